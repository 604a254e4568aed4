"""Methods that learn masks by training, one file a method; they share the loop of healing.

A method says what it does not fit (`check`), whether it `trains_weights` and which `share` of the sequences it reads;
it gives gates, the optimizer's `course` with its own part of the loss, and the task's `objective`. Its gates `attach`
themselves to a model, choose in evaluation which units stay (`chosen`, with the factors `fixed`) by how much speaks
against each (`doubt`), `settle` what had another form in training, and add what they say of themselves (`told`).
"""
