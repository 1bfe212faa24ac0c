"""Frozen features of a data set: taken once, kept in memory or as files that several evaluators share."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Num, Shaped

from maskvit.core.types import Batch, tree_paths
from maskvit.data.identity import data_identity
from maskvit.evaluators.reading import Reading, local, nothing
from maskvit.metrics.results import digest
from maskvit.sharding import replicated, whole

VERSION = 1  # to be raised with every change of what is computed from the same weights and data
MANIFEST = "manifest.json"
BASELINES = ("mean_colour", "raw_pixels")
BLOCKS = "global_of_"  # begins the name of global tokens of several blocks: "global_of_9_10_11_12"

LOG = logging.getLogger(__name__)


class Examples(NamedTuple):
    """Features by name and labels of all usable examples of a source, in stored order, on the host; files of a cache are mapped.

    "mean" and "global": one vector per example; "both": [global, mean]; "global_of_11_12": the global tokens of those blocks side by
    side; "tokens": the patches, then the global tokens. Labels: a class per example, -1 where there is none, or the map of a modality.
    """

    features: dict[str, Num[np.ndarray, "n ..."]]
    labels: Num[np.ndarray, "n ..."]

    def feature(self, name: str) -> Num[np.ndarray, "n ..."]:
        """One kind of feature; "both" is put together here."""
        if name == "both":
            return np.concatenate([self.features["global"], self.features["mean"]], axis=1)
        return self.features[name]


def pixel_features(images: Num[Array, "b h w c"]) -> dict[str, Num[Array, "b d"]]:
    """What any representation must beat: the mean color, and the pixels themselves. Missing pixels count as 0."""
    known = jnp.nan_to_num(images) if jnp.issubdtype(images.dtype, jnp.floating) else images
    return {"mean_colour": known.astype(jnp.float32).mean(axis=(1, 2)), "raw_pixels": known.reshape(len(known), -1)}


def check_features(where: str, objective: Any, features: Sequence[str], norm: bool, known: Sequence[str]) -> None:
    """Raise ValueError for features that the model has not, or a norm that it cannot leave out."""
    for name in features:
        if name not in known:
            raise ValueError(f"{where} features names {name!r}; known: {', '.join(known)}")
        if name in ("global", "both") and not objective.model.num_global_tokens:
            raise ValueError(f"{where} features names {name!r}, but the model has no global token: use 'mean'")
    if not norm and not (objective.model.final_norm and objective.model.pool == "global"):
        raise ValueError(f"{where} norm is False, but the model has no final norm on its tokens: leave it out")


class Extraction:
    """Features of an unmasked pass over a data set.

    Args:
      name: what progress bars and messages call it.
      reading: the data; `inputs`: what the model is shown of them; `norm`: as `maskvit.heads.values.encoded_tokens`.
      target: a modality whose maps are the labels; "" for the classes of the examples.
      cache: a folder for files of features; None keeps them in memory. What is found there is used only where weights, data,
        geometry and model are the same, and is replaced where the weights are others. Several processes must share the folder.
    """

    def __init__(
        self, name: str, objective: Any, reading: Reading, *, inputs: Sequence[str], norm: bool = True, target: str = "",
        cache: str | None = None,
    ):  # fmt: skip
        self.name, self.reading, self.target = name, reading, target
        self._objective, self.inputs, self._norm = objective, tuple(inputs), norm
        self._extract = jax.jit(self._features, static_argnames="kinds", out_shardings=replicated(reading.mesh))
        self._cache = None if cache is None else Path(cache).expanduser()
        if self._cache is not None and self._cache.exists() and not self._cache.is_dir():
            raise ValueError(f"cache is {str(self._cache)!r}, which is a file: give a folder")
        self._key = ""

    def protocol(self) -> dict[str, Any]:
        """How features are taken, as plain data."""
        return self.reading.protocol() | dict(norm=self._norm)

    def __call__(self, params: Any, state: Any, kinds: Sequence[str], between: Callable[[], None] = nothing) -> Examples:
        """The features `kinds` (as in `Examples`, or baselines) of all usable examples, each once, the same on every process."""
        wanted = tuple(kinds)
        if self._cache is None or set(wanted) & set(BASELINES):
            return self._take(params, state, wanted, None, between)
        self._key = self._key or digest(self._about())
        folder, weights = self._cache / self._key, self._digest(params, state)
        manifest = _manifest(folder)
        found = manifest.get("weights") == weights and set(wanted) <= set(manifest.get("kinds", ()))
        # Of what others have left here, only what every evaluator may want is kept.
        known = list(dict.fromkeys(("mean", "global", "tokens", *wanted)))
        kept = [kind for kind in known if kind in {*wanted, *manifest.get("kinds", ())}]
        if jax.process_count() > 1:  # the first process looks, so that all do the same
            found, *there = multihost_utils.broadcast_one_to_all(np.array([found, *(kind in kept for kind in known)])).tolist()
            kept = [kind for kind, is_there in zip(known, there, strict=True) if is_there]
        if not found:
            if manifest:
                LOG.info("%s: the features in %s are of other weights or kinds and are replaced", self.name, folder)
            self._take(params, state, tuple(kept), (folder, weights), between)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"features {self._key}")
        return self._opened(folder, wanted, weights)

    def _about(self) -> dict[str, Any]:
        """All but the weights that the features depend on."""
        return dict(
            version=VERSION, reading=self.protocol(), data=data_identity(self.reading.source), model=repr(self._objective.model),
            modalities=repr(self.reading.modalities), inputs=self.inputs, target=self.target,
        )  # fmt: skip

    def _digest(self, params: Any, state: Any) -> str:
        """SHA-256 of the encoder's parameters."""
        weights = hashlib.sha256()
        for name, leaf in tree_paths(whole(self._objective.encoder_params(params, state))).items():
            array = local(leaf)
            weights.update(f"{name} {array.dtype} {array.shape} ".encode())
            weights.update(np.ascontiguousarray(array).tobytes())
        return weights.hexdigest()

    def _features(self, params: Any, state: Any, batch: Batch, kinds: tuple[str, ...]) -> tuple[dict[str, Array], Array, Array]:
        """(Features by name, labels, valid) of a global batch, whole on every device."""
        found: dict[str, Array] = {}
        shown = batch.only(self.inputs)
        if "tokens" in kinds:
            encoded = self._objective.tokens(params, state, shown, self.inputs, self._norm)
            found["tokens"] = jnp.concatenate([encoded.patches, encoded.global_tokens], axis=1)
        found |= self._objective.predict(params, state, shown, self.inputs, self._norm)
        for kind in kinds:
            if kind.startswith(BLOCKS):
                layers = tuple(int(number) for number in kind.removeprefix(BLOCKS).split("_"))
                found[kind] = self._objective.global_of_blocks(params, state, shown, layers, self.inputs, self._norm)
        if set(kinds) & set(BASELINES):
            found |= pixel_features(batch.values[self.inputs[0]])
        return {name: found[name] for name in kinds}, batch.values[self.target] if self.target else batch.label, batch.valid

    def _take(
        self, params: Any, state: Any, kinds: tuple[str, ...], place: tuple[Path, str] | None, between: Callable[[], None]
    ) -> Examples:
        """A pass over the data; `place`: (folder, digest of the weights) of files to write, by the first process."""
        partial = None
        if place is not None and jax.process_index() == 0:
            partial = place[0].with_name(place[0].name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        arrays: dict[str, np.ndarray] = {}
        count = 0
        for batch in self.reading.batches(self.name, between):
            features, labels, valid = local(self._extract(params, state, batch, kinds))
            end = count + int(valid.sum())
            for name, values in {**features, "labels": labels}.items():
                if name not in arrays:
                    arrays[name] = _allocated(partial, name, (len(self.reading), *values.shape[1:]), values.dtype)
                arrays[name][count:end] = values[valid]
            count = end
        if not count:
            raise ValueError(f"{self.name}: no example can be used: {self.reading.source.describe()}")
        if partial is not None and place is not None:
            for array in arrays.values():
                array.flush()  # type: ignore[attr-defined]
            manifest = dict(weights=place[1], kinds=kinds, count=count, about=self._about())
            (partial / MANIFEST).write_text(json.dumps(manifest, default=str, indent=1))
            shutil.rmtree(place[0], ignore_errors=True)
            os.replace(partial, place[0])
        return Examples({name: array[:count] for name, array in arrays.items() if name != "labels"}, arrays["labels"][:count])

    def _opened(self, folder: Path, kinds: Sequence[str], weights: str) -> Examples:
        """The files of a folder, mapped."""
        manifest = _manifest(folder)
        if manifest.get("weights") != weights:
            raise ValueError(f"cache: {folder} does not hold the features of these weights: several processes must share the folder")
        load = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")[: manifest["count"]]  # noqa: E731
        return Examples({kind: load(kind) for kind in kinds}, load("labels"))


def _manifest(folder: Path) -> Mapping[str, Any]:
    """What stands beside the files of a folder; {} where there are none, or their writing was cut off."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}


def _allocated(folder: Path | None, name: str, shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """An array of memory, or of a new file of `folder`."""
    if folder is None:
        return np.empty(shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f"cache: the features {name!r} need {size / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free")
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
