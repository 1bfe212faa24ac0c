"""Evaluators: figures of a model on data of their own, scheduled from the config or run alone (`config.total = 0`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh

from maskvit.core.configuration import check_arguments, look_up
from maskvit.core.modalities import Modality
from maskvit.evaluators.classes import Backgrounds, Classification, Corruptions
from maskvit.evaluators.dense import Depth, Maps, Normals, Segmentation
from maskvit.evaluators.knn import Knn
from maskvit.evaluators.localization import Localization
from maskvit.evaluators.logistic import Logistic
from maskvit.evaluators.masked import MaskedLoss
from maskvit.evaluators.patches import PatchKnn, PatchLogistic, PatchRidge
from maskvit.evaluators.probe import Probe
from maskvit.evaluators.protocols import with_protocol
from maskvit.evaluators.subsets import Subsets, subsets


@runtime_checkable
class Evaluator(Protocol):
    """What the training loop knows of an evaluator.

    `protocol()`: how and of what its figures are taken, as plain data; figures of different protocols are not compared.
    Its constructor takes the keys of its config block, without `type` and `every`, and the context `CONTEXT`, and raises
    ValueError or FileNotFoundError for whatever can be known to be wrong before any work.
    """

    def protocol(self) -> dict[str, Any]: ...

    def run(self, params: Any, objective_state: Any, between: Callable[[], None]) -> Iterator[tuple[str, Any]]:
        """Yield (name, a number or a picture); the loop puts the evaluator's own name before it ("knn/mean/top1_k20").

        Every process must iterate, and all get the same values. `between` is called after every batch, on every process: it
        ends the evaluation, by an exception, where one of them is asked to stop.
        """
        ...


EVALUATORS: dict[str, Any] = {
    "knn": Knn, "classification": Classification, "segmentation": Segmentation, "depth": Depth, "normals": Normals, "maps": Maps,
    "corruptions": Corruptions, "backgrounds": Backgrounds, "probe": Probe, "logistic": Logistic,
    "localization": Localization, "patch_knn": PatchKnn, "patch_logistic": PatchLogistic, "patch_ridge": PatchRidge,
    "masked_loss": MaskedLoss,
}  # fmt: skip

# What the loop supplies to every evaluator beside its config block.
CONTEXT = ("objective", "modalities", "image_size", "mesh", "data")


def build_evaluators(
    evaluators: Mapping[str, Mapping[str, Any]],
    *,
    objective: Any,
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    mesh: Mesh,
    data: Mapping[str, Any],
) -> dict[str, Evaluator]:
    """The evaluators of `config.evaluators` by their names there.

    `type` says which one it is, `every` is the loop's, `protocol` stands for the arguments of a published protocol
    (`maskvit.evaluators.protocols`), `subsets=True` evaluates every subset of `shown` (by default of all inputs), all else are the
    evaluator's arguments. `data` is `config.data`.
    Raises ValueError for an unknown type or key, listing the known ones.
    """
    context = dict(objective=objective, modalities=modalities, image_size=image_size, mesh=mesh, data=data)
    built: dict[str, Evaluator] = {}
    for name, block in evaluators.items():
        constructor, arguments = check_evaluator(name, block, image_size)
        if not block.get("subsets"):
            built[name] = constructor(**context, **arguments)
            continue
        shown = tuple(arguments.pop("shown", None) or objective.model.inputs)
        # A head of dense tasks cannot do without the tokens that it reads.
        needed = objective.model.read_from if getattr(getattr(objective, "task", None), "dense", False) else ()
        built[name] = Subsets({chosen: constructor(**context, **arguments, shown=chosen) for chosen in subsets(shown, needed)})
    return built


def check_evaluator(name: str, block: Any, image_size: tuple[int, int] | None = None) -> tuple[Any, dict[str, Any]]:
    """A block of `config.evaluators` to (constructor, its arguments). Raises ValueError for an unknown type or key.

    `image_size`: the model's, where it is known by now.
    """
    where = f"config.evaluators.{name}"
    if not isinstance(block, Mapping) or "type" not in block:
        raise ValueError(f"{where} lacks the key 'type'; known types: {', '.join(EVALUATORS)}")
    constructor = look_up(f"{where}.type", EVALUATORS, block["type"])
    block = with_protocol(where, block, image_size)
    if not isinstance(block.get("subsets", False), bool):
        raise ValueError(f"{where}.subsets is {block['subsets']!r}; it must be True or False")
    arguments = {key: value for key, value in block.items() if key not in ("type", "every", "subsets")}
    check_arguments(where, constructor, arguments, given=CONTEXT)
    return constructor, arguments
