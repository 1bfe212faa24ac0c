"""The TFDS builder of a folder of pictures: <root>/[<split>/]<modality>/<class or "all">/<file>, paired by name.

Everything that is wrong with the folder is told at once, by file name. 8-bit JPEG and PNG pictures keep their bytes; depth
and other arrays are packed so that they decode fast; distances in metres (float arrays) become counts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from maskvit.data import codec
from maskvit.data.builders.records import RecordBuilder, in_processes, progress
from maskvit.data.sources import STATED
from maskvit.data.transforms import nearest_indices, resize_continuous
from maskvit.modalities import Modality

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jpx")
ARRAYS = (".npy", ".npz")
NO_CLASS = "all"  # the class folder of data without labels
SHOWN = 20  # files listed per kind of problem
JPEG_QUALITY = 95  # of JPEG pictures that `short_side` makes smaller


class FolderError(ValueError):
    """What is wrong with a folder, all of it."""

    def __init__(self, root: str, problems: Mapping[str, Sequence[str]]):
        lines = [f"{root} cannot be built; {sum(map(len, problems.values()))} problems:"]
        for kind, found in problems.items():
            lines.append(f"{kind} ({len(found)}):")
            lines += [f"  {problem}" for problem in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"  ... and {len(found) - SHOWN} more")
        super().__init__("\n".join(lines))
        self.problems = {kind: list(found) for kind, found in problems.items()}


@dataclasses.dataclass(frozen=True)
class Task:
    """One sample to read: modality -> file."""

    key: str
    files: dict[str, str]


class _Unfit(ValueError):
    """A file that cannot be used: (kind of problem, what exactly)."""


MISSING, UNREADABLE, SIZE, IDS, CONTENT = "missing files", "unreadable files", "wrong size", "class ids out of range", "wrong content"


# --- one file ---------------------------------------------------------------------------------------------------------


def _load(path: str, modality: Modality) -> tuple[np.ndarray, bytes | None]:
    """(array, the file's own bytes where they can be stored as they are)."""
    extension = os.path.splitext(path)[1].lower()
    try:
        with open(path, "rb") as file:
            data = file.read()
        if extension in ARRAYS:
            loaded = np.load(io.BytesIO(data), allow_pickle=False)
            if extension == ".npz":
                if len(loaded.files) != 1:
                    raise _Unfit(CONTENT, f"holds the arrays {', '.join(loaded.files)}; store one array per file")
                loaded = loaded[loaded.files[0]]
            return loaded, None
        if modality.kind == "continuous" and modality.channels == 3:
            with Image.open(io.BytesIO(data)) as image:
                kind, mode = image.format, image.mode
                image.load()
                if mode in ("L", "RGB"):
                    return np.array(image), data if kind in ("JPEG", "PNG") else None
                if mode in ("I", "F") or mode.startswith("I;16"):
                    raise _Unfit(CONTENT, f"is a picture of mode {mode}; modality {modality.name!r} has 3 channels of 8 bits")
                return np.array(image.convert("RGB")), None  # palette, alpha, CMYK
        array = codec.decode(data)
    except _Unfit:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, Image.DecompressionBombError) as error:
        raise _Unfit(UNREADABLE, str(error).splitlines()[0]) from error
    own = data if data[:2] == b"\xff\xd8" or data[:4] == b"\x89PNG" else None
    return array, own if modality.kind == "continuous" and array.dtype == np.uint8 else None


def _class_ids(array: np.ndarray, modality: Modality) -> np.ndarray:
    """Class ids in the smallest type that holds them."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise _Unfit(CONTENT, f"is {array.dtype} of shape {array.shape}; class ids are integers in one channel")
    outside = (array < 0) | (array >= modality.num_classes)
    if modality.missing is not None:
        outside &= array != modality.missing
    if outside.any():
        found = ", ".join(map(str, np.unique(array[outside])[:5]))
        allowed = f"0 ... {modality.num_classes - 1}" + ("" if modality.missing is None else f" and {modality.missing} (missing)")
        raise _Unfit(IDS, f"has {found} on {int(outside.sum())} pixels; allowed: {allowed}")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    return array.astype(np.int16 if low < 0 else np.uint8 if high < 256 else np.uint16)


def _numbers(array: np.ndarray, modality: Modality) -> np.ndarray:
    """Values of a continuous modality in a type that can be packed: "h w" or "h w c"."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    grey = array.ndim == 2 and modality.channels == 3 and array.dtype == np.uint8
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else None
    if (channels != modality.channels and not grey) or array.dtype.kind not in "iuf":
        raise _Unfit(CONTENT, f"is {array.dtype} of shape {array.shape}; modality {modality.name!r} has {modality.channels} channel(s)")
    if array.dtype.kind == "f":
        return _counts(array, modality) if modality.metres_per_count else array.astype(np.float32)
    if array.dtype in (np.uint8, np.uint16, np.int16):
        return array
    low, high = int(array.min()), int(array.max())
    for dtype in (np.uint16, np.int16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return array.astype(np.float32)


def _counts(metres: np.ndarray, modality: Modality) -> np.ndarray:
    """Metres to uint16 counts; NaN, infinity, values <= 0 and beyond the range become the code for missing."""
    with np.errstate(invalid="ignore", over="ignore"):
        counts = np.rint(metres / modality.metres_per_count)
        valid = np.isfinite(counts) & (metres > 0) & (counts <= 65535)
    if modality.missing is None and not valid.all():
        raise _Unfit(
            CONTENT,
            f"{int((~valid).sum())} pixels hold no distance, and modality {modality.name!r} declares no code for that: set its missing (0)",
        )
    code = 0 if modality.missing is None else modality.missing
    if not 0 <= code <= 65535 or code != int(code):
        raise _Unfit(CONTENT, f"modality {modality.name!r} has missing = {code}, which uint16 cannot hold")
    return np.where(valid, counts, code).astype(np.uint16)


def _shrink(array: np.ndarray, modality: Modality, size: tuple[int, int]) -> np.ndarray:
    """Resize to `size` (height, width): nearest for class ids; missing values do not bleed into their neighbours."""
    if modality.kind == "categorical":
        return array[np.ix_(*(nearest_indices(old, new) for old, new in zip(array.shape[:2], size, strict=True)))]
    bands = array if array.ndim == 3 else array[..., None]
    result = resize_continuous(bands, size, modality.missing)
    if modality.missing is not None and array.dtype.kind != "f":
        result = np.where(np.isnan(result), modality.missing, result)
    if array.dtype.kind != "f":
        result = np.rint(result).astype(array.dtype)
    return result if array.ndim == 3 else result[..., 0]


def _encode(array: np.ndarray, modality: Modality, path: str) -> bytes:
    picture = array.dtype == np.uint8 and (array.ndim == 2 or array.shape[2] == 3)
    if modality.kind == "categorical" or not picture:
        return codec.encode_array(array)
    jpeg = path.lower().endswith((".jpg", ".jpeg"))
    out = io.BytesIO()
    Image.fromarray(array).save(out, **(dict(format="JPEG", quality=JPEG_QUALITY) if jpeg else dict(format="PNG")))
    return out.getvalue()


def read_sample(
    task: Task, modalities: Mapping[str, Modality], short_side: int | None
) -> tuple[dict[str, bytes], dict[str, tuple[int, int]], list[tuple[str, str]]]:
    """Read and encode one sample.

    Returns: (modality -> bytes, modality -> (pixels missing, pixels), problems as (kind, text)).
    """
    arrays, own, problems = {}, {}, []
    for name, path in task.files.items():
        modality = modalities[name]
        try:
            array, own[name] = _load(path, modality)
            array = _class_ids(array, modality) if modality.kind == "categorical" else _numbers(array, modality)
            if 0 in array.shape:
                raise _Unfit(CONTENT, f"is empty: shape {array.shape}")
            arrays[name] = array
        except _Unfit as error:
            kind, text = error.args
            problems.append((kind, f"{path}: {text}"))
    sizes = {name: array.shape[:2] for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        reference = next(iter(sizes))
        for name, (height, width) in sizes.items():
            if sizes[name] != sizes[reference]:
                rows, columns = sizes[reference]
                problems.append((SIZE, f"{task.files[name]}: {height} x {width}, but {task.files[reference]}: {rows} x {columns}"))
    if problems:
        return {}, {}, problems

    encoded, missing = {}, {}
    for name, array in arrays.items():
        modality = modalities[name]
        if short_side and min(array.shape[:2]) > short_side:
            factor = short_side / min(array.shape[:2])
            size = tuple(max(short_side, round(side * factor)) for side in array.shape[:2])
            array, own[name] = _shrink(array, modality, size), None
        absent = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)
        if modality.missing is not None:
            absent |= array == modality.missing
        missing[name] = (int(absent.sum()), absent.size)
        encoded[name] = own[name] or _encode(array, modality, task.files[name])
    return encoded, missing, []


# --- the folder -------------------------------------------------------------------------------------------------------


def _list_files(root: str, folder: str, problems: dict[str, list[str]]) -> dict[str, str]:
    """Class/name without extension -> file, of one modality. Two files for one name are a problem."""
    found: dict[str, str] = {}
    top = os.path.join(root, folder)
    for directory, below, files in os.walk(top, followlinks=True):
        below.sort()
        for file in sorted(files):
            stem, extension = os.path.splitext(file)
            if file.startswith(".") or extension.lower() not in IMAGES + ARRAYS:
                continue
            path = os.path.join(directory, file)
            key = os.path.relpath(os.path.join(directory, stem), top).replace(os.sep, "/")
            key = key if "/" in key else f"{NO_CLASS}/{key}"
            if key in found:
                problems.setdefault("two files for one name", []).append(f"{found[key]} and {path}")
            found[key] = path
    return found


def _find_splits(root: str, modalities: Sequence[str]) -> dict[str, str]:
    """Split -> its folder: `root` itself as "train", or those of its folders that hold a modality."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no folder {root}")
    if any(os.path.isdir(os.path.join(root, name)) for name in modalities):
        return {"train": root}
    splits = {
        entry: os.path.join(root, entry)
        for entry in sorted(os.listdir(root))
        if any(os.path.isdir(os.path.join(root, entry, name)) for name in modalities)
    }
    if not splits:
        raise FileNotFoundError(
            f"{root} holds none of the modalities {', '.join(modalities)}: expected {root}/<modality>/<class or all>/<file>, "
            f"or one such tree per split ({root}/train/..., {root}/val/...)"
        )
    return splits


class Folder(RecordBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A folder of pictures: <root>/[<split>/]<modality>/<class or "all">/<file>, modalities paired by class and name.

    Args:
      root: the folder; a tree without split folders is the split "train".
      data_dir, name: where TFDS stores it.
      modalities: what to read, by folder name. A modality with `metres_per_count` may be stored as float metres (.npy, .npz).
      val_fraction: share of the samples of a tree without split folders that becomes the split "val", drawn by `seed`.
      allow_missing: modalities that a sample may lack; any other absence is an error.
      short_side: make larger pictures smaller, so that the shorter side has this many pixels.
      workers: processes that read and encode; 0 does it in this one.
    """

    def __init__(
        self,
        *,
        root: str,
        data_dir: str,
        name: str,
        modalities: Mapping[str, Modality],
        val_fraction: float = 0.0,
        seed: int = 0,
        allow_missing: Sequence[str] = (),
        short_side: int | None = None,
        workers: int = 0,
    ):
        unknown = sorted(set(allow_missing) - set(modalities))
        if unknown:
            raise ValueError(f"allow_missing names {unknown[0]!r}; modalities: {', '.join(modalities)}")
        reserved = sorted({"id", "label"} & set(modalities))
        if reserved or not modalities:
            raise ValueError(f"modality {reserved[0]!r}: the name is taken by the record's own" if reserved else "no modalities given")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; it must lie in [0, 1)")
        if short_side is not None and short_side < 1:
            raise ValueError(f"short_side is {short_side}; give a positive number of pixels, or leave it out")
        self.root = os.path.abspath(os.path.expanduser(root))
        self.specs = dict(modalities)
        self.short_side, self.workers = short_side, workers
        self.allowed = tuple(allow_missing)
        self.problems: dict[str, list[str]] = {}
        self.tasks = self._list_tasks(val_fraction, seed)
        self.missing_pixels: collections.Counter[str] = collections.Counter()
        self.pixels: collections.Counter[str] = collections.Counter()
        classes = sorted({task.key.split("/")[0] for tasks in self.tasks.values() for task in tasks})
        stated = {
            modality: {field: getattr(spec, field) for field in STATED if _says(spec, field)} for modality, spec in self.specs.items()
        }
        super().__init__(
            name=name,
            data_dir=data_dir,
            modalities=stated,
            label_names=() if classes == [NO_CLASS] else classes,
            may_lack=self.allowed,
            recipe=dict(
                builder="folder",
                root=self.root,
                modalities=stated,
                samples={split: len(tasks) for split, tasks in self.tasks.items()},
                val_fraction=val_fraction,
                seed=seed,
                allow_missing=self.allowed,
                short_side=short_side,
            ),
        )

    def _list_tasks(self, val_fraction: float, seed: int) -> dict[str, list[Task]]:
        tasks: dict[str, list[Task]] = {}
        for split, root in _find_splits(self.root, list(self.specs)).items():
            files = {name: _list_files(root, name, self.problems) for name in self.specs}
            keys = sorted(set().union(*files.values()))
            for name, found in files.items():
                if name in self.allowed:
                    continue
                for key in keys:
                    if key not in found:
                        self.problems.setdefault(MISSING, []).append(os.path.join(root, name, key) + ".*")
            tasks[split] = [Task(key, {name: found[key] for name, found in files.items() if key in found}) for key in keys]
            if not keys:
                raise FileNotFoundError(
                    f"{root} holds no files for {', '.join(self.specs)}: expected <modality>/<class or all>/<file> with one of "
                    f"{', '.join(IMAGES + ARRAYS)}"
                )
        if val_fraction and set(tasks) == {"train"}:
            everything = tasks["train"]
            count = round(val_fraction * len(everything))
            chosen = set(np.random.default_rng(seed).permutation(len(everything))[:count].tolist())
            tasks = {
                "train": [task for number, task in enumerate(everything) if number not in chosen],
                "val": [everything[number] for number in sorted(chosen)],
            }
            for split, part in tasks.items():
                if not part:
                    raise ValueError(f"val_fraction {val_fraction} of {len(everything)} samples leaves the split {split!r} empty")
        return tasks

    def prepare(self) -> str:
        """As `RecordBuilder.prepare`; prints the share of missing pixels. Raises FolderError with all that is wrong."""
        directory = super().prepare()
        for name in self.pixels:
            if self.specs[name].missing is not None or self.missing_pixels[name]:
                print(f"{self.name}: {name} is missing on {self.missing_pixels[name] / self.pixels[name]:.1%} of its pixels")
        return directory

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        # All is read before anything is raised, so that one run tells everything: the last split's end raises.
        self.unread = list(self.tasks)
        return {split: self._generate_examples(split) for split in self.tasks}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        self.unread.remove(split)
        for number, (task, encoded) in enumerate(self._read(split)):
            if encoded:
                fields: dict[str, Any] = {"id": f"{split}/{task.key}", **{name: encoded.get(name, b"") for name in self.specs}}
                if self.label_names:
                    fields["label"] = task.key.split("/")[0]
                yield number, fields
        if self.problems:
            for other in self.unread:
                for _ in self._read(other):
                    pass
            raise FolderError(self.root, self.problems)

    def _read(self, split: str) -> Iterator[tuple[Task, dict[str, bytes]]]:
        tasks = self.tasks[split]
        read = functools.partial(read_sample, modalities=self.specs, short_side=self.short_side)
        results = progress(in_processes(read, tasks, self.workers), len(tasks), f"{self.name} {split}")
        for task, (encoded, missing, problems) in zip(tasks, results, strict=True):
            for kind, text in problems:
                self.problems.setdefault(kind, []).append(text)
            for name, (absent, pixels) in missing.items():
                self.missing_pixels[name] += absent
                self.pixels[name] += pixels
            yield task, encoded


def _says(spec: Modality, field: str) -> bool:
    """Whether a field of the spec means something for its kind."""
    if field in ("channels", "metres_per_count") and spec.kind == "categorical":
        return False
    value = getattr(spec, field)
    return not (field == "num_classes" and spec.kind == "continuous") and value is not None and value == value  # NaN always means missing
