"""Compare a checkpoint's forward pass and losses here with a user's own checkout of the PyTorch reference."""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskvit.convert import Checkpoint, open_checkpoint, understand
from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import to_ours
from maskvit.patches import unpatchify

TOLERANCE = 1e-3  # of float32 outputs up to about 10; layout mistakes are of the order of the outputs themselves
SAMPLES = 2


def import_reference(directory: str | Path) -> Any:
    """The module `multimae` of a checkout. This runs the user's own code, and only because they named it."""
    directory = Path(directory).resolve()
    if not (directory / "multimae" / "multimae.py").is_file():
        raise ConversionError(f"{directory}: no checkout of the PyTorch reference: it has no multimae/multimae.py")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConversionError("--verify needs torch: pip install torch") from error
    # Of the reference's `utils` the model needs one small file; the package's own start-up wants torchvision and more.
    utils = types.ModuleType("utils")
    utils.__path__ = [str(directory / "utils")]
    sys.modules["utils"] = utils
    sys.path.insert(0, str(directory))
    try:
        return importlib.import_module("multimae")
    except ImportError as error:
        raise ConversionError(f"{directory}: the reference does not import here ({error}); install what it asks for") from error
    finally:
        sys.path.remove(str(directory))
        for name in [name for name in sys.modules if name == "utils" or name.startswith("utils.")]:
            del sys.modules[name]


def build_reference(reference: Any, config: Mapping[str, Any], checkpoint: Checkpoint) -> Any:
    """The reference's model with the checkpoint's weights, strictly loaded."""
    import torch

    objective, size = config["objective"], tuple(config["image_size"])
    encoder, decoder, inputs = objective["encoder"], objective["decoder"], list(objective["inputs"])
    input_adapters, output_adapters = {}, {}
    for name in inputs:
        spec = config["modalities"][name]
        common = dict(stride_level=spec["stride"], patch_size_full=spec["patch"], image_size=size)
        if spec["kind"] == "categorical":
            adapter = reference.SemSegInputAdapter(num_classes=spec["num_classes"], dim_class_emb=spec["embed_dim"], **common)
        else:
            adapter = reference.PatchedInputAdapter(num_channels=spec["channels"], **common)
        input_adapters[name] = adapter
    for name in objective["outputs"]:
        base = name if name in config["modalities"] else name.removeprefix("norm_")
        spec = config["modalities"][base]
        output_adapters[name] = reference.SpatialOutputAdapter(
            num_channels=spec["num_classes"] if spec["kind"] == "categorical" else spec["channels"],
            stride_level=spec["stride"], patch_size_full=spec["patch"], dim_tokens=decoder["width"], depth=decoder["depth"],
            num_heads=decoder["heads"], mlp_ratio=decoder["mlp_ratio"], image_size=size, task=base, context_tasks=inputs,
        )  # fmt: skip
    model = reference.MultiMAE(
        input_adapters, output_adapters, num_global_tokens=objective["num_global_tokens"], dim_tokens=encoder["width"],
        depth=encoder["depth"], num_heads=encoder["heads"], mlp_ratio=encoder["mlp_ratio"],
    )  # fmt: skip
    model.load_state_dict({key: torch.from_numpy(np.array(value, np.float32)) for key, value in checkpoint.state.items()}, strict=True)
    return model.eval()


def sample_batch(config: Mapping[str, Any], images: str | Path | None, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Stored values of every modality: the first modality from pictures if given, all else smooth noise."""
    height, width = config["image_size"]
    batch = {}
    for name in config["objective"]["inputs"]:
        spec = config["modalities"][name]
        shape = (SAMPLES, height // spec["stride"], width // spec["stride"])
        if spec["kind"] == "categorical":
            batch[name] = rng.integers(0, spec["num_classes"], shape).astype(np.int32)
        else:
            batch[name] = rng.uniform(0, 1 / spec.get("scale", 1.0), (*shape, spec["channels"])).astype(np.float32)
    if images is not None:
        from PIL import Image

        name = config["objective"]["inputs"][0]
        files = sorted(p for p in Path(images).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:SAMPLES]
        if len(files) < SAMPLES:
            raise ConversionError(f"{images}: needs at least {SAMPLES} pictures (.jpg, .png)")
        batch[name] = np.stack([np.asarray(Image.open(f).convert("RGB").resize((width, height))) for f in files])
    return batch


def verify(
    src: str | Path,
    directory: str | Path,
    build_objective: Callable[[Mapping[str, Any]], Any],
    images: str | Path | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
) -> bool:
    """Print the largest differences per output and per loss; True where all lie within `TOLERANCE`.

    `directory` is a checkout of the PyTorch reference, `images` a folder of pictures (random values without it);
    `build_objective` makes the objective of a config (`maskvit.objectives.build_objective`).
    """
    from maskvit.masking import drop
    from maskvit.scores import random_scores

    checkpoint = open_checkpoint(src)
    understood = understand(checkpoint, num_heads, decoder_num_heads)
    config, rules = understood.config, understood.rules
    reference = import_reference(directory)
    import torch

    theirs = build_reference(reference, config, checkpoint)
    objective = build_objective(config)
    model = objective.model
    params = to_ours(rules, checkpoint.state, str(src))
    batch = sample_batch(config, images, np.random.default_rng(0))

    with jax.default_matmul_precision("highest"):
        prepared = objective.prepare({name: jnp.asarray(value) for name, value in batch.items()})
        tokens = model.embed(params, prepared.values_of(model.inputs))
        sizes = model.layout.sizes
        counts = np.array([objective.num_visible * size // sum(sizes) for size in sizes])
        counts[0] += objective.num_visible - counts.sum()
        scores = random_scores(jax.random.split(jax.random.key(0), SAMPLES), model.layout)
        plan = drop(scores, jnp.broadcast_to(jnp.asarray(counts), (SAMPLES, len(sizes))), model.layout, objective.num_visible)
        predictions = objective.reconstruct(params, tokens, plan)
        sums = objective.loss_sums(predictions, prepared, plan, model.layout)
    ours_losses = {name: float(total / count) for name, (total, count) in sums.items()}

    differences = dict.fromkeys(model.outputs, 0.0)
    their_losses = dict.fromkeys(model.outputs, 0.0)
    for i in range(SAMPLES):  # one by one: the reference counts a whole batch's visible tokens where masks are given
        inputs = {}
        for name in model.inputs:
            value = np.asarray(prepared.values[name][i : i + 1])
            inputs[name] = torch.from_numpy(value.astype(np.int64) if value.ndim == 3 else value.transpose(0, 3, 1, 2).copy())
        masks = {
            name: torch.from_numpy(np.asarray(plan.masked[i : i + 1, model.layout.span(name)]).astype(np.int64)) for name in model.inputs
        }
        with torch.no_grad():
            predicted, _ = theirs(inputs, mask_inputs=True, task_masks=masks, num_encoded_tokens=objective.num_visible)
        for name in model.outputs:
            spec = model.modality(name)
            grid = spec.grid(model.image_size)
            ours = unpatchify(predictions[name][i : i + 1].reshape(1, grid[0] * grid[1], -1), grid, spec.patch_pixels)
            differences[name] = max(
                differences[name], float(np.abs(np.asarray(ours).transpose(0, 3, 1, 2) - predicted[name].numpy()).max())
            )
            losses = {"mse": "MaskedMSELoss", "l1": "MaskedL1Loss", "cross_entropy": "MaskedCrossEntropyLoss"}
            options = {} if spec.kind == "categorical" else {"norm_pix": name != spec.name}
            loss = getattr(reference, losses[spec.loss])(patch_size=spec.patch, stride=spec.stride, **options)
            their_losses[name] += float(loss(predicted[name], inputs[spec.name], mask=masks[spec.name])) / SAMPLES
    print(f"{'output':<12} {'largest difference':>20} {'loss here':>12} {'reference':>12}")
    for name in model.outputs:
        print(f"{name:<12} {differences[name]:>20.2e} {ours_losses[name]:>12.6f} {their_losses[name]:>12.6f}")
    agree = all(d <= TOLERANCE for d in differences.values())
    agree &= all(math.isclose(ours_losses[n], their_losses[n], rel_tol=TOLERANCE) for n in model.outputs)
    print("agreement" if agree else f"DISAGREEMENT beyond {TOLERANCE}")
    return agree
