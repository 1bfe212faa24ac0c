"""Compare a checkpoint's forward pass and losses here with a user's own checkout of the PyTorch reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from maskvit.convert import Checkpoint, family_of, open_checkpoint, understand
from maskvit.convert.checkout import build_reference, import_reference, reference_losses
from maskvit.convert.reader import ConversionError
from maskvit.convert.report import Allowed
from maskvit.convert.rules import to_ours
from maskvit.core.patches import unpatchify
from maskvit.core.types import Batch

TOLERANCE = 1e-3  # of float32 outputs up to about 10; layout mistakes are of the order of the outputs themselves
SAMPLES = 2


def loaded_reference(reference: Any, model: Any, checkpoint: Checkpoint) -> Any:
    """The reference's model with the checkpoint's weights, strictly loaded."""
    import torch

    network = build_reference(reference, model)
    network.load_state_dict({key: torch.from_numpy(np.array(value, np.float32)) for key, value in checkpoint.state.items()}, strict=True)
    return network.eval()


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
        batch[config["objective"]["inputs"][0]] = _pictures(Path(images), (height, width))
    return batch


def _pictures(folder: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "b h w 3"]:
    """The first `SAMPLES` pictures of a folder, squeezed to `size` (height, width). Raises ConversionError."""
    from PIL import Image

    from maskvit.data.pictures import PictureError, read_picture

    suffixes = (".jpg", ".jpeg", ".png")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))[:SAMPLES]
    if len(files) < SAMPLES:
        raise ConversionError(f"{folder}: needs at least {SAMPLES} pictures (.jpg, .png)")
    pictures = []
    for file in files:
        try:
            picture = Image.fromarray(read_picture(file.read_bytes(), channels=3).array)
        except PictureError as error:
            raise ConversionError(f"{file}: {error}") from error
        pictures.append(np.asarray(picture.convert("RGB").resize(size[::-1])))
    return np.stack(pictures)


def input_sets(inputs: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All inputs, then all but each one, then each alone: what the outputs of those that are left out are predicted from."""
    left_out = [tuple(name for name in inputs if name != missing) for missing in inputs]
    return list(dict.fromkeys(names for names in (inputs, *left_out, *((name,) for name in inputs)) if names))


class Compared(NamedTuple):
    """One output predicted from some inputs: the largest difference of predictions, and the loss here and there."""

    output: str
    difference: float
    loss: float
    reference_loss: float

    @property
    def agrees(self) -> bool:
        """Whether both lie within `TOLERANCE`."""
        return self.difference <= TOLERANCE and math.isclose(self.loss, self.reference_loss, rel_tol=TOLERANCE)


def verify(
    src: str | Path,
    directory: str | Path,
    build_objective: Callable[[Mapping[str, Any]], Any],
    images: str | Path | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    allow: Sequence[str] = (),
) -> bool:
    """Print the largest differences per output and per loss, for all inputs and with inputs left out; True where all are small.

    `directory` is a checkout of the PyTorch reference, `images` a folder of pictures (random values without it);
    `build_objective` makes the objective of a config (`maskvit.objectives.build_objective`); `allow` as in `convert.understand`.
    """
    allowed = Allowed(allow)
    checkpoint = open_checkpoint(src, allow=allowed)
    _, name, _ = family_of(checkpoint.state)
    if name != "MultiMAE":
        raise ConversionError(f"{src}: is {name}; --verify compares MultiMAE's own files with its own code")
    plan = understand(checkpoint, num_heads, decoder_num_heads, allow=allowed)
    theirs = import_reference(directory)
    objective = build_objective(plan.config)
    network = loaded_reference(theirs, objective.model, checkpoint)
    tensors = {key: value.astype(np.float32) for key, value in plan.source.tensors.items()}
    params = jax.tree.map(jnp.asarray, to_ours(plan.rules, tensors, str(src)))
    batch = sample_batch(plan.config, images, np.random.default_rng(0))
    agree = True
    print(f"{'inputs':<24} {'output':<12} {'largest difference':>20} {'loss here':>12} {'reference':>12}")
    for inputs in input_sets(objective.model.inputs):
        for row in _compare(objective, params, batch, inputs, theirs, network):
            mark = "" if row.agrees else "  <- differs"
            print(f"{', '.join(inputs):<24} {row.output:<12} {row.difference:>20.2e} {row.loss:>12.6f} {row.reference_loss:>12.6f}{mark}")
            agree &= row.agrees
    print("agreement" if agree else f"DISAGREEMENT beyond {TOLERANCE}")
    return agree


def _compare(
    objective: Any, params: Any, batch: Mapping[str, np.ndarray], inputs: tuple[str, ...], theirs: Any, network: Any
) -> list[Compared]:
    """Every output from the inputs of that name. Both sides hide the same tokens."""
    from maskvit.masking.plan import drop
    from maskvit.masking.scores import random_scores

    model = objective.model

    @jax.jit
    def run(params: Any, batch: Batch) -> tuple[Any, ...]:
        prepared = objective.prepare(batch)
        tokens = model.embed(params, prepared.values_of(inputs))
        layout = tokens.layout
        num_visible = max(len(inputs), round(objective.num_visible * layout.num_tokens / model.layout.num_tokens))
        counts = np.array([num_visible * size // layout.num_tokens for size in layout.sizes])
        counts[0] += num_visible - counts.sum()
        scores = random_scores(jax.random.split(jax.random.key(0), SAMPLES), layout)
        plan = drop(scores, jnp.broadcast_to(jnp.asarray(counts), (SAMPLES, len(counts))), layout, num_visible)
        predictions = objective.reconstruct(params, tokens, plan)
        return layout, plan, prepared.values, predictions, objective.loss_sums(predictions, prepared, plan, layout)

    with jax.default_matmul_precision("highest"):
        layout, plan, prepared, predictions, sums = run(params, Batch({name: jnp.asarray(value) for name, value in batch.items()}))
    num_visible = plan.visible_ids.shape[1]
    masked = {name: np.asarray(plan.masked[:, layout.span(name)]).astype(np.int64) for name in inputs}
    values = {name: np.asarray(value) for name, value in prepared.items()}
    differences, losses = _of_reference(model, predictions, values, masked, num_visible, theirs, network)
    return [Compared(name, differences[name], float(sums[name][0] / sums[name][1]), losses[name]) for name in model.outputs]


def _of_reference(
    model: Any,
    predictions: Mapping[str, Any],
    values: Mapping[str, np.ndarray],
    masked: Mapping[str, np.ndarray],
    num_visible: int,
    theirs: Any,
    network: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """(largest difference per output, the reference's losses), the inputs being those that `masked` names."""
    import torch

    loss_functions = reference_losses(theirs, model)
    differences, losses = dict.fromkeys(model.outputs, 0.0), dict.fromkeys(model.outputs, 0.0)
    for i in range(SAMPLES):  # one by one: the reference counts a whole batch's visible tokens where masks are given
        whole = {}
        for name, value in values.items():
            one = value[i : i + 1]
            whole[name] = torch.from_numpy(one.astype(np.int64) if one.ndim == 3 else one.transpose(0, 3, 1, 2).copy())
        masks = {name: torch.from_numpy(rows[i : i + 1]) for name, rows in masked.items()}
        with torch.no_grad():
            predicted, _ = network(
                {name: whole[name] for name in masked}, mask_inputs=True, task_masks=masks, num_encoded_tokens=num_visible
            )
        for name in model.outputs:
            spec = model.modality(name)
            grid = spec.grid(model.image_size)
            ours = unpatchify(predictions[name][i : i + 1].reshape(1, grid[0] * grid[1], -1), grid, spec.patch_pixels)
            difference = np.abs(np.asarray(ours).transpose(0, 3, 1, 2) - predicted[name].numpy()).max()
            differences[name] = max(differences[name], float(difference))
            losses[name] += float(loss_functions[name](predicted[name], whole[spec.name], mask=masks.get(spec.name))) / SAMPLES
    return differences, losses
