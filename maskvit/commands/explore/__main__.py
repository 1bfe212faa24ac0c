"""Look into a checkpoint by hand: hide tokens and see what is rebuilt, what tokens attend to, which patches are alike.

    python -m maskvit explore --checkpoint C --images DIR [--port 8000]
    python -m maskvit explore --checkpoint C --images DIR --out page.html [--budgets 0.1,0.25,0.5] [--strategies random,block]

The first serves a page on this machine; the second writes one with everything in it, which needs no server. DIR holds pictures of the
checkpoint's first input, or a folder per modality (DIR/rgb, DIR/depth, ...) with files of one name.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from maskvit.commands.explore.answers import Explorer, stored_answers
from maskvit.commands.explore.page import explore_page
from maskvit.commands.explore.samples import find_samples
from maskvit.commands.explore.server import Server
from maskvit.commands.report.files import write
from maskvit.core.arguments import check_output, number
from maskvit.core.errors import add_debug, log_lines, run_command
from maskvit.features import load
from maskvit.masking.scores import SCORES

BUDGETS, STRATEGIES = (0.1, 0.25, 0.5), ("random", "attention_high", "attention_low")


def shares(text: str) -> tuple[float, ...]:
    """An argparse type: shares above 0 and at most 1, with commas between them."""
    return tuple(dict.fromkeys(sorted(number(0, 1)(part) for part in text.split(","))))


def strategies(text: str) -> tuple[str, ...]:
    """An argparse type: names of strategies, with commas between them."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in SCORES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no strategy; known: {', '.join(SCORES)}")
    return names


def port(text: str) -> int:
    """An argparse type: a port's number, 0 for any that is free."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 1 to 65535, or 0 for any that is free")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 0 after Ctrl-C, too: that is how a server ends."""
    parser = argparse.ArgumentParser(
        prog="python -m maskvit explore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, its checkpoints directory, or one step's directory")
    parser.add_argument("--images", required=True, type=Path, help="folder of pictures, or of one folder per modality")
    parser.add_argument("--port", type=port, default=None, help="of the server, on this machine (8000); 0 for any that is free")
    parser.add_argument("--out", type=Path, default=None, help="HTML file to write in place of serving the page")
    parser.add_argument("--budgets", type=shares, default=None, help="with --out: shares of the tokens shown (0.1,0.25,0.5)")
    parser.add_argument("--strategies", type=strategies, default=None, help=f"with --out: which are computed ({','.join(STRATEGIES)})")
    parser.add_argument("--crop", type=number(0, 1), default=0.875, help="image side over the side of the resized picture it is cut from")
    add_debug(parser)
    arguments = vars(parser.parse_args(argv))
    debug = arguments.pop("debug")
    log_lines(debug)
    return run_command(lambda: explore(**arguments), debug)


def explore(
    checkpoint: str, images: Path, port: int | None, out: Path | None, budgets: Sequence[float] | None, strategies: Sequence[str] | None,
    crop: float,
) -> int:  # fmt: skip
    """Do what the flags say; the exit status."""
    if out is None:
        for flag, value in (("--budgets", budgets), ("--strategies", strategies)):
            if value is not None:
                raise ValueError(f"{flag} is of a page that is written: give --out FILE too, or leave it out")
    elif port is not None:
        raise ValueError("--port is of the server and --out writes a page instead: give one of them")
    if not images.exists():
        raise FileNotFoundError(f"--images is {str(images)!r}, which does not exist: give a folder of pictures")
    if out is not None:
        check_output(out)
        return write_page(checkpoint, images, out, budgets or BUDGETS, strategies or STRATEGIES, crop)
    with Server(8000 if port is None else port) as server:  # a port that is taken is told before the work
        serve(server, checkpoint, images, crop)
    return 0


def open_explorer(checkpoint: str, images: Path, crop: float) -> Explorer:
    """The checkpoint and the samples, looked at once."""
    loaded = load(checkpoint)
    tasks = find_samples(images, loaded.model)
    return Explorer(loaded, tasks, str(checkpoint), crop)


def first_click(explorer: Explorer) -> float:
    """Have what every click needs compiled, by doing it; the seconds that a click takes from then on, 0 without a decoder."""
    start, first = explorer.about()["start"], next(iter(explorer.readable()))
    masked = explorer.draw(first, start["strategy"], start["budget"], start["visible"], 0)["masked"]
    if explorer.cannot_rebuild:
        return 0.0
    explorer.rebuild(first, masked)
    began = time.perf_counter()
    explorer.rebuild(first, masked)
    return time.perf_counter() - began


def other_choices(explorer: Explorer, ended: threading.Event) -> None:
    """Have the other strategies and budgets compiled while the page is looked at, until `ended`."""
    about, first = explorer.about(), next(iter(explorer.readable()))
    start = about["start"]
    choices = [(name, start["budget"]) for name in explorer.strategies] + [(start["strategy"], budget) for budget in about["budgets"]]
    for strategy, budget in choices:
        if ended.is_set():
            return
        explorer.draw(first, strategy, budget, start["visible"], 0)


def serve(server: Server, checkpoint: str, images: Path, crop: float) -> None:
    """Answer until Ctrl-C."""
    server.explorer = open_explorer(checkpoint, images, crop)
    seconds = first_click(server.explorer)
    server.page = explore_page(server.explorer.about())
    click = f"; a click takes {1000 * seconds:.0f} ms" if seconds else ""
    print(f"{len(server.explorer.tasks)} picture(s) at {server.address}{click}. Ctrl-C ends it.", flush=True)
    ended = threading.Event()
    beside = threading.Thread(target=other_choices, args=(server.explorer, ended))
    beside.start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        ended.set()
        beside.join()


def write_page(checkpoint: str, images: Path, out: Path, budgets: Sequence[float], strategies: Sequence[str], crop: float) -> int:
    """Write the page that needs no server; 1 where a sample could not be read."""
    explorer = open_explorer(checkpoint, images, crop)
    stored = stored_answers(explorer, budgets, strategies)
    text = explore_page(explorer.about(), stored)
    write(out, text)
    left_out = {one["name"]: one["problem"] for one in stored["samples"] if "problem" in one}
    print(f"{len(explorer.tasks) - len(left_out)} picture(s) in {out}, {len(text.encode()) / 1e6:.1f} MB")
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
