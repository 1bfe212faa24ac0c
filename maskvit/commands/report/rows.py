"""Which attention row hides objects, measured on data with a semantic map, and whether tokens of outlier norm draw attention."""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from maskvit.commands.report.attention import DEVIATIONS, ROW_NAMES, equal_counts, hide, last_block_input, outliers
from maskvit.commands.report.files import write
from maskvit.core.arguments import check_output, number, whole
from maskvit.core.keys import sample_keys, stream_keys
from maskvit.core.types import Batch, Params
from maskvit.data import open_source
from maskvit.data.batches import eval_batches
from maskvit.data.scenes import FIRST_KIND
from maskvit.features import LoadedModel, load
from maskvit.guidance.attention import QUERIES, self_attention
from maskvit.masking.scores import attention_high, random_scores
from maskvit.sharding import make_mesh, place_batch, replicated


def object_tokens(
    ids: Int[np.ndarray, "b h w"], grid: tuple[int, int], first_object: int, above: float | int = 0.5
) -> Bool[np.ndarray, "b n"]:
    """Tokens of which more than a share `above` of the pixels is an object, a class id of at least `first_object`.

    Raises ValueError where the map does not divide into the grid.
    """
    b, height, width = ids.shape
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"a class map of {height} x {width} pixels does not divide into {grid[0]} x {grid[1]} tokens")
    cells = (ids >= first_object).reshape(b, grid[0], height // grid[0], grid[1], width // grid[1])
    return (cells.mean(axis=(2, 4)) > above).reshape(b, -1)


def overlap(masked: Bool[np.ndarray, "b n"], objects: Bool[np.ndarray, "b n"]) -> tuple[Float[np.ndarray, " b"], Float[np.ndarray, " b"]]:
    """Per image: (share of the object's tokens that are hidden, share of the hidden tokens that are object); NaN where of none."""
    both = (masked & objects).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return both / objects.sum(axis=1), both / masked.sum(axis=1)


class Estimate(NamedTuple):
    """A mean over images with its standard error and the number of images it is of."""

    mean: float
    error: float
    count: int  # type: ignore[assignment]  # a tuple has a method of this name


def estimate(values: Float[np.ndarray, " b"]) -> Estimate:
    """Mean and standard error of the finite values; both NaN where there are too few."""
    values = values[np.isfinite(values)]
    count = len(values)
    error = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return Estimate(float(values.mean()) if count else math.nan, error, count)


def mass_on(guidance: Float[np.ndarray, "b n"], chosen: Bool[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    """Share of an image's attention that goes to the `chosen` tokens."""
    return np.where(chosen, guidance, 0).sum(axis=1) / guidance.sum(axis=1)


def row_overlaps(
    masked: Mapping[str, Bool[np.ndarray, "b n"]], objects: Bool[np.ndarray, "b n"], present: Bool[np.ndarray, "b n"]
) -> dict[str, Any]:
    """Overlap of every hidden set with the objects, as plain data; tokens that are not `present` do not count.

    `lift`: share of object tokens hidden over the share of all tokens hidden, which is its expectation under random masks;
    `difference`: of "mean" less "global" in the share of object tokens hidden, image by image. Images without object or
    without background are left out: they say nothing of where a mask lies.
    """
    objects = objects & present
    counted = objects.any(axis=1) & (present & ~objects).any(axis=1)
    objects, present = objects[counted], present[counted]
    shares: dict[str, Float[np.ndarray, " b"]] = {}
    result: dict[str, Any] = {"object_tokens": _plain(objects.sum(axis=1) / present.sum(axis=1)), "strategies": {}}
    for name, values in masked.items():
        hidden = values[counted] & present
        shares[name], purity = overlap(hidden, objects)
        with np.errstate(invalid="ignore"):
            lift = shares[name] / (hidden.sum(axis=1) / present.sum(axis=1))
        result["strategies"][name] = {"objects_hidden": _plain(shares[name]), "hidden_are_object": _plain(purity), "lift": _plain(lift)}
    result["difference"] = _plain(shares["mean"] - shares["global"])
    return result


def _plain(values: Float[np.ndarray, " b"]) -> dict[str, Any]:
    """`estimate` as JSON has it: a number that is not finite becomes None."""
    return {key: value if math.isfinite(value) else None for key, value in estimate(values)._asdict().items()}


def sink_figures(
    guidance: Mapping[str, Float[np.ndarray, "b n"]], norms: Float[np.ndarray, "b n"], present: Bool[np.ndarray, "b n"]
) -> dict[str, Any]:
    """Tokens of one modality that draw attention whatever the picture shows.

    `outliers`: how many tokens have an outlier norm; per row: `mass` their share of the modality's attention, and
    `position_peak`: attention of the most attended *position*, averaged over images, over the mean (1 = no position stands out).
    """
    some = present.any(axis=1)
    chosen = outliers(norms, present)
    rows = {}
    for name, values in guidance.items():
        shares = values[some] / values[some].sum(axis=1, keepdims=True)
        peak = float(shares.mean(axis=0).max() * values.shape[1])
        rows[name] = {"mass": _plain(mass_on(values[some], chosen[some])), "position_peak": peak}
    counted = norms[present]
    return {
        "outliers": int(chosen.sum()),
        "outlier_share": float(chosen.sum() / present.sum()),
        "norm_mean": float(counted.mean()),
        "norm_std": float(counted.std()),
        "norm_max": float(counted.max()),
        "rows": rows,
    }


def measure_rows(
    loaded: LoadedModel,
    source: Any,
    *,
    object_modality: str,
    first_object: int = FIRST_KIND,
    above: float = 0.5,
    batch_size: int = 64,
    limit: int | None = None,
    crop: float | int = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the two guidance rows on a source that has every input and a semantic map, as plain data for JSON.

    All rows, and random masks as chance, show the same fixed number of tokens of each modality, all together the config's.
    """
    from tqdm import tqdm

    objective, model, mesh = loaded.objective, loaded.model, make_mesh()
    specs = {spec.name: spec for spec in model.modalities}
    batch_size = math.ceil(batch_size / mesh.size) * mesh.size
    counts = equal_counts(model.layout, objective.num_visible)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def compute(params: Params, batch: Batch, step: Int[Array, ""]) -> Any:
        prepared = objective.prepare(batch)
        tokens = model.embed(params, prepared.values_of(model.inputs), prepared.present)
        b = tokens.tokens.shape[0]
        guidance = {query: self_attention(model, params, tokens, query) for query in QUERIES}
        keys = stream_keys(sample_keys(seed, step, b), "scores")
        scores = {"random": random_scores(keys, tokens.layout)} | {q: attention_high(keys, tokens.layout, g) for q, g in guidance.items()}
        visible = jnp.tile(jnp.array(counts), (b, 1))
        masked = {name: hide(score, visible, tokens, objective.num_visible) for name, score in scores.items()}
        norms = jnp.linalg.norm(last_block_input(model, params, tokens), axis=-1)
        return guidance, masked, norms, jnp.ones(norms.shape, bool) if tokens.present is None else tokens.present

    parts: list[Any] = []
    total = math.ceil(min(len(source), limit or math.inf) / batch_size)
    arguments: dict[str, Any] = dict(batch_size=batch_size, crop=crop, limit=limit, inputs=model.inputs)
    with eval_batches(source, specs, model.image_size, **arguments) as batches, tqdm(total=total, unit="batch", disable=None) as bar:
        for step, batch in enumerate(batches):
            valid = batch["valid"]
            result = jax.device_get(compute(loaded.params, place_batch(batch, mesh), jnp.int32(step)))
            parts.append(jax.tree.map(lambda x, valid=valid: x[valid], (*result, batch[object_modality])))
            bar.update()
    guidance, masked, norms, present, ids = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    modalities = {}
    for name, grid, shown in zip(model.layout.names, model.layout.grids, counts, strict=True):
        span = model.layout.span(name)
        if not present[:, span].any():
            raise ValueError(f"modality {name!r} has no measured token in {source.describe()}")
        objects = object_tokens(ids, grid, first_object, above)
        modalities[name] = {
            "tokens": math.prod(grid),
            "visible": shown,
            **row_overlaps({strategy: values[:, span] for strategy, values in masked.items()}, objects, present[:, span]),
            "sinks": sink_figures({query: values[:, span] for query, values in guidance.items()}, norms[:, span], present[:, span]),
        }
    return {
        "images": len(ids),
        "data": source.describe(),
        "object_share_above": above,
        "to_global_token": {query: _plain(1 - values.sum(axis=1)) for query, values in guidance.items()},
        "modalities": modalities,
    }


def rows_table(result: Mapping[str, Any]) -> str:
    """`measure_rows` as plain text."""

    def with_error(e: Mapping[str, Any], scale: float, digits: int) -> str:
        return " +- ".join("-" if e[key] is None else f"{scale * e[key]:.{digits}f}" for key in ("mean", "error"))

    percent = functools.partial(with_error, scale=100, digits=1)
    lines = [
        f"{result['images']} images: {result['data']}",
        f"object token: more than {result['object_share_above']:.0%} of its pixels are object; chance: the share of all tokens hidden",
        "",
        f"{'modality':<12}{'hidden by':<22}{'object tokens hidden %':>24}{'hidden are object %':>22}{'lift over chance':>20}",
    ]
    for name, values in result["modalities"].items():
        for strategy, row in values["strategies"].items():
            lift = with_error(row["lift"], 1, 3)
            words = ROW_NAMES.get(strategy, strategy)
            lines.append(f"{name:<12}{words:<22}{percent(row['objects_hidden']):>24}{percent(row['hidden_are_object']):>22}{lift:>20}")
        lines.append(
            f"{'':<12}{values['visible']} of {values['tokens']} visible; {percent(values['object_tokens'])} % of tokens are object; "
            f"mean over queries less global token's row: {percent(values['difference'])} points"
        )
    lines += ["", f"Outliers: tokens that enter the last block with a norm above mean + {DEVIATIONS:g} deviations"]
    lines.append(f"{'modality':<12}{'row':<22}{'outliers':>10}{'their attention %':>20}{'peak of a position':>20}")
    for name, values in result["modalities"].items():
        sinks = values["sinks"]
        for query, row in sinks["rows"].items():
            lines.append(f"{name:<12}{ROW_NAMES[query]:<22}{sinks['outliers']:>10}{percent(row['mass']):>20}{row['position_peak']:>20.2f}")
    for query, share in result["to_global_token"].items():
        lines.append(f"{ROW_NAMES[query]}: {percent(share)} % of its attention goes to the global tokens")
    return "\n".join(lines)


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, its checkpoints directory, or one step's directory")
    parser.add_argument("--data_dir", required=True, help="folder of prepared data sets, or of one version")
    parser.add_argument("--name", default="scenes", help="name of the data set below it")
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=whole(), default=None, help="only the first so many images")
    parser.add_argument("--first_object", type=whole(0), default=FIRST_KIND, help="class ids from here on are objects")
    parser.add_argument("--above", type=number(), default=0.5, help="share of a token's pixels that must be exceeded for an object token")
    parser.add_argument("--batch_size", type=whole(), default=64, help="pictures at once, over all devices")
    parser.add_argument("--out", type=Path, default=None, help="also write all figures as JSON into this file")


def run(
    checkpoint: str, data_dir: str, name: str, split: str, limit: int | None, first_object: int, above: float, batch_size: int,
    out: Path | None,
) -> int:  # fmt: skip
    if out is not None:
        check_output(out)
    loaded = load(checkpoint)
    specs = {spec.name: spec for spec in loaded.model.modalities}
    maps = [spec.name for spec in specs.values() if spec.kind == "categorical"]
    if len(maps) != 1:
        raise ValueError(f"objects are read from a checkpoint's one categorical modality; this one has {', '.join(maps) or 'none'}")
    source = open_source("tfds", specs, data_dir=data_dir, name=name, split=split)
    result = measure_rows(
        loaded, source, object_modality=maps[0], first_object=first_object, above=above, batch_size=batch_size, limit=limit
    )
    result = {"checkpoint": str(checkpoint), **result}
    print(rows_table(result))
    if out is not None:
        write(out, json.dumps(result))
    return 0
