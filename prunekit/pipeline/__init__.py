"""A recipe from start to end: `make_plan` chooses, `run` also cuts, measures, exports and reports."""

from prunekit.pipeline.choose import Made as Made
from prunekit.pipeline.choose import make_plan as make_plan
from prunekit.pipeline.run import Result as Result
from prunekit.pipeline.run import run as run
