"""Strict renaming: a list of rules says every tensor of a file, its shape, and what it is in our tree, both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from maskvit.convert.reader import ConversionError
from maskvit.core.types import tree_paths

Arrays = tuple[np.ndarray, ...]


class Rule(NamedTuple):
    """What some tensors of a file are in our tree, mostly one for one (the same for values and Adam moments).

    `keys` with their `shapes` stand on the file's side, `paths` on ours; `to_ours` takes the arrays of the keys in their
    order and gives those of the paths, `to_torch` the other way round.
    """

    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    paths: tuple[str, ...]
    to_ours: Callable[..., Arrays]
    to_torch: Callable[..., Arrays]

    def our_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of `paths`."""
        return tuple(x.shape for x in self.to_ours(*(np.broadcast_to(np.False_, shape) for shape in self.shapes)))


def single(
    key: str, path: str, shape: Sequence[int], to_ours: Callable[[np.ndarray], np.ndarray], to_torch: Callable[[np.ndarray], np.ndarray]
) -> Rule:
    """One tensor to one."""
    return Rule((key,), (tuple(shape),), (path,), lambda x: (to_ours(x),), lambda x: (to_torch(x),))


def same(key: str, path: str, shape: Sequence[int]) -> Rule:
    """Carried as it is."""
    return single(key, path, shape, lambda x: x, lambda x: x)


def reshaped(key: str, path: str, shape: Sequence[int], ours: Sequence[int]) -> Rule:
    """The same values in the same order under another shape."""
    return single(key, path, shape, lambda x: x.reshape(ours), lambda x: x.reshape(shape))


def transposed(key: str, path: str, shape: Sequence[int]) -> Rule:
    """A matrix (out, in) to a kernel (in, out)."""
    transpose = lambda x: np.ascontiguousarray(x.T)  # noqa: E731
    return single(key, path, shape, transpose, transpose)


def linear(key: str, path: str, features_in: int, features_out: int) -> list[Rule]:
    """A linear layer: weight (out, in) to kernel (in, out)."""
    return [
        transposed(f"{key}.weight", f"{path}/kernel", (features_out, features_in)),
        same(f"{key}.bias", f"{path}/bias", (features_out,)),
    ]


def joined_linear(keys: Sequence[str], path: str, features_in: int, features_out: int) -> list[Rule]:
    """Linear layers that we keep as one, their outputs side by side (query, key and value)."""
    if len(keys) == 1:
        return linear(keys[0], path, features_in, features_out)
    part = features_out // len(keys)
    kernel = Rule(
        tuple(f"{key}.weight" for key in keys), ((part, features_in),) * len(keys), (f"{path}/kernel",),
        lambda *x: (np.ascontiguousarray(np.concatenate(x).T),),
        lambda x: tuple(np.ascontiguousarray(piece.T) for piece in np.split(x, len(keys), axis=1)),
    )  # fmt: skip
    bias = Rule(
        tuple(f"{key}.bias" for key in keys), ((part,),) * len(keys), (f"{path}/bias",),
        lambda *x: (np.concatenate(x),), lambda x: tuple(np.split(x, len(keys))),
    )  # fmt: skip
    return [kernel, bias]


def scaled_linear(key: str, scale: str, path: str, features_in: int, features_out: int) -> list[Rule]:
    """A linear layer and the LayerScale behind it: gamma * (W x + b) = (gamma W) x + gamma b. Written back with a scale of one."""
    rule = Rule(
        (f"{key}.weight", f"{key}.bias", scale),
        ((features_out, features_in), (features_out,), (features_out,)),
        (f"{path}/kernel", f"{path}/bias"),
        lambda weight, bias, gamma: (np.ascontiguousarray((gamma[:, None] * weight).T), gamma * bias),
        lambda kernel, bias: (np.ascontiguousarray(kernel.T), bias, np.ones_like(bias)),
    )
    return [rule]


def tied(keys: Sequence[str], rule: Rule) -> Rule:
    """`rule`, whose one tensor the file holds under several `keys`, which must be equal; all are written."""

    def to_ours(*copies: np.ndarray) -> Arrays:
        for key, copy in zip(keys[1:], copies[1:], strict=True):
            if not np.array_equal(copies[0], copy, equal_nan=copy.dtype.kind == "f"):
                raise ConversionError(f"{keys[0]!r} and {key!r} differ, but this model has one tensor for both")
        return rule.to_ours(copies[0])

    return Rule(tuple(keys), rule.shapes * len(keys), rule.paths, to_ours, lambda x: rule.to_torch(x) * len(keys))


def layer_norm(key: str, path: str, width: int) -> list[Rule]:
    """Weight and bias to scale and bias."""
    return [same(f"{key}.weight", f"{path}/scale", (width,)), same(f"{key}.bias", f"{path}/bias", (width,))]


def patch_projection(key: str, path: str, channels: int, patch: int, width: int) -> list[Rule]:
    """A convolution whose kernel is its stride, (out, channel, row, column), to a kernel over (row, column, channel)."""
    shape = (width, channels, patch, patch)

    def to_ours(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.transpose(2, 3, 1, 0).reshape(-1, width))

    def to_torch(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(patch, patch, channels, width).transpose(3, 2, 0, 1))

    return [single(f"{key}.weight", f"{path}/kernel", shape, to_ours, to_torch), same(f"{key}.bias", f"{path}/bias", (width,))]


def patch_head(key: str, path: str, channels: int, patch: int, width: int) -> list[Rule]:
    """A linear layer to patches: outputs ordered (channel, row, column) to (row, column, channel)."""
    torch_order = (channels, patch, patch)

    def outputs_last(x: np.ndarray) -> np.ndarray:  # (channel row column, *rest) -> (row column channel, *rest)
        return x.reshape(*torch_order, *x.shape[1:]).transpose(1, 2, 0, *range(3, x.ndim + 2)).reshape(x.shape)

    def outputs_first(x: np.ndarray) -> np.ndarray:
        return x.reshape(patch, patch, channels, *x.shape[1:]).transpose(2, 0, 1, *range(3, x.ndim + 2)).reshape(x.shape)

    features = channels * patch * patch
    weight = single(
        f"{key}.weight", f"{path}/kernel", (features, width),
        lambda x: np.ascontiguousarray(outputs_last(x).T), lambda x: np.ascontiguousarray(outputs_first(np.ascontiguousarray(x.T))),
    )  # fmt: skip
    return [weight, single(f"{key}.bias", f"{path}/bias", (features,), outputs_last, outputs_first)]


def convolution(key: str, path: str, channels_in: int, channels_out: int, side: int, bias: bool = True) -> list[Rule]:
    """Weight (out, in, row, column) to kernel (row, column, in, out); of a depthwise one `channels_in` is 1."""
    weight = single(
        f"{key}.weight",
        f"{path}/kernel",
        (channels_out, channels_in, side, side),
        lambda x: np.ascontiguousarray(x.transpose(2, 3, 1, 0)),
        lambda x: np.ascontiguousarray(x.transpose(3, 2, 0, 1)),
    )
    return [weight, same(f"{key}.bias", f"{path}/bias", (channels_out,))] if bias else [weight]


def transposed_conv(key: str, path: str, channels: int, side: int) -> list[Rule]:
    """Weight (in, out, row, column) to kernel (row, column, in, out), as many channels out as in."""
    weight = single(
        f"{key}.weight",
        f"{path}/kernel",
        (channels, channels, side, side),
        lambda x: np.ascontiguousarray(x.transpose(2, 3, 0, 1)),
        lambda x: np.ascontiguousarray(x.transpose(2, 3, 0, 1)),
    )
    return [weight, same(f"{key}.bias", f"{path}/bias", (channels,))]


def position_map(key: str, path: str, grid: tuple[int, int], width: int) -> Rule:
    """(1, width, rows, columns) to (rows, columns, width)."""
    return single(
        key,
        path,
        (1, width, *grid),
        lambda x: np.ascontiguousarray(x[0].transpose(1, 2, 0)),
        lambda x: np.ascontiguousarray(x.transpose(2, 0, 1))[None],
    )


def position_rows(key: str, path: str, grid: tuple[int, int], width: int, class_row: bool) -> Rule:
    """(1, rows, width) to (rows, columns, width). `class_row`: a row of zeros for the class token stands before the others."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        if class_row and x[0, 0].any():
            raise ConversionError(f"{key!r} gives the class token a position of its own, which this model has no place for")
        return x[0, int(class_row) :].reshape(*grid, width)

    def to_torch(x: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros((int(class_row), width), x.dtype), x.reshape(-1, width)])[None]

    return single(key, path, (1, int(class_row) + grid[0] * grid[1], width), to_ours, to_torch)


class BlockNames(NamedTuple):
    """What a layout calls the parts of a transformer block; `qkv` is one name, or those of query, key and value."""

    norm1: str = "norm1"
    qkv: tuple[str, ...] = ("attn.qkv",)
    proj: str = "attn.proj"
    norm2: str = "norm2"
    fc1: str = "mlp.fc1"
    fc2: str = "mlp.fc2"
    scale1: str = "ls1.gamma"
    scale2: str = "ls2.gamma"


def block(key: str, path: str, width: int, hidden: int, names: BlockNames = BlockNames(), scaled: bool = False) -> list[Rule]:  # noqa: B008
    """A pre-norm transformer block; `scaled` with LayerScale, which is folded into the layer before it."""

    def last(name: str, scale: str, ours: str, features_in: int) -> list[Rule]:
        if scaled:
            return scaled_linear(f"{key}.{name}", f"{key}.{scale}", f"{path}/{ours}", features_in, width)
        return linear(f"{key}.{name}", f"{path}/{ours}", features_in, width)

    return [
        *layer_norm(f"{key}.{names.norm1}", f"{path}/norm1", width),
        *joined_linear([f"{key}.{name}" for name in names.qkv], f"{path}/attn/qkv", width, 3 * width),
        *last(names.proj, names.scale1, "attn/proj", width),
        *layer_norm(f"{key}.{names.norm2}", f"{path}/norm2", width),
        *linear(f"{key}.{names.fc1}", f"{path}/mlp/fc1", width, hidden),
        *last(names.fc2, names.scale2, "mlp/fc2", hidden),
    ]


def listed(names: Iterable[str]) -> str:
    """The first eight names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_keys(where: str, found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless `found` has exactly the expected names and shapes."""
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        raise ConversionError(f"{where}: {len(missing)} tensors are missing: {listed(missing)}")
    if unexpected:
        raise ConversionError(f"{where}: {len(unexpected)} tensors are not part of this model: {listed(unexpected)}")
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if tuple(found[name].shape) != tuple(shape)
    ]
    if wrong:
        raise ConversionError(f"{where}: {len(wrong)} tensors have another shape: {listed(wrong)}")


def key_shapes(rules: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
    """Every key of the file's side with its shape."""
    return {key: shape for rule in rules for key, shape in zip(rule.keys, rule.shapes, strict=True)}


def path_shapes(rules: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
    """Every path of our side with its shape."""
    return {path: shape for rule in rules for path, shape in zip(rule.paths, rule.our_shapes(), strict=True)}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": leaf} to {"a": {"b": leaf}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def to_ours(rules: Sequence[Rule], tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """PyTorch tensors to a nested parameter tree, nothing missing, nothing left over."""
    check_keys(where, tensors, key_shapes(rules))
    flat: dict[str, np.ndarray] = {}
    for rule in rules:
        try:
            flat.update(zip(rule.paths, rule.to_ours(*(np.asarray(tensors[key]) for key in rule.keys)), strict=True))
        except ConversionError as error:
            raise ConversionError(f"{where}: {error}") from error
    return nested(flat)


def to_torch(rules: Sequence[Rule], params: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`, in the rules' order."""
    flat = tree_paths(params)
    check_keys(where, flat, path_shapes(rules))
    found: dict[str, np.ndarray] = {}
    for rule in rules:
        found.update(zip(rule.keys, rule.to_torch(*(np.asarray(flat[path]) for path in rule.paths)), strict=True))
    return found
