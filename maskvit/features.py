"""A checkpoint opened for one's own pictures: what a fine-tuned model says of them, and features, of a folder written as an array.

    python -m maskvit features --checkpoint C --images DIR --out features.npz

The file holds `ids` (paths below DIR) and `features` (float32, one row per id) as .npz, or `features` with the ids in the
metadata as .safetensors.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from maskvit.checkpoints import load_params, load_statistics, load_teacher, load_weights, trusting
from maskvit.core.arguments import check_output, number, whole
from maskvit.core.durations import to_steps
from maskvit.core.errors import add_debug, printable, run_command
from maskvit.core.modalities import Modality
from maskvit.core.types import Params, tree_paths
from maskvit.data.batches import eval_batches
from maskvit.data.files import list_files, tell
from maskvit.data.pictures import SUFFIXES, PictureError, open_picture
from maskvit.heads.task_network import TaskNetwork
from maskvit.objectives.distillation import teacher_params
from maskvit.objectives.stored import check_shapes, class_names, stored_objective
from maskvit.objectives.supervised import classifier_of
from maskvit.sharding import make_mesh, parameter_shardings, place_batch, replicated

FORMATS = (".npz", ".safetensors")
FEATURES = ("mean", "global")
WEIGHTS = ("params", "ema")

Images = Num[np.ndarray, "b h w *c"] | Num[Array, "b h w *c"]

_log = logging.getLogger(__name__)


# Checkpoints


class LoadedModel(NamedTuple):
    """A checkpoint opened for use.

    `objective`: the pure functions (`predict`, `visualize`, ...), `model`: its network, `params`: parameters on the devices
    (of self-distillation the teacher's), `config`: the plain config it was trained or converted with, `metadata`: all that
    stands beside it (source, licence), `state`: what the objective needs beside the parameters (a head's running statistics).
    """

    objective: Any
    model: Any
    params: Params
    config: dict[str, Any]
    metadata: dict[str, Any]
    state: dict[str, Any] = {}  # nothing changes it

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes that a fine-tuned model tells apart; numbers where the checkpoint does not name them. () of other models."""
        task = getattr(self.supervised, "task", None)
        if task is None or (task.dense and self.model.modality(task.target).kind != "categorical"):
            return ()
        count = task.channels({spec.name: spec for spec in self.model.modalities})
        return class_names(self.metadata, count) or tuple(map(str, range(count)))

    def predict(self, images: Images | Mapping[str, Images]) -> dict[str, Any]:
        """What a fine-tuned model says of pictures.

        `images`: the first input, or inputs by name, in stored units (uint8 of pictures) and of a size that divides into patches; the
        model was trained at `model.image_size`.

        Of a classification: "classes" (all names, in the order of the columns), "probabilities" (float32 "b k"). Of a segmentation:
        "classes", and "ids" (int32 "b h w"). Of a regression: "values" (float32 "b h w c", stored units), and "meters" where the config
        says what a unit is. Raises ValueError for a model that was not fine-tuned, and for arrays that are not its inputs.
        """
        task, objective = self.check_fine_tuned(), self.supervised
        given = dict(images) if isinstance(images, Mapping) else {self.model.inputs[0]: images}
        if wrong := [name for name in given if name not in self.model.inputs]:
            raise ValueError(f"images name {wrong[0]!r}; the model's inputs are {', '.join(self.model.inputs)}")
        if not given:
            raise ValueError(f"images are empty; the model's inputs are {', '.join(self.model.inputs)}")
        names = tuple(name for name in self.model.inputs if name in given)
        answers = said(objective, names, self.params, self.state, {name: given[name] for name in names})
        found = {name: np.asarray(value) for name, value in answers.items()}
        if not task.dense:
            return {"classes": self.class_names, **found}
        spec = self.model.modality(task.target)
        if spec.kind == "categorical":
            return {"classes": self.class_names, **found}
        return found if spec.metres_per_count is None else {**found, "meters": found["values"] * np.float32(spec.metres_per_count)}

    def check_fine_tuned(self) -> Any:
        """The task that the model was fine-tuned for. Raises ValueError where there is none."""
        if self.supervised is None:
            name = self.config["objective"]["name"]
            raise ValueError(f"the checkpoint is of the objective {name!r}, which has no task: fine-tune it first")
        return self.supervised.task

    @property
    def supervised(self) -> Any:
        """The objective that answers: the model's own, or that of the classifier that an imported encoder came with; None."""
        if hasattr(self.objective, "task"):
            return self.objective
        return classifier_of(self.model) if self.model.num_classes else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def said(objective: Any, names: tuple[str, ...], params: Params, state: Any, values: Any) -> dict[str, Any]:
    """The objective's answers as a user reads them: "probabilities", "ids" or "values"."""
    answers = objective.answers(params, state, values, names)
    if "values" in answers:
        return answers
    logits = answers["logits"].astype(jnp.float32)
    if objective.task.dense:
        return {"ids": logits.argmax(axis=-1).astype(jnp.int32)}
    return {"probabilities": jax.nn.softmax(logits, axis=-1)}


def load(path: str | os.PathLike, weights: str = "params") -> LoadedModel:
    """Open a checkpoint: a run's workdir, its checkpoints directory, one step's, or WORKDIR/best; of training or of conversion.

    `weights`: "params", or "ema" for the average that the run kept of them.

    Raises CheckpointError where there is none, it is damaged, it holds no such weights, or its parameters are not those of its
    config; ValueError for other `weights`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; known: {', '.join(WEIGHTS)}")
    params, metadata = load_params(path)
    if weights != "params":
        params = load_weights(path, weights, "weights")
    config = metadata.get("config") or {}
    with trusting(path):
        objective = stored_objective(config, params, functools.partial(_with_durations, config=config, metadata=metadata))
        teacher = load_teacher(path) if objective.model.projection else None
        if teacher is not None:
            check_shapes(*({name: leaf.shape for name, leaf in tree_paths(tree).items()} for tree in (teacher_params(params), teacher)))
            params = teacher
        state = _statistics(path, objective.model)
    params = jax.device_put(params, parameter_shardings(params, make_mesh()))
    return LoadedModel(objective, objective.model, params, config, metadata, jax.device_put(state, replicated(make_mesh())))


def _statistics(path: str | os.PathLike, model: Any) -> dict[str, Any]:
    """The running means and variances of a head that keeps some, {"statistics": ...}; else {}."""
    if not isinstance(model, TaskNetwork):
        return {}
    stored = {"statistics": load_statistics(path)}
    expected = {"statistics": jax.eval_shape(model.init_statistics)}
    check_shapes(*({name: tuple(leaf.shape) for name, leaf in tree_paths(tree).items()} for tree in (expected, stored)))
    return stored if stored["statistics"] else {}


def _with_durations(objective: Any, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Any:
    """The objective with the durations of its schedules in steps, as in the run; converted files have no schedules."""
    if "steps_per_epoch" not in metadata:
        return objective
    for key, value in (("config.global_batch", config["global_batch"]), ("steps_per_epoch", metadata["steps_per_epoch"])):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} is {value!r}; it must be a whole number above 0")
    in_steps = functools.partial(to_steps, steps_per_epoch=metadata["steps_per_epoch"], global_batch=config["global_batch"])
    return objective.resolve(functools.partial(in_steps, total_steps=in_steps(config["total"])))


# Pictures


class Pictures:
    """Image files as a data source: the one modality `modality`, read when asked for."""

    label_names: tuple[str, ...] = ()
    pixel_classes: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    may_lack: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[Path], modality: str):
        self.paths, self.modality = tuple(paths), modality

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": str(self.paths[index]), self.modality: self.paths[index].read_bytes()}

    def describe(self) -> str:
        """One line: where the data come from."""
        return f"{len(self)} pictures, the first is {self.paths[0]}"


def find_pictures(places: Sequence[str | os.PathLike]) -> list[Path]:
    """The image files among `places`: files as given, folders with all below them, in the order of their names.

    Hidden files and folders and files of other suffixes are passed over, and logged.
    Raises FileNotFoundError for a place that does not exist or holds none.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_file():
            found.append(place)
            continue
        if not place.is_dir():
            raise FileNotFoundError(f"{place} does not exist: give an image file or a folder of them")
        files, passed_over = list_files(place)
        lines = tell(passed_over, place)
        if not files:
            raise FileNotFoundError("\n  ".join([f"no images below {place}; looked for {', '.join(SUFFIXES)}", *lines]))
        for line in lines:
            _log.warning("%s: %s", place, line)
        found += sorted(map(Path, files))
    return list(dict.fromkeys(found))


def unreadable(paths: Sequence[Path]) -> dict[Path, str]:
    """What is wrong with those files that are no images, from their headers alone (fast). Alpha channels are logged."""
    wrong, alpha = {}, 0
    for path in paths:
        try:
            with open_picture(path) as (_, header):
                alpha += header.mode in ("LA", "PA", "RGBA")
        except (OSError, PictureError) as error:
            wrong[path] = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    if alpha:
        _log.warning("%d of %d pictures have an alpha channel, which is dropped", alpha, len(paths))
    return wrong


def readable(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """The image files below the folder `root`, and those that are none, with the reason.

    Raises FileNotFoundError where `root` is no folder or holds no images, ValueError where none can be read.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"--images is {str(root)!r}, which is no folder")
    paths = find_pictures([root])
    left_out = unreadable(paths)
    if len(left_out) == len(paths):
        raise ValueError(f"none of the {len(left_out)} image files below {root} can be read; the first: {next(iter(left_out.values()))}")
    return [path for path in paths if path not in left_out], left_out


def tell_left_out(left_out: Mapping[Path, str]) -> int:
    """Say on standard error which files were left out, and why; the exit status that follows."""
    if left_out:
        print(f"{len(left_out)} file(s) left out:", file=sys.stderr)
    for path, reason in left_out.items():
        print(printable(f"  {path}: {reason}"), file=sys.stderr)
    return 1 if left_out else 0


def first_input(model: Any) -> Modality:
    """The modality that pictures are given as. Raises ValueError where it has class ids."""
    spec = model.modality(model.inputs[0])
    if spec.kind != "continuous":
        raise ValueError(f"pictures are read as the first input modality, but {spec.name!r} of this checkpoint has class ids")
    return spec


def extract(
    loaded: LoadedModel, paths: Sequence[Path], batch_size: int = 64, crop: float | int = 0.875
) -> Iterator[tuple[list[int], dict[int, str], dict[str, Float[np.ndarray, "b d"]]]]:
    """Features of an unmasked pass over pictures as the first input modality: turned upright, short side resized, middle cut out.

    Yields, batch by batch: (indices into `paths`, indices of files that could not be used with the reason, features by name with
    one row per index of the former). Where more than 1 % (and ten) of the files are damaged the pipeline raises RuntimeError.
    """
    spec, mesh = first_input(loaded.model), make_mesh()
    batch_size = math.ceil(batch_size / mesh.size) * mesh.size
    predict = jax.jit(loaded.objective.predict, out_shardings=replicated(mesh))
    source = Pictures(paths, spec.name)
    with eval_batches(source, {spec.name: spec}, loaded.model.image_size, batch_size=batch_size, crop=crop) as batches:
        for batch in batches:
            features = predict(loaded.params, (), place_batch({spec.name: batch[spec.name]}, mesh))
            index, valid = batch["index"], batch["valid"]
            bad = {int(i): reason for i, reason in zip(index, batch["reason"], strict=True) if reason}
            yield index[valid].tolist(), bad, {k: np.asarray(v)[valid] for k, v in features.items()}


# The command


def write_features(path: Path, ids: Sequence[str], features: Float[np.ndarray, "n d"], about: Mapping[str, str]) -> None:
    """Write ids and features, format by the suffix; the file appears whole or not at all. `about`: where they come from."""
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".npz":
        with open(partial, "wb") as file:
            np.savez(file, ids=np.array(ids, dtype=str), features=features, about=np.array(json.dumps(dict(about))))
    else:
        from safetensors.numpy import save_file

        save_file({"features": np.ascontiguousarray(features)}, partial, metadata={"ids": json.dumps(list(ids)), **about})
    os.replace(partial, path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 1 where a file was left out, 2 where nothing could be done."""
    parser = argparse.ArgumentParser(prog="python -m maskvit features", description="Features of one's own pictures.")
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, its checkpoints directory, or one step's directory")
    parser.add_argument("--images", required=True, help="folder of pictures; those in folders below it count too")
    parser.add_argument("--out", required=True, type=Path, help=f"file to write: {' or '.join(FORMATS)}")
    parser.add_argument("--feature", choices=FEATURES, default="mean", help="mean of the patch tokens, or the global token")
    parser.add_argument("--batch_size", type=whole(), default=64, help="pictures at once, over all devices")
    parser.add_argument("--crop", type=number(0, 1), default=0.875, help="image side over the side of the resized picture it is cut from")
    add_debug(parser)
    arguments = vars(parser.parse_args(argv))
    debug = arguments.pop("debug")
    return run_command(lambda: _write_folder(**arguments), debug)


def _write_folder(checkpoint: str, images: str, out: Path, feature: str, batch_size: int, crop: float) -> int:
    if out.suffix not in FORMATS:
        raise ValueError(f"--out is {str(out)!r}; its suffix says the format: {' or '.join(FORMATS)}")
    check_output(out)
    root = Path(images)
    paths, left_out = readable(root)
    loaded = load(checkpoint)
    if feature == "global" and not loaded.model.num_global_tokens:
        raise ValueError(f"--feature is 'global', but the model of {checkpoint} has no global token: give --feature mean")

    from tqdm import tqdm

    ids, parts = [], []
    with tqdm(total=len(paths), desc="features", unit="image", disable=None) as bar:
        for good, bad, features in extract(loaded, paths, batch_size, crop):
            ids += [paths[index].relative_to(root).as_posix() for index in good]
            left_out |= {paths[index]: reason for index, reason in bad.items()}
            parts.append(features[feature])
            bar.update(len(good) + len(bad))
    rows = np.concatenate(parts)
    about = dict(checkpoint=str(checkpoint), feature=feature, modality=first_input(loaded.model).name, crop=str(crop))
    write_features(out, ids, rows, about)
    print(f"{len(ids)} x {rows.shape[1]} features ({feature}) written to {out}")
    return tell_left_out(left_out)


if __name__ == "__main__":
    sys.exit(main())
