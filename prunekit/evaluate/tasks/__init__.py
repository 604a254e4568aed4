"""What can be measured: one file a task, its class has the file's name, its fields are the task's options."""
