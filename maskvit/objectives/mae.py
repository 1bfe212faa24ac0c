"""MAE and CrossMAE: one masked autoencoder, the composition of `maskvit.objectives.multimae` with these methods' parts.

Sources: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021; Fu et al., "Rethinking Patch Dependence for Masked
Autoencoders", 2024.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from maskvit.core.modalities import Modality
from maskvit.objectives.multimae import MultiMae, check_inputs, multimae


def mae(
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    *,
    inputs: tuple[str, ...] = ("rgb",),
    outputs: tuple[str, ...] = ("norm_rgb",),
    mask_ratio: float = 0.75,
    encoder: str | Mapping[str, Any] = "B",
    decoder: Mapping[str, Any] | None = None,
    num_global_tokens: int = 1,
    scores: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    guidance: Mapping[str, Any] | None = None,
    guided_share: Mapping[str, Any] | None = None,
    loss_weight: Mapping[str, Any] | None = None,
    predicted: Mapping[str, Any] | None = None,
    compute_dtype: str = "float32",
    remat: bool = False,
) -> MultiMae:
    """MAE: a final norm, position tables with the column half first, MAE's decoder and initial values.

    `outputs`: "norm_rgb" rebuilds pixels normalised per patch, "rgb" plain ones. `mask_ratio`: int(tokens * (1 - mask_ratio))
    tokens are shown. `decoder`: as in `multimae`, by default {"name": "mae"}. All else is a row of the grid, as in `multimae`.
    """
    return _with_whole_qkv(
        multimae(
            modalities,
            image_size,
            inputs=inputs,
            outputs=outputs,
            encoder=encoder,
            decoder={"name": "mae", **(decoder or {})},
            num_global_tokens=num_global_tokens,
            num_visible=_shown(modalities, image_size, inputs, mask_ratio),
            scores=scores,
            budget=budget,
            guidance=guidance,
            guided_share=guided_share,
            loss_weight=loss_weight,
            predicted=predicted,
            final_norm=True,
            positions="columns_first",
            compute_dtype=compute_dtype,
            remat=remat,
        )
    )


def crossmae(
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    *,
    inputs: tuple[str, ...] = ("rgb",),
    outputs: tuple[str, ...] = ("norm_rgb",),
    mask_ratio: float = 0.75,
    kept_mask_ratio: float | None = None,
    predict_by: str = "random",
    encoder: str | Mapping[str, Any] = "B",
    decoder: Mapping[str, Any] | None = None,
    num_global_tokens: int = 1,
    scores: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    guidance: Mapping[str, Any] | None = None,
    guided_share: Mapping[str, Any] | None = None,
    loss_weight: Mapping[str, Any] | None = None,
    compute_dtype: str = "float32",
    remat: bool = False,
) -> MultiMae:
    """CrossMAE: cross-attention decoders that rebuild a part of the hidden tokens; otherwise `mae` without the final norm.

    `kept_mask_ratio`: share of all tokens that is rebuilt, by default every hidden one. The numbers are truncated as in the
    reference: int(n (1 - mask_ratio)) shown, int(n (mask_ratio - kept_mask_ratio)) neither shown nor rebuilt, the rest rebuilt.
    `predict_by`: "random", or "scores" for those hidden first.
    """
    kept = mask_ratio if kept_mask_ratio is None else kept_mask_ratio
    shown = _shown(modalities, image_size, inputs, mask_ratio)
    if not 0 < kept <= mask_ratio:
        raise ValueError(
            f"config.objective.kept_mask_ratio is {kept}: it is a share of all tokens, above 0 and at most mask_ratio = {mask_ratio}"
        )
    tokens = _count(modalities, image_size, inputs)
    hidden = tokens - shown
    rebuilt = hidden - int(tokens * (mask_ratio - kept))
    return _with_whole_qkv(
        multimae(
            modalities,
            image_size,
            inputs=inputs,
            outputs=outputs,
            encoder=encoder,
            decoder={"name": "crossmae", **(decoder or {})},
            num_global_tokens=num_global_tokens,
            num_visible=shown,
            scores=scores,
            budget=budget,
            guidance=guidance,
            guided_share=guided_share,
            loss_weight=loss_weight,
            predicted=dict(share=rebuilt / hidden, by=predict_by),
            positions="columns_first",
            compute_dtype=compute_dtype,
            remat=remat,
        )
    )


def _count(modalities: Mapping[str, Modality], image_size: tuple[int, int], inputs: tuple[str, ...]) -> int:
    """All tokens of the inputs."""
    return sum(math.prod(modalities[name].grid(image_size)) for name in inputs)


def _shown(modalities: Mapping[str, Modality], image_size: tuple[int, int], inputs: tuple[str, ...], mask_ratio: float) -> int:
    check_inputs(modalities, inputs)
    tokens = _count(modalities, image_size, inputs)
    shown = int(tokens * (1 - mask_ratio))
    if tokens and not 0 < shown < tokens:
        raise ValueError(
            f"config.objective.mask_ratio is {mask_ratio}: of {tokens} tokens it shows {shown}, but some must be shown and some hidden"
        )
    return shown


def _with_whole_qkv(objective: MultiMae) -> MultiMae:
    """Fused qkv kernels initialised as one matrix, as MAE does: narrower than MultiMAE's three."""
    return dataclasses.replace(objective, model=dataclasses.replace(objective.model, qkv_parts=1))
