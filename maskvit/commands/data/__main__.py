"""Data sets.

python -m maskvit data folder --root DIR --data_dir D --name N
python -m maskvit data imagenet --root DIR --data_dir D
python -m maskvit data check --config FILE.py --out sheet.png
python -m maskvit data pseudolabel --root DIR --depth MODEL --semseg MODEL
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from maskvit.core.errors import add_debug, run_command
from maskvit.data.builders import __main__ as builders

# Beside the builders: name -> (module with `add_arguments` and `run`, what it does).
COMMANDS = {
    "check": ("maskvit.commands.data.check", "look at samples of all data that a config reads: a table, and a sheet of pictures"),
    "pictures": ("maskvit.commands.data.pictures", "rendered scenes as picture files: some labeled by rough strokes, the others in full"),
    "pseudolabel": ("maskvit.commands.data.pseudolabel", "estimate depth and class maps for a folder of pictures"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 1 where `check` found something wrong, 2 where nothing could be done."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] not in COMMANDS:
        return builders.main(words, "\n".join(f"  {name:<18}{what}" for name, (_, what) in COMMANDS.items()))
    name, what = COMMANDS[words[0]]
    module = importlib.import_module(name)
    parser = argparse.ArgumentParser(prog=f"python -m maskvit data {words[0]}", description=what[0].upper() + what[1:] + ".")
    module.add_arguments(parser)
    add_debug(parser)
    arguments = vars(parser.parse_args(words[1:]))
    debug = arguments.pop("debug")
    return run_command(lambda: module.run(**arguments), debug)


if __name__ == "__main__":
    sys.exit(main())
