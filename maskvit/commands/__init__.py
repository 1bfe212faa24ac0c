"""The commands of `python -m maskvit COMMAND`, one file or folder each."""
