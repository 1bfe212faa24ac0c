"""The vocabulary of the package: what every part hands to the next.

Axis letters, one legend for the whole package:

    b batch, h w grid or image, c channels, n all tokens, v visible tokens, q predicted (hidden) tokens,
    d width, a heads, m modalities

One polarity: `masked` is True where a token is hidden; an attention `mask` is True where attention is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, Num

from maskvit.core.modalities import BATCH_FIELDS

# A plain nested dict of arrays with the package's own stable names ("encoder/block_00/attn/qkv/kernel").
Params = dict[str, Any]

# Importance per token, "b n"; comparable inside one sample and modality only.
Guidance = Float[Array, "b n"]

# Scalars by name. A value is (numerator, denominator): sums over micro-batches and devices stay exact.
Metrics = dict[str, tuple[Array, Array]]


@jax.tree_util.register_static
class TokenLayout(NamedTuple):
    """Which span of the token sequence belongs to which modality, and its grid.

    `names`, `grids` (rows, columns), in token order. Static for JAX, also as a part of what `jit` takes and gives back.
    """

    names: tuple[str, ...]
    grids: tuple[tuple[int, int], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens per modality."""
        return tuple(rows * columns for rows, columns in self.grids)

    @property
    def num_tokens(self) -> int:
        """All tokens of all modalities, the global token not counted."""
        return sum(self.sizes)

    def span(self, name: str) -> slice:
        """The slice of modality `name` in the token axis."""
        index = self.names.index(name)
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def spans(self) -> tuple[slice, ...]:
        """The slice of every modality, in token order."""
        return tuple(self.span(name) for name in self.names)


class Record(NamedTuple):
    """Which record a sample shows and how, for what is kept per record; each is None where nobody asked for it.

    `index`: its number, negative for padding; `box`: the part of the whole picture that is seen (top, left, height, width as
    shares of it); `flip`: whether it is mirrored after that.
    """

    index: Any = None  # Int "b"
    box: Any = None  # Float "b 4"
    flip: Any = None  # Bool "b"


class Batch(NamedTuple):
    """Samples on their way through a step.

    `values`: by modality, stored units (continuous: uint8 or float32 "b h w c", NaN where missing; categorical: int32 "b h w", -1
    where missing); `present`: which modalities a sample has, the objective's inputs in their order, then what is an output alone,
    as in the model's `modalities`; `label`; `valid`: False for the padding of the last evaluation batch; `maps`: stored guidance in
    0 ... 1, of one map for all inputs or one each, or block masks; `record`; `views`: "global" and "local" views by modality,
    "b v h w c"; `whole`: whole pictures by input, of every k-th sample; `kept`: what the objective keeps of each sample's record
    (`Objective.recall`), where it keeps something per record. What a batch does not hold is None or empty.
    """

    values: dict[str, Num[Array, "b h w *c"]]
    present: Any = None  # Bool "b m"
    label: Any = None  # Int "b"
    valid: Any = None  # Bool "b"
    maps: Any = None  # Float "b m gh gw"
    record: Record = Record()
    views: dict[str, dict[str, Num[Array, "b v h w *c"]]] = {}
    whole: dict[str, Num[Array, "k h w *c"]] = {}
    kept: Any = None  # Float "b m g g"

    @property
    def size(self) -> int:
        """How many samples."""
        return jax.tree.leaves((self.values, self.views))[0].shape[0]

    def only(self, names: Sequence[str]) -> Batch:
        """The batch with the values of these modalities alone, and which samples have them."""
        return Batch({name: value for name, value in self.values.items() if name in names}, self.present)


def batch_of(arrays: Mapping[str, Any]) -> Batch:
    """A batch out of the loader's arrays by name (`maskvit.data.batches`): where their names end, and fields begin."""
    fields = {name: arrays.get(name) for name in BATCH_FIELDS}
    values: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {"global": {}, "local": {}, "whole": {}}
    for name, array in arrays.items():
        kind, _, modality = name.partition("/")
        if modality:
            parts[kind][modality] = array
        elif name not in fields:
            values[name] = array
    record = Record(fields["index"], fields["box"], fields["flip"])
    views = {kind: parts[kind] for kind in ("global", "local") if parts[kind]}
    return Batch(values, fields["present"], fields["label"], fields["valid"], fields["guidance"], record, views, parts["whole"])


class DataNeeds(NamedTuple):
    """What an objective wants of the loader beside the modalities.

    `views`: several views of a record in place of one crop; `record`: fields of `Record`; `whole_every`: k > 0 for the whole pictures
    of every k-th sample; `maps`: a stored map set; `blocks`: (ratio, ratio_var) of block masks; `num_classes`: labels 0 ... num_classes
    - 1, 0 where labels are not needed.
    """

    views: bool = False
    record: tuple[str, ...] = ()
    whole_every: int = 0
    maps: str | None = None
    blocks: tuple[Any, Any] | None = None
    num_classes: int = 0

    def loading(self) -> dict[str, Any]:
        """Arguments of `maskvit.data.batches.train_batches`."""
        return dict(extras=self.record, whole_every=self.whole_every, maps=self.maps, blocks=self.blocks, num_classes=self.num_classes)


class TokenBatch(NamedTuple):
    """Embedded tokens of all modalities, position added, in the order of `layout`.

    `present`: True for tokens that exist; None where every sample has every modality.
    """

    tokens: Float[Array, "b n d"]
    layout: TokenLayout
    present: Bool[Array, "b n"] | None = None


class MaskPlan(NamedTuple):
    """Everything a decoder or loss may know of masking; all shapes are static.

    `visible_ids` ascend; slots whose `visible_valid` is False (a sample with too few tokens) point at hidden tokens
    and must be ignored. `predicted_ids` are the hidden tokens a loss is taken on; hidden but not predicted is legal.
    `masked` is True where hidden (absent tokens included). `loss_weights` of the predicted tokens, None where all weigh 1.
    """

    visible_ids: Int[Array, "b v"]
    visible_valid: Bool[Array, "b v"]
    predicted_ids: Int[Array, "b q"]
    predicted_valid: Bool[Array, "b q"]
    masked: Bool[Array, "b n"]
    loss_weights: Float[Array, "b n"] | None = None


class Queries(NamedTuple):
    """Which tokens of one output's own grid are decoded, in raster order; the others where `valid` is False are fillers."""

    ids: Int[Array, "b q"]
    valid: Bool[Array, "b q"]


class TrainState(NamedTuple):
    """All that training carries from step to step. Leaves are untyped: optax and Orbax fill them with specs."""

    step: Any  # int32; keys learning rate, data order and randomness; advances on skipped steps too
    params: Any
    opt_state: Any
    objective_state: Any  # {} where the objective keeps nothing; a teacher, loss averages, stored scores
    skipped: Any  # int32; updates skipped so far because loss or gradient was not finite


def path_name(path: Any) -> str:
    """A tree path as "encoder/block_00/norm1/scale": how parameters are named in rules, reports and errors."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def tree_paths(tree: Any) -> dict[str, Any]:
    """Flatten a nested dict into {"a/b/c": leaf}, in sorted key order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
