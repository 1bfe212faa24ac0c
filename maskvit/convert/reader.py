"""Tensors out of `.pth` and `.safetensors` files, without torch and without running anything that a file asks for.

A `.pth` is a zip of a pickle and raw storages. What a file is, its contents say and not its name. All work and memory is bounded
by the file's size.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import struct
import zipfile
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maskvit.convert.formats import ConversionError, check_directory, foreign_file, foreign_zip
from maskvit.convert.pickles import MAX_AXES, Machine
from maskvit.convert.stand_ins import STORAGE_TYPES, Stored

MAX_PICKLE_BYTES = 64 * 2**20
MAX_DIRECTORY_BYTES = 16 * 2**20
# Of safetensors' header and of JSON files: each byte takes some thirty in memory once read.
MAX_JSON_BYTES = 8 * 2**20
# Tensors may share storages (tied weights, one value for a whole tensor), but not so that a small file asks for a large memory.
MAX_SHARING = 8
MIN_SHARED_BYTES = 2**20
SAFE_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
# What a folder at Hugging Face calls its weights, the safe form first.
INDEX = ".index.json"
FOLDER_FILES = (
    *("model.safetensors", f"model.safetensors{INDEX}", "diffusion_pytorch_model.safetensors", "open_clip_model.safetensors"),
    *("pytorch_model.bin", f"pytorch_model.bin{INDEX}", "open_clip_pytorch_model.bin"),
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".onnx")
MAX_SHARDS = 1000
MAX_FILES_LISTED = 10_000


def sha256(path: str | Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_file(path: Path) -> bool:
    """Whether a path is that of a regular file; names that no file can have are not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def check_file(path: Path) -> None:
    """ConversionError where there is no regular file."""
    if not is_file(path):
        there = path.exists() if "\0" not in str(path) else False
        raise ConversionError(f"{path}: {'is a folder or a device: no such file' if there else 'no such file'}")


def read_json(path: Path) -> Any:
    """The contents of a JSON file. ConversionError where it is none, or too large to be one that lies beside weights."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConversionError(f"{path}: has {path.stat().st_size:,} bytes, more than such a file needs")
        return json.loads(path.read_bytes().decode())  # UTF-8, as JSON is; bytes would be guessed at
    except ConversionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not sound JSON ({type(error).__name__}: {str(error)[:200]})") from error


def find_files(path: str | Path) -> list[Path]:
    """The file or files that `path` means: itself, the one checkpoint of a folder, or all shards of a model in several files.

    ConversionError where there is none, more than one, or a shard is missing.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if is_file(path / name)]
        if not found:
            raise ConversionError(
                f"{path}: is a folder without model.safetensors or pytorch_model.bin, or an index of either; {_inside(path)}"
            )
        path = found[0]
    shard = re.fullmatch(r"(.*)-[0-9]{5}-of-([0-9]{5})(\.\w+)", path.name)
    if path.name.endswith(INDEX):
        check_file(path)
        return _shards(path)
    if shard is None:
        check_file(path)
        return [path]
    index = path.with_name(f"{shard[1]}{shard[3]}{INDEX}")
    if is_file(index):
        return _shards(index)
    count = int(shard[2])
    if not 1 <= count <= MAX_SHARDS:
        raise ConversionError(f"{path}: is named as one of {count} shards")
    return _all_there(path, [path.with_name(f"{shard[1]}-{i:05d}-of-{shard[2]}{shard[3]}") for i in range(1, count + 1)])


def _inside(folder: Path) -> str:
    """What a folder without a checkpoint of a known name holds instead."""
    if is_file(folder / ".metadata") and next(folder.glob("*.distcp"), None):
        return (
            "it is a distributed checkpoint of torch: join it with python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{folder} NEW.pth"
        )
    if next(itertools.chain(folder.glob("state/_METADATA"), folder.glob("*/state/_METADATA"), folder.glob("checkpoints/*/state")), None):
        return "it is a checkpoint of ours: --to LAYOUT writes it for others"
    if is_file(folder / "saved_model.pb"):
        return "it is a model of TensorFlow; get the model in PyTorch's form or as safetensors"
    below = sorted(p for p in itertools.islice(folder.rglob("*"), MAX_FILES_LISTED) if p.suffix in SUFFIXES and is_file(p))
    return f"give one of {', '.join(map(str, below[:6]))}" if below else f"it holds no {', '.join(SUFFIXES)} file"


def _shards(index: Path) -> list[Path]:
    """The shards that an index names, in their order."""
    try:
        content = read_json(index)
    except ConversionError as error:
        raise ConversionError(f"{error}: not an index of shards") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f'{index}: not an index of shards: it has no "weight_map" of keys to names of files')
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if not name.isprintable() or name in ("", ".", "..") or Path(name).name != name]
    if outside:
        raise ConversionError(f"{index}: names {outside[0]!r}, which does not lie beside it")
    if len(names) > MAX_SHARDS:
        raise ConversionError(f"{index}: names {len(names):,} shards; at most {MAX_SHARDS:,} are read")
    return _all_there(index, [index.with_name(name) for name in names])


def _all_there(path: Path, shards: list[Path]) -> list[Path]:
    missing = [shard.name for shard in shards if not is_file(shard)]
    if missing or not shards:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ConversionError(
            f"{path}: belongs to a model in {len(shards)} shards, of which {len(missing)} are missing: {', '.join(missing[:8])}{more}; "
            "fetch them all into one folder"
        )
    return shards


def read_files(paths: Sequence[Path], allowed: Container[str] = ()) -> Any:
    """As `read_checkpoint`, of one file or of all shards of one model together."""
    if len(paths) == 1:
        return read_checkpoint(paths[0], allowed)
    together: dict[str, Any] = {}
    for path in paths:
        content = read_checkpoint(path, allowed)
        if not isinstance(content, dict):
            raise ConversionError(f"{path}: a shard that holds a {type(content).__name__}, not a state dict")
        twice = together.keys() & content.keys()
        if twice:
            raise ConversionError(f"{path}: holds {min(map(str, twice))!r}, which another shard holds too")
        together.update(content)
    return together


def read_checkpoint(path: str | Path, allowed: Container[str] = ()) -> Any:
    """What a `.pth` or `.safetensors` file holds, with numpy arrays for tensors. ConversionError says what is wrong.

    `allowed`: names of globals ("module.Class") that a `.pth` may mention beside those that are known; stand-ins take their place.
    """
    path = Path(path)
    check_file(path)
    size = path.stat().st_size
    if size == 0:
        raise ConversionError(f"{path}: the file is empty")
    with open(path, "rb") as file:
        start = file.read(1024)
        file.seek(max(0, size - 64))
        end = file.read()
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _read_archive(path, size, allowed)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and (path.suffix == ".safetensors" or length <= size):
        return _read_safetensors(path, size, length)[0]
    foreign = foreign_file(path, start, end)
    if foreign:
        raise ConversionError(f"{path}: {foreign}")
    kind = "a sound safetensors file" if path.suffix == ".safetensors" else "a PyTorch checkpoint"
    raise ConversionError(f"{path}: not {kind}, or cut off; compare its size and SHA-256 with the source's")


def read_stated(path: Path) -> dict[str, str]:
    """The texts that a safetensors file states of itself; empty for all other files."""
    with open(path, "rb") as file:
        start = file.read(9)
    length, size = int.from_bytes(start[:8], "little"), path.stat().st_size
    return _read_safetensors(path, size, length, tensors=False)[1] if start[8:9] == b"{" and length <= size else {}


def _read_archive(path: Path, size: int, allowed: Container[str]) -> Any:
    check_directory(path, size, MAX_DIRECTORY_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).load(allowed)
    except ConversionError:
        raise
    except Exception as error:  # zipfile raises many kinds; whatever is wrong, the file is at fault
        raise ConversionError(
            f"{path}: not a PyTorch checkpoint, or cut off ({str(error)[:200]}); compare its size and SHA-256 with the source's"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _read_safetensors(path: Path, size: int, length: int, tensors: bool = True) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(the tensors, the texts about them). The header is looked through first, which the library's errors do not explain."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    problem = f"{path}: not a sound safetensors file"
    if not 2 <= length <= size - 8:
        raise ConversionError(f"{problem}: its header claims {length:,} of {size:,} bytes; cut off?")
    if length > MAX_JSON_BYTES:
        raise ConversionError(f"{problem}: its header has {length:,} bytes, more than a checkpoint needs")
    try:
        with open(path, "rb") as file:
            file.seek(8)
            header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        stated = header.pop("__metadata__", {})
        others = sorted(name if name.isprintable() else repr(name) for name in {str(e["dtype"]) for e in header.values()} - set(SAFE_TYPES))
        deep = [name for name, entry in header.items() if len(entry["shape"]) > MAX_AXES]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{problem} (its header: {type(error).__name__}: {str(error)[:200]})") from error
    if others:
        raise ConversionError(f"{path}: its tensors are of type {', '.join(others[:8])}; read are {', '.join(SAFE_TYPES)}")
    if deep:
        raise ConversionError(f"{path}: {deep[0]!r} has more than {MAX_AXES} axes")
    stated = {key: value for key, value in stated.items() if isinstance(value, str)} if isinstance(stated, dict) else {}
    if not tensors:
        return {}, stated
    try:
        return load_file(str(path)), stated
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConversionError(f"{problem} ({str(error)[:300]})") from error


class _Archive:
    """One open `.pth`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        self.storages: dict[str, np.ndarray] = {}
        self.size = path.stat().st_size
        self.tensor_bytes = 0
        names = [info.filename for info in archive.infolist()]
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        scripts = any(name.split("/")[1:] == ["constants.pkl"] for name in names)
        for info in archive.infolist():
            parts = info.filename.split("/")
            if info.filename.startswith("/") or "\\" in info.filename or ".." in parts:
                raise ConversionError(f"{path}: the archive has the unsafe member name {info.filename!r}")
            if info.flag_bits & 1:
                raise ConversionError(f"{path}: member {info.filename!r} is encrypted")
            # PyTorch stores without compression; so no member can be larger than the file.
            if pickles and (info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size):
                raise ConversionError(f"{path}: member {info.filename!r} is compressed, which PyTorch never does")
        if len(pickles) != 1 or scripts:
            raise ConversionError(f"{path}: {foreign_zip(names)}")
        if sum(info.file_size for info in archive.infolist()) > self.size:
            raise ConversionError(f"{path}: its members claim more bytes than the file has: they overlap")
        if len(set(names)) != len(names):
            raise ConversionError(f"{path}: the archive has the same member twice")
        self.root = pickles[0].removesuffix("data.pkl")
        self.sizes = {info.filename: info.file_size for info in archive.infolist()}
        if self.sizes[pickles[0]] > MAX_PICKLE_BYTES:
            raise ConversionError(f"{path}: its pickle has {self.sizes[pickles[0]]:,} bytes, more than a state dict needs")
        if f"{self.root}byteorder" in self.sizes and self._member("byteorder").strip() != b"little":
            raise ConversionError(f"{path}: its values are not little-endian")

    def _member(self, name: str) -> bytes:
        try:
            return self.archive.read(self.root + name)
        except KeyError as error:
            raise ConversionError(f"{self.path}: member {self.root + name!r} is missing") from error
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError, struct.error) as error:
            raise ConversionError(f"{self.path}: member {self.root + name!r} is damaged ({error})") from error

    def load(self, allowed: Container[str]) -> Any:
        return Machine(self._member("data.pkl"), str(self.path), self.tensor, allowed).run()

    def _values(self, stored: Stored) -> np.ndarray:
        """The values of one storage, read once."""
        if stored.key not in self.storages:
            self.storages[stored.key] = np.frombuffer(self._member(f"data/{stored.key}"), np.uint8)
        raw, dtype = self.storages[stored.key], _dtype(stored.kind)
        if stored.count * dtype.itemsize != raw.size:
            raise ConversionError(f"{self.path}: storage {stored.key!r} has {raw.size:,} bytes, not {stored.count} values of {dtype}")
        return raw.view(dtype)

    def tensor(self, stored: Stored, offset: Any, size: tuple[Any, ...], stride: tuple[Any, ...]) -> np.ndarray:
        """A tensor on a storage, checked to lie inside it, and all tensors together not to be much larger than the file."""
        if not all(type(n) is int and abs(n) < 2**48 for n in (offset, *size, *stride)):
            raise ConversionError(f"{self.path}: a tensor whose offset, size or stride is of the wrong type")
        if any(n < 0 for n in (offset, *size, *stride)):
            raise ConversionError(f"{self.path}: a tensor with offset {offset}, size {size} and stride {stride}")
        storage = self._values(stored)
        count = math.prod(size)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else offset
        if last > storage.size or (count and last == storage.size):
            raise ConversionError(
                f"{self.path}: a tensor of size {size} and stride {stride} at {offset} does not fit its storage of {storage.size}"
            )
        self.tensor_bytes += count * storage.itemsize
        if self.tensor_bytes > max(MAX_SHARING * self.size, MIN_SHARED_BYTES):
            raise ConversionError(f"{self.path}: its tensors share storages so that they take over {MAX_SHARING} times the file's size")
        strides = [s * storage.itemsize for s in stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(storage[offset:], size, strides)).reshape(size)


def _dtype(kind: str) -> np.dtype:
    name = STORAGE_TYPES[kind]
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
