"""The heads of fine-tuned MultiMAE models, `output_adapters.TASK.*`: ConvNeXt, DPT and Segmenter, to our parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import Rule, block, convolution, layer_norm, linear, listed, reshaped, tied, to_ours, transposed, transposed_conv
from maskvit.convert.source import Hints, Source
from maskvit.core.types import Params

# The reference makes a residual unit there that nothing ever reaches.
UNUSED = "scratch.refinenet4.resConfUnit1."
WHY_UNUSED = "a residual unit of DPT's coarsest level that the reference never uses"


class TaskHead(NamedTuple):
    """The head of one task in a file.

    Attributes:
      name: row of `HEADS`; parameters stand under it.
      channels: classes, or values per pixel.
      options: the head's sizes, as its block of a config holds them.
      width: of the tokens that it reads; of several modalities their widths together.
      rules: its tensors.
      left_out: the file's own keys of what is not read: their shapes, and why.
    """

    name: str
    channels: int
    options: dict[str, Any]
    width: int
    rules: list[Rule]
    left_out: dict[str, tuple[tuple[int, ...], str]]


class Sizes(NamedTuple):
    """Sizes of a head; fields as of `TaskHead`."""

    channels: int
    options: dict[str, Any]
    width: int


def _depth(source: Source, key: str) -> int:
    return len({match[1] for name in source.tensors if (match := re.match(rf"{re.escape(key)}\.blocks\.(\d+)\.", name))})


def _blocks(params: Params) -> int:
    return sum(name.startswith("block_") for name in params)


def _read_convnext(source: Source, key: str, hints: Hints) -> Sizes:
    width, width_in = source.shape(f"{key}.proj_dec.weight", 2)
    channels, narrow, *_ = source.shape(f"{key}.final_layer.weight", 4)
    if math.isqrt(width // narrow) ** 2 * narrow != width:
        shown = f"{width} outputs, which are no square of places with {narrow} channels each"
        raise ConversionError(f"{source.where}: '{key}.proj_dec.weight' has {shown}")
    return Sizes(channels, dict(width=width, preds_per_patch=width // narrow, depth=_depth(source, key)), width_in)


def _own_convnext(params: Params) -> Sizes:
    width_in, width = params["proj"]["kernel"].shape
    *_, narrow, channels = params["head"]["kernel"].shape
    return Sizes(channels, dict(width=width, preds_per_patch=width // narrow, depth=_blocks(params)), width_in)


def _convnext(key: str, path: str, sizes: Sizes) -> list[Rule]:
    width = sizes.options["width"]
    narrow = width // sizes.options["preds_per_patch"]
    rules = linear(f"{key}.proj_dec", f"{path}/proj", sizes.width, width)
    for i in range(sizes.options["depth"]):
        theirs, ours = f"{key}.blocks.{i}", f"{path}/block_{i:02d}"
        rules += convolution(f"{theirs}.dwconv", f"{ours}/dwconv", 1, narrow, 7)
        rules += layer_norm(f"{theirs}.norm", f"{ours}/norm", narrow)
        rules += linear(f"{theirs}.pwconv1", f"{ours}/pwconv1", narrow, 4 * narrow)
        rules += linear(f"{theirs}.pwconv2", f"{ours}/pwconv2", 4 * narrow, narrow)
    return rules + convolution(f"{key}.final_layer", f"{path}/head", narrow, sizes.channels, 1)


def _read_segmenter(source: Source, key: str, hints: Hints) -> Sizes:
    _, classes, width = source.shape(f"{key}.cls_emb", 3)
    width_in = source.shape(f"{key}.proj_dec.weight", 2)[1]
    return Sizes(classes, dict(width=width, depth=_depth(source, key), heads=hints.segmenter_heads(width, source.where)), width_in)


def _own_segmenter(params: Params) -> Sizes:
    classes, width = params["class_tokens"].shape
    return Sizes(classes, dict(width=width, depth=_blocks(params)), params["proj"]["kernel"].shape[0])


def _segmenter(key: str, path: str, sizes: Sizes) -> list[Rule]:
    width, classes = sizes.options["width"], sizes.channels
    rules = [reshaped(f"{key}.cls_emb", f"{path}/class_tokens", (1, classes, width), (classes, width))]
    rules += linear(f"{key}.proj_dec", f"{path}/proj", sizes.width, width)
    for i in range(sizes.options["depth"]):
        rules += block(f"{key}.blocks.{i}", f"{path}/block_{i:02d}", width, 4 * width)
    rules += layer_norm(f"{key}.decoder_norm", f"{path}/norm", width)
    rules.append(transposed(f"{key}.patch_proj.weight", f"{path}/patch_proj/kernel", (width, width)))
    rules.append(transposed(f"{key}.classes_proj.weight", f"{path}/class_proj/kernel", (width, width)))
    return rules + layer_norm(f"{key}.mask_norm", f"{path}/mask_norm", classes)


def _twice(rules: list[Rule], first: str, second: str) -> list[Rule]:
    """Rules whose tensors the file holds under two names each."""
    return [tied((*rule.keys, *(name.replace(first, second, 1) for name in rule.keys)), rule) for rule in rules]


def _read_dpt(source: Source, key: str, hints: Hints) -> Sizes:
    dims, width_in = [], 0
    for level in (1, 2, 3, 4):
        narrow, width_in, *_ = source.shape(f"{key}.act_{level}_postprocess.0.weight", 4)
        dims.append(narrow)
    width = source.shape(f"{key}.scratch.layer1_rn.weight", 4)[0]
    form = "regression" if f"{key}.head.2.weight" in source.tensors else "segmentation"
    return Sizes(source.shape(f"{key}.head.4.weight", 4)[0], dict(form=form, width=width, layer_dims=tuple(dims)), width_in)


def _own_dpt(params: Params) -> Sizes:
    projections = [params[f"reassemble_{level}"]["proj"]["kernel"].shape for level in (1, 2, 3, 4)]
    width, form = params["reassemble_1"]["reduce"]["kernel"].shape[-1], "regression" if "head_conv2" in params else "segmentation"
    options = dict(form=form, width=width, layer_dims=tuple(shape[-1] for shape in projections))
    return Sizes(params["head"]["kernel"].shape[-1], options, projections[0][-2])


def _dpt(key: str, path: str, sizes: Sizes) -> list[Rule]:
    width = sizes.options["width"]
    rules: list[Rule] = []
    for level, narrow in enumerate(sizes.options["layer_dims"], 1):
        theirs, ours = f"{key}.act_{level}_postprocess", f"{path}/reassemble_{level}"
        resized = convolution(f"{theirs}.0", f"{ours}/proj", sizes.width, narrow, 1)
        if level < 3:
            resized += transposed_conv(f"{theirs}.1", f"{ours}/resize", narrow, {1: 4, 2: 2}[level])
        elif level == 4:
            resized += convolution(f"{theirs}.1", f"{ours}/resize", narrow, narrow, 3)
        rules += _twice(resized, f"act_{level}_postprocess", f"act_postprocess.{level - 1}")
        reduced = convolution(f"{key}.scratch.layer{level}_rn", f"{ours}/reduce", narrow, width, 3, bias=False)
        rules += _twice(reduced, f"layer{level}_rn", f"layer_rn.{level - 1}")
        for unit in (1, 2) if level < 4 else (2,):
            for conv in ("conv1", "conv2"):
                theirs = f"{key}.scratch.refinenet{level}.resConfUnit{unit}.{conv}"
                rules += convolution(theirs, f"{path}/fusion_{level}_unit{unit}/{conv}", width, width, 3)
        rules += convolution(f"{key}.scratch.refinenet{level}.out_conv", f"{path}/fusion_{level}_out", width, width, 1)
    if sizes.options["form"] == "regression":
        rules += convolution(f"{key}.head.0", f"{path}/head_conv1", width, width // 2, 3)
        rules += convolution(f"{key}.head.2", f"{path}/head_conv2", width // 2, 32, 3)
        return rules + convolution(f"{key}.head.4", f"{path}/head", 32, sizes.channels, 1)
    rules += convolution(f"{key}.head.0", f"{path}/head_conv1", width, width, 3, bias=False)
    return rules + convolution(f"{key}.head.4", f"{path}/head", width, sizes.channels, 1)


class Layout(NamedTuple):
    """How a head stands in a file.

    `own`: a key that no other head has. `read`, `of_params`: its sizes, of the tensors of a file and of our parameters. `rules`: its
    tensors, of the key and the path that they stand under and its sizes.
    """

    own: str
    read: Callable[[Source, str, Hints], Sizes]
    of_params: Callable[[Params], Sizes]
    rules: Callable[[str, str, Sizes], list[Rule]]


LAYOUTS: Mapping[str, Layout] = {  # by row of `HEADS`
    "convnext": Layout("final_layer.weight", _read_convnext, _own_convnext, _convnext),
    "segmenter": Layout("cls_emb", _read_segmenter, _own_segmenter, _segmenter),
    "dpt": Layout("scratch.layer1_rn.weight", _read_dpt, _own_dpt, _dpt),
}


def task_head(source: Source, task: str, hints: Hints) -> TaskHead:
    """The head of `output_adapters.<task>` and its rules. ConversionError where there is none, or one of another kind."""
    key = f"output_adapters.{task}"
    mine = [name for name in source.tensors if name.startswith(f"{key}.")]
    if not mine:
        raise ConversionError(f"{source.where}: has no head for the task {task!r}: no key begins with '{key}.'")
    name = next((name for name, layout in LAYOUTS.items() if f"{key}.{layout.own}" in source.tensors), None)
    if name is None:
        raise ConversionError(f"{source.where}: the head of {task!r} is none of {', '.join(LAYOUTS)}: {listed(mine)}")
    sizes = LAYOUTS[name].read(source, key, hints)
    unused = [tensor for tensor in mine if name == "dpt" and tensor.startswith(f"{key}.{UNUSED}")]
    left_out = {source.keys[tensor]: (tuple(source.tensors[tensor].shape), WHY_UNUSED) for tensor in unused}
    return TaskHead(name, *sizes, LAYOUTS[name].rules(key, name, sizes), left_out)


def own_head_rules(task: str, name: str, params: Params) -> list[Rule]:
    """The rules of a head of ours, row `name` of `HEADS` with these parameters, as `output_adapters.<task>`."""
    return LAYOUTS[name].rules(f"output_adapters.{task}", name, LAYOUTS[name].of_params(params))


def task_head_params(source: Source, task: str, head: TaskHead) -> Params:
    """{the head's name: its parameters}. ConversionError for tensors that are missing, left over, or differ where they must not."""
    prefix = f"output_adapters.{task}."
    tensors = {name: x for name, x in source.tensors.items() if name.startswith(prefix) and source.keys[name] not in head.left_out}
    return to_ours(head.rules, tensors, source.where)
