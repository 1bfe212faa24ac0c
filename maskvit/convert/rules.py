"""Strict renaming: a list of rules says every key, its shape, and how its values are laid out on the other side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from maskvit.convert.reader import ConversionError
from maskvit.types import tree_paths


class Rule(NamedTuple):
    """One tensor: its PyTorch key and shape, our path, and the layouts' two maps (the same for values and Adam moments)."""

    key: str
    path: str
    shape: tuple[int, ...]
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def same(key: str, path: str, shape: Sequence[int]) -> Rule:
    """Carried as it is."""
    return Rule(key, path, tuple(shape), lambda x: x, lambda x: x)


def reshaped(key: str, path: str, shape: Sequence[int], ours: Sequence[int]) -> Rule:
    """The same values in the same order under another shape."""
    return Rule(key, path, tuple(shape), lambda x: x.reshape(ours), lambda x: x.reshape(shape))


def linear(key: str, path: str, features_in: int, features_out: int) -> list[Rule]:
    """A linear layer: weight (out, in) to kernel (in, out)."""
    transpose = lambda x: np.ascontiguousarray(x.T)  # noqa: E731
    weight = Rule(f"{key}.weight", f"{path}/kernel", (features_out, features_in), transpose, transpose)
    return [weight, same(f"{key}.bias", f"{path}/bias", (features_out,))]


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

    return [Rule(f"{key}.weight", f"{path}/kernel", shape, to_ours, to_torch), same(f"{key}.bias", f"{path}/bias", (width,))]


def patch_head(key: str, path: str, channels: int, patch: int, width: int) -> list[Rule]:
    """A linear layer to patches: outputs ordered (channel, row, column) to (row, column, channel)."""
    torch_order = (channels, patch, patch)

    def outputs_last(x: np.ndarray) -> np.ndarray:  # (channel row column, *rest) -> (row column channel, *rest)
        return x.reshape(*torch_order, *x.shape[1:]).transpose(1, 2, 0, *range(3, x.ndim + 2)).reshape(x.shape)

    def outputs_first(x: np.ndarray) -> np.ndarray:
        return x.reshape(patch, patch, channels, *x.shape[1:]).transpose(2, 0, 1, *range(3, x.ndim + 2)).reshape(x.shape)

    features = channels * patch * patch
    weight = Rule(
        f"{key}.weight", f"{path}/kernel", (features, width),
        lambda x: np.ascontiguousarray(outputs_last(x).T), lambda x: np.ascontiguousarray(outputs_first(np.ascontiguousarray(x.T))),
    )  # fmt: skip
    return [weight, Rule(f"{key}.bias", f"{path}/bias", (features,), outputs_last, outputs_first)]


def position_table(key: str, path: str, grid: tuple[int, int], width: int) -> Rule:
    """(1, width, rows, columns) to (rows, columns, width)."""
    shape = (1, width, *grid)
    return Rule(
        key,
        path,
        shape,
        lambda x: np.ascontiguousarray(x[0].transpose(1, 2, 0)),
        lambda x: np.ascontiguousarray(x.transpose(2, 0, 1))[None],
    )


def block(key: str, path: str, width: int, hidden: int) -> list[Rule]:
    """A pre-norm transformer block with timm's names."""
    return [
        *layer_norm(f"{key}.norm1", f"{path}/norm1", width),
        *linear(f"{key}.attn.qkv", f"{path}/attn/qkv", width, 3 * width),
        *linear(f"{key}.attn.proj", f"{path}/attn/proj", width, width),
        *layer_norm(f"{key}.norm2", f"{path}/norm2", width),
        *linear(f"{key}.mlp.fc1", f"{path}/mlp/fc1", width, hidden),
        *linear(f"{key}.mlp.fc2", f"{path}/mlp/fc2", hidden, width),
    ]


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_keys(where: str, found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless `found` has exactly the expected names and shapes."""
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        raise ConversionError(f"{where}: {len(missing)} tensors are missing: {_listed(missing)}")
    if unexpected:
        raise ConversionError(f"{where}: {len(unexpected)} tensors are not part of this model: {_listed(unexpected)}")
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if tuple(found[name].shape) != tuple(shape)
    ]
    if wrong:
        raise ConversionError(f"{where}: {len(wrong)} tensors have another shape: {_listed(wrong)}")


def to_ours(rules: Sequence[Rule], tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """PyTorch tensors to a nested parameter tree, nothing missing, nothing left over."""
    check_keys(where, tensors, {rule.key: rule.shape for rule in rules})
    tree: dict[str, Any] = {}
    for rule in rules:
        *parents, last = rule.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = rule.to_ours(np.asarray(tensors[rule.key]))
    return tree


def to_torch(rules: Sequence[Rule], params: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`, in the rules' order."""
    flat = tree_paths(params)
    check_keys(where, flat, {rule.path: rule.to_ours(np.empty(rule.shape, np.bool_)).shape for rule in rules})
    return {rule.key: rule.to_torch(np.asarray(flat[rule.path])) for rule in rules}
