"""Reads an optimized program kernel by kernel: bytes, arithmetic, communication, and the least time that they take."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from maskvit.commands.plan.devices import Device

# What real programs reach of the makers' figures at best.
MEMORY_SHARE, PEAK_SHARE = 0.85, 0.78

_BYTES = dict(
    pred=1, s8=1, u8=1, s4=0.5, u4=0.5, f8e4m3fn=1, f8e5m2=1, bf16=2, f16=2, s16=2, u16=2, f32=4, s32=4, u32=4, s64=8, u64=8, f64=8, c64=8
)  # fmt: skip
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id", "replica-id", "domain",
    "opt-barrier", "get-dimension-size",
}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_READERS = ("slice", "dynamic-slice", "gather")
_WRITERS = ("dynamic-update-slice", "scatter")


class Instruction(NamedTuple):
    """One line of a program; `rest` is what follows the operands."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def target(self) -> str:
        """Whose kernel a custom call is."""
        found = re.search(r'custom_call_target="([^"]+)"', self.rest)
        return found.group(1) if found else ""

    @property
    def source(self) -> str:
        """Which line of the model it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    def called(self, key: str) -> str | None:
        """The computation that it calls as `key`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None


class Kernel(NamedTuple):
    """What the device is given to do at once, `times` in a step; bytes and FLOPs of one time. `beside`: it runs beside others."""

    times: int
    op: str
    name: str
    bytes: float
    flops: float
    source: str
    sent: float = 0.0
    beside: bool = False

    def seconds(self, device: Device) -> float:
        """The least that all its times take."""
        return self.times * max(self.flops / (PEAK_SHARE * device.peak), self.bytes / (MEMORY_SHARE * device.rate), device.launch)


class Program(NamedTuple):
    """An optimized program: its computations by name, and which one is run."""

    computations: Mapping[str, Sequence[Instruction]]
    entry: str


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += text[i] in "([{"
        depth -= text[i] in ")]}"
        if not depth:
            return i
    return len(text) - 1


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"^\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    shape = line[at:end]
    call = re.match(r"\s*([\w\-]+)\(", line[end:])
    if not call:
        return None
    opened = end + call.end() - 1
    closed = _closing(line, opened)
    operands = tuple(re.findall(r"%([\w.\-]+)", line[opened:closed]))
    return Instruction(head.group(2), shape, call.group(1), operands, line[closed + 1 :], bool(head.group(1)))


def parse(text: str) -> Program:
    """The text of a compiled program (`compiled.as_text()`)."""
    if _TPU in text:
        text = _ON_CHIP.sub(_HERE + "}", text)
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (found := _instruction(line)):
            current.append(found)
    if not entry:
        raise ValueError("this is no program: it has no line that begins with ENTRY")
    return Program(computations, entry)


# Layouts of TPUs name tiles ("T(8,128)"), and a memory ("S(1)", "S(2)") that is the chip's own: what lies there crosses no bus.
_TPU, _ON_CHIP, _HERE = ":T(", re.compile(r"S\([12]\)\}"), "ONCHIP"


def shapes_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, axes) of an array, or of each of a tuple."""
    return [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape) if kind in _BYTES]


def size_of(shape: str) -> float:
    """Bytes of an array or a tuple in the device's large memory; on TPUs in whole tiles, which is how they lie there and are fetched."""
    return sum(size for size, here in _sizes(shape) if not here)


def _sizes(shape: str) -> list[tuple[float, bool]]:
    """(Bytes, whether it lies on the chip) of an array, or of each of a tuple."""
    found = re.findall(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?", shape)
    return [(_BYTES[kind] * math.prod(_tiled(dims, layout)), layout.endswith(_HERE)) for kind, dims, layout in found if kind in _BYTES]


def _tiled(dims: str, layout: str) -> list[int]:
    """The axes of an array, the last ones of its layout rounded up to whole tiles: "64,12,640,64" in "3,2,1,0:T(8,128)" ends in 128."""
    axes = [int(d) for d in dims.split(",") if d]
    order, _, tiles = layout.partition(":")
    if (tile := re.match(r"T\(([\d,]+)\)", tiles)) and axes:
        for axis, side in zip(map(int, order.split(",")), reversed([int(d) for d in tile.group(1).split(",")]), strict=False):
            axes[axis] = -(-axes[axis] // side) * side
    return axes


def _axes(shape: str) -> tuple[int, ...]:
    found = shapes_of(shape)
    return found[0][1] if found else ()


def _spatial(axes: tuple[int, ...], names: str) -> list[int]:
    """The sides of a convolution's array along its windows, in their order; `names`: a label per axis, digits for these."""
    return [axes[names.index(digit)] for digit in sorted(filter(str.isdigit, names))]


def _windows(rest: str, count: int) -> list[dict[str, int]]:
    """Stride, padding in front, gaps in the input and gaps in the window along each of `count` axes."""
    found = dict(re.findall(r"(\w+)=([-\dx_]+)", text.group(1))) if (text := re.search(r"window=\{([^}]*)\}", rest)) else {}
    usual = dict(stride="1", lhs_dilate="1", rhs_dilate="1", pad="0_0")
    values = {key: found[key].split("x") if key in found else [value] * count for key, value in usual.items()}
    return [{key: int(sides[axis].split("_")[0]) for key, sides in values.items()} for axis in range(count)]


def _window_products(given: int, window: int, results: int, how: Mapping[str, int]) -> int:
    """How many values of an input a convolution multiplies along one axis, over all its results: neither padding nor gaps are any.

    TPUs write products of batches, and of heads beside each other, as convolutions whose windows meet one value and else nothing.
    """
    at = np.arange(results)[:, None] * how["stride"] + np.arange(window) * how["rhs_dilate"] - how["pad"]
    return int(((at >= 0) & (at % how["lhs_dilate"] == 0) & (at // how["lhs_dilate"] < given)).sum())


def product_flops(instruction: Instruction, shapes: Mapping[str, str]) -> float:
    """FLOPs of one matrix product, convolution, or library kernel that is one; 0 of anything else."""
    op, target = instruction.op, instruction.target
    out = math.prod(_axes(instruction.shape))
    operands = [_axes(shapes.get(name, "")) for name in instruction.operands]
    if op == "dot" or "cublas" in target or "matmul" in target:
        contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[\[{]([\d",\s]*)[\]}]', instruction.rest)
        axes = [int(d) for d in re.findall(r"\d+", contracted.group(1))] if contracted else []
        return 2.0 * out * math.prod(operands[0][axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if (op == "convolution" or target.startswith("__cudnn$conv")) and labels and len(operands) > 1:
        sides = [_spatial(axes, names) for axes, names in zip((*operands[:2], _axes(instruction.shape)), labels.groups(), strict=True)]
        steps = math.prod(_window_products(*side) for side in zip(*sides, _windows(instruction.rest, len(sides[0])), strict=True))
        return 2.0 * out / max(math.prod(sides[2]), 1) * operands[1][labels.group(2).index("i")] * steps
    if target.startswith("__cudnn$fmha"):
        (b, queries, heads, width), keys = operands[0], operands[1][1]
        products = 5 if "Backward" in target else 2
        return 2.0 * products * b * heads * queries * keys * width
    if target == "tpu_custom_call" and instruction.name.startswith("splash_mha"):
        (b, heads, queries, width), (_, _, keys, _) = [axes for axes in operands if len(axes) == 4][:2]
        return 2.0 * (5 if "dkv" in instruction.name else 2) * b * heads * queries * keys * width
    return 0.0


def _fused_flops(program: Program, name: str) -> float:
    body = program.computations[name]
    shapes = {one.name: one.shape for one in body}
    total = 0.0
    for one in body:
        total += product_flops(one, shapes)
        if one.op == "fusion" and (inner := one.called("calls")):
            total += _fused_flops(program, inner)
    return total


def _fused_bytes(program: Program, name: str) -> float:
    """What a fused kernel reads and writes: of an operand of which it takes rows alone, those rows; in place, what it changes."""
    body = program.computations[name]
    shapes, users = {one.name: one.shape for one in body}, collections.defaultdict(list)
    for one in body:
        for operand in one.operands:
            users[operand].append(one)
    root = next((one for one in body if one.root), body[-1])
    results = {root.name} | (set(root.operands) if root.op == "tuple" else set())

    def uses(one: Instruction) -> list[tuple[Instruction, bool]]:
        """(Who uses it, whether as what is read or written in parts), behind bitcasts, which cost nothing."""
        found: list[tuple[Instruction, bool]] = []
        for user in users[one.name]:
            found += uses(user) if user.op == "bitcast" and user.name not in results else [(user, user.operands[0] == one.name)]
        return found

    total = 0.0
    for one in body:
        if one.op == "parameter":
            found = uses(one)
            if found and all(first and user.op in _READERS for user, first in found):
                total += sum(size_of(user.shape) for user, _ in found)
            elif not (found and all(first and user.op in _WRITERS for user, first in found)):  # else changed in place: its rows, below
                total += size_of(one.shape)
        if one.name in results and one.op != "tuple":
            if one.op in _WRITERS:
                update = one.operands[1] if one.op == "dynamic-update-slice" else one.operands[-1]
                total += size_of(shapes.get(update, ""))
            else:
                total += size_of(one.shape)
    return total


def _sent(instruction: Instruction, size: float) -> float:
    """Bytes that each device sends in a collective, in rings."""
    groups = re.search(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]+)\})", instruction.rest)
    n = (int(groups.group(2)) if groups.group(2) else len(groups.group(3).split(","))) if groups else 2
    share = (n - 1) / n if n else 0.0
    times = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": share, "all-to-all": share}
    return times.get(_plain(instruction.op), 1.0) * size


def _transferred(shape: str, op: str) -> float:
    """Bytes of "(to, from, context)" of a copy, or "((from), to, context)" of a part, that are read and written in the large memory."""
    parts = re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", shape)
    if op == "copy-start":
        return sum(size_of(part) for part in parts[:2])
    return _sizes(parts[-2])[0][0] * (float(_HERE not in parts[0]) + float(_HERE not in parts[-2]))


def _plain(op: str) -> str:
    return op.removesuffix("-start")


def kernels(program: Program) -> list[Kernel]:
    """Every kernel of a program in the order in which they run; the bodies of loops as often as they do."""
    rows: list[Kernel] = []

    def walk(name: str, times: int) -> None:
        shapes: dict[str, str] = {}
        for one in program.computations[name]:
            shapes[one.name] = one.shape
            if one.op in _FREE or one.op.endswith(("-done", "-update")) or one.target == "ConcatBitcast":
                continue
            if one.op == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.rest)
                walk(one.called("body") or "", times * (int(trips.group(1)) if trips else 1))
                continue
            if one.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
                names = re.findall(r"[\w.\-]+", branches.group(1)) if branches else []
                for branch in [*names, one.called("true_computation"), one.called("false_computation")]:
                    walk(branch, times) if branch else None
                continue
            if one.op in ("call", "async-start"):
                walk(one.called("to_apply") or one.called("calls") or "", times)
                continue
            if one.op in ("copy-start", "slice-start"):
                moved = _transferred(one.shape, one.op)
                rows.append(Kernel(times, one.op, one.name, moved, 0.0, one.source, beside=True))
                continue
            operands = sum(size_of(shapes.get(operand, "")) for operand in one.operands)
            plain = _plain(one.op)
            if one.op == "fusion" and (body := one.called("calls")):
                rows.append(Kernel(times, one.op, one.name, _fused_bytes(program, body), _fused_flops(program, body), one.source))
            elif plain in COLLECTIVES:
                result = size_of(one.shape) - (operands if one.op.endswith("-start") and one.shape.startswith("(") else 0)
                rows.append(Kernel(times, plain, one.name, operands + result, 0.0, one.source, _sent(one, max(operands, result))))
            elif one.op in _READERS:
                rows.append(Kernel(times, one.op, one.name, 2 * size_of(one.shape), 0.0, one.source))
            elif one.op in _WRITERS:
                update = one.operands[1] if one.op == "dynamic-update-slice" else one.operands[-1]
                rows.append(Kernel(times, one.op, one.name, 2 * size_of(shapes.get(update, "")), 0.0, one.source))
            else:
                moved = size_of(one.shape) + operands
                rows.append(Kernel(times, one.target or one.op, one.name, moved, product_flops(one, shapes), one.source))

    walk(program.entry, 1)
    return rows


# Words in the name of a line, and the part of the step that it belongs to.
_MODULES = (("Decoder", "decoder"), ("Encoder", "encoder"), ("Adapter", "adapter"), ("Head", "head"))
_WORK = (
    ("attn", "attention"), ("mlp", "mlp"), ("norm", "norm"), ("head", "head"), ("scatter", "gather and scatter"),
    ("gather", "gather and scatter"), ("sort", "sort"),
)  # fmt: skip


def floor_seconds(text: str, device: Device) -> float:
    """The least time that a compiled program can take on a device, kernel after kernel."""
    return least_seconds(kernels(parse(text)), device)


def least_seconds(rows: Sequence[Kernel], device: Device) -> float:
    """One kernel after the other, and no less than the memory takes for all bytes: transfers beside kernels share it with them."""
    alone = sum(row.seconds(device) for row in rows if not row.beside)
    return max(alone, sum(row.times * row.bytes for row in rows) / (MEMORY_SHARE * device.rate))


def part_of(source: str) -> str:
    """The part of the step that a kernel belongs to, for the eye."""
    module = next((word for mark, word in _MODULES if mark in source), "rest of the step")
    work = next((word for mark, word in _WORK if mark in source), "")
    way = "backward" if "transpose(" in source else "forward"
    return " ".join(filter(None, (module, work, way)))


class Part(NamedTuple):
    """Sums over the kernels of a part; `floor` in seconds."""

    kernels: int
    bytes: float
    flops: float
    floor: float


def parts(rows: Sequence[Kernel], device: Device) -> dict[str, Part]:
    """What each part of the step takes, the longest first."""
    found: dict[str, Part] = collections.defaultdict(lambda: Part(0, 0.0, 0.0, 0.0))
    for row in rows:
        old = found[part_of(row.source)]
        found[part_of(row.source)] = Part(
            old.kernels + row.times, old.bytes + row.times * row.bytes, old.flops + row.times * row.flops, old.floor + row.seconds(device)
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].floor))


def collectives(rows: Sequence[Kernel]) -> dict[str, tuple[int, float]]:
    """{kind: (how many, bytes that each device sends)} in a step."""
    found: dict[str, tuple[int, float]] = {}
    for row in rows:
        if row.op in COLLECTIVES:
            count, sent = found.get(row.op, (0, 0.0))
            found[row.op] = (count + row.times, sent + row.times * row.sent)
    return found
