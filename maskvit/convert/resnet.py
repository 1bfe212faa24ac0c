"""torchvision's key layout of a ResNet with bottleneck blocks (ResNet-50); batch norms are folded into the convolutions before them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import Rule, convolution, linear
from maskvit.convert.source import Hints, Source
from maskvit.core import modalities as known

BATCH_NORM_EPS = 1e-5
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
# What a convolution's batch norm is called.
NORMS = ((r"(.*)conv([123])", r"\1bn\2"), (r"(.*)downsample\.0", r"\1downsample.1"))


def is_resnet(keys: Any) -> bool:
    """Whether these are the keys of a bottleneck ResNet with its classifier."""
    return {"conv1.weight", "layer1.0.conv3.weight", "fc.weight"} <= set(keys)


def tensors(state: Mapping[str, np.ndarray], where: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The convolutions with scale and shift of their batch norms in weight and bias, and the classifier. Also says what was done."""
    found = {key: value for key, value in state.items() if not key.endswith(".num_batches_tracked")}
    convolutions = [key.removesuffix(".weight") for key, value in found.items() if value.ndim == 4 and key.endswith(".weight")]
    for key in convolutions:
        norm = next((re.sub(f"^{old}$", new, key) for old, new in NORMS if re.fullmatch(old, key)), None)
        if norm is None:
            raise ConversionError(f"{where}: the convolution {key!r} is not part of a ResNet")
        missing = [f"{norm}.{part}" for part in BATCH_NORM if f"{norm}.{part}" not in found]
        if missing:
            raise ConversionError(f"{where}: tensors are missing: {', '.join(missing)}")
        kernel = found[f"{key}.weight"].astype(np.float64)
        weight, bias, mean, variance = (found.pop(f"{norm}.{part}").astype(np.float64) for part in BATCH_NORM)
        if not weight.shape == bias.shape == mean.shape == variance.shape == kernel.shape[:1]:
            raise ConversionError(f"{where}: the batch norm {norm!r} does not fit {key!r} with {kernel.shape[0]} channels")
        factor = weight / np.sqrt(variance + BATCH_NORM_EPS)
        found[f"{key}.weight"] = (kernel * factor[:, None, None, None]).astype(np.float32)
        found[f"{key}.bias"] = (bias - mean * factor).astype(np.float32)
    return found, [f"{len(convolutions)} batch norms folded into their convolutions"]


def _stage_depth(found: Mapping[str, Any], stage: int) -> int:
    return len({match[1] for key in found if (match := re.match(rf"layer{stage}\.(\d+)\.", key))})


def infer_config(source: Source, _: Hints) -> dict[str, Any]:
    """`image_size`, `modalities` and `classifier` of the network whose `tensors` are the source's."""
    found, where = source.tensors, source.where
    if found["fc.weight"].ndim != 2 or found["conv1.weight"].ndim != 4 or found["conv1.weight"].shape[1] != 3:
        shapes = found["conv1.weight"].shape, found["fc.weight"].shape
        raise ConversionError(f"{where}: 'conv1.weight' and 'fc.weight' have the shapes {shapes[0]} and {shapes[1]}: no classifier of rgb")
    width = found["conv1.weight"].shape[0]
    depths = tuple(_stage_depth(found, stage) for stage in (1, 2, 3, 4))
    if 0 in depths:
        raise ConversionError(f"{where}: has {depths} blocks in its four stages")
    classifier = dict(name="resnet", depths=depths, num_classes=found["fc.weight"].shape[0], width=width)
    return dict(image_size=(224, 224), modalities=dict(rgb=known.RGB), classifier=classifier)


def rules(config: Mapping[str, Any]) -> list[Rule]:
    """Every one of the `tensors` of the network that `config` describes."""
    block = config["classifier"]
    channels, stem = block["width"], block["width"]
    found = convolution("conv1", "stem", 3, stem, 7)
    for stage, depth in enumerate(block["depths"]):
        narrow = stem * 2**stage
        for i in range(depth):
            key, path = f"layer{stage + 1}.{i}", f"stage_{stage + 1}/block_{i:02d}"
            found += convolution(f"{key}.conv1", f"{path}/conv1", channels, narrow, 1)
            found += convolution(f"{key}.conv2", f"{path}/conv2", narrow, narrow, 3)
            found += convolution(f"{key}.conv3", f"{path}/conv3", narrow, 4 * narrow, 1)
            if not i:
                found += convolution(f"{key}.downsample.0", f"{path}/shortcut", channels, 4 * narrow, 1)
            channels = 4 * narrow
    return [*found, *linear("fc", "head", channels, block["num_classes"])]
