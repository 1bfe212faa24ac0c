"""`python -m maskvit`: what there is, and `init`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = (
    ("python -m maskvit init DIR", "write a config file for your own data, after looking at them"),
    ("python -m maskvit.data.builders folder --root DIR", "pack a folder of pictures; scenes: render a data set to try things on"),
    ("python convert_torch_checkpoint.py --src FILE --dst DIR", "convert a PyTorch checkpoint; also back, and to say what a file is"),
    ("python main.py --config=FILE.py --workdir=DIR", "train, resume or evaluate"),
    ("python -m maskvit.features --checkpoint DIR --images DIR", "features of your own pictures"),
    ("python -m maskvit.commands.report COMMAND", "pages: attention, decoder, masks, guidance, compare; rows: a table"),
    ("python -m maskvit.commands.sweep --config FILE.py --out DIR", "a grid of runs, and a table of what differs"),
    ("python -m maskvit.commands.maps --config FILE.py", "guidance maps of a whole data set"),
    ("python -m maskvit.commands.bench", "time steps, the loader, guidance"),
    ("python -m maskvit.commands.demo", "the main job in minutes, on one page"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """`init`, or the list of commands; the exit status is 2 for an unknown one."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["init"]:
        from maskvit.commands.init.__main__ import main as init

        return init(words[1:])
    listed = "\n".join(f"  {start:<60}{what}" for start, what in COMMANDS)
    if words and words[0] not in ("-h", "--help"):
        print(f"error: python -m maskvit has no command {words[0]!r}. What there is:\n{listed}", file=sys.stderr)
        return 2
    print(f"Each has --help.\n{listed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
