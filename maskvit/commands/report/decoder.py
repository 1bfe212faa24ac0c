"""How the decoder of a MAE or CrossMAE works, on pictures of one's own, as one HTML page.

What it rebuilds after each block; for CrossMAE the weights with which its blocks read the encoder's; for MAE how much its masked
tokens attend to visible and to masked ones. Source of all three: Fu et al., "Rethinking Patch Dependence for Masked
Autoencoders", 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, Num

from maskvit.commands.report.attention import share_visible
from maskvit.commands.report.files import add_picture_arguments, each_picture, picture_command
from maskvit.core.keys import sample_keys, stream_keys
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch, Params
from maskvit.features import LoadedModel, first_input
from maskvit.masking.plan import drop, present_counts
from maskvit.masking.scores import random_scores
from maskvit.plots import curves, page, panels, pictures


class Decoded(NamedTuple):
    """A batch as the decoder sees it.

    `masked`: the hidden tokens; `stages`: what it rebuilds if it ends after each block, in stored units; `attention`: per block
    (attention of a masked token to a visible token, to a masked token) as multiples of an even spread, for MAE decoders.
    """

    masked: Bool[Array, "b n"]
    stages: list[Num[Array, "b h w c"]]
    attention: Float[Array, "l 2"] | None


def output_of(model: Any, modality: str) -> str:
    """The output that rebuilds an input modality. Raises ValueError where there is none, or its decoder has no such blocks."""
    found = [output for output in model.outputs if model.modality(output).name == modality]
    if not found:
        raise ValueError(f"this checkpoint has no decoder of {modality!r}: its outputs are {', '.join(model.outputs) or 'none'}")
    if model.decoder_name == "spatial":
        raise ValueError("the decoder of this checkpoint is 'spatial'; its blocks are shown for: mae, crossmae")
    return found[0]


def attention_by_kind(weights: Float[Array, "b a s s"], masked: Bool[Array, "b n"]) -> Float[Array, "2"]:
    """Mean attention of a masked token to a visible and to a masked token, times the number of tokens: 1 is an even spread.

    The global tokens, which come last in `weights`, are neither.
    """
    n, s = masked.shape[1], weights.shape[-1]
    rows = jnp.einsum("bqk,bq->bk", weights.mean(axis=1)[:, :n, :n], masked.astype(jnp.float32))
    pairs = masked.sum(axis=1)
    return jnp.stack([(rows * keys).sum() / (pairs * keys.sum(axis=1)).sum() for keys in (~masked, masked)]) * s


@functools.partial(jax.jit, static_argnames=("objective", "output", "num_visible"))
def decode(objective: Any, params: Params, batch: Batch, keys: Key[Array, " b"], output: str, num_visible: int) -> Decoded:
    """Hide all but `num_visible` tokens of the one modality in `batch` at random, and follow the decoder."""
    model = objective.model
    prepared = objective.prepare(batch)
    tokens = model.embed(params, prepared.values, prepared.present)
    counts = jnp.minimum(num_visible, present_counts(tokens.layout, tokens.present, tokens.tokens.shape[0]))
    plan = drop(random_scores(stream_keys(keys, "scores"), tokens.layout), counts, tokens.layout, num_visible, tokens.present)
    memory = objective.encode_visible(params, tokens, plan)
    spec = model.modality(output)
    stages = []
    for flat in model.decode_after_blocks(params, output, memory, plan, tokens.layout, tokens.present is not None):
        stages.append(objective.to_stored(output, flat.reshape(*flat.shape[:2], spec.patch_pixels**2, -1), prepared))
    attention = None
    if model.decoder_name == "mae":
        maps = model.decoder_attentions(params, output, memory, plan, tokens.layout)
        attention = jnp.stack([attention_by_kind(weights, plan.masked) for weights in maps])
    return Decoded(plan.masked, stages, attention)


def paste_visible(stage: np.ndarray, stored: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """The rebuilt picture with the given pixels where tokens are visible."""
    cells = np.kron(masked, np.ones((stage.shape[0] // masked.shape[0], stage.shape[1] // masked.shape[1]), bool))
    return np.where(cells[..., None], stage, stored.reshape(stage.shape))


def decoder_page(loaded: LoadedModel, paths: Sequence[Path], checkpoint: str, crop: float | int = 0.875) -> tuple[str, dict[Path, str]]:
    """One self-contained HTML page of pictures given as the first input modality, and the files left out with the reason."""
    spec, model = first_input(loaded.model), loaded.model
    output, grid = output_of(model, spec.name), spec.grid(model.image_size)
    tokens = grid[0] * grid[1]
    visible = share_visible(tokens, loaded.objective.num_visible, model.layout.num_tokens)
    left_out: dict[Path, str] = {}
    sections, attentions, errors = [], [], []
    for number, (path, given) in enumerate(each_picture(model, paths, crop, left_out)):
        values, keys = Batch({spec.name: jnp.asarray(given)}), sample_keys(0, number, 1)
        found = jax.device_get(decode(loaded.objective, loaded.params, values, keys, output, visible))
        attentions += [] if found.attention is None else [found.attention]
        stored, masked = given[0], found.masked[0].reshape(grid)
        picture = pictures.to_picture(spec, stored)
        tiles = [("input", picture), (f"visible: {visible} of {tokens}", pictures.mask_overlay(picture, masked))]
        errors.append([hidden_error(spec, stage[0], stored, masked) for stage in found.stages])
        for i, stage in enumerate(found.stages):
            shown = pictures.to_picture(spec, paste_visible(stage[0], stored, masked), like=stored)
            tiles.append((f"after block {i}", shown))
        caption = (
            f"{path}: what {output} rebuilds if the decoder ends after each of its blocks (final norm and head applied), with the "
            "visible patches as they are."
        )
        if output != spec.name:
            caption += " Predictions of normalized patches borrow mean and deviation of the true patch."
        sections.append(page.Section(path.name, [page.Figure(panels.tile_grid(tiles, 5), caption)]))

    decoder = dict(model.decoder)
    facts = [
        ("checkpoint", checkpoint),
        ("decoder", f"{model.decoder_name} of {output}: width {decoder['width']}, {decoder['depth']} blocks, {decoder['heads']} heads"),
        ("visible", f"{visible} of {tokens}, at random"),
    ]
    about = page.Section("What is shown", [page.Table(("what", "value"), facts)])
    blocks, first = _errors_by_block(np.array(errors), spec, output != spec.name)
    reads, second = what_it_reads(loaded, output, attentions)
    found_out = [page.Section("Error by block", blocks), *([page.Section("What the blocks read", reads)] if reads else [])]
    return page.html_page("The decoder, block by block", [*found_out, about, *sections], f"{first} {second}".strip()), left_out


def hidden_error(spec: Modality, stage: np.ndarray, stored: np.ndarray, masked: Bool[np.ndarray, "gh gw"]) -> float:
    """Root mean square error of the hidden pixels in stored units; of class ids the share that is wrong. Missing values do not count."""
    rebuilt, true = (values.reshape(*stage.shape[:2], -1).astype(np.float64) for values in (stage, stored))
    cells = np.kron(masked, np.ones([side // grid for side, grid in zip(stage.shape, masked.shape, strict=False)], bool))
    known = np.isfinite(true) & (True if spec.missing is None else true != spec.missing)
    differences = (rebuilt - true)[known & cells[..., None]]
    if not differences.size:
        return float("nan")
    return float((differences != 0).mean() if spec.kind == "categorical" else np.sqrt((differences**2).mean()))


def _errors_by_block(errors: Float[np.ndarray, "p l"], spec: Modality, normalized: bool) -> tuple[list[Any], str]:
    """(a table of the mean error after each decoder block and what follows from it, the result in a sentence); "p" pictures.

    `normalized`: patches are rebuilt with the true mean and deviation.
    """
    means = errors.mean(axis=0)
    name = "share of wrong classes" if spec.kind == "categorical" else f"error (root mean square, stored units of {spec.name})"
    last = len(means) - 1
    rows = [(i, float(f"{value:.4g}")) for i, value in enumerate(means)]
    table = page.Table(("after decoder block", name), rows)
    if not last:
        return [table], f"After the decoder's one block the {name} on hidden patches is {means[0]:.3g}."
    result = f"The {name} on hidden patches goes from {means[0]:.3g} after the first decoder block to {means[-1]:.3g} after the last."
    steps = np.diff(means)
    most = int(steps.argmin())
    words = f"Block {most + 1} lowers it most, by {-steps[most]:.3g}." if steps[most] < 0 else "No block lowers what the first one leaves."
    words += " The head was trained to read the last block alone, so earlier ones may know more than it shows."
    words += " Every patch is given its true mean and deviation, so the error is of what is left to tell." if normalized else ""
    return [table, page.Prose(words)], result


def what_it_reads(loaded: LoadedModel, output: str, attentions: Sequence[np.ndarray]) -> tuple[list[Any], str]:
    """(the attention of a MAE decoder as a table, or the weights of a CrossMAE decoder as a heat map; the result in a sentence)."""
    if attentions:
        means = np.stack(attentions).mean(axis=0)
        rows = [(i, f"{v:.2f}", f"{m:.2f}") for i, (v, m) in enumerate(means)]
        v, m = means.mean(axis=0)
        result = f"A masked token attends {v / max(m, 1e-9):.1f} times as much to a visible token as to a masked one."
        words = (
            "How much a masked token attends to one visible and to one masked token, as a multiple of an even spread over all tokens, "
            f"mean over heads and pictures. Block {int((means[:, 0] - means[:, 1]).argmax())} prefers visible tokens most. The CrossMAE "
            "paper gives 1.42 and 0.39 for a MAE; how it scales them is not known here."
        )
        table = page.Table(("block", "to a visible token", "to a masked token"), [*rows, ("mean", f"{v:.2f}", f"{m:.2f}")])
        return [table, page.Prose(words)], result
    weights = loaded.params["outputs"][output].get("feature_weights")
    if weights is None:
        return [], ""
    features, weights = dict(loaded.model.decoder)["features"], np.asarray(weights, np.float64)
    result = most_read(weights, features)
    picture = curves.matrix(weights, "decoder block", "encoder feature (column)", "Inter-block weights")
    named = "column 0 is what enters the encoder" if 0 in features else f"column 0 is block {features[0] - 1}"
    caption = f"Weights with which each decoder block sums the encoder's features; {named}. They are free in sign."
    return [page.Figure(picture, caption)], result


def most_read(weights: Float[np.ndarray, "l f"], features: Sequence[int]) -> str:
    """Which of the encoder's `features` (0: what enters it, i: what leaves its i-th block) has the largest weights, in a sentence."""
    shares = np.abs(weights).mean(axis=0) / max(float(np.abs(weights).mean(axis=0).sum()), 1e-30)
    names = ["what enters the encoder" if feature == 0 else f"encoder block {feature - 1}" for feature in features]
    order = np.argsort(-shares, kind="stable")[:2]
    told = " and ".join(f"{names[i]} ({shares[i]:.0%} of the absolute weights)" for i in order)
    return f"The decoder reads {told} most; even weights would give each {1 / len(names):.0%}."


# The command

add_arguments = add_picture_arguments


def run(checkpoint: str, images: Sequence[str], out: Path, crop: float) -> int:
    """The command; 1 where a file was left out."""
    return picture_command(decoder_page, checkpoint, images, out, crop)
