"""The optimizers and the schedules of the learning rate, by the names that configs use."""

from __future__ import annotations

from typing import Any

from maskvit.core.configuration import look_up
from maskvit.core.types import Params
from maskvit.optim.schedules import Cosine, CosinePerEpoch, Polynomial
from maskvit.optim.transforms import Optimizer, adamw, lars, sgd

# (parameters, fixed, schedule, *, what config.optimizer holds beside base_lr and name) -> Optimizer
OPTIMIZERS: dict[str, Any] = {"adamw": adamw, "sgd": sgd, "lars": lars}
SCHEDULES: dict[str, Any] = {"cosine": Cosine, "polynomial": Polynomial, "cosine_per_epoch": CosinePerEpoch}


def build_optimizer(params: Params, fixed: Any, schedule: Any, *, name: str = "adamw", **options: Any) -> Optimizer:
    """The optimizer `name` of a model's parameters (arrays or shapes), of which it never trains what is True in `fixed`."""
    return look_up("config.optimizer.name", OPTIMIZERS, name)(params, fixed, schedule, **options)
