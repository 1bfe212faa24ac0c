"""Depth and class maps for pictures that have none, by networks of `transformers`, in the layout that `data folder` reads.

<root>/[<split>/]rgb/<class or "all">/<file> is read; depth/ and semseg/ are written beside rgb/, and per modality a manifest
<root>/<modality>.manifest.jsonl: its first line says how they were made, each further one names a file with the SHA-256 of it and of the
picture. What the manifest names is not made again. <root>/semseg.classes.txt names the classes, one a line.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8, UInt16
from PIL import Image

from maskvit.commands.map_parts import check_same
from maskvit.data.builders.layout import find_splits, list_modality
from maskvit.data.builders.records import progress
from maskvit.data.pictures import PictureError, read_picture

MOST, METERS = 65535, 1 / 512  # greatest count; of a metric network the meters of one, as of MultiMAE's pseudo-labels
CLASS_FILE = "semseg.classes.txt"
METRIC = ("zoedepth", "depth_pro", "prompt_depth_anything")  # model types whose answers are meters
Answer = Callable[[UInt8[np.ndarray, "h w 3"]], np.ndarray]


def pictures_of(root: str) -> Iterator[tuple[str, str, str]]:
    """(file, split's folder, its path below rgb/) of every picture. Raises FileNotFoundError where the layout is another."""
    found = False
    for top in find_splits(root, ["rgb"]).values():
        folder = os.path.join(top, "rgb")
        for path in sorted(list_modality(folder).files.values()):
            found = True
            yield path, top, os.path.relpath(path, folder)
    if not found:
        raise FileNotFoundError(f"{root} holds no pictures in rgb/")


class Manifest:
    """The files of one modality that are done, in <root>/<modality>.manifest.jsonl; one line is added per file.

    Args:
      settings: how they are made. Raises ValueError where an earlier call made some in another way, or the folder holds files of others.
    """

    def __init__(self, root: str, modality: str, settings: dict[str, Any], folders: list[str]):
        self.path = os.path.join(root, f"{modality}.manifest.jsonl")
        self.done: dict[str, str] = {}
        settings = json.loads(json.dumps(settings))
        if not os.path.exists(self.path):
            if foreign := [folder for folder in folders if os.path.isdir(folder) and os.listdir(folder)]:
                raise ValueError(f"{foreign[0]} holds files already, and {self.path} does not say how they were made: move them away")
            self._add(settings)
            return
        with open(self.path, "rb") as file:
            lines = file.read().split(b"\n")
        whole = lines[:-1]  # what follows the last end of line was being written when an earlier call ended
        if lines[-1]:
            with open(self.path, "r+b") as file:
                file.truncate(sum(len(line) + 1 for line in whole))
        try:
            first, *rest = [json.loads(line) for line in whole]
            self.done = {entry["file"]: entry["sha256"] for entry in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error!r}): remove it, and the files that it names") from error
        check_same(first, settings, f"{self.path} names files", f"remove them and {self.path}, or give the same settings")

    def add(self, file: str, data: bytes, picture: bytes) -> None:
        """One more file is done."""
        digest, source = (hashlib.sha256(content).hexdigest() for content in (data, picture))
        self._add({"file": file, "sha256": digest, "picture_sha256": source})
        self.done[file] = digest

    def _add(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")


def _network(kind: str, name: str, revision: str | None, device: str | None) -> tuple[Any, Any, str, dict[str, Any]]:
    """(processor, model on its device, device, what the manifest says of it) of a folder or a name of Hugging Face's hub."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(f"pseudo-labels need {error.name}, which is not there: python -m pip install 'maskvit[pseudolabels]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, revision=revision)
        model = getattr(transformers, kind).from_pretrained(name, revision=revision).to(place).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be had as a model for {kind}: {str(error).splitlines()[0]}") from error
    about = dict(
        model=os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name,
        revision=_folder_digest(name) if os.path.isdir(name) else getattr(model.config, "_commit_hash", None) or revision,
        architecture=type(model).__name__,
        processor=type(processor).__name__,
        transformers=transformers.__version__,
        torch=torch.__version__,
    )
    return processor, model, place, about


def _folder_digest(folder: str) -> str:
    """SHA-256 of the files of a model's folder, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin"):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _answers(processor: Any, model: Any, device: str, rgb: UInt8[np.ndarray, "h w 3"]) -> Any:
    import torch

    inputs = processor(images=Image.fromarray(rgb), return_tensors="pt").to(device)
    with torch.inference_mode():
        return model(**inputs)


def estimate_depth(processor: Any, model: Any, device: str, rgb: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
    """What the model says of the depth of a picture, at the picture's size, in its own units."""
    outputs = _answers(processor, model, device, rgb)
    (answer,) = processor.post_process_depth_estimation(outputs, target_sizes=[rgb.shape[:2]])
    depth: np.ndarray = answer["predicted_depth"].float().cpu().numpy()
    return depth.reshape(rgb.shape[:2])


def estimate_classes(processor: Any, model: Any, device: str, rgb: UInt8[np.ndarray, "h w 3"]) -> Integer[np.ndarray, "h w"]:
    """The most likely class of every pixel, at the picture's size."""
    outputs = _answers(processor, model, device, rgb)
    (ids,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[rgb.shape[:2]])
    classes: np.ndarray = ids.cpu().numpy()
    return classes


def depth_counts(depth: Float[np.ndarray, "h w"], unit: str) -> UInt16[np.ndarray, "h w"]:
    """16-bit counts: of 1/512 m for "meters", 0 where one is not positive or beyond 128 m; else from 0, the least, to 65,535, the greatest.

    Raises ValueError for relative values that are not finite.
    """
    if unit == "meters":
        with np.errstate(invalid="ignore", over="ignore"):
            counts = np.rint(depth.astype(np.float64) / METERS)
        return np.where(np.isfinite(counts) & (counts > 0) & (counts <= MOST), counts, 0).astype(np.uint16)
    if not np.isfinite(depth).all():
        raise ValueError("the model gives numbers that are not finite")
    low, high = float(depth.min()), float(depth.max())
    return np.rint((depth.astype(np.float64) - low) / max(high - low, 1e-12) * MOST).astype(np.uint16)


def label(root: str, modality: str, answer: Answer, settings: dict[str, Any]) -> int:
    """Write `answer` of every picture that the manifest does not name, as PNG beside rgb/. Returns how many pictures could not be read."""
    listed = list(pictures_of(root))
    manifest = Manifest(root, modality, settings, sorted({os.path.join(top, modality) for _, top, _ in listed}))
    places = [(path, os.path.join(top, modality, os.path.splitext(below)[0] + ".png")) for path, top, below in listed]
    waiting = [(path, place) for path, place in places if os.path.relpath(place, root) not in manifest.done or not os.path.isfile(place)]
    if len(waiting) < len(places):
        print(f"{modality}: {len(places) - len(waiting)} of {len(places)} are there already")
    unread = 0
    for path, place in progress(waiting, len(waiting), modality):
        data = Path(path).read_bytes()
        try:
            rgb = read_picture(data, channels=3).array
        except PictureError as error:
            print(f"{path}: {error}: left out")
            unread += 1
            continue
        out = io.BytesIO()
        Image.fromarray(answer(rgb if rgb.ndim == 3 else np.repeat(rgb[..., None], 3, axis=2))).save(out, "PNG")
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(f"{place}.part", "wb") as file:
            file.write(out.getvalue())
        os.replace(f"{place}.part", place)  # so that a file of that name is always whole
        manifest.add(os.path.relpath(place, root), out.getvalue(), data)
    return unread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--root", required=True, help='folder with [<split>/]rgb/<class or "all">/<file>; depth/ and semseg/ are added')
    parser.add_argument(
        "--depth", metavar="MODEL", help="a depth estimator: a folder, or a name of Hugging Face's hub such as Intel/dpt-large"
    )
    parser.add_argument(
        "--depth_unit", choices=("meters", "relative"),
        help="what it answers: meters, or numbers of any scale such as the inverse depth of MiDaS's DPT (by its config)",
    )  # fmt: skip
    parser.add_argument(
        "--semseg", metavar="MODEL", help="a universal segmenter, such as facebook/mask2former-swin-small-coco-panoptic (133 classes)"
    )
    parser.add_argument("--depth_revision", metavar="COMMIT", help="commit of the depth estimator on the hub")
    parser.add_argument("--semseg_revision", metavar="COMMIT", help="commit of the segmenter on the hub")
    parser.add_argument("--device", help="where the networks run: cuda, cpu, ... (cuda where there is one)")


def run(
    root: str, depth: str | None, depth_unit: str | None, semseg: str | None, depth_revision: str | None, semseg_revision: str | None,
    device: str | None,
) -> int:  # fmt: skip
    """The command; 1 where pictures could not be read."""
    root = os.path.abspath(os.path.expanduser(root))
    next(pictures_of(root))  # before a network is loaded
    if not depth and not semseg:
        raise ValueError("nothing to do: give --depth MODEL, --semseg MODEL, or both")
    unread, declared, more = 0, ["rgb"], ""
    if depth:
        processor, model, place, about = _network("AutoModelForDepthEstimation", depth, depth_revision, device)
        metric = model.config.model_type in METRIC or getattr(model.config, "depth_estimation_type", "") == "metric"
        unit = depth_unit or ("meters" if metric else "relative")
        estimate = functools.partial(estimate_depth, processor, model, place)
        unread = max(unread, label(root, "depth", lambda rgb: depth_counts(estimate(rgb), unit), dict(about, unit=unit)))
        declared.append("depth,missing=0,metres_per_count=1/512" if unit == "meters" else "depth,metres_per_count=None")
        if unit == "relative":
            print(f"depth: relative values, from 0 to {MOST} in each picture; of MiDaS's networks more is nearer")
    if semseg:
        processor, model, place, about = _network("AutoModelForUniversalSegmentation", semseg, semseg_revision, device)
        classes = [model.config.id2label[number] for number in range(len(model.config.id2label))]
        if len(classes) > 255:
            raise ValueError(f"{semseg} has {len(classes)} classes; 8-bit maps hold 255")
        segment = functools.partial(estimate_classes, processor, model, place)
        unread = max(unread, label(root, "semseg", lambda rgb: segment(rgb).astype(np.uint8), dict(about, classes=classes)))
        declared.append(f"semseg,num_classes={len(classes)}")
        if len(set(classes)) == len(classes):
            Path(root, CLASS_FILE).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
            more = f" --pixel_classes semseg={os.path.join(root, CLASS_FILE)}"
    print(f"pack them: python -m maskvit data folder --root {root} --data_dir data --name NAME --modalities {' '.join(declared)}{more}")
    return 1 if unread else 0
