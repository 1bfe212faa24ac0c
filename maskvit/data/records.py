"""Records to rows of a batch: decoding, one crop for all modalities, replacements of what cannot be read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from maskvit.core.modalities import Modality
from maskvit.data import views
from maskvit.data.augment.geometry import Geometry, center_geometry, draw_crop, draw_geometry, transform, visible_share, whole_geometry
from maskvit.data.augment.settings import Augment
from maskvit.data.block import block_mask, draw_ratio
from maskvit.data.codec import RecordError
from maskvit.data.decoding import absent, check_values, decode_record, output_dtype
from maskvit.data.maps import MapSet
from maskvit.data.order import _philox, epoch_order, record_rng, steps_per_epoch
from maskvit.data.sources import Source

CHUNK = 16  # records that one worker prepares at a time: batches of thousands then neither stall the start nor fill the memory
PROBES = 64  # records looked at, at most, before the first batch
REPLACEMENTS = 10  # records tried in place of a bad one
EXTRAS = ("index", "box", "flip")  # keys that a batch holds when asked for
READ_ERRORS = (RecordError, OSError)  # a bad sample; anything else is a fault of ours and ends the run


def probe(source: Source, modalities: Mapping[str, Modality]) -> dict[str, np.dtype]:
    """Look at a few records spread over the data: does each modality exist and fit its declaration?

    Returns: dtype per modality in the batches.

    Raises:
      ValueError: a modality that no record looked at has (and that the source does not say may be lacking), class ids
        out of range, or not one readable record.
    """
    if len(source) == 0:
        raise ValueError(f"no records: {source.describe()}")
    dtypes: dict[str, np.dtype] = {}
    readable, first_error = 0, None
    indices = np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int))
    for count, index in enumerate(np.random.default_rng(0).permutation(indices)):  # not the same end of the data first
        if count >= 8 and readable and len(dtypes) == len(modalities):
            break
        try:
            record = source[int(index)]
            arrays = decode_record(record, modalities)
        except READ_ERRORS as error:
            first_error = first_error or ValueError(f"record {int(index)}: {error}")
            continue
        readable += 1
        for name, array in arrays.items():
            try:
                check_values(array, modalities[name])
            except RecordError as error:
                raise ValueError(f"record {record['id']!r}: {error}") from error
            dtype = output_dtype(array, modalities[name])
            dtypes[name] = np.promote_types(dtypes.get(name, dtype), dtype)
    if not readable:
        raise ValueError(f"none of {len(indices)} records tried is readable ({source.describe()}); the first: {first_error}")
    for name in modalities:
        if name not in dtypes and name not in source.may_lack:
            raise ValueError(
                f"modality {name!r} has no data in {source.describe()}: drop it from config.modalities, "
                f"or name it in config.data's may_lack if only some records lack it"
            )
    return {
        name: dtypes.get(name, np.dtype(np.int32 if modality.kind == "categorical" else np.float32))
        for name, modality in modalities.items()
    }


class _Records:
    """What training and evaluation share: record -> arrays of the model's size, and arrays -> batch. Picklable.

    `rows`: first and end of this process's rows in a global batch; the other arguments are those of `train_batches`.
    """

    def __init__(
        self,
        source: Source,
        modalities: Mapping[str, Modality],
        image_size: tuple[int, int],
        rows: tuple[int, int],
        *,
        inputs: Sequence[str] | None,
        extras: Sequence[str],
        whole_every: int,
        maps: str | None,
        blocks: tuple[Any, Any] | None,
    ):
        self.source = source
        self.rows = rows
        self.chunks_per_batch = math.ceil((rows[1] - rows[0]) / CHUNK)
        self.modalities = dict(modalities)
        self.image_size = (int(image_size[0]), int(image_size[1]))
        for modality in self.modalities.values():
            modality.size(self.image_size)
        self.inputs = tuple(self.modalities if inputs is None else inputs)
        unknown = sorted(set(self.inputs) - set(self.modalities))
        if unknown:
            raise ValueError(f"input {unknown[0]!r} is not declared in config.modalities ({', '.join(self.modalities)})")
        wrong = [name for name in extras if name not in EXTRAS]
        if wrong:
            raise ValueError(f"the extra batch key {wrong[0]!r} is unknown; known: {', '.join(EXTRAS)}")
        # The inputs come first, in their order, then what is only an output.
        self.columns = (*self.inputs, *(name for name in self.modalities if name not in self.inputs))
        self.extras = tuple(extras)
        if whole_every < 0 or (whole_every and (rows[1] - rows[0]) % whole_every):
            raise ValueError(
                f"config.objective.guidance asks for the whole picture of every {whole_every} samples, which must divide the batch of "
                f"each process, now {rows[1] - rows[0]}: change config.objective.guidance or config.global_batch"
            )
        self.whole_every = whole_every
        self.blocks = blocks
        if blocks is not None:
            if maps is not None:
                raise ValueError("stored maps and block masks are both the batch's guidance: ask for one of them")
            draw_ratio(np.random.default_rng(0), *blocks)  # wrong ratios are said here
        self.maps = None if maps is None else MapSet(maps, source, self.inputs, self.modalities[self.inputs[0]].grid(self.image_size))
        self.dtypes = probe(source, self.modalities)

    def chunk(self, number: int) -> tuple[int, range]:
        """(step, this process's rows, counted from 0, that are in the chunk)."""
        step, part = divmod(int(number), self.chunks_per_batch)
        return step, range(part * CHUNK, min((part + 1) * CHUNK, self.rows[1] - self.rows[0]))

    def name(self, number: int) -> str:
        """What chunk `number` is, for messages."""
        step, rows = self.chunk(number)
        return f"rows {self.rows[0] + rows.start} to {self.rows[0] + rows.stop - 1} of batch {step}"

    def decode(self, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        arrays = decode_record(record, self.modalities)
        for name, array in arrays.items():
            if self.dtypes[name] == np.uint8 and array.dtype != np.uint8:
                raise RecordError(f"modality {name!r} is {array.dtype} here and uint8 in the other records")
        lacking = [name for name in self.modalities if name not in arrays and name not in self.source.may_lack]
        if lacking:
            raise RecordError(f"lacks modality {lacking[0]!r}; if that is expected, name the modality in config.data's may_lack")
        return arrays

    def example(
        self, index: int, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], geometry: Geometry, resize: str, row: int
    ) -> dict[str, Any]:
        """Row `row` of this process's batch out of a record and its decoded arrays."""
        made: dict[str, Any] = self.transformed(arrays, self.modalities, geometry, resize)
        made["label"] = np.int32(record.get("label", -1))
        if self.source.may_lack:
            made["present"] = np.array([name in arrays for name in self.columns])
        height, width = next(iter(arrays.values())).shape[:2]
        box = visible_share(geometry, height, width, self.image_size)
        made |= self.chosen(index, box, geometry.flip)
        if self.maps is not None:
            made["guidance"] = self.maps.cropped(index, record["id"], box, geometry.flip)
        if self.gives_whole(row):
            made["whole"] = self.transformed(arrays, self.inputs, whole_geometry(height, width, self.image_size), resize)
        return made

    def transformed(
        self,
        arrays: Mapping[str, np.ndarray],
        names: Collection[str],
        geometry: Geometry,
        resize: str,
        size: tuple[int, int] | None = None,
    ) -> dict[str, np.ndarray]:
        """The named modalities at the model's size (or another), with a stand-in for those that the record lacks."""
        size = self.image_size if size is None else size
        made = transform({n: arrays[n] for n in names if n in arrays}, self.modalities, geometry, size, resize)
        return {n: made[n] if n in made else absent(self.modalities[n], size, self.dtypes[n]) for n in names}

    def chosen(self, index: int, box: tuple[float, float, float, float], flip: bool) -> dict[str, Any]:
        """The keys of `EXTRAS` that were asked for."""
        known = {"index": np.int32(index), "box": np.array(box, np.float32), "flip": np.bool_(flip)}
        return {name: known[name] for name in self.extras}

    def block_guidance(self, seed: int, epoch: int, index: int, count: int = 1) -> dict[str, Any]:
        """The block masks of a record's views in an epoch, 1 where hidden, as the batch's guidance; nothing where none was asked for."""
        if self.blocks is None:
            return {}
        grid = self.modalities[self.inputs[0]].grid(self.image_size)
        rng = np.random.Generator(_philox(seed, "blocks", epoch, index))
        masks = [block_mask(rng, *grid, draw_ratio(rng, *self.blocks) * math.prod(grid)) for _ in range(count)]
        return {"guidance": np.stack(masks).astype(np.float32)}

    def gives_whole(self, row: int) -> bool:
        """Whether the batch holds the whole picture of this process's row `row`."""
        return self.whole_every > 0 and row % self.whole_every == 0

    def padding(self, row: int) -> dict[str, Any]:
        """A row that stands for no example: finite everywhere, so that what is computed from it stays finite."""
        made: dict[str, Any] = {}
        for name, modality in self.modalities.items():
            empty = absent(modality, self.image_size, self.dtypes[name])
            made[name] = empty if modality.kind == "categorical" else np.zeros_like(empty)
        whole = {name: made[name] for name in self.modalities}
        made["label"] = np.int32(-1)
        if self.source.may_lack:
            made["present"] = np.ones(len(self.columns), bool)
        made |= self.chosen(-1, (0.0, 0.0, 1.0, 1.0), False)
        if self.maps is not None:
            made["guidance"] = self.maps.empty()
        if self.blocks is not None:
            made |= self.block_guidance(0, 0, 0)
        if self.gives_whole(row):
            made["whole"] = whole
        return made

    def stack(self, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Rows to arrays, the whole pictures of some of them (maybe of none) apart. Takes "whole" out of the rows."""
        wholes = [row.pop("whole") for row in rows if "whole" in row]
        stacked = {name: self._stack(name, [row[name] for row in rows]) for name in rows[0]}
        if self.whole_every:
            for name in self.inputs:
                empty = np.empty((0, *stacked[name].shape[1:]), self.dtypes[name])
                stacked[f"whole/{name}"] = self._stack(name, [whole[name] for whole in wholes]) if wholes else empty
        return stacked

    def _stack(self, name: str, values: Sequence[Any]) -> np.ndarray:
        dtype = self.dtypes.get(name)
        return np.stack(values, dtype=dtype, casting="same_kind" if dtype is None else "safe")


class _TrainChunks(_Records):
    """Chunk number -> rows of a training batch."""

    def __init__(self, *args: Any, augment: Augment, seed: int, global_batch: int, **settings: Any):
        super().__init__(*args, **settings)
        self.augment, self.seed, self.global_batch = augment, seed, global_batch
        if augment.views is not None:
            self._check_views(augment.views)
        self.epoch_steps = steps_per_epoch(len(self.source), global_batch)

    def __call__(self, number: int) -> dict[str, Any]:
        step, rows = self.chunk(number)
        epoch, step = divmod(step, self.epoch_steps)
        bad: list[tuple[str, str]] = []
        return {**self.stack([self._row(epoch, step * self.global_batch, row, bad) for row in rows]), "bad": bad}

    def _row(self, epoch: int, batch_start: int, row: int, bad: list[tuple[str, str]]) -> dict[str, Any]:
        position = batch_start + self.rows[0] + row
        order = epoch_order(self.seed, epoch, len(self.source))
        for attempt in range(REPLACEMENTS):
            index = int(order[(position + attempt) % len(order)])
            identity = f"record {index}"
            try:
                record = self.source[index]
                identity = str(record["id"])
                arrays = self.decode(record)
                height, width = next(iter(arrays.values())).shape[:2]
                rng = record_rng(self.seed, epoch, index)
                if self.augment.views is not None:
                    made = self.cut_views(rng, record, arrays, self.augment.views) | self.chosen(index, (0.0, 0.0, 1.0, 1.0), False)
                    return made | self.block_guidance(self.seed, epoch, index, views.GLOBAL_VIEWS)
                geometry = draw_geometry(rng, height, width, self.image_size, self.augment)
                made = self.example(index, record, arrays, geometry, self.augment.resize, row)
                return made | self.block_guidance(self.seed, epoch, index)
            except READ_ERRORS as error:
                bad.append((identity, str(error)))
        raise RuntimeError(f"{REPLACEMENTS} records in a row are unusable in {self.source.describe()}; the last: {_complaint(bad[-1])}")

    def cut_views(
        self, rng: np.random.Generator, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], settings: views.MultiCrop
    ) -> dict[str, Any]:
        """The views of one record: "global/<modality>" and "local/<modality>", one after the other along the first axis."""
        height, width = next(iter(arrays.values())).shape[:2]
        made: dict[str, list[np.ndarray]] = {}
        for number in range(views.GLOBAL_VIEWS + settings.local_crops):
            large = number < views.GLOBAL_VIEWS
            size, scale = (self.image_size, self.augment.scale) if large else (settings.local_image_size, settings.local_scale)
            geometry = draw_crop(rng, height, width, size, scale, self.augment)
            colors = views.draw_colors(rng, min(number, 2), settings)
            view = self.transformed(arrays, self.modalities, geometry, self.augment.resize, size)
            for name, picture in view.items():
                # directions are no colors, though they are stored like them
                if self.dtypes[name] == np.uint8 and self.modalities[name].channels == 3 and not self.modalities[name].mirrored_channels:
                    picture = views.apply_colors(picture, colors)
                made.setdefault(f"{'global' if large else 'local'}/{name}", []).append(picture)
        stacked: dict[str, Any] = {name: np.stack(pictures) for name, pictures in made.items()}
        stacked["label"] = np.int32(record.get("label", -1))
        if self.source.may_lack:
            stacked["present"] = np.array([name in arrays for name in self.columns])
        return stacked

    def _check_views(self, settings: views.MultiCrop) -> None:
        """Raise where views cannot be cut, or something was asked for that belongs to one crop."""
        for modality in self.modalities.values():
            try:
                modality.size(settings.local_image_size)
            except ValueError as error:
                raise ValueError(f"{views.WHERE}.local_size: {error}") from error
        asked = {"a stored map": self.maps is not None, "the whole picture": self.whole_every > 0}
        asked |= {f"the batch key {name!r}": name in self.extras for name in ("box", "flip")}
        wrong = [what for what, is_asked in asked.items() if is_asked]
        if wrong:
            raise ValueError(f"{wrong[0]} goes with one crop of a record, but config.data.augment.views asks for several: drop one of them")


class _EvalChunks(_Records):
    """Chunk number -> rows of an evaluation batch, records in stored order, padded behind the last."""

    def __init__(self, *args: Any, crop: float | int | None, resize: str, batch_size: int, num_records: int, **settings: Any):
        super().__init__(*args, **settings)
        self.crop, self.resize, self.batch_size, self.num_records = crop, resize, batch_size, num_records

    def __call__(self, number: int) -> dict[str, Any]:
        step, numbers = self.chunk(number)
        bad: list[tuple[str, str]] = []
        rows, ids, reasons = [], [], []
        for row_number in numbers:
            slot = step * self.batch_size + self.rows[0] + row_number
            real = slot < self.num_records
            # a limit takes records spread over the data: folders are stored class by class
            index = slot * len(self.source) // self.num_records if real else -1
            identity, row = self._row(index, row_number, bad) if real else ("", None)
            ids.append(identity)
            reasons.append(bad[-1][1] if real and row is None else "")
            rows.append(
                {
                    **(self.padding(row_number) if row is None else row),
                    "valid": np.bool_(row is not None),
                    "index": np.int32(index),
                }
            )
        return {**self.stack(rows), "id": ids, "reason": reasons, "bad": bad}

    def _row(self, index: int, row: int, bad: list[tuple[str, str]]) -> tuple[str, dict[str, Any] | None]:
        identity = f"record {index}"
        try:
            record = self.source[index]
            identity = str(record["id"])
            arrays = self.decode(record)
            height, width = next(iter(arrays.values())).shape[:2]
            if self.crop is None:
                geometry = whole_geometry(height, width, self.image_size)
            else:
                geometry = center_geometry(height, width, self.image_size, self.crop)
            return identity, self.example(index, record, arrays, geometry, self.resize, row) | self.block_guidance(0, 0, index)
        except READ_ERRORS as error:
            bad.append((identity, str(error)))
            return identity, None


def _complaint(bad: tuple[str, str]) -> str:
    """One line about a record that cannot be used: its id, and why."""
    return f"{bad[0]!r}: {bad[1]}"
