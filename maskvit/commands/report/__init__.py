"""Pages and tables about checkpoints, strategies and runs: `python -m maskvit.commands.report COMMAND`, one file per command."""
