"""MultiMAE, MAE and CrossMAE: one masked autoencoder with one signature, and a row of defaults for each method."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from maskvit.core.configuration import named_function
from maskvit.core.modalities import Modality
from maskvit.guidance import GUIDANCE, Source, build_source
from maskvit.heads import decoder_arguments
from maskvit.heads.network import Network
from maskvit.masking.budgets import BUDGETS
from maskvit.masking.scores import GUIDED_SCORES, SCORES
from maskvit.nn.attention import attention_kernel
from maskvit.nn.backbone import encoder_sizes
from maskvit.objectives.masked import MaskedAutoencoder
from maskvit.objectives.options import GuidedShare, LossWeight, Predicted, check_inputs, part_of


def masked_autoencoder(
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    *,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    mask_ratio: float = 0.75,
    kept_mask_ratio: float | None = None,
    predict_by: str = "",
    encoder: str | Mapping[str, Any] = "B",
    decoder: Mapping[str, Any] | None = None,
    num_global_tokens: int = 1,
    num_visible: int = 98,
    scores: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    guidance: Mapping[str, Any] | None = None,
    guided_share: Mapping[str, Any] | None = None,
    loss_weight: Mapping[str, Any] | None = None,
    predicted: Mapping[str, Any] | None = None,
    final_norm: bool = False,
    num_classes: int = 0,
    pool: str = "global",
    positions: str = "rows_first",
    compute_dtype: str = "float32",
    remat: bool | str = False,
    attention: str = "auto",
    decoder_name: str = "spatial",
    qkv_parts: int = 3,
    by_ratio: bool = False,
) -> MaskedAutoencoder:
    """Build the objective from `config.objective`. Every mistake is an error that names the key.

    `inputs`, `outputs`: names; "norm_rgb" rebuilds pixels normalized per patch. How many tokens are shown: `num_visible`, or
    int(tokens * (1 - mask_ratio)) in methods that go `by_ratio`. `kept_mask_ratio`, `predict_by`: `rebuilt_share`.
    `decoder`: each output's, {"name": "spatial" (MultiMAE's, by default 256 wide with 2 blocks and 8 heads), "mae" (512, 8, 16) or
    "crossmae" (512, 12, 16), and width, depth, heads, mlp_ratio}; "crossmae" takes `features` (encoder blocks read: "all" or a
    list), `use_input` (also what enters the encoder), `weighted` (False: the last block alone) and `self_attention` beside.
    `positions`: "rows_first" or, as in MAE, "columns_first". `scores`, `budget`, `guidance`: {"name": ..., and that row's
    arguments}; by default random scores under a Dirichlet budget. `guided_share`, `loss_weight`, `predicted`: the fields of
    `GuidedShare`, `LossWeight`, `Predicted`. `final_norm`, `num_classes`, `pool`:
    of imported encoders; one without `outputs` gives features and guidance and cannot be trained.
    `attention`: what computes it, "plain", "cudnn", "splash" or "auto" (`maskvit.nn.attention.attention_kernel`). `remat`: False,
    True, "dots" or "offload" (`maskvit.nn.encoder.REMAT`).
    """
    check_inputs(modalities, inputs)
    check_outputs(modalities, outputs)
    if by_ratio:
        num_visible, tokens = shown_by_ratio(modalities, image_size, inputs, mask_ratio)
        if predict_by:
            predicted = dict(share=rebuilt_share(tokens, num_visible, mask_ratio, kept_mask_ratio), by=predict_by)
    names = dict.fromkeys((*inputs, *(name if name in modalities else name.removeprefix("norm_") for name in outputs)))
    sizes = encoder_sizes(encoder)
    decoder_name, decoder_sizes = decoder_arguments({"name": decoder_name, **(decoder or {})}, sizes["depth"])
    model = Network(
        modalities=tuple(modalities[name] for name in names),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        image_size=image_size,
        encoder=tuple(sorted(sizes.items())),
        decoder=tuple(sorted(decoder_sizes.items())),
        num_global_tokens=num_global_tokens,
        compute_dtype=compute_dtype,
        remat=remat,
        attention_kernel=attention_kernel(attention, compute_dtype),
        final_norm=final_norm,
        heads=(("head", (("num_classes", num_classes),)),) if num_classes else (),
        pool=pool,
        decoder_name=decoder_name,
        positions=positions,
        qkv_parts=qkv_parts,
    )
    check_visible(model, num_visible)
    return with_choices(model, num_visible, scores, budget, guidance, guided_share, loss_weight, predicted)


def check_outputs(modalities: Mapping[str, Modality], outputs: tuple[str, ...]) -> None:
    """Raise ValueError where `config.objective.outputs` names what cannot be rebuilt."""
    for name in outputs:
        base = name if name in modalities else name.removeprefix("norm_")
        if base not in modalities:
            known = ", ".join(modalities) + ", or norm_<name> of a continuous one"
            raise ValueError(f"config.objective.outputs names {name!r}; known: {known}")
        if name != base and modalities[base].kind == "categorical":
            raise ValueError(f"config.objective.outputs names {name!r}, but classes of {base!r} cannot be normalized per patch")


def check_visible(model: Network, num_visible: int) -> None:
    """Raise ValueError where sizes do not divide, or nothing would be shown or nothing hidden."""
    for spec in model.modalities:
        spec.size(model.image_size)
    if not 1 <= num_visible < model.layout.num_tokens:
        raise ValueError(
            f"config.objective.num_visible is {num_visible}, but an image of {model.image_size} has {model.layout.num_tokens} tokens "
            f"({', '.join(f'{n} {s}' for n, s in zip(model.layout.names, model.layout.sizes, strict=True))}): "
            "at least one must be visible and one hidden"
        )


def shown_by_ratio(
    modalities: Mapping[str, Modality], image_size: tuple[int, int], inputs: tuple[str, ...], mask_ratio: float
) -> tuple[int, int]:
    """(int(tokens * (1 - mask_ratio)), all tokens of the inputs)."""
    tokens = sum(math.prod(modalities[name].grid(image_size)) for name in inputs)
    shown = int(tokens * (1 - mask_ratio))
    if tokens and not 0 < shown < tokens:
        raise ValueError(
            f"config.objective.mask_ratio is {mask_ratio}: of {tokens} tokens it shows {shown}, but some must be shown and some hidden"
        )
    return shown, tokens


def rebuilt_share(tokens: int, shown: int, mask_ratio: float, kept_mask_ratio: float | None) -> float:
    """Which share of the hidden tokens CrossMAE rebuilds: `kept_mask_ratio` is one of all tokens, by default every hidden one.

    The numbers are truncated as in the reference: int(n (1 - mask_ratio)) shown, int(n (mask_ratio - kept_mask_ratio)) neither shown
    nor rebuilt, the rest rebuilt.
    """
    kept = mask_ratio if kept_mask_ratio is None else kept_mask_ratio
    if not 0 < kept <= mask_ratio:
        raise ValueError(
            f"config.objective.kept_mask_ratio is {kept}: it is a share of all tokens, above 0 and at most mask_ratio = {mask_ratio}"
        )
    hidden = tokens - shown
    return (hidden - int(tokens * (mask_ratio - kept))) / hidden


def with_choices(
    model: Network,
    num_visible: int,
    scores: Mapping[str, Any] | None,
    budget: Mapping[str, Any] | None,
    guidance: Mapping[str, Any] | None,
    guided_share: Mapping[str, Any] | None,
    loss_weight: Mapping[str, Any] | None,
    predicted: Mapping[str, Any] | None,
) -> MaskedAutoencoder:
    """The objective of a network: blocks of a config to functions and sources, checked against one another."""
    name = (scores or {}).get("name", "random")
    score = named_function("config.objective.scores", SCORES, scores or {"name": "random"}, ("keys", "layout", "guidance", "present"))
    weight = part_of("loss_weight", LossWeight, loss_weight)
    users = [f"scores {name!r}"] if name in GUIDED_SCORES else []
    users += ["loss_weight"] if weight is not None else []
    if users and not guidance:
        raise ValueError(
            f"config.objective.{users[0].replace(' ', '.name ')} needs config.objective.guidance, one of: {', '.join(GUIDANCE)}"
        )
    if guidance and not users:
        raise ValueError(f"config.objective.guidance is set, but scores {name!r} do not use it and there is no loss_weight: remove it")
    share = part_of("guided_share", GuidedShare, guided_share)
    source: Source | None = build_source(guidance) if guidance else None
    if source is not None:
        if source.predicts_errors:
            model = dataclasses.replace(model, error_outputs=model.inputs)
        source.check(model)
    given = ("keys", "layout", "num_visible", "present", "scores", "averages")
    spend = named_function("config.objective.budget", BUDGETS, budget or {"name": "dirichlet"}, given)
    objective = MaskedAutoencoder(model, num_visible, score, spend, source, share, weight, part_of("predicted", Predicted, predicted))
    _check_arguments_of_functions(objective)
    return objective


def _check_arguments_of_functions(objective: MaskedAutoencoder) -> None:
    """Call scores and budget on shapes, so that wrong numbers are found before anything is computed."""
    model = objective.model
    if objective._budget_momentum is not None:
        missing = [n for n in model.inputs if n not in model.outputs and f"norm_{n}" not in model.outputs]
        if missing:
            raise ValueError(
                f"the budget 'adaptive_dirichlet' follows losses, but the input {missing[0]!r} is not in config.objective.outputs"
            )
    (score, score_arguments), (budget, budget_arguments), layout = objective.scores, objective.budget, model.layout

    def both(keys: Key[Array, " b"]) -> Any:
        scores = score(keys, layout, jnp.zeros((1, layout.num_tokens)), None, **dict(score_arguments))
        return budget(keys, layout, objective.num_visible, None, scores, None, **dict(budget_arguments))

    jax.eval_shape(both, jax.random.split(jax.random.key(0), 1))


def _method(fixed: Mapping[str, Any], without: tuple[str, ...] = (), **defaults: Any) -> Callable[..., MaskedAutoencoder]:
    """`masked_autoencoder` with values that a config cannot change, keys that it has not, and defaults of its own."""

    @functools.wraps(masked_autoencoder)
    def build(modalities: Mapping[str, Modality], image_size: tuple[int, int], **given: Any) -> MaskedAutoencoder:
        return masked_autoencoder(modalities, image_size, **{**defaults, **fixed, **given})

    signature = inspect.signature(masked_autoencoder)
    keys = [p for p in signature.parameters.values() if p.name not in fixed and p.name not in without]
    build.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(default=defaults.get(p.name, p.default)) for p in keys]
    )
    return build


_RATIOS = ("mask_ratio", "kept_mask_ratio", "predict_by")
_ENCODERS = ("num_visible", "num_classes", "pool")
_PIXELS: dict[str, Any] = dict(inputs=("rgb",), outputs=("norm_rgb",))
# Fused qkv kernels are initialized as one matrix in MAE, narrower than MultiMAE's three.
_MAE = dict(by_ratio=True, positions="columns_first", qkv_parts=1)

multimae = _method(dict(by_ratio=False, decoder_name="spatial", qkv_parts=3), _RATIOS)
mae = _method(dict(_MAE, decoder_name="mae", final_norm=True), (*_ENCODERS, "kept_mask_ratio", "predict_by"), **_PIXELS)
crossmae = _method(dict(_MAE, decoder_name="crossmae", final_norm=False), (*_ENCODERS, "predicted"), predict_by="random", **_PIXELS)
