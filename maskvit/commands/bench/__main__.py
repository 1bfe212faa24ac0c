"""The command; see the package's text."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskvit.commands.bench import distillation, guidance, loader, step
from maskvit.commands.bench.timing import limit_cpu_threads, machine
from maskvit.core.arguments import make_folder, whole
from maskvit.core.errors import add_debug, run_command


def comma_list(kind: Callable[[str], Any], known: Sequence[Any] | None = None) -> Callable[[str], list[Any]]:
    """An argparse type: "a,b" to a list, each item converted and among `known`."""

    def parse(text: str) -> list[Any]:
        items = [kind(item) for item in text.split(",")]
        for item in items:
            if known is not None and item not in known:
                raise argparse.ArgumentTypeError(f"{item!r} is not one of {', '.join(map(str, known))}")
        return items

    return parse


def make_parser() -> argparse.ArgumentParser:
    """All that can be asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m maskvit bench", description="Times steps, the input pipeline, cheap guidance, or self-distillation."
    )
    parser.add_argument("what", nargs="?", choices=("step", "loader", "guidance", "distillation"), default="step")
    parser.add_argument("--batch", type=comma_list(whole()), default=[8], help="images per step over all devices; 64,256 times both")
    parser.add_argument("--image", type=whole(), default=224, help="side of the square image")
    parser.add_argument("--steps", type=whole(), default=5, help="timed rounds (loader: batches)")
    parser.add_argument("--cpu-threads", type=whole(0), default=0, help="keep to this many cores (0: all)")
    timed = parser.add_argument_group("step, guidance and distillation")
    timed.add_argument("--size", choices=step.SIZES, default="B")
    timed.add_argument("--dtype", type=comma_list(str, step.DTYPES), default=["float32"], help="compute types; float32,bfloat16 times both")
    timed.add_argument("--warmup", type=whole(0), default=2, help="untimed rounds")
    timed.add_argument("--compare", choices=("objectives",), help="step: MAE against CrossMAE (kept 0.25), not MultiMAE's steps")
    timed.add_argument("--reference", type=Path, metavar="DIR", help="step: time the PyTorch MultiMAE of this checkout too (needs torch)")
    timed.add_argument("--no-torch", action="store_true", help="step: leave torch out even where it is installed")
    data = parser.add_argument_group("loader")
    data.add_argument("--data-dir", help="the folder of the prepared data set")
    data.add_argument("--name", default="scenes", help="its TFDS name")
    data.add_argument("--split", default="train")
    data.add_argument("--workers", type=whole(0), default=0, help="worker processes")
    data.add_argument("--resize", choices=("pil", "cv2"), default="pil", help="as config.data.augment.resize")
    cheap = parser.add_argument_group("guidance")
    cheap.add_argument("--only", type=comma_list(str), default=[], help="options whose names contain one of these words")
    cheap.add_argument("--no-time", action="store_true", help="agreement alone")
    cheap.add_argument("--scenes", default="", metavar="FILE", help="agreement on rendered scenes: random weights, and this PyTorch file's")
    cheap.add_argument("--checkpoint", help="measure agreement with this checkpoint, on --images")
    cheap.add_argument("--images", help="folder of pictures that agreement is measured on")
    cheap.add_argument("--learn-from", help="folder of other pictures, which predictors are fitted on")
    cheap.add_argument("--out", type=Path, help="folder for guidance_cost.jsonl and guidance_cost.svg")
    add_debug(parser)
    return parser


def show(record: Mapping[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps({key: round(value, 6) if isinstance(value, float) else value for key, value in record.items()}), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where nothing could be measured."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.what == "loader" and not options.data_dir:
        parser.error("loader needs --data-dir, where the data set was prepared")
    if options.reference and (options.what != "step" or options.compare):
        parser.error("--reference is timed beside MultiMAE's steps: leave it out, or give `step` without --compare")
    if options.what == "guidance" and options.checkpoint and not (options.images and options.learn_from):
        parser.error("--checkpoint needs --images and --learn-from: two folders of pictures, none of them in both")
    return run_command(lambda: bench(options), options.debug)


def bench(options: argparse.Namespace) -> None:
    """Measure what was asked for."""
    if options.out:
        make_folder(options.out)
    if options.cpu_threads:
        limit_cpu_threads(options.cpu_threads)
    # Torch shares the GPU: memory is taken as needed, not three quarters of it at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.what == "loader":
        for batch in options.batch:
            data = (options.name, options.data_dir, options.split, options.image)
            show(loader.bench_loader(*data, batch, options.steps, options.workers, options.resize))
        return
    show(machine())
    times = dict(steps=options.steps, warmup=options.warmup)
    if options.what == "guidance":
        timed = None
        if not options.no_time:
            timed = dict(size=options.size, batch=options.batch[0], image=options.image, dtype=options.dtype[0], **times)
        records = guidance.bench_guidance(
            timed, options.only, options.scenes, options.checkpoint, options.images, options.learn_from, show=show
        )
        print(guidance.table(records), file=sys.stderr, flush=True)
        if options.out:
            guidance.write(options.out, [machine(), *records])
        return
    if options.what == "distillation":
        for dtype in options.dtype:
            for batch in options.batch:
                for record in distillation.bench_distillation(options.size, batch=batch, image=options.image, dtype=dtype, **times):
                    show(record)
                    print(step.table_row(record), file=sys.stderr, flush=True)
        return
    if options.reference:  # before anything is compiled
        from maskvit.convert.checkout import import_reference

        import_reference(options.reference)
    with_torch = not options.no_torch and importlib.util.find_spec("torch") is not None
    for dtype in options.dtype:
        for batch in options.batch:
            sizes = dict(batch=batch, image=options.image, dtype=dtype, **times)
            if options.compare == "objectives":
                records = step.bench_objectives(options.size, **sizes)
            else:
                records = step.bench_step(options.size, with_torch=with_torch, reference=options.reference, **sizes)
            for record in records:
                show(record)
                print(step.table_row(record), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
