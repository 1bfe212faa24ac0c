"""`python -m maskvit init DIR`: a config file for one's own data, after looking at them.

DIR is a folder of pictures, <root>/[<split>/]<modality>/<class or "all">/<file>, a folder of class folders of photos, or a
prepared data set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from maskvit.commands.init.found import look_at
from maskvit.commands.init.recipe import recipe
from maskvit.commands.init.write import config_text
from maskvit.core.arguments import check_output, whole
from maskvit.core.config_files import get_value, load_config
from maskvit.core.errors import add_debug, run_command
from maskvit.data.builders.__main__ import parse_fields
from maskvit.training.config import check_config


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where no config could be written."""
    parser = argparse.ArgumentParser(
        prog="python -m maskvit init", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIR", help="the data; nothing in it is changed")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.py", help="the config file to write (NAME.py)")
    parser.add_argument("--data_dir", default="data", help="where data sets are packed: config.data.train.data_dir (data)")
    parser.add_argument("--name", default=None, help="name of the packed data set; of the folder unless given")
    parser.add_argument(
        "--modality", action="append", default=[], metavar="NAME,FIELD=VALUE...",
        help="what files cannot say: depth,metres_per_count=1/1000,missing=0 or parts,kind=categorical,num_classes=7; repeatable",
    )  # fmt: skip
    parser.add_argument("--checkpoint", default=None, help="a converted checkpoint or a run to continue from")
    parser.add_argument("--image_size", type=whole(), default=None, help="side of the images the model sees; of the pictures unless given")
    parser.add_argument("--force", action="store_true", help="replace the file where it is there already")
    add_debug(parser)
    options = parser.parse_args(argv)
    return run_command(lambda: init(options), options.debug)


def init(options: argparse.Namespace) -> None:
    """Look, decide, write, and say what was found, assumed and chosen."""
    if options.name is not None and not options.name.isidentifier():
        raise ValueError(f"--name is {options.name!r}; use letters, digits and underscores, beginning with a letter")
    data = look_at(options.directory, options.data_dir, options.name, dict(parse_fields(text) for text in options.modality))
    chosen = recipe(data, options.checkpoint, options.image_size)
    check_config(chosen.config)
    out = options.out or Path(f"{data.source.get('name') or Path(options.directory).resolve().name}.py")
    check_output(out)
    if out.exists() and not options.force:
        raise FileExistsError(f"{out} is there already: give another --out, or --force to replace it")
    out.write_text(config_text(chosen, data, options.directory, str(out)), encoding="utf-8")
    load_config(str(out))
    print("Found")
    for line in data.found:
        print(f"  {line}")
    if data.assumed:
        print("Assumed")
        for line in data.assumed:
            print(f"  {line}")
    print("Chosen")
    for key, reason in chosen.reasons.items():
        value = get_value(chosen.config, key)
        print(f"  config.{key}" + ("" if isinstance(value, dict) else f" = {value!r}") + f": {reason}")
    print(f"Written to {out}. Next:")
    for command in (*data.commands, f"python -m maskvit train --config={out} --workdir=runs/{out.stem}"):
        print(f"  {command}")


if __name__ == "__main__":
    sys.exit(main())
