"""Plans as lines of JSON, text for the eye, a table, a plot, and a comparison with earlier ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskvit.commands.plan import program, step
from maskvit.commands.plan.devices import COMPILER_OPTIONS, DEVICES, make_devices

# What a plan's line holds that a later one should not exceed.
COMPARED = ("floor_ms", "gb_moved", "kernels", "state_gb", "temporary_gb")
TOLERANCE = 1.005


def one(
    head: Mapping[str, Any], config: Mapping[str, Any], name: str, count: str, records: int, micro_batches: int, top: int
) -> tuple[dict[str, Any], str]:
    """Compile one plan and print it; its record, and the program."""
    device, devices = DEVICES[name], make_devices(name, count)
    capability = None if device.gpu is None else float("{}.{}".format(*device.gpu["capability"]))
    compiled = step.compile_step(
        config, devices, COMPILER_OPTIONS[device.platform], capability=capability, memory=device.memory, records=records,
        micro_batches=micro_batches,
    )  # fmt: skip
    rows = program.kernels(program.parse(compiled.text))
    floor = program.least_seconds(rows, device)
    sent = program.collectives(rows)
    per_device, memory = config["global_batch"] / len(devices), compiled.memory
    record = {
        **head,
        "floor_ms": 1e3 * floor,
        "images_per_s": config["global_batch"] / floor,
        "share_of_peak": compiled.flops * per_device / floor / device.peak,
        "gb_moved": sum(row.times * row.bytes for row in rows) / 1e9,
        "kernels": sum(row.times for row in rows),
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "fits": memory.argument_size_in_bytes + memory.temp_size_in_bytes < device.memory,
        "collectives": {kind: [times, size / 1e9] for kind, (times, size) in sent.items()},
        "link_ms": 1e3 * sum(size for _, size in sent.values()) / device.link,
        "gflop_per_image": compiled.flops / 1e9,
        "days_per_100_epochs": 100 * records * floor / config["global_batch"] / 86400,
        "parameters": compiled.parameters,
        "attention": compiled.attention,
        "compile_s": compiled.seconds,
    }
    print(text_of(record, rows, device, compiled, top), flush=True)
    return record, compiled.text


def text_of(record: Mapping[str, Any], rows: Sequence[program.Kernel], device: Any, compiled: step.Compiled, top: int) -> str:
    """One plan for the eye."""
    r = record
    lines = [
        f"{name_of(r)}: compiled in {r['compile_s']:.0f} s, {compiled.attention} attention, {compiled.parameters / 1e6:.1f} M parameters",
        f"memory per device: state and batch {r['state_gb']:.2f}, temporaries {r['temporary_gb']:.2f} of {device.memory / 1e9:.0f} GB: "
        + ("fits" if r["fits"] else "does NOT fit"),
        f"floor, from the compiled program: {r['floor_ms']:.1f} ms a step = {r['images_per_s']:,.0f} images/s, {r['share_of_peak']:.0%} of "
        f"peak ({r['gflop_per_image']:.1f} GFLOP an image); {r['kernels']:,} kernels, {r['gb_moved']:.0f} GB moved; "
        f"100 epochs in {r['days_per_100_epochs']:.2f} days",
    ]
    for kind, (times, size) in record["collectives"].items():
        lines.append(f"{kind}: {times}, each device sends {size:.3f} GB; beside the floor, {record['link_ms']:.1f} ms of the links in all")
    lines.append(f"{'part of the step':36s} {'kernels':>8s} {'GB':>8s} {'TFLOP':>7s} {'floor ms':>9s}")
    for name, part in program.parts(rows, device).items():
        if part.floor > 0.0005 * record["floor_ms"] / 1e3:
            lines.append(f"{name:36s} {part.kernels:8d} {part.bytes / 1e9:8.2f} {part.flops / 1e12:7.2f} {1e3 * part.floor:9.2f}")
    for row in sorted(rows, key=lambda row: -row.seconds(device))[:top]:
        lines.append(
            f"{1e3 * row.seconds(device):7.2f} ms  {row.times} x {row.op} {row.name}  {row.times * row.bytes / 1e9:.2f} GB  "
            f"{row.times * row.flops / 1e12:.2f} TFLOP  {row.source[-110:]}"
        )
    return "\n".join(lines) + "\n"


COLUMNS = (
    ("floor ms", "floor_ms", "{:.1f}"), ("images/s", "images_per_s", "{:,.0f}"), ("of peak", "share_of_peak", "{:.0%}"),
    ("GB moved", "gb_moved", "{:.0f}"), ("kernels", "kernels", "{:,}"), ("state GB", "state_gb", "{:.2f}"),
    ("temporaries GB", "temporary_gb", "{:.2f}"), ("fits", "fits", "{}"), ("days / 100 epochs", "days_per_100_epochs", "{:.2f}"),
)  # fmt: skip


def name_of(record: Mapping[str, Any]) -> str:
    """What tells one plan from another."""
    return " ".join(str(record[key]) for key in ("config", "cell", "devices") if record[key]) + f" batch {record['batch']}"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """All plans, a Markdown table."""
    lines = ["| plan | " + " | ".join(title for title, _, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for record in records:
        shown = {**record, "fits": "yes" if record["fits"] else "NO"}
        cells = [form.format(shown[key]) for _, key, form in COLUMNS]
        lines.append(f"| {name_of(record)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """A plan as one more line of a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The plans of a file. Raises ValueError naming the line that is none."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            name_of(record)
            float(record["floor_ms"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no plan: write such files with --json") from error
        records.append(record)
    return records


def compare(records: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> int:
    """Print what changed from the plans of the same name; 1 where something got worse by more than half a percent."""
    old, worse = {name_of(record): record for record in before}, False
    for record in records:
        name = name_of(record)
        if name not in old:
            print(f"{name}: not in the earlier file")
            continue
        for key in COMPARED:
            was, now = old[name][key], record[key]
            if now > was * TOLERANCE:
                worse = True
            word = "WORSE" if now > was * TOLERANCE else "better" if now * TOLERANCE < was else "the same"
            print(f"{name}: {key} {was:,.4g} -> {now:,.4g}  {word}")
    return int(worse)


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Floor, images per second, memory and kernels of all plans, as SVG: over what varies, a line per kind of device."""
    from maskvit.plots import curves

    axis, places = _axis(records)
    panels = {}
    shown = {"floor, ms": "floor_ms", "images/s": "images_per_s", "state and temporaries, GB": "", "GB moved": "gb_moved"}
    for title, key in shown.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for record, place in zip(records, places, strict=True):
            value = record[key] if key else record["state_gb"] + record["temporary_gb"]
            lines.setdefault(record["devices"], []).append((place, value))
        panels[title] = {name: [tuple(zip(*sorted(points), strict=True))] for name, points in lines.items()}
    path.write_bytes(curves.line_panels(panels, x=axis))  # type: ignore[arg-type]


def _axis(records: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]]:
    """What varies between plans, and its value in each: the batch, the number that a grid sets, or the size of the model."""
    if len({record["batch"] for record in records}) > 1:
        return "batch", [record["batch"] for record in records]
    keys = {record["cell"].partition("=")[0] for record in records}
    try:
        if len(keys) == 1 and len({record["cell"] for record in records}) > 1:
            return keys.pop(), [float(record["cell"].partition("=")[2]) for record in records]
    except ValueError:
        pass
    return "parameters, millions", [record["parameters"] / 1e6 for record in records]
