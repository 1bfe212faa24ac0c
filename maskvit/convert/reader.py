"""Tensors out of `.pth` and `.safetensors` files, without torch and without running anything that a file asks for.

A `.pth` is a zip of a pickle and raw storages. The pickle is read with an allow-list: tensors, ordered dicts and an inert
stand-in for `argparse.Namespace`; any other global is refused by its name before it is looked up.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_PICKLE_BYTES = 64 * 2**20
# Tensors may share storages (tied weights), but not so that a small file asks for a large memory.
MAX_SHARING = 8
STORAGE_TYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
TYPE_NAMES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# What a folder at Hugging Face calls its weights, the safe form first.
INDEX = ".index.json"
FOLDER_FILES = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".onnx")
MAX_SHARDS = 1000
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"


class ConversionError(ValueError):
    """A file is not what it claims, not what is needed, or not safe; nothing in it was imported or called."""


class Namespace:
    """Stands for `argparse.Namespace`: attributes, nothing else."""


class _Storage(NamedTuple):
    """A storage type. Immutable: a pickle may try to write attributes onto what it is given."""

    dtype: np.dtype


class _Dict(dict):
    """Stands for `OrderedDict`, without attributes: torch stores some beside a state dict, and one could hide a method."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Attributes are left out."""


def sha256(path: str | Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_files(path: str | Path) -> list[Path]:
    """The file or files that `path` means: itself, the one checkpoint of a folder, or all shards of a model in several files.

    ConversionError where there is none, more than one, or a shard is missing.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not found:
            below = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            hint = f"give one of {', '.join(map(str, below[:6]))}" if below else f"it holds no {', '.join(SUFFIXES)} file"
            raise ConversionError(f"{path}: is a folder without {' or '.join(FOLDER_FILES)}; {hint}")
        path = found[0]
    shard = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\.\w+)", path.name)
    if path.name.endswith(INDEX):
        return _shards(path)
    if shard is None:
        if not path.is_file():
            raise ConversionError(f"{path}: no such file")
        return [path]
    index = path.with_name(f"{shard[1]}{shard[3]}{INDEX}")
    if index.is_file():
        return _shards(index)
    count = int(shard[2])
    if not 1 <= count <= MAX_SHARDS:
        raise ConversionError(f"{path}: is named as one of {count} shards")
    return _all_there(path, [path.with_name(f"{shard[1]}-{i:05d}-of-{shard[2]}{shard[3]}") for i in range(1, count + 1)])


def _shards(index: Path) -> list[Path]:
    """The shards that an index names, in their order."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{index}: not an index of shards ({type(error).__name__}: {str(error)[:200]})") from error
    if outside:
        raise ConversionError(f"{index}: names {outside[0]!r}, which does not lie beside it")
    return _all_there(index, [index.with_name(name) for name in names])


def _all_there(path: Path, shards: list[Path]) -> list[Path]:
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ConversionError(
            f"{path}: belongs to a model in {len(shards)} shards, of which {len(missing)} are missing: {', '.join(missing[:8])}{more}; "
            "fetch them all into one folder"
        )
    return shards


def read_files(paths: Sequence[Path]) -> Any:
    """As `read_checkpoint`, of one file or of all shards of one model together."""
    if len(paths) == 1:
        return read_checkpoint(paths[0])
    together: dict[str, Any] = {}
    for path in paths:
        content = read_checkpoint(path)
        if not isinstance(content, dict):
            raise ConversionError(f"{path}: a shard that holds a {type(content).__name__}, not a state dict")
        twice = together.keys() & content.keys()
        if twice:
            raise ConversionError(f"{path}: holds {min(map(str, twice))!r}, which another shard holds too")
        together.update(content)
    return together


def read_checkpoint(path: str | Path) -> Any:
    """What a `.pth` or `.safetensors` file holds, with numpy arrays for tensors. ConversionError says what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ConversionError(f"{path}: the file is empty")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith(LEGACY_MAGIC) or start[:1] == b"\x80" or start[257:262] == b"ustar":
        raise ConversionError(
            f"{path}: written in PyTorch's format from before 1.6 (a tar or several pickles), or a bare pickle; where it comes from a "
            "trusted source, rewrite it with "
            "python -c \"import torch; torch.save(torch.load('OLD', map_location='cpu'), 'NEW')\""
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).load()
    except ConversionError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise ConversionError(
            f"{path}: not a PyTorch checkpoint, or cut off ({error}); compare its size and SHA-256 with the source's"
        ) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors
    from safetensors.numpy import load_file

    try:
        return load_file(str(path))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConversionError(f"{path}: not a sound safetensors file ({error})") from error


class _Archive:
    """One open `.pth`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        self.storages: dict[str, np.ndarray] = {}
        self.tensor_bytes = 0
        names = [info.filename for info in archive.infolist()]
        for info in archive.infolist():
            parts = info.filename.split("/")
            if info.filename.startswith("/") or "\\" in info.filename or ".." in parts:
                raise ConversionError(f"{path}: the archive has the unsafe member name {info.filename!r}")
            if info.flag_bits & 1:
                raise ConversionError(f"{path}: member {info.filename!r} is encrypted")
            # PyTorch stores without compression; so no member can be larger than the file.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ConversionError(f"{path}: member {info.filename!r} is compressed, which PyTorch never does")
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise ConversionError(f"{path}: its members claim more bytes than the file has: they overlap")
        if len(set(names)) != len(names):
            raise ConversionError(f"{path}: the archive has the same member twice")
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ConversionError(f"{path}: a zip, but not a PyTorch checkpoint: it has no member <name>/data.pkl")
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
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise ConversionError(f"{self.path}: member {self.root + name!r} is damaged ({error})") from error

    def load(self) -> Any:
        program = self._member("data.pkl")
        try:
            # Looked through before it is run: one memo index may make Python's unpickler take as many times 16 bytes.
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(program):
                    raise ConversionError(f"{self.path}: its pickle numbers more objects than it can hold")
            return _Unpickler(io.BytesIO(program), self).load()
        except ConversionError:
            raise
        except Exception as error:  # a pickle is a program: whatever it does wrong, the file is at fault
            raise ConversionError(f"{self.path}: its pickle cannot be read ({type(error).__name__}: {error})") from error

    def storage(self, dtype: np.dtype, key: Any, count: Any) -> np.ndarray:
        """The values of one storage, read once."""
        if not isinstance(key, str) or "/" in key or key in (".", ".."):
            raise ConversionError(f"{self.path}: unsafe storage name {key!r}")
        if key not in self.storages:
            data = self._member(f"data/{key}")
            self.storages[key] = np.frombuffer(data, np.uint8)
        raw = self.storages[key]
        if not isinstance(count, int) or count * dtype.itemsize != raw.size:
            raise ConversionError(f"{self.path}: storage {key!r} has {raw.size:,} bytes, not {count} values of {dtype}")
        return raw.view(dtype)

    def tensor(self, storage: Any, offset: Any, size: tuple[Any, ...], stride: tuple[Any, ...]) -> np.ndarray:
        """A tensor on a storage, checked to lie inside it and not to be larger than it."""
        numbers = (offset, *size, *stride)
        if not isinstance(storage, np.ndarray) or len(size) != len(stride) or not all(type(n) is int and abs(n) < 2**48 for n in numbers):
            raise ConversionError(f"{self.path}: a tensor whose storage, offset, size or stride is of the wrong type")
        if any(n < 0 for n in numbers):
            raise ConversionError(f"{self.path}: a tensor with offset {offset}, size {size} and stride {stride}")
        count = math.prod(size)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else offset
        if count > storage.size or (count and last >= storage.size):
            raise ConversionError(
                f"{self.path}: a tensor of size {size} and stride {stride} at {offset} does not fit its storage of {storage.size}"
            )
        self.tensor_bytes += count * storage.itemsize
        if self.tensor_bytes > MAX_SHARING * self.path.stat().st_size:
            raise ConversionError(f"{self.path}: its tensors share storages so that they take over {MAX_SHARING} times the file's size")
        strides = [s * storage.itemsize for s in stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(storage[offset:], size, strides)).reshape(size)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, archive: _Archive):
        super().__init__(file, encoding="utf-8")
        self.archive = archive

        def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
            return archive.tensor(storage, offset, tuple(size), tuple(stride))

        # Functions and classes of this file alone: what its pickle writes onto one reaches nothing else.
        self.allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): type("OrderedDict", (_Dict,), {"__slots__": ()}),
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch", "Size"): lambda sizes=(): tuple(sizes),
            ("torch", "device"): lambda *parts: ":".join(str(part) for part in parts if isinstance(part, (str, int))),
            ("argparse", "Namespace"): type("Namespace", (Namespace,), {}),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if module == "torch" and name in STORAGE_TYPES:
            return _Storage(np.dtype(STORAGE_TYPES[name]))
        if module == "torch" and name in TYPE_NAMES:
            return f"torch.{name}"
        raise ConversionError(
            f"{self.archive.path}: its pickle asks for {module}.{name}, which a checkpoint of tensors does not need; nothing was run. "
            "Where the file comes from a trusted source, save its state dict alone with torch"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Storage)):
            raise ConversionError(f"{self.archive.path}: its pickle holds a reference that is no tensor storage")
        return self.archive.storage(pid[1].dtype, pid[2], pid[4])
