"""Pages and tables about checkpoints, strategies and runs: `python -m maskvit report COMMAND`, one file per command."""
