"""A user's own checkout of the PyTorch MultiMAE: its model of the same sizes as one of ours, and its losses. Needs torch."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

from maskvit.convert.reader import ConversionError

LOSSES = {"mse": "MaskedMSELoss", "l1": "MaskedL1Loss", "cross_entropy": "MaskedCrossEntropyLoss"}


def import_reference(directory: str | Path) -> Any:
    """The module `multimae` of a checkout. This runs the user's own code, and only because they named it.

    Raises ConversionError where the folder is none, or something that it imports is missing.
    """
    directory = Path(directory).resolve()
    if not (directory / "multimae" / "multimae.py").is_file():
        raise ConversionError(f"{directory}: no checkout of the PyTorch reference: it has no multimae/multimae.py")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConversionError("the PyTorch reference needs torch: pip install torch") from error
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


def build_reference(reference: Any, model: Any) -> Any:
    """The reference's model with the inputs, outputs and sizes of `model`, a MultiMAE of ours; fresh weights."""
    encoder, decoder = ({"mlp_ratio": 4.0, **dict(sizes)} for sizes in (model.encoder, model.decoder))
    inputs, outputs = {}, {}
    for name in model.inputs:
        spec = model.modality(name)
        common = dict(stride_level=spec.stride, patch_size_full=spec.patch, image_size=model.image_size)
        if spec.kind == "categorical":
            inputs[name] = reference.SemSegInputAdapter(num_classes=spec.num_classes, dim_class_emb=spec.embed_dim, **common)
        else:
            inputs[name] = reference.PatchedInputAdapter(num_channels=spec.channels, **common)
    for name in model.outputs:
        spec = model.modality(name)
        outputs[name] = reference.SpatialOutputAdapter(
            num_channels=spec.num_classes if spec.kind == "categorical" else spec.channels, stride_level=spec.stride,
            patch_size_full=spec.patch, dim_tokens=decoder["width"], depth=decoder["depth"], num_heads=decoder["heads"],
            mlp_ratio=decoder["mlp_ratio"], image_size=model.image_size, task=spec.name, context_tasks=list(model.inputs),
        )  # fmt: skip
    return reference.MultiMAE(
        inputs, outputs, num_global_tokens=model.num_global_tokens, dim_tokens=encoder["width"], depth=encoder["depth"],
        num_heads=encoder["heads"], mlp_ratio=encoder["mlp_ratio"],
    )  # fmt: skip


def reference_losses(reference: Any, model: Any) -> dict[str, Any]:
    """The reference's loss of every output of `model`."""
    found = {}
    for name in model.outputs:
        spec = model.modality(name)
        options = {} if spec.kind == "categorical" else {"norm_pix": name != spec.name}
        found[name] = getattr(reference, LOSSES[spec.loss])(patch_size=spec.patch, stride=spec.stride, **options)
    return found
