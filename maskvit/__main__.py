"""`python -m maskvit COMMAND`: all commands; without one, the list of them."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

# name -> (module with `main(argv) -> exit status`, what it does, how it is used). A module is imported only when it runs.
COMMANDS = {
    "init": ("maskvit.commands.init.__main__", "write a config file for your own data, after looking at them", "DIR"),
    "data": (
        "maskvit.commands.data.__main__",
        "pack a folder of pictures (folder) or a published data set (imagenet, ...); render one (scenes); look at a config's data (check)",
        "folder --root DIR --data_dir DIR --name NAME",
    ),
    "convert": (
        "maskvit.commands.convert",
        "convert a PyTorch checkpoint; also back, and to say what a file is (convert_torch_checkpoint.py)",
        "--src FILE --dst DIR",
    ),
    "train": ("maskvit.commands.train", "train, resume or evaluate (main.py)", "--config=FILE.py --workdir=DIR"),
    "predict": (
        "maskvit.commands.predict",
        "what a fine-tuned model says of a folder of pictures: classes, maps of classes, depth",
        "--checkpoint DIR --images DIR --out DIR",
    ),
    "segment": (
        "maskvit.commands.segment.__main__",
        "class maps of new photos from a few labeled ones and a frozen encoder, on one page",
        "--checkpoint DIR --labeled DIR --images DIR --out DIR",
    ),
    "features": ("maskvit.features", "features of your own pictures", "--checkpoint DIR --images DIR --out FILE.npz"),
    "explore": (
        "maskvit.commands.explore.__main__",
        "look into a checkpoint by hand: a page on which tokens are hidden and shown",
        "--checkpoint DIR --images DIR",
    ),
    "export": (
        "maskvit.commands.export",
        "a checkpoint as one program that runs without maskvit: StableHLO, for JAX, or ONNX",
        "--checkpoint DIR --dst FILE.stablehlo",
    ),
    "push": ("maskvit.commands.push", "a folder to the Hugging Face Hub", "--folder DIR --repo NAME"),
    "pull": ("maskvit.commands.pull", "a folder from the Hugging Face Hub", "--repo NAME --dst DIR"),
    "report": (
        "maskvit.commands.report.__main__",
        "pages: attention, features, decoder, masks, guidance, compare; a table: rows",
        "attention --checkpoint DIR --images DIR --out FILE.html",
    ),
    "sweep": ("maskvit.commands.sweep.__main__", "a grid of runs, and a table of what differs", "--config FILE.py --out DIR"),
    "worth": (
        "maskvit.commands.worth.__main__",
        "whether continued pretraining helped: fine-tuned from scratch, from the import and from what continued it, on one page",
        "--config FILE.py --imported DIR --continued DIR --out DIR",
    ),
    "table": ("maskvit.commands.table", "figures of several runs side by side", "RUN [RUN ...] --figures knn/mean/top1_k20"),
    "maps": ("maskvit.commands.maps", "guidance maps of a whole data set", "--config FILE.py"),
    "bench": ("maskvit.commands.bench.__main__", "time steps, the loader, guidance or self-distillation", "step --batch 8"),
    "plan": ("maskvit.commands.plan.__main__", "what a step costs on devices that are not there", "--config FILE.py --devices h100:8"),
    "demo": ("maskvit.commands.demo.__main__", "the main job in minutes, on one page", "--workdir DIR"),
}


def listing() -> str:
    """The commands, two lines each."""
    return "\n".join(f"  {name:<10}{what}\n{'':12}python -m maskvit {name} {usage}" for name, (_, what, usage) in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or list them; the exit status is the command's, and 2 where there is none of that name."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"Each has --help.\n{listing()}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        print(f"error: python -m maskvit has no command {name!r}. What there is:\n{listing()}", file=sys.stderr)
        return 2
    if name == "train":
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in main.py: until a run listens itself, Ctrl-C ends the process at once
    module, _, _ = COMMANDS[name]
    return importlib.import_module(module).main(words[1:])


def script() -> int:
    """The console script: config files import `configs` from the folder it is started in, as they do under `python -m`."""
    sys.path.insert(0, os.getcwd())
    return main()


if __name__ == "__main__":
    sys.exit(main())
