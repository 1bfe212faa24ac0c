"""Reports on a checkpoint: what its attention looks at, and which attention row hides objects.

    python -m maskvit.report attention --checkpoint C --images FILES_OR_FOLDER --out attention.html
    python -m maskvit.report rows --checkpoint C --data_dir D

`attention` draws pictures of one's own into one HTML page; `rows` measures on `scenes` (or any data with a semantic map)
how much the tokens that each guidance row would hide overlap the objects, and looks for tokens of outlier norm.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from maskvit import figures
from maskvit.data import open_source
from maskvit.data.pipeline import eval_batches
from maskvit.data.scenes import FIRST_KIND
from maskvit.features import LoadedModel, Pictures, find_pictures, first_input, load, unreadable
from maskvit.guidance.attention import QUERIES, self_attention
from maskvit.keys import sample_keys, stream_keys
from maskvit.masking import attention_high, drop, present_counts, random_scores
from maskvit.sharding import make_mesh, place_batch, replicated
from maskvit.types import Batch, Params, TokenBatch, TokenLayout

DEVIATIONS = 4.0  # a token is an outlier where its norm exceeds the mean by so many standard deviations
ROW_NAMES = {"global": "global token's row", "mean": "mean over queries"}


# Equal budgets


def equal_counts(layout: TokenLayout, num_visible: int) -> tuple[int, ...]:
    """Visible tokens per modality, as equal as can be; what one modality is too small for goes to the next, in token order.

    Raises ValueError where there are fewer tokens than `num_visible`.
    """
    if num_visible > layout.num_tokens:
        raise ValueError(f"{num_visible} visible tokens of {layout.num_tokens}")
    counts = [0] * len(layout.sizes)
    while (left := num_visible - sum(counts)) > 0:
        room = [i for i, size in enumerate(layout.sizes) if counts[i] < size]
        for place, i in enumerate(room):
            counts[i] += min(left // len(room) + (place < left % len(room)), layout.sizes[i] - counts[i])
    return tuple(counts)


def share_visible(num_tokens: int, num_visible: int, all_tokens: int) -> int:
    """Of `num_tokens` as large a share visible as `num_visible` of `all_tokens`; at least one visible and one hidden."""
    return min(max(1, round(num_tokens * num_visible / all_tokens)), num_tokens - 1)


# The attention page


class AttentionMaps(NamedTuple):
    """What a page shows of a batch; `n` patch tokens, `e` = n and the global tokens, which come last.

    `attentions`: every block's attention ("l" blocks); `rows`: the last block's, mean over heads, as the guidance "global"
    and "mean" reads it; `masked`: what each of them hides.
    """

    attentions: Float[Array, "b l a e e"]
    rows: dict[str, Float[Array, "b n"]]
    masked: dict[str, Bool[Array, "b n"]]


@functools.partial(jax.jit, static_argnames=("objective", "num_visible"))
def attention_maps(objective: Any, params: Params, batch: Batch, num_visible: int) -> AttentionMaps:
    """Attention on the modalities in `batch` alone, and what stays hidden when `num_visible` tokens are shown."""
    model = objective.model
    prepared = objective.prepare(batch)
    tokens = model.embed(params, prepared.values, prepared.present)
    b = tokens.tokens.shape[0]
    rows = {query: self_attention(model, params, tokens, query) for query in QUERIES}
    counts = jnp.tile(jnp.array(equal_counts(tokens.layout, num_visible)), (b, 1))
    masked = {query: _hide(row, counts, tokens, num_visible) for query, row in rows.items()}
    attentions = jnp.stack(model.attentions(params, tokens), axis=1)
    return AttentionMaps(attentions, rows, masked)


def _hide(scores: Float[Array, "b n"], counts: Int[Array, "b m"], tokens: TokenBatch, num_visible: int) -> Bool[Array, "b n"]:
    """The tokens hidden where those with the highest `scores` are."""
    counts = jnp.minimum(counts, present_counts(tokens.layout, tokens.present, counts.shape[0]))
    return drop(scores, counts, tokens.layout, num_visible, tokens.present).masked


def attention_page(loaded: LoadedModel, paths: Sequence[Path], checkpoint: str, crop: float | int = 0.875) -> tuple[str, dict[Path, str]]:
    """One self-contained HTML page of pictures given as the first input modality, and the files left out with the reason."""
    spec, model = first_input(loaded.model), loaded.model
    grid = spec.grid(model.image_size)
    tokens = math.prod(grid)
    visible = share_visible(tokens, loaded.objective.num_visible, model.layout.num_tokens)
    left_out = unreadable(paths)
    paths = [path for path in paths if path not in left_out]
    if not paths:
        raise ValueError(f"none of the files can be read as an image: {next(f'{p}: {why}' for p, why in left_out.items())}")

    sections = []
    with eval_batches(Pictures(paths, spec.name), {spec.name: spec}, model.image_size, batch_size=1, crop=crop) as batches:
        for batch in batches:
            path = paths[int(batch["index"][0])]
            if not batch["valid"][0]:
                left_out[path] = "damaged picture data"
                continue
            maps = jax.device_get(attention_maps(loaded.objective, loaded.params, {spec.name: jnp.asarray(batch[spec.name])}, visible))
            rollout = figures.attention_rollout(maps.attentions[0])[-1, :tokens]
            heads = maps.attentions[0, -1, :, -1, :tokens]
            picture = figures.to_picture(spec, batch[spec.name][0])
            on_grid = lambda values: np.asarray(values, np.float64).reshape(grid)  # noqa: E731
            heat = functools.partial(figures.heat_overlay, picture)
            tiles = [("input", picture)]
            tiles += [(ROW_NAMES[query], heat(on_grid(maps.rows[query][0]))) for query in QUERIES]
            tiles += [("rollout over all blocks", heat(on_grid(rollout)))]
            tiles += [
                (f"visible, {ROW_NAMES[query]}", figures.mask_overlay(picture, maps.masked[query][0].reshape(grid))) for query in QUERIES
            ]
            tiles += [(f"head {i}", heat(on_grid(head))) for i, head in enumerate(heads)]
            caption = (
                f"{path}: last-block attention averaged over heads (both rows), attention rollout, the {visible} of {tokens} tokens that "
                "stay visible when the most attended are hidden, and the global token's attention per head. Each heat map has its own "
                "scale."
            )
            sections.append(figures.Section(path.name, [figures.Figure(figures.tile_grid(tiles, 4, heat_bar=True), caption)]))
    if not sections:
        raise ValueError(f"none of the files can be read as an image: {next(f'{p}: {why}' for p, why in left_out.items())}")

    encoder = dict(model.encoder)
    guidance = loaded.config["objective"].get("guidance") or {}
    facts = [
        ("checkpoint", checkpoint),
        ("image size", f"{model.image_size[0]} x {model.image_size[1]}, {tokens} tokens of {spec.name} alone"),
        ("encoder", f"width {encoder['width']}, {encoder['depth']} blocks, {encoder['heads']} heads"),
        ("visible", f"{visible} of {tokens}, the share of {loaded.objective.num_visible} of {model.layout.num_tokens} in its config"),
        ("guidance in its config", ROW_NAMES.get(guidance.get("query"), "none") if guidance else "none"),
    ]
    about = figures.Section("What is shown", [figures.Table(("", "value"), facts)])
    return figures.html_page("Attention", [about, *sections], "What the last block attends to, and what would be hidden for it."), left_out


# Which row hides objects


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
    count: int


def estimate(values: Float[np.ndarray, " b"]) -> Estimate:
    """Mean and standard error of the finite values; both NaN where there are too few."""
    values = values[np.isfinite(values)]
    count = len(values)
    error = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return Estimate(float(values.mean()) if count else math.nan, error, count)


def outliers(
    norms: Float[np.ndarray, "b n"], present: Bool[np.ndarray, "b n"], deviations: float = DEVIATIONS
) -> Bool[np.ndarray, "b n"]:
    """Present tokens whose norm exceeds the mean of all of them by `deviations` standard deviations."""
    counted = norms[present]
    return present & (norms > counted.mean() + deviations * counted.std())


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


def last_block_input(model: Any, params: Params, tokens: TokenBatch) -> Float[Array, "b n d"]:
    """What the last block reads, patch tokens only: the encoder's output with one block less."""
    sizes = dict(model.encoder)
    shorter = dataclasses.replace(model, encoder=tuple(sorted((sizes | {"depth": sizes["depth"] - 1}).items())))
    blocks = dict(params["encoder"])
    blocks.pop(f"block_{sizes['depth'] - 1:02d}")
    encoded = shorter.encode({**params, "encoder": blocks}, tokens.tokens, tokens.present)
    return encoded[:, : tokens.layout.num_tokens].astype(jnp.float32)


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
        masked = {name: _hide(score, visible, tokens, objective.num_visible) for name, score in scores.items()}
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


# The commands


def main(argv: Sequence[str] | None = None) -> int:
    """The commands; the exit status is 1 where a file was left out, 2 where nothing could be done."""
    parser = argparse.ArgumentParser(prog="python -m maskvit.report", description="Reports on a checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True)
    attention = commands.add_parser("attention", help="heads, rollout and masks on pictures of one's own, as one HTML page")
    rows = commands.add_parser("rows", help="which attention row hides objects more, measured on data with a semantic map")
    for command in (attention, rows):
        command.add_argument("--checkpoint", required=True, help="a run's workdir, its checkpoints directory, or one step's directory")
    attention.add_argument("--images", required=True, nargs="+", help="image files or folders of them")
    attention.add_argument("--out", required=True, type=Path, help="HTML file to write")
    attention.add_argument("--crop", type=float, default=0.875, help="image side over the side of the resized picture it is cut from")
    rows.add_argument("--data_dir", required=True, help="folder of prepared data sets, or of one version")
    rows.add_argument("--name", default="scenes", help="name of the data set below it")
    rows.add_argument("--split", default="val")
    rows.add_argument("--limit", type=int, default=None, help="only the first so many images")
    rows.add_argument("--first_object", type=int, default=FIRST_KIND, help="class ids from here on are objects")
    rows.add_argument("--above", type=float, default=0.5, help="share of a token's pixels that must be exceeded for an object token")
    rows.add_argument("--batch_size", type=int, default=64)
    rows.add_argument("--out", type=Path, default=None, help="also write the figures as JSON")
    arguments = vars(parser.parse_args(argv))
    command = {"attention": _attention_command, "rows": _rows_command}[arguments.pop("command")]
    try:
        return command(**arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out is {str(out)!r}, but the folder {out.parent} does not exist: make it first")


def _write(out: Path, text: str) -> None:
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)


def _attention_command(checkpoint: str, images: Sequence[str], out: Path, crop: float) -> int:
    _check_out(out)
    paths = find_pictures(images)
    page, left_out = attention_page(load(checkpoint), paths, str(checkpoint), crop)
    _write(out, page)
    print(f"{len(paths) - len(left_out)} picture(s) in {out}")
    for path, reason in left_out.items():
        print(f"left out: {path}: {reason}", file=sys.stderr)
    return 1 if left_out else 0


def _rows_command(
    checkpoint: str, data_dir: str, name: str, split: str, limit: int | None, first_object: int, above: float, batch_size: int,
    out: Path | None,
) -> int:  # fmt: skip
    if out is not None:
        _check_out(out)
    if batch_size < 1:
        raise ValueError(f"--batch_size is {batch_size}; it must be at least 1")
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
    text = json.dumps(result)
    print(text)
    if out is not None:
        _write(out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
