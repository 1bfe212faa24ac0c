"""Model, batch, learning rate and length for so many records, each with the reason: what `init` writes beside the data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from maskvit.checkpoints import load_params
from maskvit.commands.init.found import Data
from maskvit.core.modalities import parse_modalities
from maskvit.core.types import tree_paths
from maskvit.objectives import build_objective
from maskvit.objectives.stored import stored_objective

ENOUGH_STEPS = 50  # an epoch should have so many
# The published recipes: (batch, learning rate at that batch).
PUBLISHED = {"multimae": (2048, 8e-4), "mae": (4096, 2.4e-3), "crossmae": (4096, 2.4e-3)}
STEPS = {"scratch": 40_000, "continued": 10_000}
# (records from which on, the encoder, the decoder)
SIZES = (
    (500_000, dict(width=768, depth=12, heads=12), dict(width=256, depth=2, heads=8)),
    (20_000, dict(width=384, depth=12, heads=6), dict(width=192, depth=2, heads=6)),
    (0, dict(width=192, depth=12, heads=3), dict(width=128, depth=2, heads=4)),
)
NOT_OF_A_START = ("inputs", "outputs", "num_visible", "scores", "budget", "guidance", "guided_share", "loss_weight", "predicted")


class Recipe(NamedTuple):
    """A plain config, and the reasons by dotted key."""

    config: dict[str, Any]
    reasons: dict[str, str]


def recipe(data: Data, checkpoint: str | None, image_size: int | None) -> Recipe:
    """The config for the data. Raises ValueError where there are too few records or too small pictures, or for a checkpoint of
    an objective that rebuilds no pixels; CheckpointError where there is none."""
    records = data.records[data.train]
    start = _checkpoint(checkpoint) if checkpoint else {}
    why: dict[str, str] = {}
    size, patch = _size(data, image_size, start, why)
    modalities = _modalities(data, patch, start)
    objective = _objective(data, modalities, size, start, records, why)
    batch, epochs, base_lr = _numbers(records, objective["name"], bool(start), why)
    steps = records // batch
    few = max(1, epochs // 20)
    config: dict[str, Any] = dict(
        seed=0,
        image_size=size,
        total=f"{epochs} epochs",
        global_batch=batch,
        micro_batch=0,
        modalities=modalities,
        objective=objective,
        optimizer=dict(base_lr=base_lr, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, no_decay=()),
        schedule=dict(total_epochs=float(epochs), start_epochs=0.0, warmup_epochs=round(0.05 * epochs, 2), min_lr=0.0),
        data=dict(
            train=data.source,
            augment=dict(crop="random_resized", scale=(0.2, 1.0), ratio=(0.75, 4 / 3), flip=0.5, resize="pil"),
            workers=0 if records < 1000 else 8,
            prefetch=2,
        ),
        evaluators={},
        init_from=dict(path="", fresh=(), drop=()),
        log_every=max(1, min(50, steps * epochs // 20)),
        picture_every=f"{few} epochs",
        checkpoint=dict(every=f"{max(1, math.ceil(500 / steps))} epochs", keep=3),
        writers=(),
    )
    why["data.augment"] = "flip=0.0 where left and right mean something, as in text"
    if data.classes > 1 and data.val:
        test = dict(data.source, split=data.val)
        ks = tuple(k for k in (10, 20) if k <= records) or (1,)
        config["evaluators"] = dict(knn=dict(type="knn", every=f"{few} epochs", ks=ks, test=test))
        why["evaluators"] = f"the data have {data.classes} classes and a split {data.val!r}: k-NN on frozen features"
    else:
        why["evaluators"] = "none: k-NN needs classes and a second split"
    if start and checkpoint:
        config["init_from"] = _differences(config, checkpoint, why)
    return Recipe(config, why)


def _checkpoint(path: str) -> dict[str, Any]:
    params, metadata = load_params(path)
    config = metadata.get("config") or {}
    block = config.get("objective")
    name = block.get("name") if isinstance(block, Mapping) else None
    if not isinstance(name, str) or name not in PUBLISHED:
        raise ValueError(f"--checkpoint {path} is of the objective {name!r}; init continues {', '.join(PUBLISHED)}")
    try:
        stored_objective(config, params)
    except ValueError as error:
        raise ValueError(f"--checkpoint {path}: {error}") from error
    return config


def _size(data: Data, image_size: int | None, start: Mapping[str, Any], why: dict[str, str]) -> tuple[tuple[int, int], int]:
    short = min(data.size)
    side = image_size or min(224, short // (32 if short >= 64 else 8) * 8 if short < 64 else short // 32 * 32)
    patch = 16 if side >= 128 else 8 if side >= 32 else 4
    if start:
        patch = max(fields["patch"] for fields in start["modalities"].values() if "patch" in fields)
        side = side // patch * patch
    if side < 2 * patch or side % patch:
        raise ValueError(
            f"pictures of {data.size[0]} x {data.size[1]} pixels make images of {side}, which are not at least 2 patches of {patch}: "
            "give --image_size"
        )
    why["image_size"] = (
        f"the median picture has {data.size[0]} x {data.size[1]} pixels; {(side // patch) ** 2} tokens of {patch} x {patch} per modality"
    )
    return (side, side), patch


def _modalities(data: Data, patch: int, start: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    declared = {}
    for name, fields in data.modalities.items():
        sizes: dict[str, Any] = dict(patch=patch)
        if fields["kind"] == "categorical":
            sizes["stride"] = max(1, patch // 4)
        stored = (start.get("modalities") or {}).get(name, {})
        kept = ("patch", "stride", "embed_dim", "scale", "mean", "std", "standardize", "loss")
        same = stored.get("kind", "continuous") == fields["kind"]
        declared[name] = {**fields, **sizes, **({key: stored[key] for key in kept if key in stored} if same else {})}
    return declared


def _objective(
    data: Data, modalities: Mapping[str, Any], size: tuple[int, int], start: Mapping[str, Any], records: int, why: dict[str, str]
) -> dict[str, Any]:
    inputs = tuple(modalities)
    specs = parse_modalities(modalities)
    tokens = sum(math.prod(spec.grid(size)) for spec in specs.values())
    outputs = (*inputs, *(("norm_rgb",) if "rgb" in inputs else ()))
    compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if start:
        objective = {key: value for key, value in start["objective"].items() if key not in NOT_OF_A_START}
        stored = start["objective"].get("outputs") or ()
        outputs = tuple(output for output in outputs if output in inputs or output in stored)
        if objective["name"] != "multimae":
            inputs = tuple(name for name in start["objective"]["inputs"] if name in modalities) or inputs
            outputs = tuple(output for output in stored if output.removeprefix("norm_") in inputs) or inputs
        objective |= dict(inputs=inputs, outputs=outputs, compute_dtype=compute)
        why["objective.name"] = "sizes and kind of the checkpoint"
    elif len(inputs) == 1:
        first = next(iter(specs.values()))
        target = f"norm_{inputs[0]}" if first.kind == "continuous" else inputs[0]
        encoder = next(encoder for least, encoder, _ in SIZES if records >= least)
        objective = dict(
            name="mae", inputs=inputs, outputs=(target,), mask_ratio=0.75, encoder=encoder, decoder=dict(width=128, depth=4, heads=4)
        )
        objective |= dict(compute_dtype=compute, remat=False)
        why["objective.name"] = "one modality: a masked autoencoder, three quarters of the tokens hidden"
    else:
        encoder, decoder = next((encoder, decoder) for least, encoder, decoder in SIZES if records >= least)
        objective = dict(name="multimae", inputs=inputs, outputs=outputs, encoder=encoder, decoder=decoder, num_global_tokens=1)
        objective |= dict(compute_dtype=compute, remat=False)
        why["objective.name"] = f"{len(inputs)} modalities: MultiMAE"
    if objective["name"] == "multimae":
        objective["num_visible"] = max(1, tokens // 6)
        why["objective.num_visible"] = f"a sixth of {tokens} tokens, as published"
        objective["budget"] = dict(name="dirichlet", alphas=1.0)
    objective |= dict(scores=dict(name="random"), guidance={})
    why["objective.scores"] = (
        "attention_high with guidance=dict(name='self_attention') hides what is attended to most; docs/grid.md lists all"
    )
    if not start:
        why["objective.encoder"] = f"as wide as {records:,} records can teach; B (768, 12, 12) from {SIZES[0][0]:,} on"
    return objective


def _numbers(records: int, name: str, continued: bool, why: dict[str, str]) -> tuple[int, int, float]:
    """(batch, epochs, base learning rate)."""
    if records < 2:
        raise ValueError(f"{records} record(s) to train on: there must be at least 2")
    most, peak = PUBLISHED[name]
    batch = min(most, 2 ** int(math.log2(records)), max(8, 2 ** int(math.log2(max(1, records // ENOUGH_STEPS)))))
    per_epoch = records // batch
    why["global_batch"] = (
        f"{per_epoch} steps an epoch with {records:,} records (the recipe's {most} would make {records / most:.2g})"
        if batch < most
        else f"the recipe's; {per_epoch} steps an epoch with {records:,} records"
    )
    target = STEPS["continued" if continued else "scratch"]
    epochs = min(1600, max(20, round(target / per_epoch)))
    why["total"] = f"{epochs * per_epoch:,} steps; from scratch some 40,000, from a checkpoint some 10,000, at most 1,600 epochs"
    rate = peak * math.sqrt(batch / most) / (10 if continued else 1)
    base_lr = float(f"{rate * 256 / batch:.2g}")
    why["optimizer.base_lr"] = (
        f"times global_batch / 256: {base_lr * batch / 256:.2g} at the peak. The recipe's {peak:g} at batch {most}, times the "
        f"square root of {batch}/{most}, as Adam scales with the batch" + (", and a tenth of that from a checkpoint" if continued else "")
    )
    return batch, epochs, base_lr


def _differences(config: Mapping[str, Any], checkpoint: str, why: dict[str, str]) -> dict[str, Any]:
    """`config.init_from`: what of the model starts fresh, and what of the checkpoint is left out."""
    objective = build_objective(config)
    model = {name: leaf.shape for name, leaf in tree_paths(jax.eval_shape(objective.init, jax.random.key(0))[0]).items()}
    stored = {name: leaf.shape for name, leaf in tree_paths(load_params(checkpoint)[0]).items()}
    fresh = {name for name, shape in model.items() if name not in stored or (shape != stored[name] and not name.endswith("pos_embed"))}
    drop = stored.keys() - model.keys()
    why["init_from"] = "fresh: what the checkpoint has not, or of another size; drop: what this model has not"
    return dict(path=checkpoint, fresh=_patterns(fresh, model), drop=_patterns(drop, stored))


def _patterns(names: set[str], everything: Mapping[str, Any]) -> tuple[str, ...]:
    """Regular expressions that match these names and no others: whole branches where all of a branch is meant."""
    found: dict[str, None] = {}
    for name in sorted(names):
        parts = name.split("/")
        branches = ("/".join(parts[:depth]) + "/" for depth in range(1, len(parts)))
        whole = next((b for b in branches if all(other in names for other in everything if other.startswith(b))), None)
        found[re.escape(name) if whole is None else re.escape(whole) + ".*"] = None
    return tuple(pattern.replace("\\/", "/") for pattern in found)
