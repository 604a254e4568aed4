"""`optimum-cli prune`: hands over to `prunekit prune`, with its options, help and exit codes.

optimum finds this file by its folder. No folder on the way may have an `__init__.py`: they merge with optimum's own.
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class PruneCommand(BaseOptimumCLICommand):
    """Structured pruning by a prunekit recipe."""

    COMMAND = CommandInfo(name="prune", help="Prune a model by a prunekit recipe; same options as `prunekit prune`.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Leaves everything after `prune` to prunekit, `--help` too.

        argparse would keep a leading option for itself, so no argument may look like an option to it.
        """
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        """Runs `prunekit prune` with the same arguments and leaves with its exit code."""
        from prunekit.cli.main import main

        raise SystemExit(main(["prune", *self.args.arguments]))


REGISTER_COMMANDS = [PruneCommand]
