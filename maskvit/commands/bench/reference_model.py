"""The step of the published PyTorch MultiMAE, out of a checkout of the user's. Needs torch, so it is imported only where that is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from maskvit.commands.bench.torch_model import torch_device
from maskvit.convert.checkout import build_reference, import_reference, reference_losses


def standardized(values: Any) -> Any:
    """Depth as the published training gives it: by mean and deviation of the middle four fifths of its values."""
    flat = values.flatten(1).sort(dim=1)[0]
    middle = flat[:, int(0.1 * flat.shape[1]) : int(0.9 * flat.shape[1])]
    per_picture = lambda x: x[:, None, None, None]  # noqa: E731
    return (values - per_picture(middle.mean(dim=1))) / torch.sqrt(per_picture(middle.var(dim=1)) + 1e-6)


def reference_step(path: Path, objective: Any, batch: int, dtype: str) -> Callable[[], None]:
    """One step of the published pretraining: drawn masks, forward, losses, backward, the gradients' norm, AdamW.

    With the sizes of `objective`, a MultiMAE of ours. On CUDA where JAX runs on a GPU, in bfloat16 by autocast where `dtype` says so; class
    maps are decoded in float32, as published. Raises ConversionError as `maskvit.convert.checkout.import_reference`.
    """
    reference, model, device = import_reference(path), objective.model, torch_device()
    net, losses = build_reference(reference, model).to(device).train(), reference_losses(reference, model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    given = {}
    for name in model.inputs:
        spec = model.modality(name)
        size = spec.size(model.image_size)
        if spec.kind == "categorical":
            given[name] = torch.randint(spec.num_classes, (batch, *size), device=device)
        else:
            given[name] = torch.randn(batch, spec.channels, *size, device=device)
    maps = [name for name in model.outputs if model.modality(name).kind == "categorical"]

    def run() -> None:
        values = {name: standardized(x) if model.modality(name).standardize else x for name, x in given.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            predictions, masks = net(values, num_encoded_tokens=objective.num_visible, alphas=1.0, fp32_output_adapters=maps)
            loss = torch.zeros((), device=device)
            for name, prediction in predictions.items():
                source = model.modality(name).name
                loss = loss + losses[name](prediction.float(), values[source], mask=masks[source])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
        optimizer.step()
        if not torch.isfinite(norm + loss.detach()):  # waits for the device, as the published loop does
            raise FloatingPointError("the loss of the reference is not finite: its timings would not be those of a real step")

    return run
