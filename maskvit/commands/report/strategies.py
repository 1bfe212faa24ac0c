"""What masking strategies do on the same images: their guidance, attention heads and hidden tokens, for the pages that show them."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from maskvit.checkpoints import load_params
from maskvit.commands.sweep.cells import load_cells, load_experiment, overrides
from maskvit.core.arguments import number, whole
from maskvit.core.durations import to_steps
from maskvit.core.keys import sample_keys
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch, Params, TokenLayout, batch_of, path_name, tree_paths
from maskvit.data import open_source
from maskvit.data.batches import eval_batches
from maskvit.guidance.attention import SelfAttention
from maskvit.losses.weights import guidance_weights
from maskvit.masking.plan import predicted_mask
from maskvit.objectives import build_objective
from maskvit.objectives.masked import MaskedAutoencoder
from maskvit.plots import page, pictures
from maskvit.plots.answers import class_legend

FRESH = "Fresh parameters"


class Shown(NamedTuple):
    """What a strategy does to the images; every dict is by input modality, empty where there is nothing of the kind.

    `heads`: the attention that the guidance is read from, per head ("b a gh gw"); `weights`: of the loss; `thrown`: what is hidden
    and not rebuilt either (`config.objective.predicted`).
    """

    inputs: dict[str, np.ndarray]
    masked: dict[str, Bool[np.ndarray, "b gh gw"]]
    guidance: dict[str, Float[np.ndarray, "b gh gw"]]
    heads: dict[str, Float[np.ndarray, "b a gh gw"]]
    weights: dict[str, Float[np.ndarray, "b gh gw"]]
    thrown: dict[str, Bool[np.ndarray, "b gh gw"]]


class Shows(NamedTuple):
    """All strategies on the same images: those that could be shown, the others with the reason, and remarks on the former."""

    shown: dict[str, Shown]
    missing: dict[str, str]
    remarks: dict[str, str]
    modalities: dict[str, Modality]
    ids: list[str]
    data: str
    classes: dict[str, tuple[str, ...]] = {}  # names of class ids by modality, where they have any; nothing changes it


def add_arguments(parser: argparse.ArgumentParser, out: str = "HTML file to write") -> None:
    """The arguments of every page that shows strategies; `out`: help of --out."""
    parser.add_argument("--config", required=True, help="config file; its get_sweep(), if any, names strategies")
    parser.add_argument(
        "--checkpoint", default=None, help="parameters to look with: a run's workdir, its checkpoints, or one step; else fresh ones"
    )
    parser.add_argument(
        "--strategies", default=None, metavar="FILE|NAMES", help="another file with get_sweep(), or some of the config's by name"
    )
    parser.add_argument("--out", required=True, type=Path, help=out)
    parser.add_argument("--images", type=whole(), default=4, help="so many images, spread over the split")
    parser.add_argument("--split", default=None, help="split of config.data.train to take them from; its own unless given")
    parser.add_argument("--crop", type=number(0, 1), default=1.0, help="image side over the side of the resized picture it is cut from")


def find_strategies(config_file: str, strategies: str | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(config, dotted overrides by strategy): the config's own cells, some of them, or another file's; itself where it has none."""
    config, cells, stages = load_experiment(config_file)
    if stages:
        raise ValueError(f"the cells of {config_file} are stages with configs of their own, not ways of masking of one config")
    if strategies is None:
        return config, cells or {"config": {}}
    if strategies.endswith(".py"):
        return config, load_cells(strategies, config)
    names = [name for name in strategies.split(",") if name]
    for name in names:
        if name not in cells:
            known = f"its get_sweep() has {', '.join(cells)}" if cells else "it has no get_sweep()"
            raise ValueError(f"--strategies names {name!r}, which {config_file} does not define: {known}")
    return config, {name: cells[name] for name in names}


def show_strategies(
    config: Mapping[str, Any], strategies: Mapping[str, Mapping[str, Any]], checkpoint: str | None, images: int, split: str | None,
    crop: float | int,
) -> Shows:  # fmt: skip
    """Every strategy on the same images under the same keys, at the end of its schedules.

    A strategy that lacks what it needs (stored maps, a modality, fitting parameters) is left out with the reason. Raises
    ValueError where the images themselves cannot be had.
    """
    params, _ = load_params(checkpoint) if checkpoint else (None, None)
    shown: dict[str, Shown] = {}
    missing: dict[str, str] = {}
    remarks: dict[str, str] = {}
    modalities: dict[str, Modality] = {}
    ids: list[str] = []
    data = ""
    classes: dict[str, tuple[str, ...]] = {}
    for name, changes in strategies.items():
        changed = overrides(config, changes, f"strategy {name!r}")
        try:
            shown[name], remarks[name], ids, specs, data, classes = _show(changed, params, images, split, crop)
            modalities |= specs
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            missing[name] = str(error)
    if not shown:
        raise ValueError("no strategy can be shown; " + "; ".join(f"{name}: {why}" for name, why in missing.items()))
    return Shows(shown, missing, {name: remark for name, remark in remarks.items() if remark}, modalities, ids, data, classes)


def _show(
    config: Mapping[str, Any], given: Params | None, images: int, split: str | None, crop: float | int
) -> tuple[Shown, str, list[str], dict[str, Modality], str, dict[str, tuple[str, ...]]]:
    objective = build_objective(config)
    model = objective.model
    specs = {spec.name: spec for spec in model.modalities}
    block = dict(config["data"]["train"], **({"split": split} if split else {}))
    source = open_source(block.pop("source", "tfds"), specs, **block)
    # A split that is smaller than a batch can be looked at, though not trained on.
    durations: dict[str, Any] = dict(steps_per_epoch=max(1, len(source) // config["global_batch"]), global_batch=config["global_batch"])
    end = to_steps(config["total"], **durations)
    objective = objective.resolve(functools.partial(to_steps, total_steps=end, **durations))

    needs = objective.needs._replace(whole_every=0, blocks=None)
    with eval_batches(
        source, specs, model.image_size, batch_size=images, limit=images, crop=crop, inputs=model.inputs, **needs.loading()
    ) as batches:
        host = next(batches)
    if not host["valid"].all():
        raise ValueError(f"only {host['valid'].sum()} of {images} images could be read from {source.describe()}")
    ids = host["id"]
    batch = batch_of({key: jnp.asarray(value) for key, value in host.items() if isinstance(value, np.ndarray)})

    params, remark = _fitting(objective, given, config.get("seed", 0))
    state = objective.init_state(params, len(source))
    if state:
        remark = f"{remark} What it keeps from training ({', '.join(state)}) starts anew here.".strip()
    keys = sample_keys(config.get("seed", 0), 0, images)
    arrays, heads, weights, thrown = jax.device_get(_look(objective, params, state, batch, keys, jnp.int32(end)))
    shown = Shown(arrays["inputs"], arrays["masked"], arrays["guidance"], heads, weights, thrown)
    return shown, remark, ids, specs, source.describe(), dict(source.pixel_classes)


def _fitting(objective: Any, given: Params | None, seed: int) -> tuple[Params, str]:
    """The given parameters where the model has them, else fresh ones, and a remark that says which. Raises ValueError for other shapes."""
    fresh = objective.init(jax.random.key(seed))[0]  # op by op: strategies share their shapes, a program for each would be its own
    if given is None:
        return fresh, f"{FRESH}: what they attend to means nothing."
    have, lacking = tree_paths(given), []

    def choose(path: Any, leaf: Array) -> Any:
        name = path_name(path)
        if name not in have:
            lacking.append(name)
            return leaf
        if have[name].shape != leaf.shape:
            raise ValueError(f"the checkpoint's {name} has shape {have[name].shape}, this config's model has {leaf.shape}")
        return jnp.asarray(have[name])

    params = jax.tree_util.tree_map_with_path(choose, fresh)
    blocks = sorted({"/".join(name.split("/")[:2]) for name in lacking})
    return params, f"The checkpoint lacks {', '.join(blocks)}: fresh parameters there." if blocks else ""


@functools.partial(jax.jit, static_argnames="objective")
def _look(
    objective: Any, params: Params, state: Any, batch: Batch, keys: Key[Array, " b"], step: Int[Array, ""]
) -> tuple[
    dict[str, dict[str, Array]], dict[str, Float[Array, "b a gh gw"]], dict[str, Float[Array, "b gh gw"]], dict[str, Bool[Array, "b gh gw"]]
]:  # fmt: skip
    """(what `visualize` gives without reconstructions, attention per head, loss weights, what is hidden and not rebuilt)."""
    arrays = dict(objective.visualize(params, state, batch, keys, step=step))
    del arrays["reconstructions"]
    heads: dict[str, Float[Array, "b a gh gw"]] = {}
    weights: dict[str, Float[Array, "b gh gw"]] = {}
    thrown: dict[str, Bool[Array, "b gh gw"]] = {}
    if not isinstance(objective, MaskedAutoencoder):  # self-distillation has no loss weights, and predicts all that it hides
        return arrays, heads, weights, thrown
    if isinstance(objective.guidance, SelfAttention):
        prepared = objective.prepare(batch)
        tokens = objective.model.embed(params, prepared.values_of(objective.model.inputs), prepared.present)
        maps = objective.model.attentions(params, tokens)[objective.guidance.block]
        rows = maps[:, :, -1] if objective.guidance.query == "global" else maps.mean(axis=2)
        for name, grid in zip(tokens.layout.names, tokens.layout.grids, strict=True):
            heads[name] = rows[:, :, tokens.layout.span(name)].reshape(*rows.shape[:2], *grid)
    if objective.loss_weight is not None:
        for name, values in arrays["guidance"].items():
            layout = TokenLayout((name,), (values.shape[1:],))
            flat = guidance_weights(values.reshape(len(values), -1), layout, objective.loss_weight.at(step), objective.loss_weight.gamma)
            weights[name] = flat.reshape(values.shape)
    if objective.predicted is not None:
        plan = objective.plan(params, batch, keys, state, step)[0]
        rebuilt = predicted_mask(plan)
        for name, masked in arrays["masked"].items():
            thrown[name] = masked & ~rebuilt[:, objective.model.layout.span(name)].reshape(masked.shape)
    return arrays, heads, weights, thrown


def input_names(shows: Shows) -> list[str]:
    """The input modalities of any strategy, as declared."""
    return [name for name in shows.modalities if any(name in shown.masked for shown in shows.shown.values())]


def modality_pictures(shows: Shows, shown: Shown, modality: str) -> list[pictures.Picture]:
    """One modality of every image."""
    return [pictures.to_picture(shows.modalities[modality], values) for values in shown.inputs[modality]]


def doubt(shows: Shows) -> str:
    """That nothing follows from what fresh parameters attend to, where they do; "" else."""
    guided = [name for name, shown in shows.shown.items() if shown.guidance]
    fresh = any(shows.remarks.get(name, "").startswith(FRESH) for name in guided)
    return " The parameters are fresh, so what they attend to means nothing: give --checkpoint." if fresh else ""


def legends(shows: Shows) -> list[page.Figure]:
    """Names of the classes on the class maps among the inputs."""
    first = {name: shown.inputs[name] for shown in shows.shown.values() for name in shown.inputs}
    return [
        page.Figure(class_legend(first[name], shows.modalities[name], shows.classes.get(name, ())), f"The classes of {name}.")
        for name in input_names(shows)
        if shows.modalities[name].kind == "categorical"
    ]


def notes(shows: Shows, strategies: Mapping[str, Mapping[str, Any]], checkpoint: str | None) -> page.Section:
    """Where the page comes from: data, parameters, what every strategy sets, and which could not be shown."""
    facts = [("parameters", checkpoint or "fresh"), ("data", shows.data)]
    rows = [
        (
            name,
            ", ".join(f"{key} = {value}" for key, value in changes.items()) or "the config as it is",
            f"not shown: {shows.missing[name]}" if name in shows.missing else shows.remarks.get(name, ""),
        )
        for name, changes in strategies.items()
    ]
    blocks: Sequence[Any] = [page.Table(("what", "value"), facts), page.Table(("strategy", "config keys it sets", "remark"), rows)]
    return page.Section("What is shown", blocks)
