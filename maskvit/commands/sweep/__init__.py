"""A grid of runs in one process, and a table of what came of it: `python -m maskvit sweep`."""
