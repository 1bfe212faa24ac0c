"""What a config's train step would cost on GPUs and TPUs that are not there.

    python -m maskvit plan --config FILE.py --devices h100:8,v5e:4x4 [--batch 256,512] [--grid objective.encoder=S,B,L]

Compiles the real step, with the real shardings, for every device and batch that is named, and reads the optimized program. Memory is the
compiler's own account. The floor is a sum over kernels: each takes its bytes at 85 % of the memory's rate, its FLOPs at 78 % of the dense
bfloat16 peak, or two microseconds, whichever is longest. It is computed, not measured. A real device is slower where kernels are chosen
badly, where it waits for data, and where nothing overlaps; it may be faster where its caches keep what one kernel leaves for the next.

--json writes a line per plan, and --against compares with such a file. For GPUs JAX's CUDA plugin must be installed and for TPUs libtpu;
neither needs a driver.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskvit.core.arguments import make_folder, whole
from maskvit.core.errors import add_debug, run_command

IMAGENET = 1_281_167


def parser() -> argparse.ArgumentParser:
    """All that can be asked for."""
    p = argparse.ArgumentParser(prog="python -m maskvit plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True, help="config file of a run; FILE.py:ARGUMENT as for train")
    p.add_argument("--devices", type=_list, default=["h100"], help="a100, h100, h200 with :NUMBER; v5e, v5p, v6e with :TOPOLOGY; cpu")
    p.add_argument("--batch", type=_numbers, default=[], help="global batches in place of the config's; a list")
    p.add_argument("--micro-batches", type=whole(), default=1, help="parts that a batch is processed in")
    p.add_argument("--grid", action="append", default=[], metavar="KEY=A,B", help="a dotted config key and its values; repeatable")
    p.add_argument(
        "--growth", action="store_true",
        help="plan the config at other batches, image sizes, inputs and model sizes, measure starts with up to 10 million records on this "
        "machine, and draw all of it (needs --out)",
    )  # fmt: skip
    p.add_argument("--num-records", type=whole(), default=IMAGENET, help="size of the training data (ImageNet-1K's unless given)")
    p.add_argument("--top", type=whole(0), default=0, help="list so many kernels, the longest first")
    p.add_argument("--json", type=Path, metavar="FILE", help="append a line per plan to this file")
    p.add_argument("--against", type=Path, metavar="FILE", help="compare with the lines of this file, and say what got worse")
    p.add_argument("--out", type=Path, metavar="DIR", help="save the optimized programs there, and a plot where there are several plans")
    add_debug(p)
    return p


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _numbers(text: str) -> list[int]:
    return [whole()(part) for part in _list(text)]


def plan(
    config: str, devices: Sequence[str], batch: Sequence[int], micro_batches: int, grid: Sequence[str], growth: bool, num_records: int,
    top: int, json: Path | None, against: Path | None, out: Path | None,
) -> int:  # fmt: skip
    """Compile and report every combination; 1 where something got worse than `against`."""
    from maskvit.commands.plan import report
    from maskvit.commands.plan.devices import parse_devices
    from maskvit.commands.sweep.cells import Experiment, make_cells, overrides, parse_grid
    from maskvit.core.config_files import load_config
    from maskvit.training.config import check_config, experiment

    wanted = [parse_devices(text) for text in devices]
    plain = load_config(config).copy_and_resolve_references().to_dict()
    check_config(plain)
    if growth:
        if out is None or len(wanted) > 1 or len(batch) > 1 or grid or against:
            raise ValueError("--growth needs --out, and takes one entry of --devices, one of --batch, and neither --grid nor --against")
        make_folder(out)
        sized = {**plain, "global_batch": (batch or [plain["global_batch"]])[0]}
        return grow(sized, config, *wanted[0], micro_batches, num_records, json, out)
    cells = {"": {}} if not grid else make_cells(Experiment(plain, {}), [parse_grid(text, plain) for text in grid])
    before = report.read_lines(against) if against else []
    if out:
        make_folder(out)
    records = []
    for cell, changes in cells.items():
        for size in batch or [plain["global_batch"]]:
            changed = {**overrides(plain, changes, "--grid"), "global_batch": size}
            check_config(changed)
            whole_config = experiment(**changed)
            for name, count in wanted:
                head = dict(config=config, cell=cell, devices=f"{name}:{count}", batch=size)
                record, text = report.one(head, whole_config, name, count, num_records, micro_batches, top)
                records.append(record)
                if json:
                    report.append_line(json, record)
                if out:
                    label = "_".join(str(part) for part in (cell, name, count, size) if part).replace("/", "-")
                    (out / f"{label}.txt").write_text(text)
    if len(records) > 1:
        print(report.table(records))
        if out:
            report.draw(records, out / "plan.svg")
            print(f"plot: {out / 'plan.svg'}")
    return report.compare(records, before) if against else 0


def grow(
    plain: dict[str, Any], config: str, name: str, count: str, micro_batches: int, num_records: int, json: Path | None, out: Path
) -> int:
    """Plan the points of `growth.studies`, measure starts, and write growth.svg."""
    from maskvit.commands.plan import growth, report
    from maskvit.training.config import check_config, experiment

    def one(cell: str, changed: dict[str, Any]) -> dict[str, Any]:
        check_config(changed)
        head = dict(config=config, cell=cell, devices=f"{name}:{count}", batch=changed["global_batch"])
        record, _ = report.one(head, experiment(**changed), name, count, num_records, micro_batches, 0)
        if json:
            report.append_line(json, record)
        return record

    result = growth.grown(plain, one)
    print(growth.table(result))
    growth.draw(result, (), out / "growth.svg")  # what took minutes is there before anything else can fail
    growth.draw(result, growth.starts(), out / "growth.svg")
    print(f"plot: {out / 'growth.svg'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where nothing could be done, 1 where something got worse than --against."""
    arguments: Mapping[str, Any] = vars(parser().parse_args(argv))
    if "jax" not in sys.modules:  # this machine's own devices are not looked at; a TPU plugin would wait for a TPU
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the plugins say for every plan that there is no driver
    options = {key: value for key, value in arguments.items() if key != "debug"}
    return run_command(lambda: plan(**options), arguments["debug"])


if __name__ == "__main__":
    sys.exit(main())
