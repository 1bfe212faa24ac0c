"""The optimizers: AdamW with its decay, clipping and freezing, SGD, LARS."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maskvit.core.types import Params, path_name
from maskvit.optim.groups import check_patterns, decay_mask, frozen_with, rate_scales
from maskvit.optim.schedules import CosineDecay


class Optimizer(NamedTuple):
    """`tx` turns gradients into steps of learning rate 1 (sign included); `schedule` gives the learning rate.

    `frozen`: a tree of bools, True for parameters that the run does not train and takes no gradient of; None where a config names none.
    """

    tx: optax.GradientTransformation
    schedule: Any
    frozen: Any = None


def guarded(accepted: Any, new: Any, old: Any) -> Any:
    """`new` where a step is accepted, else `old` bit for bit, leaf by leaf.

    For leaves that are computed anew as a whole: the compiler makes the choice part of that arithmetic. A table of which a step
    writes some rows would be read and written as a whole: it must guard its rows.
    """
    return jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, old)


def clip_tensors(limit: float) -> optax.GradientTransformation:
    """Each tensor's gradient g times min(1, limit / (|g| + 1e-6)), as DINO and iBOT clip: no tensor's norm touches another's."""

    def clip(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g: g * jnp.minimum(1.0, limit / (jnp.sqrt(jnp.square(g).sum()) + 1e-6)), updates)

    return optax.stateless(clip)


def scale_updates(scales: Any) -> optax.GradientTransformation:
    """Each tensor's update times its number in `scales`: a tree of factors on the learning rate."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, scale: u if scale == 1 else scale * u, updates, scales))


def scheduled_decay(schedule: Any, mask: Any) -> optax.GradientTransformationExtraArgs:
    """Add schedule(step) * parameter to the updates that `mask` marks; `step` is the run's, an extra argument of `update`."""

    def update(updates: Any, state: Any, params: Any = None, *, step: Any, **_: Any) -> Any:
        weight = schedule(step)
        return jax.tree.map(lambda u, p, decays: u + weight * p if decays else u, updates, params, mask(updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def from_step(first: int, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` from the run's step `first` on. Before it nothing changes: no update, no decay, no moments, no count."""
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, *, step: Any, **extra: Any) -> Any:
        new_updates, new_state = inner.update(updates, state, params, step=step, **extra)
        on = jnp.asarray(step) >= first
        return guarded(on, new_updates, jax.tree.map(jnp.zeros_like, new_updates)), guarded(on, new_state, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def adamw(
    params: Params,
    fixed: Any,
    schedule: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float | tuple[float, float] = 0.05,
    no_decay: Sequence[str] = (),
    clip_norm: float | None = None,
    clip_tensor_norm: float | None = None,
    freeze: Mapping[str, Any] | None = None,
    layer_decay: float | None = None,
    lr_scales: Sequence[tuple[str, float]] = (),
    frozen: Sequence[str] = (),
) -> Optimizer:
    """AdamW with decoupled decay: p <- p (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps).

    `params` (arrays or shapes) and `fixed` (True = the model never trains it) say what decays and what has optimizer state.
    `weight_decay`: a pair goes from the first to the second on half a cosine over `schedule`.
    Every trainable tensor decays, norms and biases included, as in the MultiMAE reference, but those whose path matches one of
    the regular expressions `no_decay`.
    `clip_norm` limits the norm of all gradients together, `clip_tensor_norm` that of each tensor.
    `freeze` {"parameters": regular expression, "until": step}: those tensors and their moments stay as they are before that step.
    `layer_decay`, `lr_scales`: factors on the learning rate, and so on the decay (`maskvit.optim.groups.rate_scales`).
    `frozen`: regular expressions of parameters that this run never trains: no gradient, no state, no decay.
    """
    if freeze and clip_norm is not None:
        raise ValueError("config.optimizer.clip_norm is a norm of all tensors, of which freeze holds some back: use clip_tensor_norm")
    held = freeze["parameters"] if freeze else None
    check_patterns(params, "no_decay", no_decay)
    check_patterns(params, "freeze.parameters", [] if held is None else [held])
    untrained = frozen_with(params, fixed, frozen)
    late = jax.tree_util.tree_map_with_path(
        lambda path, x: held is not None and not x and re.fullmatch(held, path_name(path)) is not None, untrained
    )
    decays = decay_mask(params, untrained, no_decay)

    def adam(members: Any) -> optax.GradientTransformation:
        """The optimizer of the tensors that `members` marks."""
        # Inside `optax.masked` all others are `MaskedNode`s, and a mask must have the same holes.
        mask = lambda _: jax.tree.map(lambda d, m: d if m else optax.MaskedNode(), decays, members)  # noqa: E731
        if isinstance(weight_decay, Sequence):
            decay = scheduled_decay(CosineDecay(*weight_decay, schedule), mask)
        else:
            decay = optax.add_decayed_weights(weight_decay, mask=mask)
        parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
        parts += [] if clip_tensor_norm is None else [clip_tensors(clip_tensor_norm)]
        parts += [optax.scale_by_adam(b1=b1, b2=b2, eps=eps), decay, optax.scale(-1.0)]
        return optax.chain(*parts)

    early = jax.tree.map(lambda x, y: not x and not y, untrained, late)
    parts = [optax.masked(adam(early), early)]
    if freeze:
        parts.append(optax.masked(from_step(freeze["until"], adam(late)), late))
    return _assembled(parts, schedule, untrained, rate_scales(params, layer_decay, lr_scales), frozen)


def sgd(
    params: Params,
    fixed: Any,
    schedule: Any,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
    layer_decay: float | None = None,
    lr_scales: Sequence[tuple[str, float]] = (),
    frozen: Sequence[str] = (),
) -> Optimizer:
    """Stochastic gradient descent: g <- g + wd p; m <- momentum m + g; p <- p - lr m.

    As torch.optim.SGD without Nesterov and dampening: the decay is part of the gradient, and so of the momentum. The other
    arguments are those of `adamw`.
    """
    check_patterns(params, "no_decay", no_decay)
    untrained = frozen_with(params, fixed, frozen)
    parts = [optax.add_decayed_weights(weight_decay, mask=decay_mask(params, untrained, no_decay))] if weight_decay else []
    parts += _momentum(momentum, untrained)
    return _assembled(parts, schedule, untrained, rate_scales(params, layer_decay, lr_scales), frozen)


def lars(
    params: Params,
    fixed: Any,
    schedule: Any,
    *,
    momentum: float = 0.9,
    trust: float = 0.001,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    lr_scales: Sequence[tuple[str, float]] = (),
    frozen: Sequence[str] = (),
) -> Optimizer:
    """LARS as MAE's linear probe has it: g <- (g + wd p) trust |p| / |g + wd p|; m <- momentum m + g; p <- p - lr m.

    Decay and trust ratio are for tensors with more than one axis; biases and scales take their plain gradient. The ratio is 1 where
    a norm is 0. The other arguments are those of `adamw`. Source: You et al., "Large Batch Training of Convolutional Networks", 2017.
    """
    untrained = frozen_with(params, fixed, frozen)
    adapted = jax.tree.map(lambda p, x: len(p.shape) > 1 and not x, params, untrained)
    parts = [optax.add_decayed_weights(weight_decay, mask=adapted)] if weight_decay else []
    parts += [optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), adapted), *_momentum(momentum, untrained)]
    return _assembled(parts, schedule, untrained, rate_scales(params, layer_decay, lr_scales), frozen)


def _momentum(momentum: float, untrained: Any) -> list[optax.GradientTransformation]:
    """The sum m <- momentum m + g as step, kept of trained parameters alone."""
    return [optax.masked(optax.trace(momentum), jax.tree.map(lambda x: not x, untrained)), optax.scale(-1.0)]


def _assembled(parts: Sequence[Any], schedule: Any, untrained: Any, scales: Any, frozen: Sequence[str]) -> Optimizer:
    """`parts` one after the other, steps times `scales`, none for what is `untrained`."""
    parts = [*parts, *([] if scales is None else [scale_updates(scales)]), optax.masked(optax.set_to_zero(), untrained)]
    return Optimizer(optax.with_extra_args_support(optax.chain(*parts)), schedule, untrained if frozen else None)


def freeze_block(*, parameters: str, until: str | int) -> dict[str, Any]:
    """`config.optimizer.freeze`."""
    return dict(parameters=parameters, until=until)


def with_adam_moments(opt_state: Any, moments: dict[str, Any]) -> Any:
    """Put imported moments {"count", "mu", "nu"} (parameter trees without frozen tensors) into a fresh optimizer state."""

    def merge(template: Any, given: Any, path: str) -> Any:
        if isinstance(template, dict):
            given = given if isinstance(given, Mapping) else {}
            return {key: merge(value, given.get(key), f"{path}/{key}") for key, value in template.items()}
        if isinstance(template, optax.MaskedNode):
            return template
        if getattr(given, "shape", None) != template.shape:
            raise ValueError(f"imported optimizer moments lack {path[1:]!r} of shape {template.shape}")
        return jnp.asarray(given, template.dtype)

    def replace(state: Any) -> Any:
        if not isinstance(state, optax.ScaleByAdamState):
            return state
        mu, nu = (merge(tree, moments[name], "") for name, tree in (("mu", state.mu), ("nu", state.nu)))
        return optax.ScaleByAdamState(jnp.asarray(moments["count"], state.count.dtype), mu, nu)

    return jax.tree.map(replace, opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
