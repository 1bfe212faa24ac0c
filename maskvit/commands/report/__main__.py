"""Reports.

python -m maskvit report attention --checkpoint C --images FILES_OR_FOLDER --out attention.html
python -m maskvit report features --checkpoint C --images FILES_OR_FOLDER --out features.html
python -m maskvit report rows --checkpoint C --data_dir D
python -m maskvit report decoder --checkpoint C --images FILES_OR_FOLDER --out decoder.html
python -m maskvit report compare RUN... --out compare.html
python -m maskvit report masks --config FILE --out masks.html
python -m maskvit report guidance --config FILE --out guidance.html
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from maskvit.commands.report import attention, compare, decoder, features, guidance, masks, rows
from maskvit.core.errors import add_debug, run_command

COMMANDS = {
    "attention": (attention, "heads, rollout and masks on pictures of one's own, as one HTML page"),
    "features": (features, "main components of patch features and patches like a chosen one, on pictures of one's own, as one HTML page"),
    "rows": (rows, "which attention row hides objects more, measured on data with a semantic map"),
    "decoder": (decoder, "what the decoder of a MAE or CrossMAE rebuilds after each block, and what it reads, as one HTML page"),
    "compare": (compare, "runs side by side: curves, k-NN, epochs to reach the baseline, a table with spread"),
    "masks": (masks, "what masking strategies look at and hide, on images of a config's data"),
    "guidance": (guidance, "maps as loss weights, from raw to exp(g / tau), and map sets side by side"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The commands; the exit status is 1 where something was left out, 2 where nothing could be done."""
    parser = argparse.ArgumentParser(prog="python -m maskvit report", description="Pages and tables about checkpoints and runs.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (module, words) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=words)
        module.add_arguments(subparser)
        add_debug(subparser)
    arguments = vars(parser.parse_args(argv))
    module, _ = COMMANDS[arguments.pop("command")]
    debug = arguments.pop("debug")
    return run_command(lambda: module.run(**arguments), debug)


if __name__ == "__main__":
    sys.exit(main())
