"""Fashion-MNIST from its four idx files: 60,000 + 10,000 gray pictures of 28 x 28 pixels, stored as PNG of 32 x 32 in three channels."""

from __future__ import annotations

import functools
import gzip
import os

import numpy as np
from jaxtyping import UInt8

from maskvit.data.builders.archives import Contents, modalities, require
from maskvit.data.builders.layout import Task

# Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
CLASSES = ("t_shirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
FILES = {"train": "train", "test": "t10k"}
MARGIN = 2  # black pixels around: 28 is no multiple of the usual patches, 32 is, and nothing is resampled


@functools.lru_cache(maxsize=4)
def read_idx(path: str) -> UInt8[np.ndarray, "..."]:
    """The array of a gzipped idx file of bytes. Raises ValueError for anything else."""
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: no gzip file, or a truncated one ({error})") from error
    axes = data[3] if data[:3] == b"\0\0\x08" and len(data) >= 4 + 4 * data[3] else 0
    shape = tuple(np.frombuffer(data[4 : 4 + 4 * axes], ">u4").tolist())
    if not axes or len(data) != 4 + 4 * axes + int(np.prod(shape)):
        raise ValueError(f"{path}: no idx file of bytes, or a truncated one ({len(data)} bytes)")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def load_picture(place: str) -> UInt8[np.ndarray, "32 32 3"]:
    """Picture number N of "FILE#N", with a black margin, in three equal channels."""
    path, _, number = place.rpartition("#")
    picture = np.pad(read_idx(path)[int(number)], MARGIN)
    return np.repeat(picture[..., None], 3, axis=2)


def fashion_mnist(root: str) -> Contents:
    """The folder with {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz; splits "train" and "test"."""
    read_idx.cache_clear()  # the files may be others than those of an earlier call
    named = {split: (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz") for split, part in FILES.items()}
    require(root, [name for names in named.values() for name in names], "four files *-ubyte.gz")
    tasks = {}
    for split, names in named.items():
        images, labels = (os.path.join(root, name) for name in names)
        numbers = read_idx(labels)
        if numbers.ndim != 1 or read_idx(images).shape != (len(numbers), 28, 28) or (len(numbers) and numbers.max() >= len(CLASSES)):
            found = f"{images} has shape {read_idx(images).shape}, {labels} {numbers.shape}"
            raise ValueError(f"{found}: expected n x 28 x 28, and n numbers below {len(CLASSES)}")
        tasks[split] = [Task(f"{i:05d}", {"rgb": f"{images}#{i}"}, CLASSES[label]) for i, label in enumerate(numbers.tolist())]
    return Contents(modalities(), tasks, CLASSES, {"rgb": load_picture})
