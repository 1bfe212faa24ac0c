"""DINO and iBOT (AttMask) from `config.objective`: blocks of a config to a network and to self-distillation, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maskvit.core.configuration import check_arguments, hashable, named_function
from maskvit.core.modalities import Modality
from maskvit.guidance import build_source
from maskvit.heads.network import Network
from maskvit.masking.scores import SCORES
from maskvit.nn.attention import attention_kernel
from maskvit.nn.backbone import encoder_sizes
from maskvit.objectives.distillation import Distillation, Masking, choose_hidden
from maskvit.objectives.options import Duration, check_inputs


def dino(
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    *,
    inputs: tuple[str, ...] = ("rgb",),
    encoder: str | Mapping[str, Any] = "S",
    projection: Mapping[str, Any] | None = None,
    teacher_momentum: float | int = 0.996,
    momentum_over: Duration = "100 percent",
    center_momentum: float | int = 0.9,
    teacher_temperature: tuple[float, float] = (0.04, 0.04),
    temperature_warmup: Duration = 0,
    drop_path: float | int = 0.1,
    compute_dtype: str = "float32",
    remat: bool | str = False,
    attention: str = "auto",
) -> Distillation:
    """Build the objective from `config.objective`. Every mistake is an error that names the key.

    `projection`: hidden, bottleneck, num_prototypes, fixed_scale; by default 2048, 256, 65536, True. The loader must deliver views
    (`config.data.augment.views`).
    """
    sizes = {"fixed_scale": True, **(projection or {})}
    model = _model(modalities, image_size, inputs, encoder, sizes, compute_dtype, remat, attention, False)
    return _checked(
        model, teacher_momentum=teacher_momentum, momentum_over=momentum_over, center_momentum=center_momentum,
        teacher_temperature=teacher_temperature, temperature_warmup=temperature_warmup, drop_path=drop_path,
    )  # fmt: skip


def ibot(
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    *,
    inputs: tuple[str, ...] = ("rgb",),
    encoder: str | Mapping[str, Any] = "S",
    projection: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    masking: Mapping[str, Any] | None = None,
    guidance: Mapping[str, Any] | None = None,
    teacher_momentum: float | int = 0.996,
    momentum_over: Duration = "100 percent",
    center_momentum: float | int = 0.9,
    teacher_temperature: tuple[float, float] = (0.04, 0.07),
    patch_temperature: tuple[float, float] = (0.04, 0.07),
    temperature_warmup: Duration = "30 epochs",
    drop_path: float | int = 0.1,
    compute_dtype: str = "float32",
    remat: bool | str = False,
    attention: str = "auto",
) -> Distillation:
    """Build the objective from `config.objective`. Every mistake is an error that names the key.

    `projection`: hidden, bottleneck, num_prototypes, num_patch_prototypes (0: shared), fixed_scale; by default 2048, 256, 8192, 0,
    False. `scores`, `masking`: what is hidden and how much; AttMask is one of the attention scores. `guidance`
    {"name": "block_mask", ratio, ratio_var} hides iBOT's exact blocks in their stead. The loader must deliver views
    (`config.data.augment.views`).
    """
    sizes = {"num_prototypes": 8192, **(projection or {})}
    model = _model(modalities, image_size, inputs, encoder, sizes, compute_dtype, remat, attention, True)
    chosen: dict[str, Any] = {}
    if guidance:
        if guidance.get("name") != "block_mask":
            raise ValueError(
                f"config.objective.guidance.name is {guidance.get('name')!r}; known: block_mask (the teacher's attention needs no guidance)"
            )
        for name, block in (("scores", scores), ("masking", masking)):
            if block:
                raise ValueError(f"config.objective.{name} is set, but guidance 'block_mask' makes whole masks: remove one of them")
        source = build_source(guidance)
        source.check(model)
        chosen["guidance"] = source
    else:
        block = scores or {"name": "random"}
        given: tuple[str, ...] = ("keys", "layout", "guidance", "present")
        # The amount of hints is drawn as the amount of masking is.
        given += ("ratio", "ratio_var") if block.get("name") == "attention_hint" else ()
        chosen["scores"] = named_function("config.objective.scores", SCORES, block, given)
        check_arguments("config.objective.masking", Masking, masking or {})
        chosen["masking"] = Masking(**{key: hashable(value) for key, value in (masking or {}).items()})
    objective = _checked(
        model, teacher_momentum=teacher_momentum, momentum_over=momentum_over, center_momentum=center_momentum,
        teacher_temperature=teacher_temperature, patch_temperature=patch_temperature, temperature_warmup=temperature_warmup,
        drop_path=drop_path, **chosen,
    )  # fmt: skip
    masking_of, scores_of = objective.masking, objective.scores
    if masking_of is not None:
        # Wrong numbers are found on shapes, before anything is computed.
        keys, tokens = jax.random.split(jax.random.key(0), 1), model.layout.num_tokens
        jax.eval_shape(lambda: choose_hidden(masking_of, scores_of, jnp.zeros((1, tokens)), keys, keys[0], model.layout))
    return objective


def _model(
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    inputs: tuple[str, ...],
    encoder: str | Mapping[str, Any],
    projection: Mapping[str, Any],
    compute_dtype: str,
    remat: bool | str,
    attention: str,
    mask_embed: bool,
) -> Network:
    check_inputs(modalities, inputs)
    sizes = encoder_sizes(encoder)
    check_arguments("config.objective.projection", projection_sizes, projection)
    head = projection_sizes(**projection)
    model = Network(
        modalities=tuple(modalities[name] for name in inputs),
        inputs=tuple(inputs),
        image_size=image_size,
        encoder=tuple(sorted(sizes.items())),
        compute_dtype=compute_dtype,
        remat=remat,
        attention_kernel=attention_kernel(attention, compute_dtype),
        final_norm=True,
        positions="learned",
        mask_embed=mask_embed,
        heads=(("projection", tuple(sorted(head.items()))),),
    )
    for spec in model.modalities:
        spec.size(model.image_size)
    return model


def projection_sizes(
    *, hidden: int = 2048, bottleneck: int = 256, num_prototypes: int = 65536, num_patch_prototypes: int = 0, fixed_scale: bool = False
) -> dict[str, Any]:
    """`config.objective.projection`."""
    sizes = dict(hidden=hidden, bottleneck=bottleneck, num_prototypes=num_prototypes, num_patch_prototypes=num_patch_prototypes)
    for key, size in sizes.items():
        least = 0 if key == "num_patch_prototypes" else 1
        if not least <= size <= 2**24:
            raise ValueError(f"config.objective.projection.{key} is {size}; it must be at least {least} and at most {2**24}")
    return {**sizes, "fixed_scale": fixed_scale}


def _checked(model: Network, **fields: Any) -> Distillation:
    """The objective, or an error about a number that cannot be."""
    for name, low, high in (("teacher_momentum", 0, 1), ("center_momentum", 0, 1), ("drop_path", 0, 1)):
        if not low <= fields[name] < high:
            raise ValueError(f"config.objective.{name} is {fields[name]}; it must be at least {low} and below {high}")
    for name in ("teacher_temperature", "patch_temperature"):
        ends = fields.get(name, (1.0, 1.0))
        if not isinstance(ends, tuple) or len(ends) != 2 or min(ends) <= 0:
            raise ValueError(f"config.objective.{name} is {ends}; give (first, last), both above 0")
    return Distillation(model, **fields)
