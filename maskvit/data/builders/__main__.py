"""`python -m maskvit data NAME ...`: prepare a data set."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Mapping
from typing import Any

from maskvit.core import modalities as known
from maskvit.core.errors import add_debug, run_command
from maskvit.data.builders import ARCHIVES, prepare
from maskvit.data.sources import STATED

DECLARED: dict[str, Mapping[str, Any]] = {"rgb": known.RGB, "depth": known.DEPTH, "semseg": known.SEMSEG}

LAYOUT = """
Pack a folder of pictures:

    <root>/<modality>/<class>/<file>           <class> is "all" where there are no classes
    <root>/<split>/<modality>/<class>/<file>   with splits: train, val, ...

Files of one sample have one class and one name in all modalities; their suffixes may differ. Pictures are JPEG, PNG, TIFF, WebP,
BMP, GIF, PNM and AVIF files, arrays .npy or .npz with one array. Everything that is wrong is told as one list before anything is
kept; what is passed over (hidden files, other suffixes) is counted and named. docs/data.md says what is read as what.
"""

EXAMPLES = """
examples of --modalities:
  rgb                                             pictures of 3 channels and 8 bits
  depth,metres_per_count=1/1000,missing=0         16-bit PNG in millimeters, 0 where nothing was measured; .npy and float .tif hold meters
  semseg,num_classes=40,missing=255               class ids 0 ... 39, 255 = no label; PNG or other files without loss in one channel
  normals,channels=3                              any other name: kind=continuous, channels=3 unless stated
  parts,kind=categorical,num_classes=7
"""


def parse_modality(text: str) -> tuple[str, dict[str, Any]]:
    """Turn "depth,missing=0,metres_per_count=1/1000" into (name, fields); rgb, depth and semseg start from their declarations.

    Raises ValueError for text that is not of that form and for fields that a builder does not know.
    """
    name, given = parse_fields(text)
    fields = {key: value for key, value in DECLARED.get(name, {}).items() if key in (*STATED, "loss")} | given
    fields["loss"] = known.LOSSES.get(fields.get("kind", "continuous"), ("mse",))[0]
    return name, fields


def parse_fields(text: str) -> tuple[str, dict[str, Any]]:
    """The name, and the fields that the text itself states. Raises ValueError as `parse_modality`."""
    name, *settings = text.split(",")
    fields: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in STATED:
            raise ValueError(f"--modalities {text}: {setting!r} is not FIELD=VALUE with one of the fields {', '.join(STATED)}")
        try:
            top, slash, bottom = value.partition("/")
            fields[key] = float(top) / float(bottom) if slash else ast.literal_eval(value)
        except (ValueError, SyntaxError, ZeroDivisionError) as error:
            if key != "kind":
                raise ValueError(f"--modalities {text}: {key} is {value!r}; write a number, a fraction such as 1/1000, or None") from error
            fields[key] = value
    return name, fields


def parse_modalities(texts: list[str]) -> tuple[dict[str, known.Modality], list[str]]:
    """The modalities of `--modalities`, and those whose `metres_per_count` is a default. Raises ValueError for one named twice."""
    parsed = [parse_modality(text) for text in texts]
    names = [name for name, _ in parsed]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--modalities names {twice[0]!r} twice: write all its fields behind one name, separated by commas")
    specs = known.parse_modalities(dict(parsed))
    assumed = [text.split(",")[0] for text in texts if "metres_per_count=" not in text]
    return specs, [name for name in assumed if specs[name].metres_per_count]


def parser(others: str = "") -> argparse.ArgumentParser:
    """The command line; `others`: lines of the help on commands beside the builders."""
    suppress: Any = argparse.SUPPRESS
    top = argparse.ArgumentParser(
        prog="python -m maskvit data", description="Prepare a data set as TFDS array_record files.",
        epilog=others and f"besides:\n{others}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(dest="builder", required=True)
    scenes = commands.add_parser("scenes", help="render the embedded data", description="Render scenes: rgb, depth, semseg and a class.")
    scenes.add_argument("--name", default=suppress, help="folder below --data_dir (scenes)")
    scenes.add_argument("--num_train", type=int, default=suppress, help="scenes of the split train (3000)")
    scenes.add_argument("--num_val", type=int, default=suppress, help="scenes of the split val (500)")
    scenes.add_argument("--size", type=int, default=suppress, help="pixels per side (64)")
    scenes.add_argument("--seed", type=int, default=suppress, help="which scenes (0)")
    folder = commands.add_parser(
        "folder", help='pack <root>/[<split>/]<modality>/<class or "all">/<file>', description=LAYOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    folder.add_argument("--root", required=True, help="the folder to pack; nothing in it is changed")
    folder.add_argument("--name", required=True, help="name of the data set, a folder below --data_dir: config.data.train.name")
    folder.add_argument(
        "--modalities", nargs="+", default=["rgb", "depth", "semseg"], metavar="NAME[,FIELD=VALUE...]",
        help=f"folders to read and what they hold; fields: {', '.join(STATED)} (rgb depth semseg)",
    )  # fmt: skip
    folder.add_argument(
        "--val_fraction", type=float, default=suppress, metavar="SHARE",
        help="share of the samples that becomes the split val, where the folder has no splits (0)",
    )  # fmt: skip
    folder.add_argument("--seed", type=int, default=suppress, help="which samples --val_fraction takes (0)")
    folder.add_argument(
        "--allow_missing", nargs="+", default=suppress, metavar="NAME", help="modalities that samples may lack; else that is an error"
    )
    folder.add_argument(
        "--labels", default=suppress, metavar="FILE",
        help="CSV (first line: file,class) or JSON lines with the class of each file, in place of class folders",
    )  # fmt: skip
    folder.add_argument(
        "--class_names", default=suppress, metavar="FILE", help="the classes in the order of their labels, one name a line (sorted)"
    )
    folder.add_argument(
        "--pixel_classes", nargs="+", default=suppress, metavar="NAME=FILE",
        help="names of the class ids of a modality in their order, one a line, such as semseg=names.txt",
    )  # fmt: skip
    archives = [_archive(commands, name) for name in ARCHIVES]
    for command in (folder, *archives):
        command.add_argument(
            "--short_side", type=int, default=suppress, metavar="PIXELS",
            help="make larger pictures smaller, to so many pixels on the shorter side (JPEG stays JPEG, of quality 95)",
        )  # fmt: skip
        command.add_argument("--skip_bad", action="store_true", default=suppress, help="leave out samples with a problem and list them")
    for command in (scenes, folder, *archives):
        command.add_argument("--data_dir", required=True, help="where data sets lie: config.data.train.data_dir")
        command.add_argument("--workers", type=int, default=suppress, help="processes that read and encode; 0 does it in this one (0)")
        add_debug(command)
    return top


def parse_pixel_classes(texts: list[str]) -> dict[str, str]:
    """Turn "semseg=names.txt" into {"semseg": "names.txt"}. Raises ValueError for text that is not of that form, or a name given twice."""
    pairs = [text.partition("=") for text in texts]
    found = {name: file for name, _, file in pairs}
    if wrong := [text for text, (name, _, file) in zip(texts, pairs, strict=True) if not name or not file]:
        raise ValueError(f"--pixel_classes {wrong[0]} is not NAME=FILE, such as semseg=names.txt")
    if len(found) < len(texts):
        raise ValueError("--pixel_classes names a modality twice")
    return found


def _archive(commands: Any, name: str) -> argparse.ArgumentParser:
    """The command of a published archive."""
    suppress: Any = argparse.SUPPRESS
    archive = ARCHIVES[name]
    text = f"Pack {archive.what} from its extracted archive: <root>/ holds {archive.layout}. docs/data_sets.md says more."
    command: argparse.ArgumentParser = commands.add_parser(name, help=f"pack {archive.what}", description=text)
    command.add_argument("--root", required=True, help="the folder of the extracted archive; nothing in it is changed")
    command.add_argument("--name", default=suppress, help=f"folder below --data_dir ({name})")
    for option, settings in archive.options.items():
        command.add_argument(f"--{option}", **{"default": suppress, **settings})
    return command


def main(arguments: list[str] | None = None, others: str = "") -> int:
    """Run the command; returns the exit status. `others` as of `parser`."""
    settings = vars(parser(others).parse_args(arguments))

    def command() -> None:
        if "modalities" in settings:
            settings["modalities"], settings["assumed"] = parse_modalities(settings["modalities"])
        if "pixel_classes" in settings:
            settings["pixel_classes"] = parse_pixel_classes(settings["pixel_classes"])
        prepare(**settings)

    return run_command(command, settings.pop("debug"))


if __name__ == "__main__":
    sys.exit(main())
