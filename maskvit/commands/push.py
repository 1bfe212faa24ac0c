"""A folder to the Hugging Face Hub: one that `convert --to huggingface` or `--to timm` wrote, or a checkpoint of ours.

    python -m maskvit push --folder DIR --repo NAME [--private]

The repository is made where it is not there. Who you are is what `hf auth login` or the variable HF_TOKEN says.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from maskvit.core.errors import add_debug, message, run_command


def library() -> ModuleType:
    """huggingface_hub. Raises ImportError that names the pip command."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hub needs huggingface_hub: pip install 'maskvit[hub]'") from error
    return huggingface_hub


def check_repo(repo: str) -> None:
    """Raise ValueError for what is no name of a repository."""
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", repo):
        raise ValueError(f"--repo is {repo!r}; give NAME, or OWNER/NAME")


@contextlib.contextmanager
def talking_to(repo: str) -> Iterator[None]:
    """What the library raises, as one line that names the repository."""
    try:
        yield
    except Exception as error:
        text = " ".join(message(error).split())
        raise RuntimeError(f"--repo is {repo!r}: {text}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where nothing could be written."""
    parser = argparse.ArgumentParser(
        prog="python -m maskvit push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, type=Path, help="all files in it and below it are written, but hidden ones")
    parser.add_argument("--repo", required=True, help="NAME (yours), or OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="a repository that is made now is for you alone")
    add_debug(parser)
    arguments = vars(parser.parse_args(argv))
    debug = arguments.pop("debug")
    return run_command(lambda: push(**arguments), debug)


def push(folder: Path, repo: str, private: bool) -> int:
    """Do what the flags say; the exit status."""
    check_repo(repo)
    if not folder.is_dir():
        raise NotADirectoryError(f"--folder is {str(folder)!r}, which is no folder")
    hidden = lambda path: any(part.startswith(".") for part in path.relative_to(folder).parts)  # noqa: E731
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not hidden(path))
    if not files:
        raise FileNotFoundError(f"--folder is {str(folder)!r}, which holds no files")
    hub = library()
    size = sum(file.stat().st_size for file in files)
    with talking_to(repo):
        made = hub.create_repo(repo, private=private, exist_ok=True)
        written = hub.upload_folder(repo_id=made.repo_id, folder_path=folder, ignore_patterns=[".*", "*/.*"])
    print(f"{len(files)} files ({size / 2**20:.1f} MiB) written to {made.repo_id}: {written.commit_url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
