"""A folder from the Hugging Face Hub; what to do with it, `convert` says.

python -m maskvit pull --repo NAME --dst DIR
python -m maskvit convert --src DIR --dst checkpoints/x
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from maskvit.commands.push import check_repo, library, talking_to
from maskvit.core.arguments import make_folder
from maskvit.core.errors import add_debug, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where nothing could be read."""
    parser = argparse.ArgumentParser(
        prog="python -m maskvit pull", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repo", required=True, help="OWNER/NAME")
    parser.add_argument("--dst", required=True, type=Path, help="folder to write to: a new or empty one, or that of an earlier pull")
    parser.add_argument("--revision", help="a branch, a tag or a commit (the main branch)")
    add_debug(parser)
    arguments = vars(parser.parse_args(argv))
    debug = arguments.pop("debug")
    return run_command(lambda: pull(**arguments), debug)


def pull(repo: str, dst: Path, revision: str | None) -> int:
    """Do what the flags say; the exit status."""
    check_repo(repo)
    begun = (dst / ".cache" / "huggingface").is_dir()  # by an earlier pull, which the library goes on with
    if dst.exists() and not begun and not (dst.is_dir() and not any(dst.iterdir())):
        raise FileExistsError(f"--dst is {str(dst)!r}, which is there already: give a new folder")
    hub = library()
    make_folder(dst, "--dst")
    with talking_to(repo):
        hub.snapshot_download(repo, local_dir=dst, revision=revision)
    files = [path for path in dst.rglob("*") if path.is_file() and not path.relative_to(dst).parts[0].startswith(".")]
    print(f"{len(files)} files of {repo} written to {dst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
