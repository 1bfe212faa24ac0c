"""What a file is by its first bytes, where it is not what was asked for: a pointer, a web page, another tool's format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from maskvit.core.errors import printable

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
# torch's default since 2.6, weights_only=True, refuses tar files and files with a Namespace, and so would not rewrite them.
REWRITE = (
    "where it comes from a source that you trust, rewrite it with python -c \"import torch; torch.save(torch.load('OLD', "
    "map_location='cpu', weights_only=False), 'NEW')\""
)
REWRITE_PICKLE = (
    'where it comes from a source that you trust, rewrite it with python -c "import pickle, torch; '
    "torch.save(pickle.load(open('OLD', 'rb'), encoding='latin1'), 'NEW')\""
)
REWRITE_SCRIPT = (
    "take its weights with python -c \"import torch; torch.save(torch.jit.load('OLD', map_location='cpu').state_dict(), 'NEW')\""
)
UNPACK = "unpack it and give the checkpoint inside"
# (first bytes, what begins so, what to do)
MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the weights themselves",
        "fetch them with `git lfs pull`, or download the file itself",
    ),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write (.h5)", "convert it to PyTorch or safetensors first"),
    (b"\x93NUMPY", "one numpy array (.npy)", "save the model's tensors as .safetensors"),
    (b"\x1f\x8b", "compressed with gzip", UNPACK),
    (b"BZh", "compressed with bzip2", UNPACK),
    (b"\xfd7zXZ\x00", "compressed with xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"GGUF", "a GGUF file, as llama.cpp reads", "get the model in PyTorch's form or as safetensors"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture", "give the checkpoint's path"),
    (b"\xff\xd8\xff", "a JPEG picture", "give the checkpoint's path"),
    (b"%PDF-", "a PDF document", "give the checkpoint's path"),
    (b"\x7fELF", "a program (ELF)", "give the checkpoint's path"),
    (LEGACY_MAGIC, "written in PyTorch's format from before 1.6 (several pickles)", REWRITE),
)
WEB_PAGE = "a web page (HTML)"
TEXT_STARTS = ((b"<!doctype", WEB_PAGE), (b"<html", WEB_PAGE), (b"<head", WEB_PAGE), (b"<!--", WEB_PAGE), (b"<?xml", "XML text"))
FETCH_AGAIN = "what came instead of the weights (a log-in or quota notice?); fetch the file again and compare its size"
# The last eight bytes of a table of TensorFlow (.index), and of LevelDB.
TABLE_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
# Members of zip archives that say who wrote them. PyTorch's own have <name>/data.pkl.
ZIPS: tuple[tuple[str, str, str], ...] = (
    ("/constants.pkl", "a TorchScript program (torch.jit.save)", REWRITE_SCRIPT),
    (".npy", "arrays of numpy (.npz), as Google's JAX checkpoints are", "get the model in PyTorch's form (timm, Hugging Face)"),
    ("/serialized_exported_program.json", "a program of torch.export (.pt2)", "save its state_dict with torch.save"),
    ("serialized_exported_program.json", "a program of torch.export (.pt2)", "save its state_dict with torch.save"),
    ("/archive_format", "a program of torch.export (.pt2)", "save its state_dict with torch.save"),
    (".weights.h5", "a Keras model (.keras)", "convert it to PyTorch or safetensors first"),
    (".pth", "a zip around a checkpoint", UNPACK),
    (".pt", "a zip around a checkpoint", UNPACK),
    (".bin", "a zip around a checkpoint", UNPACK),
    (".safetensors", "a zip around a checkpoint", UNPACK),
)


class ConversionError(ValueError):
    """A file is not what it claims, not what is needed, or not safe; nothing in it was imported or called.

    Its message may quote the file: control characters are spelled out.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def foreign_file(path: Path, start: bytes, end: bytes) -> str | None:
    """What `path` is, of its first and last bytes, and what to do; None where it is of no kind that is known here."""
    for magic, what, advice in MAGICS:
        if start.startswith(magic):
            return f"is {what}; {advice}" if not what.startswith(("compressed", "written")) else f"is {what}: {advice}"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, what in TEXT_STARTS:
        if text.startswith(magic):
            return f"is {what}, {FETCH_AGAIN}"
    if start[257:262] == b"ustar":
        if b"sys_info" in start[:100] or start.startswith((b"pickle\0", b"storages\0", b"tensors\0")):
            return f"is written in PyTorch's format from before 1.6 (a tar): {REWRITE}"
        return f"is a tar archive; {UNPACK}"
    if start[4:8] == b"TFL3":
        return "is a TensorFlow Lite model; get the model in PyTorch's form or as safetensors"
    if end.endswith(TABLE_END) or ".data-0" in path.name or path.name == "saved_model.pb":
        return "is a part of a TensorFlow checkpoint; get the model in PyTorch's form or as safetensors"
    if path.suffix == ".msgpack":
        return "is a Flax checkpoint (.msgpack); get the model as safetensors or in PyTorch's form"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"is a bare pickle, not written by torch.save (or in PyTorch's format from before 1.6): {REWRITE_PICKLE}"
    if not start.strip(b"\0"):
        return "holds zeros alone where its contents should begin: an unfinished download?"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start[:200]):
        return f"is text that begins {start[:60].decode('ascii')!r}, {FETCH_AGAIN}"
    return None


def foreign_zip(names: Iterable[str]) -> str:
    """What a zip archive without <name>/data.pkl is, of its members' names, and what to do."""
    names = list(names)
    for end, what, advice in ZIPS:
        if any(name.endswith(end) for name in names):
            return f"is {what}; {advice}"
    return f"a zip, but not a PyTorch checkpoint: it has no member <name>/data.pkl, but {', '.join(map(repr, names[:4])) or 'nothing'}"


def check_directory(path: Path, size: int, limit: int) -> None:
    """ConversionError where the directory of a zip archive claims more than `limit` bytes: each takes fifteen in memory once read."""
    with open(path, "rb") as file:
        file.seek(max(0, size - 2**16 - 256))
        tail = file.read()
    for magic, at, width in ((b"PK\x05\x06", 12, 4), (b"PK\x06\x06", 40, 8)):
        start = tail.find(magic)
        while start >= 0:
            claimed = int.from_bytes(tail[start + at : start + at + width], "little")
            if limit < claimed != 2**32 - 1:
                raise ConversionError(f"{path}: its directory has {claimed:,} bytes, more than a checkpoint needs")
            start = tail.find(magic, start + 1)
