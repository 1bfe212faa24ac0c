"""Guidance maps for a whole data set, made once and stored beside it.

    python -m maskvit maps --config configs/guidance/tokencut_imagenet.py

A map source looks at every whole picture, squeezed to `image_size`, and the maps become a data set of their own
(`maskvit.data.maps`), which `config.objective.guidance = dict(name="stored", path=<data_dir>/<name>)` reads. Finished parts lie
in <data_dir>/<name>.parts until all are there, so the same command resumes where it was stopped, with the same result.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from maskvit.commands.map_parts import Parts, check_same
from maskvit.core.config_files import apply_overrides, load_config, split_overrides
from maskvit.core.configuration import check_arguments, look_up
from maskvit.core.errors import add_debug, run_command
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch, Params, TokenBatch, TokenLayout, tree_paths
from maskvit.guidance.attention import SelfAttention, self_attention
from maskvit.guidance.discovery import attention_map
from maskvit.guidance.gradcam import resnet_gradcam, vit_gradcam
from maskvit.guidance.tokencut import tokencut_map
from maskvit.losses.weights import normalize_guidance
from maskvit.nn.resnet import ResNet, resnet_of

PART_RECORDS = 512  # maps, about, that are written at once and that a stopped run may lose
SAY_EVERY = 10.0  # seconds between lines of progress where there is no terminal
DATA_FIELDS = ("missing", "metres_per_count")  # of a modality, in which data may differ from what a checkpoint declares


# Sources: (network, params, batch of stored values, arguments) -> maps "b m gh gw" in 0 ... 1; m is 1 (one map for all the
# modalities looked at) or their number. A network is an objective, whose model is a ViT, or a ResNet.


def attention_of_model(
    network: Any, params: Params, batch: Batch, query: str = "global", block: int = -1, heads: tuple[int, ...] | None = None
) -> Float[Array, "b m gh gw"]:
    """The attention that every token receives in one block (`maskvit.guidance.attention`), 0 ... 1 per image and modality."""
    tokens = embedded(network, params, batch)
    scores = self_attention(network.model, params, tokens, query, block, heads)
    if tokens.present is not None:
        scores = jnp.where(tokens.present, scores, jnp.nan)
    return on_first_grid(normalize_guidance(scores, tokens.layout, ~jnp.isnan(scores)), tokens.layout)


def dino_attention(network: Any, params: Params, batch: Batch, **reading: Any) -> Float[Array, "b 1 gh gw"]:
    """The class token's attention to one modality (`maskvit.guidance.discovery.attention_map`, whose arguments these are)."""
    return attention_map(network.model, params, embedded(network, params, batch), **reading)[:, None]


def tokencut(network: Any, params: Params, batch: Batch, **cutting: Any) -> Float[Array, "b 1 gh gw"]:
    """The object that TokenCut finds (`maskvit.guidance.tokencut.tokencut_map`, whose arguments these are)."""
    return tokencut_map(network.model, params, embedded(network, params, batch), **cutting)[:, None]


def gradcam(network: Any, params: Params, batch: Batch, **place: Any) -> Float[Array, "b 1 gh gw"]:
    """Where a classifier finds the class that it predicts (`maskvit.guidance.gradcam`): a ResNet, with its `stage`, or a ViT."""
    if isinstance(network, ResNet):
        return resnet_gradcam(network, params, network.prepare(batch.values[network.modality.name]), **place)[:, None]
    return vit_gradcam(network.model, params, embedded(network, params, batch))[:, None]


def embedded(objective: Any, params: Params, batch: Batch) -> TokenBatch:
    """Stored values to the tokens of the model's inputs."""
    prepared = objective.prepare(batch)
    return objective.model.embed(params, prepared.values_of(objective.model.inputs), prepared.present)


def on_first_grid(scores: Float[Array, "b n"], layout: TokenLayout) -> Float[Array, "b m gh gw"]:
    """Scores as one map per modality, all on the grid of the first."""
    b, first = scores.shape[0], layout.grids[0]
    maps = [scores[:, span].reshape(b, *grid) for span, grid in zip(layout.spans(), layout.grids, strict=True)]
    return jnp.stack([here if here.shape[1:] == first else jax.image.resize(here, (b, *first), "linear") for here in maps], axis=1)


MAP_SOURCES: dict[str, Callable[..., Float[Array, "b m gh gw"]]] = {
    "self_attention": attention_of_model,
    "dino_attention": dino_attention,
    "tokencut": tokencut,
    "gradcam": gradcam,
}
# (what a source's arguments are those of, what it is given beside them) for a ViT and for a ResNet; None: it cannot be had.
GIVEN = ("network", "params", "batch", "model", "values", "classes")
ARGUMENTS: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]] = {
    "self_attention": (attention_of_model, None),
    "dino_attention": (attention_map, None),
    "tokencut": (tokencut_map, None),
    "gradcam": (vit_gradcam, resnet_gradcam),
}


def check_source(network: Any, name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError where the network cannot give the source, or not with these arguments."""
    function = ARGUMENTS[name][isinstance(network, ResNet)]
    if function is None:
        raise ValueError(
            f"config.source.name is {name!r}, which reads a ViT, but config.model.checkpoint is a ResNet; it can give: gradcam"
        )
    check_arguments("config.source", function, arguments, GIVEN)
    if name == "self_attention":
        try:
            SelfAttention(**arguments).check(network.model)
        except ValueError as error:
            raise ValueError(str(error).replace("config.objective.guidance", "config.source")) from error


def shapes_of_batch(specs: Mapping[str, Modality], size: tuple[int, int], batch_size: int) -> Batch:
    """What the loader will deliver, without values."""
    values: dict[str, Any] = {}
    for name, spec in specs.items():
        channels, dtype = ((spec.channels,), jnp.float32) if spec.kind == "continuous" else ((), jnp.int32)
        values[name] = jax.ShapeDtypeStruct((batch_size, *spec.size(size), *channels), dtype)
    return Batch(values)


# The checkpoint and the data


def open_network(checkpoint: str, modalities: Mapping[str, Mapping[str, Any]]) -> tuple[Any, Params, dict[str, Any]]:
    """(objective or ResNet that sees only `modalities`, its parameters on the devices, the checkpoint's metadata)."""
    from maskvit.checkpoints import load_params, trusting
    from maskvit.features import load
    from maskvit.sharding import make_mesh, parameter_shardings

    params, metadata = load_params(checkpoint)
    config = metadata.get("config", {})
    if "classifier" not in config:
        loaded = load(checkpoint)
        return use_inputs(loaded.objective, modalities), loaded.params, loaded.metadata
    with trusting(checkpoint):
        network = resnet_of(config)
        depths = tuple(len(params[f"stage_{stage}"]) for stage in range(1, len(network.depths) + 1))
        if network.depths != depths:
            raise ValueError(f"classifier.depths is {network.depths}, the tensors have {depths} blocks")
    (spec,) = seen({network.modality.name: network.modality}, modalities).values()
    return dataclasses.replace(network, modality=spec), jax.device_put(params, parameter_shardings(params, make_mesh())), metadata


def use_inputs(objective: Any, modalities: Mapping[str, Mapping[str, Any]]) -> Any:
    """The objective with only these input modalities, and what the data say about them."""
    model = objective.model
    specs = seen({name: model.modality(name) for name in model.inputs}, modalities)
    return dataclasses.replace(
        objective, model=dataclasses.replace(model, inputs=tuple(specs), outputs=(), error_outputs=(), modalities=tuple(specs.values()))
    )


def seen(inputs: Mapping[str, Modality], modalities: Mapping[str, Mapping[str, Any]]) -> dict[str, Modality]:
    """Those of the network's inputs that `config.modalities` names, in the network's order, with what the data say about them."""
    for name, fields in modalities.items():
        if name not in inputs:
            raise ValueError(f"config.modalities names {name!r}, which is no input of the checkpoint; its inputs: {', '.join(inputs)}")
        wrong = sorted(set(fields) - set(DATA_FIELDS))
        if wrong:
            raise ValueError(
                f"config.modalities.{name} has the key {wrong[0]!r}; the checkpoint says what {name!r} is, and the data may differ "
                f"from it only in {' and '.join(DATA_FIELDS)}"
            )
    if not modalities:
        raise ValueError(f"config.modalities is empty: name one or more of the checkpoint's inputs {', '.join(inputs)}")
    return {name: dataclasses.replace(spec, **modalities[name]) for name, spec in inputs.items() if name in modalities}


def parameters_digest(params: Params) -> str:
    """SHA-256 over names, types, shapes and values of all parameters."""
    digest = hashlib.sha256()
    for name, leaf in tree_paths(params).items():
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# The run


def make_maps(
    *,
    data: Mapping[str, Any],
    modalities: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
    source: Mapping[str, Any],
    out: Mapping[str, Any],
    image_size: int | tuple[int, int],
    batch_size: int = 64,
    workers: int = 0,
) -> str:
    """Make and store the maps of a whole data set. Returns the map set's folder.

    Args:
      data: the data set, as `config.data.train`.
      modalities: the checkpoint's inputs to look at; each with the fields of `DATA_FIELDS` in which the data differ.
      model: {"checkpoint": what `maskvit.load` opens}.
      source: {"name": a key of `MAP_SOURCES`, and its arguments}.
      out: {"data_dir", "name", optionally "grid": (rows, columns) to store the maps at instead of the source's own}.
      image_size: (height, width) or a number for both, to which the whole picture is squeezed.
      batch_size: pictures at once, over all devices.
      workers: processes that decode.

    Raises:
      ValueError: settings that do not fit, or not those of the stopped run or the finished set at that place.
      FileNotFoundError, CheckpointError: no such data or checkpoint.
    """
    import maskvit
    from maskvit.data import open_source
    from maskvit.data.maps import data_identity
    from maskvit.sharding import make_mesh

    check_arguments("config.model", lambda checkpoint: None, model)
    check_arguments("config.out", lambda data_dir, name, grid=None: None, out)
    arguments = dict(source)
    name = arguments.pop("name", "")
    look_up("config.source.name", MAP_SOURCES, name)
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    mesh = make_mesh()
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(f"config.batch_size is {batch_size}; it must be a multiple of the {mesh.size} devices")
    network, params, metadata = open_network(model["checkpoint"], modalities)
    check_source(network, name, arguments)
    specs = {spec.name: spec for spec in ((network.modality,) if isinstance(network, ResNet) else network.model.modalities)}
    compute = functools.partial(MAP_SOURCES[name], network, **arguments)
    try:
        jax.eval_shape(compute, params, shapes_of_batch(specs, size, batch_size))
    except ValueError as error:
        raise ValueError(f"config.source {name!r} cannot be had from {model['checkpoint']}: {error}") from error
    records = open_source(modalities=specs, **{"source": "tfds", **data})
    about = {
        "name": Path(os.path.abspath(model["checkpoint"])).name,
        "parameters_sha256": parameters_digest(params),
        "source": metadata.get("source"),
        "licence": metadata.get("licence"),
    }
    settings = dict(
        source=dict(source),
        checkpoint=about,
        data=data_identity(records),
        modalities=list(specs),
        declared={key: dict(fields) for key, fields in modalities.items()},
        image_size=size,
        batch_size=batch_size,
        resampled_to=out.get("grid"),
        program=f"maskvit {maskvit.__version__}",
    )
    root = Path(os.path.abspath(os.path.expanduser(out["data_dir"])))
    finished = _find_finished(root / out["name"], settings)
    if finished:
        print(f"{out['name']}: found in {finished}")
        return finished
    per_part = max(1, PART_RECORDS // batch_size)
    batches = math.ceil(len(records) / batch_size)
    parts = Parts(root / f"{out['name']}.parts", settings, math.ceil(batches / per_part))
    for number, part in _compute_parts(compute, params, records, specs, size, parts, per_part, batch_size, workers, mesh, out):
        parts.write(number, *part)
    return _finish(parts, root, out["name"])


def _find_finished(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The finished map set in `directory`, made with these settings, or None."""
    from maskvit.data.builders.maps import Maps
    from maskvit.data.maps import read_manifest

    directory = directory / str(Maps.VERSION)
    if not (directory / "dataset_info.json").is_file():
        return None
    wanted = json.loads(json.dumps(dict(settings)))
    remedy = f"give the maps another config.out.name or data_dir, or remove {directory}"
    check_same(read_manifest(str(directory)), wanted, f"{directory} holds maps", remedy)
    return str(directory)


def _compute_parts(
    compute: Callable[..., Any], params: Params, records: Any, specs: Mapping[str, Any], size: tuple[int, int], parts: Parts,
    per_part: int, batch_size: int, workers: int, mesh: Any, out: Mapping[str, Any],
) -> Iterator[tuple[int, tuple[list[str], UInt8[np.ndarray, "k m h w"], list[bool]]]]:  # fmt: skip
    """(number, (ids, maps, found)) of every part that is still missing."""
    from maskvit.data.batches import eval_batches
    from maskvit.data.maps import crop_map, to_bytes
    from maskvit.sharding import place_batch, replicated

    number = parts.first_missing
    if number == parts.count:
        return
    done, total = number * per_part * batch_size, len(records)
    if done:
        print(f"going on after {done} of {total} maps", flush=True)
    compute = jax.jit(compute, out_shardings=replicated(mesh))
    ids: list[str] = []
    maps: list[UInt8[np.ndarray, "m h w"]] = []
    found: list[bool] = []
    stream = eval_batches(
        records, specs, size, batch_size=batch_size, crop=None, start_batch=number * per_part, workers=workers, inputs=tuple(specs)
    )
    with stream, Progress(out["name"], done, total) as progress:
        for step, batch in enumerate(stream, 1):
            on_device = {key: batch[key] for key in (*specs, "present") if key in batch}
            values = np.asarray(compute(params, place_batch(on_device, mesh)), np.float64)
            real = batch["index"] >= 0
            has = batch["valid"] & (batch["present"].all(axis=1) if "present" in batch else True)
            grid = tuple(out.get("grid") or values.shape[2:])
            for row in np.flatnonzero(real):
                ids.append(batch["id"][row])
                found.append(bool(has[row]))
                here = values[row] if has[row] else np.zeros_like(values[row])
                if not ((here >= 0) & (here <= 1)).all():
                    raise ValueError(f"config.source gave record {ids[-1]!r} values from {here.min()} to {here.max()}, not within 0 ... 1")
                maps.append(to_bytes(here if here.shape[1:] == grid else crop_map(here, (0.0, 0.0, 1.0, 1.0), False, grid)))
            progress.advance(int(real.sum()))
            if step % per_part == 0:
                yield number, (ids, np.stack(maps), found)
                number, ids, maps, found = number + 1, [], [], []
    if ids:
        yield number, (ids, np.stack(maps), found)


def _finish(parts: Parts, root: Path, name: str) -> str:
    """Pack the parts into the data set, then remove them."""
    from maskvit.data.builders.maps import Maps

    manifest = {**parts.settings, **parts.summary()}
    directory = Maps(data_dir=str(root), name=name, records=parts.records(), manifest=manifest).prepare()
    shutil.rmtree(parts.directory)
    if manifest["without_map"]:
        print(f"{manifest['without_map']} records have no map: they could not be read or lack {' or '.join(manifest['modalities'])}")
    return directory


class Progress:
    """A bar on a terminal, elsewhere a line now and then: maps done, maps/s, time left."""

    def __init__(self, what: str, done: int, total: int):
        from tqdm import tqdm

        self.what, self.done, self.total, self.first = what, done, total, done
        self.began = self.told = time.monotonic()
        self.bar = tqdm(total=total, initial=done, desc=what, unit=" maps", disable=not sys.stderr.isatty())

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and (now - self.told > SAY_EVERY or self.done == self.total):
            self.told = now
            rate = (self.done - self.first) / max(now - self.began, 1e-9)
            left = datetime.timedelta(seconds=round((self.total - self.done) / rate))
            print(f"{self.what}: {self.done} of {self.total} maps, {rate:.1f} maps/s, {left} left", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where the maps could not be made."""
    words = sys.argv[1:] if argv is None else list(argv)

    def command() -> None:
        others, overrides = split_overrides(words)
        config = load_config(parser.parse_args(others).config)
        apply_overrides(config, overrides)
        run(config.to_dict())

    parser = argparse.ArgumentParser(
        prog="python -m maskvit maps",
        description="Guidance maps of a whole data set, made once.",
        epilog="Any key of the config can be set with --config.key=value.",
    )
    parser.add_argument("--config", required=True, help="what to make: a file of configs/guidance/ or one's own")
    add_debug(parser)
    return run_command(command, "--debug" in words)


def run(config: Mapping[str, Any]) -> None:
    """Make the maps that a plain config asks for; raises as `make_maps`."""
    logging.getLogger("absl").setLevel(logging.WARNING)  # the libraries' own reports of what they read and write
    check_arguments("config", make_maps, config)
    make_maps(**config)


if __name__ == "__main__":
    sys.exit(main())
