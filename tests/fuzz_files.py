"""The files of `tests.fuzz_reader`: sound ones, broken ones, and programs of pickles that no one wrote."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# ------------------------------------------------------------------------------------------ files that are right


def vit(blocks: int = 2, width: int = 4) -> dict[str, np.ndarray]:
    """A tiny plain ViT."""
    rng = np.random.default_rng(0)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width), "patch_embed.proj.weight": (width, 3, 2, 2)}
    shapes |= {"patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    for i in range(blocks):
        for name, (out, features) in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}.items():
            shapes[f"blocks.{i}.{name}.weight"] = (out * width, features * width)
            shapes[f"blocks.{i}.{name}.bias"] = (out * width,)
        shapes |= {f"blocks.{i}.norm{n}.{part}": (width,) for n in (1, 2) for part in ("weight", "bias")}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else b"\x8a" + bytes([len(d := pickle.encode_long(value))]) + d


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode("utf-8", "surrogatepass")


def tensor(key: str, count: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: str = "FloatStorage", offset: int = 0) -> bytes:
    """The operations that make a tensor, as torch writes them."""
    numbers = lambda values: b"(" + b"".join(map(integer, values)) + b"t"  # noqa: E731
    storage = b"(" + text("storage") + name_of("torch", kind) + text(key) + text("cpu") + integer(count) + b"tQ"
    arguments = (
        b"(" + storage + integer(offset) + numbers(shape) + numbers(strides) + b"\x89" + name_of("collections", "OrderedDict") + b")Rt"
    )
    return name_of("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def program(state: dict[str, np.ndarray], more: bytes = b"") -> bytes:
    """The pickle of {"model": state}; `more`: operations that add entries."""
    entries = b""
    for i, (key, value) in enumerate(state.items()):
        strides = tuple(stride // value.itemsize for stride in value.strides)
        entries += text(key) + tensor(str(i), value.size, value.shape, strides)
    return b"\x80\x02}" + text("model") + b"}(" + entries + b"us" + more + b"."


def archive(members: dict[str, bytes]) -> bytes:
    """A zip without compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def pth(data_pkl: bytes, state: dict[str, np.ndarray]) -> bytes:
    return archive({"a/data.pkl": data_pkl, "a/byteorder": b"little"} | {f"a/data/{i}": v.tobytes() for i, v in enumerate(state.values())})


def safetensors_file(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def safetensors_header(state: dict[str, np.ndarray]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "maskvit": '{"num_heads": 2, "image_size": [4, 4]}'}}
    at = 0
    for key, value in state.items():
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    return header


def onnx_file() -> bytes:
    """A small graph with the names of an export; empty where onnx is not installed."""
    try:
        import onnx
    except ImportError:
        return b""
    make, constant = onnx.helper.make_node, onnx.numpy_helper.from_array
    tensors = {"embeddings.cls_token": (1, 1, 4), "embeddings.patch_embeddings.projection.weight": (4, 3, 2, 2)}
    tensors |= {"encoder.layer.0.norm1.weight": (4,), "encoder.layer.0.mlp.fc1.bias": (8,), "onnx::MatMul_1": (4, 8)}
    tensors |= {"onnx::Concat_2": (1, 1, 4), "onnx::Reshape_3": (1, 4, 4)}
    nodes = [make("MatMul", ["x", "onnx::MatMul_1"], ["y"]), make("Add", ["encoder.layer.0.mlp.fc1.bias", "y"], ["z"])]
    nodes += [make("Concat", ["onnx::Concat_2", "t"], ["u"], axis=1), make("Reshape", ["onnx::Reshape_3", "s"], ["t"])]
    nodes.append(make("Resize", ["t"], ["v"], mode="cubic", coordinate_transformation_mode="half_pixel", cubic_coeff_a=-0.75))
    picture = onnx.helper.make_tensor_value_info("image", 1, [1, 3, 4, 4])
    values = [constant(np.ones(shape, np.float32), name) for name, shape in tensors.items()]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [picture], [], values)).SerializeToString()


# ------------------------------------------------------------------------------------------ broken files


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, removed, repeated or put in."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(6)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 1 and found:
            found[at % len(found)] = rng.randrange(256)
        elif kind == 2:
            del found[at : at + rng.choice((1, 2, 8, 100))]
        elif kind == 3:
            found[at:at] = found[at : at + rng.choice((1, 4, 64))] * rng.choice((1, 2, 1000))
        elif kind == 4:
            found[at:at] = rng.choice((b"\xff" * 8, bytes(8), struct.pack("<Q", rng.getrandbits(64)), struct.pack("<I", 2**31 - 1)))
        else:
            del found[at:]
    return bytes(found)


GLOBALS = [
    *(("torch", f"{kind}Storage") for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Byte", "Bool", "ComplexFloat")),
    *(("torch", name) for name in ("float32", "bfloat16", "Size", "device", "Tensor", "load", "Generator")),
    *(("torch._utils", f"_rebuild_{name}") for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")),
    *(("torch._tensor", "_rebuild_from_type_v2"), ("torch.storage", "_load_from_bytes"), ("torch.nn.parameter", "Parameter")),
    *(("collections", name) for name in ("OrderedDict", "defaultdict", "Counter", "deque", "namedtuple")),
    *(("numpy.core.multiarray", name) for name in ("scalar", "_reconstruct")),
    *(("numpy", "dtype"), ("numpy", "ndarray"), ("numpy", "load"), ("argparse", "Namespace"), ("types", "SimpleNamespace")),
    *(("builtins", name) for name in ("set", "eval", "exec", "getattr", "setattr", "object", "type", "print", "dict", "list", "int")),
    *(("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("copyreg", "_reconstructor"), ("copyreg", "add_extension")),
    *(("pathlib", "PosixPath"), ("omegaconf", "DictConfig"), ("__main__", "X"), ("maskvit.convert", "export"), ("ml_dtypes", "bfloat16")),
    *(("sys", "modules"), ("sys", "setrecursionlimit"), ("_codecs", "encode"), ("", ""), ("a.b", "c.d"), ("torch._utils", "__dict__")),
]
NAMES = (
    "model",
    "state_dict",
    "teacher",
    "student",
    "state_dict_ema",
    "args",
    "epoch",
    "optimizer",
    "__class__",
    "__dict__",
    "",
    "\x1b[2J",
)
NAMES += ("_content", "_val", "num_heads", "image_size", "norm_pix_loss", "mean", "std", "maskvit", "pretrained_cfg", "ibot_loss", "\udcff")
NUMBERS = (0, 1, 2, 3, 5, -1, 255, 2**16, 2**31 - 1, -(2**31), 2**31, 2**47, 2**61 - 1, 2**63, -(2**63), 2**64, 10**30)


# Operations by what they need on the stack, how many values and whether a mark below them, and how many values they leave.
JOINS: tuple[tuple[bytes, int, bool, int], ...] = (
    *((op, 1, False, 1) for op in (b"\x85", b"q\x00", b"q\x01", b"r\xff\xff\xff\x7f", b"\x94", b"Q", b"P0\n")),
    *((op, 1, False, 2) for op in (b"2", b"h\x00", b"h\x01")),
    *((op, 2, False, 1) for op in (b"\x86", b"R", b"R", b"R", b"\x81", b"b", b"b", b"b", b"a", b"\x93")),
    *((op, 3, False, 1) for op in (b"\x87", b"s", b"s", b"\x92")),
    *((op, 0, True, 1) for op in (b"t", b"l", b"d", b"\x91", b"o", b"(ios\nsystem\n", b"(icollections\nOrderedDict\n")),
    *((op, 1, True, 1) for op in (b"u", b"u", b"e", b"\x90")),
    (b"0", 1, False, 0),
    (b"1", 0, True, 0),
)
# What belongs together: a call, an object's attributes, entries.
PHRASES = (b"", b")R", b")\x81", b")R}b", b")\x81N}\x86b", b"K\x00\x85R", b")R}(" + text("a") + b"Nub", b"]\x85R", b"}\x85R")


def random_program(rng: random.Random, keys: list[str]) -> bytes:
    """A pickle program of operations that fit together more often than not."""
    kinds = [name for _, name in GLOBALS if name.endswith("Storage")]

    def numbers(usual: tuple[int, ...], axes: int) -> tuple[int, ...]:
        return tuple(rng.choice(NUMBERS) if rng.random() < 0.05 else rng.choice(usual) for _ in range(axes))

    def random_tensor() -> bytes:
        axes = rng.choice((0, 1, 1, 2, 2, 4, 70))
        count, offset = rng.choice((4, 4, 16, 20, rng.choice(NUMBERS))), rng.choice((0, 0, 0, 0, *NUMBERS[:6]))
        strides = numbers((0, 1, 1, 4), axes + (rng.random() < 0.05))
        return tensor(rng.choice(("0", "0", "1", "2", "99", "../x")), count, numbers((1, 2, 4), axes), strides, rng.choice(kinds), offset)

    pushes: list[Callable[[], bytes]] = [
        lambda: text(rng.choice(rng.choice((NAMES, keys)))),
        lambda: integer(rng.choice(NUMBERS)),
        lambda: name_of(*rng.choice(GLOBALS)) + rng.choice(PHRASES),
        lambda: text(rng.choice(GLOBALS)[0]) + text(rng.choice(GLOBALS)[1]) + b"\x93",
        lambda: rng.choice((b"}", b"}", b"]", b")", b"\x8f", b"N", b"\x88", b"\x89", b"G?\xf0\x00\x00\x00\x00\x00\x00")),
        random_tensor,
        lambda: rng.choice((b"j\xff\xff\xff\x7f", b"g7\n", b"\x82\x01", b"\x97", b"I01\n", b"L5L\n", b"F1e999\n")),
        lambda: b"C\x07" + rng.randbytes(7),
        lambda: b"\x8b" + struct.pack("<i", rng.choice((0, 1, 9, 200, -1))) + rng.randbytes(200),
    ]
    weights = (6, 4, 5, 1, 5, 5, 0.05, 1, 0.05)
    out, depths = [b"\x80" + bytes([rng.choice((2, 2, 2, 3, 4, 5))])], [0]
    for _ in range(rng.choice((3, 10, 30, 100))):
        fits = [join for join in JOINS if len(depths) > 1 or not join[2]]
        fits = [join for join in fits if join[1] <= (depths[-2] if join[2] else depths[-1])]
        if rng.random() < 0.01:  # what does not fit
            out.append(rng.choice(JOINS)[0] * rng.choice((1, 2, 500)))
        elif rng.random() < 0.1:
            out.append(b"(")
            depths.append(0)
        elif fits and rng.random() < 0.3:
            op, takes, marked, leaves = rng.choice(fits)
            out.append(op)
            if marked:
                depths.pop()
            depths[-1] += leaves - takes
        else:
            entry = rng.random() < 0.3  # into a dict below
            out.append((b"}" + text(rng.choice(rng.choice((NAMES, keys)))) if entry else b"") + rng.choices(pushes, weights)[0]())
            out.append(b"s" if entry else b"")
            depths[-1] += 1
    return b"".join(out) + b"." * (rng.random() < 0.9)


def random_json(rng: random.Random, depth: int = 0) -> Any:
    """What stands where something else belongs."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 6:
        return rng.choice(
            (None, True, -1, 2**70, 1e308, "x", "", "F8_E4M3", "\x1b[2J", float("nan"), rng.choice(NUMBERS), rng.choice(NAMES))
        )
    if kind == 6:
        return [random_json(rng, depth + 1) for _ in range(rng.choice((0, 1, 3, 100)))]
    return {rng.choice(NAMES).encode("ascii", "replace").decode(): random_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def changed_json(rng: random.Random, value: Any) -> Any:
    """The same with one thing in it replaced, renamed or removed."""
    value = json.loads(json.dumps(value))
    part = value
    while isinstance(part, (dict, list)) and part:
        key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
        if rng.random() < 0.5 or not isinstance(part[key], (dict, list)) or not part[key]:
            if rng.random() < 0.2:
                del part[key]
            elif rng.random() < 0.2 and isinstance(part, dict):
                part[rng.choice(NAMES).encode("ascii", "replace").decode()] = part.pop(key)
            else:
                part[key] = random_json(rng)
            break
        part = part[key]
    return value


class Right(NamedTuple):
    """Sound files, to be broken."""

    state: dict[str, np.ndarray]
    data_pkl: bytes
    pth: bytes
    header: dict[str, Any]
    data: bytes
    onnx: bytes


def right_files() -> Right:
    state = vit()
    more = (
        text("epoch")
        + integer(3)
        + b"s"
        + text("args")
        + name_of("argparse", "Namespace")
        + b")R}"
        + text("num_heads")
        + integer(2)
        + b"sbs"
    )
    data_pkl = program(state, more)
    data = b"".join(value.tobytes() for value in state.values())
    return Right(state, data_pkl, pth(data_pkl, state), safetensors_header(state), data, onnx_file())


# How many files of each kind among a hundred.
KINDS = dict(program=40, pickle=15, zip=8, header=10, text=8, safetensors=4, index=6, onnx=5, beside=4)


def make(number: int, seed: int, folder: Path, right: Right) -> Path:
    """The file of a number, written to an empty folder."""
    rng = random.Random(f"{seed}/{number}")
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    path = folder / ("x.safetensors" if kind in ("header", "text", "safetensors", "beside") else "x.pth")
    header = json.dumps(right.header).encode()
    if kind == "program":
        path.write_bytes(pth(random_program(rng, list(right.state)), right.state))
    elif kind == "pickle":
        path.write_bytes(pth(damaged(rng, right.data_pkl), right.state))
    elif kind == "zip":
        path.write_bytes(damaged(rng, right.pth))
    elif kind == "header":
        path.write_bytes(safetensors_file(json.dumps(changed_json(rng, right.header)).encode("utf-8", "surrogatepass"), right.data))
    elif kind == "text":
        path.write_bytes(safetensors_file(damaged(rng, header), right.data))
    elif kind == "safetensors":
        path.write_bytes(damaged(rng, safetensors_file(header, right.data)))
    elif kind == "index":
        shard = "model-00001-of-00001.safetensors"
        (folder / shard).write_bytes(safetensors_file(header, right.data))
        index = json.dumps(changed_json(rng, {"metadata": {}, "weight_map": dict.fromkeys(right.state, shard)})).encode()
        path = folder / "model.safetensors.index.json"
        path.write_bytes(damaged(rng, index) if rng.random() < 0.5 else index)
    elif kind == "onnx":
        path = folder / "x.onnx"
        path.write_bytes(damaged(rng, right.onnx))
    else:
        path.write_bytes(safetensors_file(header, right.data))
        sizes: dict[str, Any] = dict(model_type="vit", hidden_size=4, num_attention_heads=2, image_size=[4, 4], layer_norm_eps=1e-6)
        config = rng.choice((sizes, dict(architecture="vit", pretrained_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3, input_size=[3, 4, 4]))))
        pictures = rng.choice(
            (dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, rescale_factor=0.1), dict(image_processor=dict(image_mean=[1], image_std=[2])))
        )
        (folder / "config.json").write_text(json.dumps(changed_json(rng, config)))
        (folder / "preprocessor_config.json").write_text(json.dumps(changed_json(rng, pictures)))
    return path
