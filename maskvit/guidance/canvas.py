"""A map of every record's whole picture, on the device: read and written under the crop that a training step sees.

Geometry: a crop is `box` (top, left, height, width as shares of the whole picture), mirrored afterwards where `flip`. Tokens of the
crop and cells of the map are points at their centers; values pass between them with triangle kernels as wide as the coarser of
the two grids (bilinear where the map is the coarser one), normalized over what is known. NaN stands for what is not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from maskvit.core.flops import embed_flops
from maskvit.core.keys import stream_keys
from maskvit.core.types import Batch, DataNeeds, Guidance, Record, TokenBatch, TokenLayout
from maskvit.guidance.attention import SelfAttention, check_momentum
from maskvit.guidance.errors import check_rebuilds_inputs
from maskvit.guidance.source import Request, Source
from maskvit.heads.network import Network

# A row per record: its maps (m, g, g), flattened, since TPUs pad the last axis of an array to 128. float16; NaN where nothing was written.
Table = Float[Array, "r c"]


def blank(num_records: int, layout: TokenLayout, grid: int) -> Table:
    """Maps that know nothing, one per record and modality."""
    return jnp.full((num_records, len(layout.names) * grid**2), jnp.nan, jnp.float16)


def _centers(count: int) -> Float[Array, " k"]:
    return (jnp.arange(count) + 0.5) / count


def _axis_weights(first: Float[Array, ""], length: Float[Array, ""], tokens: int, cells: int) -> Float[Array, "t c"]:
    """Nearness in [0, 1] of the tokens of a crop's axis to the cells of the map's; every token has a cell at 1/2 or nearer."""
    cell_centers = _centers(cells)
    token_centers = jnp.clip(first + length * _centers(tokens), cell_centers[0], cell_centers[-1])
    width = jnp.maximum(1.0 / cells, length / tokens)
    return jnp.maximum(1.0 - jnp.abs(token_centers[:, None] - cell_centers[None, :]) / width, 0.0)


def _box_weights(
    box: Float[Array, "4"], flip: Bool[Array, ""], tokens: tuple[int, int], cells: tuple[int, int]
) -> tuple[Float[Array, "t c"], Float[Array, "u e"]]:
    """`_axis_weights` of rows and columns; the columns of a mirrored crop run backwards."""
    rows = _axis_weights(box[0], box[2], tokens[0], cells[0])
    columns = _axis_weights(box[1], box[3], tokens[1], cells[1])
    return rows, jnp.where(flip, columns[::-1], columns)


def _normalized(rows: Float[Array, "o i"], values: Float[Array, "i j"], columns: Float[Array, "p j"]) -> Float[Array, "o p"]:
    """Values weighted by rows x columns, divided by the weight of those that are known; NaN where none is."""
    known = ~jnp.isnan(values)
    total = rows @ jnp.where(known, values, 0.0) @ columns.T
    weight = rows @ known.astype(jnp.float32) @ columns.T
    return jnp.where(weight > 1e-3, total / jnp.maximum(weight, 1e-3), jnp.nan)


def read(maps: Float[Array, "b m g g"], box: Float[Array, "b 4"], flip: Bool[Array, " b"], layout: TokenLayout) -> Float[Array, "b n"]:
    """What the maps say under each sample's crop, at its tokens; NaN where no cell nearby is known."""

    def one_sample(own: Float[Array, "m g g"], own_box: Float[Array, "4"], own_flip: Bool[Array, ""]) -> Float[Array, " n"]:
        parts = []
        for modality, grid in zip(own.astype(jnp.float32), layout.grids, strict=True):
            rows, columns = _box_weights(own_box, own_flip, grid, modality.shape)
            parts.append(_normalized(rows, modality, columns).reshape(-1))
        return jnp.concatenate(parts)

    return jax.vmap(one_sample)(maps, box, flip)


def write(
    maps: Float[Array, "b m g g"],
    values: Float[Array, "b n"],
    box: Float[Array, "b 4"],
    flip: Bool[Array, " b"],
    layout: TokenLayout,
    momentum: float,
) -> Float[Array, "b m g g"]:
    """The maps after each sample's crop was seen: in cells whose center lies in the crop, momentum * old + (1 - momentum) * new.

    A cell's first value is taken as it is; NaN among `values` is no observation.
    """

    def one_sample(
        own: Float[Array, "m g g"], seen: Float[Array, " n"], own_box: Float[Array, "4"], own_flip: Bool[Array, ""]
    ) -> Float[Array, "m g g"]:
        parts = []
        for modality, grid, span in zip(own.astype(jnp.float32), layout.grids, layout.spans(), strict=True):
            rows, columns = _box_weights(own_box, own_flip, grid, modality.shape)
            new = _normalized(rows.T, seen[span].reshape(grid), columns.T)
            inside = [
                (centers >= start) & (centers <= start + length)
                for centers, start, length in zip(map(_centers, modality.shape), own_box[:2], own_box[2:], strict=True)
            ]
            new = jnp.where(inside[0][:, None] & inside[1][None, :], new, jnp.nan)
            mixed = jnp.where(jnp.isnan(modality), new, momentum * modality + (1 - momentum) * new)
            parts.append(jnp.where(jnp.isnan(new), modality, mixed))
        return jnp.stack(parts)

    return jax.vmap(one_sample)(maps, values, box, flip)


def rows_of(table: Table, index: Int[Array, " b"] | None, grid: int) -> Float[Array, "b m g g"] | None:
    """The maps of the samples' records; unknown (NaN) for an index that is no record (negative, padding). None without an index."""
    if index is None:
        return None
    own = table.at[jnp.where(index < 0, table.shape[0], index)].get(mode="fill", fill_value=jnp.nan)
    return own.astype(jnp.float32).reshape(own.shape[0], -1, grid, grid)


def store(table: Table, index: Int[Array, " b"], new: Float[Array, "b m g g"], accepted: Bool[Array, ""] | bool = True) -> Table:
    """The table with the maps of the samples' records replaced; of a record that is in the batch twice one is kept.

    Nothing is written unless the step is `accepted`: a choice between the maps before and after would copy them all.
    """
    rows = new.astype(table.dtype).reshape(-1, table.shape[1])
    return table.at[jnp.where(accepted & (index >= 0), index, table.shape[0])].set(rows, mode="drop")


def check_grid(key: str, grid: int) -> None:
    """Raise unless a map can have this side."""
    if not 1 <= grid <= 64:
        raise ValueError(f"config.objective.guidance.{key} is {grid}; a map kept per record has a side of 1 ... 64 cells")


# Exact scores of a part of the batch


def stride(batch: int, every: int) -> int:
    """Of a batch in which one sample in `every` gets an exact pass: samples 0, stride, 2 stride, ... of it do.

    The least number from `every` on that divides the batch: then devices that share the batch also share those samples equally.
    A batch smaller than that has its turn once in every // batch steps (`in_turn`).
    """
    return next(step for step in range(min(every, batch), batch + 1) if batch % step == 0)


def every_kth(tree: Any, step: int) -> Any:
    """Rows 0, step, 2 step, ... of arrays whose rows `step` divides; rows that are spread over devices stay where they are."""
    return jax.tree.map(lambda x: x.reshape(-1, step, *x.shape[1:])[:, 0], tree)


Rows = tuple[Int[Array, " b"], Float[Array, "b m g g"]]  # indices of records (-1: of none) and their new maps


def in_turn(learn: Callable[[], Any], otherwise: Callable[[], Any], request: Request, step: Int[Array, ""], every: int) -> Any:
    """What `learn` makes in the steps in which exact passes are due, else `otherwise`. Neither must hand on the maps of all records."""
    period = max(1, every // request.keys.shape[0])
    return learn() if period == 1 else jax.lax.cond(step % period == 0, learn, otherwise)


def no_rows(request: Request, every: int) -> Rows:
    """As many rows as `thinned` has, of no record."""
    count = request.keys.shape[0] // stride(request.keys.shape[0], every)
    return jnp.full(count, -1, request.batch.record.index.dtype), jnp.zeros((count, *request.batch.kept.shape[1:]))


def thinned(request: Request, every: int) -> Request:
    """The request of the samples with an exact pass; their tokens are embedded anew, so that only they cost anything."""
    everything = dict(request.values), request.tokens.present, request.batch._replace(whole={}), request.keys
    values, present, batch, keys = every_kth(everything, stride(request.keys.shape[0], every))
    tokens = request.model.embed(request.params, values, present)
    return request._replace(tokens=tokens, values=values, batch=batch, keys=keys)


def averaged_rows(request: Request, logs: Float[Array, "b n"], momentum: float) -> Rows:
    """The maps of the samples' records after their scores were written under their crops."""
    index, box, flip = request.batch.record
    return index, write(request.batch.kept, logs, box, flip, request.tokens.layout, momentum)


CHUNK = 64  # samples whose attention is held at once


def standard_logs(source: SelfAttention, request: Request) -> Float[Array, "b n"]:
    """The exact scores, as `standardize` gives them, with at most `CHUNK` samples in memory at once where their number allows."""
    layout = request.tokens.layout

    def one_chunk(part: tuple[Any, Any, Any]) -> Float[Array, "b n"]:
        tokens, present, keys = part
        scores = source(request._replace(tokens=TokenBatch(tokens, layout, present), keys=keys))
        return standardize(jnp.log(jnp.maximum(scores, 1e-12)), layout, present)

    parts = (request.tokens.tokens, request.tokens.present, request.keys)
    rows = request.keys.shape[0]
    chunks = next(n for n in range(-(-rows // CHUNK), rows + 1) if rows % n == 0)
    if chunks == 1:
        return one_chunk(parts)
    # Every chunk takes every `chunks`-th row: a batch that is spread over devices stays so.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, chunks, *x.shape[1:]), 1, 0), parts)
    return jnp.moveaxis(jax.lax.map(one_chunk, split), 0, 1).reshape(rows, -1)


def standardize(values: Float[Array, "b n"], layout: TokenLayout, present: Bool[Array, "b n"] | None = None) -> Float[Array, "b n"]:
    """Mean 0 and deviation 1 over each modality's known tokens (present, not NaN); NaN for the others."""
    parts = []
    for span in layout.spans():
        here = values[:, span]
        known = ~jnp.isnan(here) if present is None else ~jnp.isnan(here) & present[:, span]
        count = jnp.maximum(known.sum(axis=1, keepdims=True), 1)
        centered = here - jnp.where(known, here, 0.0).sum(axis=1, keepdims=True) / count
        deviation = jnp.sqrt((jnp.where(known, centered, 0.0) ** 2).sum(axis=1, keepdims=True) / count)
        parts.append(jnp.where(known, centered / jnp.maximum(deviation, 1e-6), jnp.nan))
    return jnp.concatenate(parts, axis=1)


def fill_unknown(values: Float[Array, "b n"], layout: TokenLayout, keys: Key[Array, " b"]) -> Float[Array, "b n"]:
    """Unknown tokens (NaN) get the mean of the modality's known ones and, so that their order is random, a little noise.

    Where nothing is known of a sample's modality its values are that noise alone.
    """
    noise = 1e-3 * jax.vmap(lambda key: jax.random.normal(key, values.shape[1:]))(stream_keys(keys, "unknown"))
    parts = []
    for span in layout.spans():
        here, known = values[:, span], ~jnp.isnan(values[:, span])
        mean = jnp.where(known, here, 0.0).sum(axis=1, keepdims=True) / jnp.maximum(known.sum(axis=1, keepdims=True), 1)
        parts.append(jnp.where(known, here, mean + noise[:, span]))
    return jnp.concatenate(parts, axis=1)


# The sources

VIEWS = ("crop", "whole")


@dataclasses.dataclass(frozen=True)
class ReusedAttention(SelfAttention):
    """The exact scores of earlier visits, kept per record as a map of the whole picture and read under today's crop.

    A record that was never visited with an exact pass gets random scores, unseen places of a map the mean of the seen ones. The
    other fields say how attention is read in the exact pass. What a map holds are logarithms, of mean 0 and deviation 1 per view.

    Attributes:
      every: one sample in `every` gets an exact pass (see `stride`), so a record is refreshed at every `every`-th visit on average.
      view: what that pass sees: "crop", the sample as it is trained on, averaged into the map under its box; or "whole", the whole
        picture, which replaces the map.
      momentum: how much of the old map stays where a crop is averaged in.
      grid: side of the maps, 2 grid^2 bytes per record and modality.
    """

    every: int = 24
    view: str = "crop"
    momentum: float = 0.8
    grid: int = 32

    @property
    def needs(self) -> DataNeeds:
        return DataNeeds(record=Record._fields, whole_every=self.every if self.view == "whole" else 0)

    def check(self, model: Network) -> None:
        super().check(model)
        check_momentum(self.momentum)
        check_grid("grid", self.grid)
        if self.every < 1:
            raise ValueError(f"config.objective.guidance.every is {self.every}; it must be at least 1")
        if self.view not in VIEWS:
            raise ValueError(f"config.objective.guidance.view is {self.view!r}; known: {', '.join(VIEWS)}")

    def init(self, model: Network, params: Any, num_records: int) -> Table:
        return blank(num_records, model.layout, self.grid)

    def recall(self, memory: Table, index: Int[Array, " b"] | None) -> tuple[Any, Any]:
        return (), rows_of(memory, index, self.grid)

    def __call__(self, request: Request) -> Guidance:
        record, layout = request.batch.record, request.tokens.layout
        own = read(request.batch.kept, record.box, record.flip, layout)
        return jnp.exp(fill_unknown(own, layout, request.keys))

    def update(self, request: Request, step: Int[Array, ""], errors: Float[Array, "b n"] | None) -> Table:
        exact = SelfAttention(self.query, self.block, self.heads, self.renormalise)

        def learn() -> Rows:
            if self.view == "crop":
                part = thinned(request, self.every)
                return averaged_rows(part, standard_logs(exact, part), self.momentum)
            step = stride(request.keys.shape[0], self.every)
            rows, kept, keys = every_kth((request.batch.record.index, request.batch.kept, request.keys), step)
            everything = jnp.tile(jnp.array([0.0, 0.0, 1.0, 1.0]), (rows.shape[0], 1))
            seen = Batch({}, record=Record(rows, everything, jnp.zeros(rows.shape, bool)), kept=kept)
            part = request._replace(tokens=request.whole_tokens(), keys=keys, batch=seen)
            return averaged_rows(part, standard_logs(exact, part), 0.0)

        index, rows = in_turn(learn, lambda: no_rows(request, self.every), request, step, self.every)
        return store(request.state, index, rows, request.accepted)

    def learn(self, request: Request, targets: Float[Array, "b n"]) -> Table:
        """The memory after the exact scores of these crops (`standard_logs`) were seen."""
        return store(request.state, *averaged_rows(request, targets, self.momentum))

    def flops(self, model: Network, batch: int = 1) -> float:
        return (embed_flops(model) + super().flops(model)) / self.every


@dataclasses.dataclass(frozen=True)
class AverageError(Source):
    """How badly a record's places were rebuilt in earlier visits: a moving average of the step's own errors per token, as a map of
    the whole picture kept per record and read under today's crop. It costs no pass.

    Errors are brought to mean 0 and deviation 1 over each sample's hidden tokens of a modality, so that visits compare; a token that was
    visible says nothing. Records that were never visited get random scores.

    Attributes:
      momentum: how much of the old map stays at each visit.
      grid: side of the maps, 2 grid^2 bytes per record and modality.
    """

    momentum: float = 0.9
    grid: int = 16
    observes = True

    @property
    def needs(self) -> DataNeeds:
        return DataNeeds(record=Record._fields)

    def check(self, model: Network) -> None:
        check_rebuilds_inputs(model, "average_error")
        check_momentum(self.momentum)
        check_grid("grid", self.grid)

    def init(self, model: Network, params: Any, num_records: int) -> Table:
        return blank(num_records, model.layout, self.grid)

    def recall(self, memory: Table, index: Int[Array, " b"] | None) -> tuple[Any, Any]:
        return (), rows_of(memory, index, self.grid)

    def __call__(self, request: Request) -> Guidance:
        record, layout = request.batch.record, request.tokens.layout
        own = read(request.batch.kept, record.box, record.flip, layout)
        return fill_unknown(own, layout, request.keys)

    def update(self, request: Request, step: Int[Array, ""], errors: Float[Array, "b n"] | None) -> Table:
        if errors is None:
            raise ValueError("average_error needs the errors of the step")
        index, rows = averaged_rows(request, standardize(errors, request.tokens.layout), self.momentum)
        return store(request.state, index, rows, request.accepted)
