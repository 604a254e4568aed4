"""A recipe from start to end: `make_plan` chooses, `run` also cuts, measures, exports and reports."""

from prunekit.pipeline.carry_out import Result as Result
from prunekit.pipeline.carry_out import run as run
from prunekit.pipeline.choose import Made as Made
from prunekit.pipeline.choose import make_plan as make_plan
from prunekit.pipeline.heal_folder import heal_folder as heal_folder
from prunekit.pipeline.heal_folder import heal_recipe as heal_recipe
from prunekit.pipeline.reproduction import Reproduction as Reproduction
from prunekit.pipeline.reproduction import reproduce as reproduce
