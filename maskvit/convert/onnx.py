"""Tensors out of an ONNX export of a Vision Transformer: what the exporter left of the names is put back together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from maskvit.convert.formats import ConversionError, foreign_file
from maskvit.convert.pickles import MAX_AXES
from maskvit.convert.reader import MAX_SHARING, check_file
from maskvit.core.patches import resample_pos_embed

CLASS_TOKEN = "embeddings.cls_token"
PATCH_KERNEL = "embeddings.patch_embeddings.projection.weight"
POSITIONS = "embeddings.position_embeddings"
NUMBER_TYPES = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT16", "INT8", "UINT8", "BOOL")
MAX_POSITIONS = 2**14


def read_onnx(path: str | Path) -> dict[str, np.ndarray]:
    """The named tensors of a graph exported from PyTorch.

    A linear layer's matrix has lost its name: it is the constant factor of the product that the named bias is added to, and
    comes back as (out, in). Position tables have lost theirs too: one row is joined to the class token's place, the others are
    resized to the grid of the graph's own input; they come back together as the table for that input.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConversionError(f"{path}: reading .onnx needs the package onnx: pip install onnx") from error
    path = Path(path)
    check_file(path)
    with open(path, "rb") as file:
        foreign = foreign_file(path, file.read(1024), b"")
    if foreign:
        raise ConversionError(f"{path}: {foreign}")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf raises its own kinds
        raise ConversionError(f"{path}: not a sound ONNX file ({type(error).__name__}: {str(error)[:200]})") from error
    try:
        return _named(str(path), graph, path.stat().st_size)
    except ConversionError:
        raise
    except Exception as error:  # a graph of other nodes than the exporter writes
        raise ConversionError(f"{path}: not the export of a Vision Transformer ({type(error).__name__}: {str(error)[:200]})") from error


def _initializers(where: str, graph: Any, size: int) -> dict[str, np.ndarray]:
    """The constants of a graph that lie in the file itself, as arrays; no other file is opened."""
    from onnx import TensorProto, numpy_helper

    known = [getattr(TensorProto, name) for name in NUMBER_TYPES]
    found = {}
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise ConversionError(f"{where}: the values of {tensor.name!r} lie in another file; export the graph with its values inside")
        if tensor.data_type not in known:
            raise ConversionError(f"{where}: {tensor.name!r} is of a type that is not read; read are {', '.join(NUMBER_TYPES)}")
        if len(tensor.dims) > MAX_AXES or math.prod(tensor.dims) > size:
            raise ConversionError(f"{where}: {tensor.name!r} claims {len(tensor.dims)} axes and {math.prod(tensor.dims):,} values")
        found[tensor.name] = numpy_helper.to_array(tensor)
    return found


def _named(where: str, graph: Any, size: int) -> dict[str, np.ndarray]:
    tensors = _initializers(where, graph, size)
    if not tensors:
        raise ConversionError(f"{where}: the graph holds no tensors")
    named = {name: value for name, value in tensors.items() if "::" not in name}
    rest = {name: value for name, value in tensors.items() if "::" in name}
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in rest}
    copied = 0
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name in named and name.endswith(".bias")), None)
        matrix = next((products[name] for name in node.input if name in products), None)
        if bias and matrix:
            copied += tensors[matrix].nbytes
            if copied > MAX_SHARING * size:
                raise ConversionError(f"{where}: its layers share matrices so that they take over {MAX_SHARING} times the file's size")
            named[f"{bias.removesuffix('.bias')}.weight"] = np.ascontiguousarray(rest.pop(matrix, tensors[matrix]).T)
    prefix = next((name.removesuffix(CLASS_TOKEN) for name in named if name.endswith(CLASS_TOKEN)), None)
    if prefix is None or named.get(prefix + PATCH_KERNEL, np.zeros(())).ndim != 4:
        raise ConversionError(
            f"{where}: the graph has no tensors {CLASS_TOKEN!r} and {PATCH_KERNEL!r}: no Vision Transformer with the names of Dinov2Model"
        )
    named[prefix + POSITIONS] = _positions(where, graph, rest, named[prefix + PATCH_KERNEL].shape[-1])
    if rest:
        raise ConversionError(f"{where}: {len(rest)} nameless tensors have an unknown use: {', '.join(sorted(rest)[:4])}")
    return named


def _positions(where: str, graph: Any, rest: dict[str, np.ndarray], patch: int) -> np.ndarray:
    """The position table "1 n d" for the graph's own input, class token's row first; what it is made of is taken out of `rest`."""
    import onnx

    first = [name for n in graph.node if n.op_type == "Concat" for name in n.input if name in rest and rest[name].shape[:2] == (1, 1)]
    table = [name for n in graph.node if n.op_type == "Reshape" for name in n.input[:1] if name in rest and rest[name].ndim == 3]
    if len(first) != 1 or len(table) != 1:
        raise ConversionError(f"{where}: {len(first)} position rows of the class token and {len(table)} tables found; one of each expected")
    resizes = [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in graph.node if n.op_type == "Resize"]
    cubic = [r for r in resizes if r.get("mode") == b"cubic"]
    if len(cubic) != 1 or cubic[0].get("coordinate_transformation_mode") not in (b"half_pixel", b"pytorch_half_pixel"):
        raise ConversionError(f"{where}: its position table is not resized as PyTorch's bicubic interpolation does: {cubic}")
    if abs(cubic[0].get("cubic_coeff_a", -0.75) + 0.75) > 1e-6 or cubic[0].get("antialias", 0):
        raise ConversionError(f"{where}: its position table is resized with another kernel: {cubic[0]}")
    sides = [axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim[2:]]
    if len(sides) != 2 or not patch or not all(side > 0 and side % patch == 0 for side in sides):
        raise ConversionError(f"{where}: its input {graph.input[0].name!r} has no fixed size that divides by the patch {patch}")
    if math.prod(side // patch for side in sides) > MAX_POSITIONS:
        raise ConversionError(f"{where}: its input of {sides[0]} x {sides[1]} pixels has more than {MAX_POSITIONS:,} patches")
    class_row, rows = rest.pop(first[0]), rest.pop(table[0])
    side = math.isqrt(rows.shape[1])
    if not side or side**2 != rows.shape[1]:
        raise ConversionError(f"{where}: its position table has {rows.shape[1]} rows, which is no square grid")
    resized = np.asarray(resample_pos_embed(rows.reshape(side, side, -1), (sides[0] // patch, sides[1] // patch)))
    return np.concatenate([class_row, resized.reshape(1, -1, resized.shape[-1])], axis=1)
