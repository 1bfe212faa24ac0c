"""`python -m maskvit.data.builders scenes|folder ...`: prepare a data set."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Mapping
from typing import Any

from maskvit import modalities as known
from maskvit.data.builders import prepare

DECLARED: dict[str, Mapping[str, Any]] = {"rgb": known.RGB, "depth": known.DEPTH, "semseg": known.SEMSEG}


def parse_modality(text: str) -> tuple[str, dict[str, Any]]:
    """Turn "depth,missing=0,metres_per_count=1/1000" into (name, fields); rgb, depth and semseg start from their declarations."""
    name, *settings = text.split(",")
    fields = dict(DECLARED.get(name, {}))
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--modalities {text}: {setting!r} is not field=value")
        try:
            top, slash, bottom = value.partition("/")
            fields[key] = float(top) / float(bottom) if slash else ast.literal_eval(value)
        except (ValueError, SyntaxError, ZeroDivisionError):
            fields[key] = value  # a word: kind=categorical
    return name, fields


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m maskvit.data.builders", description="Prepare a data set as TFDS array_record files.")
    commands = parser.add_subparsers(dest="builder", required=True)
    scenes = commands.add_parser("scenes", help="render the embedded data")
    scenes.add_argument("--name", default=argparse.SUPPRESS)
    for name in ("num_train", "num_val", "size", "seed"):
        scenes.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    folder = commands.add_parser("folder", help='pack <root>/[<split>/]<modality>/<class or "all">/<file>')
    folder.add_argument("--root", required=True)
    folder.add_argument("--name", required=True)
    folder.add_argument(
        "--modalities",
        nargs="+",
        default=["rgb", "depth", "semseg"],
        metavar="NAME[,FIELD=VALUE...]",
        help="folders to read and what they hold: rgb depth,missing=0,metres_per_count=1/1000 semseg,num_classes=40 "
        "normals,channels=3 (fields: maskvit.modalities.Modality)",
    )
    folder.add_argument("--val_fraction", type=float, default=argparse.SUPPRESS)
    folder.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    folder.add_argument("--allow_missing", nargs="+", default=argparse.SUPPRESS, metavar="NAME")
    folder.add_argument("--short_side", type=int, default=argparse.SUPPRESS)
    for command in (scenes, folder):
        command.add_argument("--data_dir", required=True)
        command.add_argument("--workers", type=int, default=argparse.SUPPRESS, help="processes; 0 does all in this one")
    settings = vars(parser.parse_args(arguments))
    try:
        if "modalities" in settings:
            settings["modalities"] = known.parse_modalities(dict(map(parse_modality, settings["modalities"])))
        prepare(**settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
