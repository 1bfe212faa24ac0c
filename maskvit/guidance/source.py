"""What a guidance source is: importance per token out of whatever the model, the batch and its own memory can give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key, Num

from maskvit.core.types import Batch, DataNeeds, Guidance, Params, TokenBatch
from maskvit.heads.network import Network


class Request(NamedTuple):
    """What a source may read. No gradient flows out of a source.

    `state`: the source's own memory, () where it keeps none; what it keeps of the samples' records is in `batch.kept`;
    `tokens`: the embedded tokens of all inputs; `values`: the model values they were made from, by input; `batch`: what the loader
    delivered; `keys`: one per sample; `random_errors(keys)`: the reconstruction error per token "b n" of an extra pass under a random
    mask, NaN where not hidden; `whole_tokens()`: the embedded tokens of the whole pictures, where the batch holds them (`whole_every`);
    `accepted`: whether the step counts: where it is False `update` must leave the memory as it is, bit for bit.
    """

    model: Network
    params: Params
    state: Any
    tokens: TokenBatch
    values: Mapping[str, Num[Array, "b h w *c"]]
    batch: Batch
    keys: Key[Array, " b"]
    random_errors: Callable[[Key[Array, " b"]], Float[Array, "b n"]]
    whole_tokens: Callable[[], TokenBatch]
    accepted: Bool[Array, ""] | bool = True


class Source:
    """Base of all sources: a frozen dataclass whose fields are the keys of `config.objective.guidance`.

    Attributes:
      observes: whether `update` needs the step's own errors per token.
      predicts_errors: whether the model must learn to predict its errors (`Network.error_outputs`).
    """

    observes: bool = False
    predicts_errors: bool = False

    @property
    def needs(self) -> DataNeeds:
        """What the batch must hold beside the modalities."""
        return DataNeeds()

    def check(self, model: Network) -> None:
        """Raise ValueError where the model cannot give what this source reads."""

    def init(self, model: Network, params: Params, num_records: int) -> Any:
        """The memory at step 0; `num_records`: size of the training data, for what is kept per record."""
        return ()

    def __call__(self, request: Request) -> Guidance:
        """Importance per token."""
        raise NotImplementedError(f"{type(self).__name__} defines no guidance")

    def recall(self, memory: Any, index: Int[Array, " b"] | None) -> tuple[Any, Any]:
        """What of the memory holds for every sample, and what it keeps of the records `index`, None where it keeps nothing of them."""
        return memory, None

    def remind(self, request: Request, memory: Any) -> Request:
        """The request with this memory: as the objective makes it, for a source that is not the objective's own."""
        kept = self.recall(memory, request.batch.record.index)[1]
        return request._replace(state=memory, batch=request.batch._replace(kept=kept))

    def update(self, request: Request, step: Int[Array, ""], errors: Float[Array, "b n"] | None) -> Any:
        """The memory after a step, from the whole one in `request.state`, the updated parameters and the whole batch.

        `errors`: reconstruction error per token of this step's masked pass, NaN where none was taken; given if `observes`.
        """
        return request.state

    def flops(self, model: Network, batch: int = 1) -> float:
        """Arithmetic per image and step: the call and the update."""
        return 0.0
