"""Records to rows of a batch: decoding, one crop for all modalities, replacements of what cannot be read."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from maskvit.core.modalities import Modality
from maskvit.data import views
from maskvit.data.augment import change_pictures
from maskvit.data.augment.dense import DENSE, DenseRecord, evaluated, stored_values
from maskvit.data.augment.geometry import Geometry, center_geometry, draw_crop, draw_geometry, transform, visible_share, whole_geometry
from maskvit.data.augment.settings import Augment
from maskvit.data.block import block_mask, draw_ratio
from maskvit.data.codec import RecordError
from maskvit.data.decoding import absent, decode_record
from maskvit.data.maps import MapSet
from maskvit.data.order import _philox, record_at, record_rng, steps_per_epoch
from maskvit.data.probing import READ_ERRORS, probe
from maskvit.data.sources import Source

CHUNK = 16  # records that one worker prepares at a time: batches of thousands then neither stall the start nor fill the memory
REPLACEMENTS = 10  # records tried in place of a bad one
EXTRAS = ("index", "box", "flip", "size")  # keys that a batch holds when asked for


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
        num_classes: int = 0,
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
        self.blocks, self.num_classes = blocks, num_classes
        if blocks is not None:
            if maps is not None:
                raise ValueError("stored maps and block masks are both the batch's guidance: ask for one of them")
            draw_ratio(np.random.default_rng(0), *blocks)  # wrong ratios are said here
        self.maps = None if maps is None else MapSet(maps, source, self.inputs, self.modalities[self.inputs[0]].grid(self.image_size))
        self.dtypes = probe(source, self.modalities)
        # 8-bit RGB: what colors are changed of. Directions are no colors, though they are stored like them.
        self.pictures = frozenset(
            name
            for name, modality in self.modalities.items()
            if self.dtypes[name] == np.uint8 and modality.channels == 3 and not modality.mirrored_channels
        )

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

    def decode_alone(self, record: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
        """One modality of a record."""
        return decode_record(record, {name: self.modalities[name]})

    def example(
        self, index: int, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], geometry: Geometry, resize: str, row: int
    ) -> dict[str, Any]:
        """Row `row` of this process's batch out of a record and its decoded arrays."""
        made: dict[str, Any] = self.transformed(arrays, self.modalities, geometry, resize) | self.facts(record, arrays)
        height, width = next(iter(arrays.values())).shape[:2]
        box = visible_share(geometry, height, width, self.image_size)
        made |= self.chosen(index, (height, width), box, geometry.flip)
        if self.maps is not None:
            made["guidance"] = self.maps.cropped(index, record["id"], box, geometry.flip)
        if self.gives_whole(row):
            made["whole"] = self.transformed(arrays, self.inputs, whole_geometry(height, width, self.image_size), resize)
        return made

    def facts(self, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The label of a record, and which modalities it has."""
        there = {"present": np.array([name in arrays for name in self.columns])} if self.source.may_lack else {}
        label = record.get("label", -1)
        if self.num_classes and label >= self.num_classes:
            raise RecordError(f"label {label} is none of the {self.num_classes} classes of config.objective.task.num_classes")
        return {"label": np.int32(label), **there}

    def dense_example(
        self, index: int, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """A row of what a crop of dense tasks made of a record."""
        height, width = next(iter(arrays.values())).shape[:2]
        row: dict[str, Any] = {
            name: made[name] if name in made else absent(modality, self.image_size, self.dtypes[name])
            for name, modality in self.modalities.items()
        }
        return row | self.facts(record, arrays) | self.chosen(index, (height, width))

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

    def chosen(
        self, index: int, size: tuple[int, int], box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0), flip: bool = False
    ) -> dict[str, Any]:
        """The keys of `EXTRAS` that were asked for."""
        known = {"index": np.int32(index), "box": np.array(box, np.float32), "flip": np.bool_(flip), "size": np.array(size, np.int32)}
        return {name: known[name] for name in self.extras}

    def refuse_places(self, reason: str) -> None:
        """Raise where something was asked for that goes with one crop of a record alone; `reason` is what does not fit it."""
        asked = {"a stored map": self.maps is not None, "the whole picture": self.whole_every > 0}
        asked |= {f"the batch key {name!r}": name in self.extras for name in ("box", "flip")}
        wrong = [what for what, is_asked in asked.items() if is_asked]
        if wrong:
            raise ValueError(f"{wrong[0]} goes with one crop of a record, but {reason}: drop one of them")

    def check_padding(self, what: str) -> None:
        """Raise where a modality has no value that could stand beyond the picture."""
        for name, modality in self.modalities.items():
            if modality.missing is None and name not in self.pictures:
                raise ValueError(
                    f"{what} pads pictures, but modality {name!r} has nothing that means missing: set config.modalities.{name}.missing to "
                    "the stored value that does, or to -1 where none does"
                )

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
        made |= self.chosen(-1, (0, 0))
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
        self._check_augment(augment)
        self.epoch_steps = steps_per_epoch(len(self.source), global_batch)

    def __call__(self, number: int) -> dict[str, Any]:
        step, rows = self.chunk(number)
        epoch, step = divmod(step, self.epoch_steps)
        bad: list[tuple[str, str]] = []
        return {**self.stack([self._row(epoch, step * self.global_batch, row, bad) for row in rows]), "bad": bad}

    def _row(self, epoch: int, batch_start: int, row: int, bad: list[tuple[str, str]]) -> dict[str, Any]:
        position = batch_start + self.rows[0] + row
        count = len(self.source)
        for attempt in range(REPLACEMENTS):
            index = record_at(self.seed, epoch, (position + attempt) % count, count)
            identity = f"record {index}"
            try:
                record = self.source[index]
                identity = str(record["id"])
                arrays = self.decode(record)
                height, width = next(iter(arrays.values())).shape[:2]
                rng = record_rng(self.seed, epoch, index)
                if self.augment.views is not None:
                    made = self.cut_views(rng, record, arrays, self.augment.views) | self.chosen(index, (height, width))
                    return made | self.block_guidance(self.seed, epoch, index, views.GLOBAL_VIEWS)
                return self.augmented(rng, index, record, arrays, row) | self.block_guidance(self.seed, epoch, index)
            except READ_ERRORS as error:
                bad.append((identity, str(error)))
        raise RuntimeError(f"{REPLACEMENTS} records in a row are unusable in {self.source.describe()}; the last: {_complaint(bad[-1])}")

    def augmented(
        self, rng: np.random.Generator, index: int, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], row: int
    ) -> dict[str, Any]:
        """One crop of a record. Draws of colors come after those of the crop, but where a crop of dense tasks has them."""
        augment = self.augment
        if augment.crop in DENSE:
            dense = DenseRecord(arrays, self.modalities, self.pictures, augment.resize)
            colors = functools.partial(change_pictures, rng, augment=augment)
            return self.dense_example(index, record, arrays, DENSE[augment.crop](rng, dense, self.image_size, augment, colors))
        height, width = next(iter(arrays.values())).shape[:2]
        made = self.example(index, record, arrays, draw_geometry(rng, height, width, self.image_size, augment), augment.resize, row)
        return made | change_pictures(rng, {name: made[name] for name in sorted(self.pictures) if name in arrays}, augment)

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
                if name in self.pictures:
                    picture = views.apply_colors(picture, colors)
                made.setdefault(f"{'global' if large else 'local'}/{name}", []).append(picture)
        return {name: np.stack(pictures) for name, pictures in made.items()} | self.facts(record, arrays)

    def _check_views(self, settings: views.MultiCrop) -> None:
        """Raise where views cannot be cut, or something was asked for that belongs to one crop."""
        for modality in self.modalities.values():
            try:
                modality.size(settings.local_image_size)
            except ValueError as error:
                raise ValueError(f"{views.WHERE}.local_size: {error}") from error
        self.refuse_places("config.data.augment.views asks for several")

    def _check_augment(self, augment: Augment) -> None:
        """Raise where the modalities do not allow what is asked for."""
        where = "config.data.augment"
        changed = (*augment.recipes, *(("gray",) if augment.gray else ()))
        others = [name for name in self.modalities if name not in self.pictures]
        if changed and not self.pictures:
            raise ValueError(f"{where}.{changed[0]} changes 8-bit RGB pictures, but {', '.join(others)} are none: remove it")
        if augment.randaugment is not None:
            if others:
                raise ValueError(
                    f"{where}.randaugment moves the pixels of 8-bit RGB pictures alone, but the data have {others[0]!r} too, which would "
                    "no longer lie over them: remove it, or drop the modality from config.modalities"
                )
            self.refuse_places(f"{where}.randaugment moves its pixels")
        if augment.crop in DENSE:
            self.refuse_places(f"{where}.crop {augment.crop!r} is resized and padded by rules of its own")
        if augment.pads:
            self.check_padding(f"{where}.crop {augment.crop!r}")
        labeled = [name for name, modality in self.modalities.items() if modality.kind == "categorical"]
        if (augment.cat_max_ratio or 1) < 1 and len(labeled) != 1:
            raise ValueError(
                f"{where}.cat_max_ratio is {augment.cat_max_ratio}, which one modality with class ids decides, but the data have "
                f"{' and '.join(labeled) or 'none'}: set it to 1 to take any crop"
            )


class _EvalChunks(_Records):
    """Chunk number -> rows of an evaluation batch, records in stored order, padded behind the last."""

    def __init__(
        self, *args: Any, crop: float | int | str | None, resize: str, batch_size: int, num_records: int, originals: Sequence[str],
        **settings: Any,
    ):  # fmt: skip
        super().__init__(*args, **settings)
        self.crop, self.resize, self.batch_size, self.num_records = crop, resize, batch_size, num_records
        self.originals = tuple(originals)
        if unknown := sorted(set(self.originals) - set(self.modalities)):
            raise ValueError(f"originals names {unknown[0]!r}, which is not declared in config.modalities ({', '.join(self.modalities)})")
        if isinstance(crop, str):
            self.refuse_places(f"the crop {crop!r} is resized by rules of its own")
            if crop == "pad":
                self.check_padding("the crop 'pad'")

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
                    **(self.padding(row_number) | self.no_originals() if row is None else row),
                    "valid": np.bool_(row is not None),
                    "index": np.int32(index),
                }
            )
        originals = {f"original/{name}": [row.pop(f"original/{name}") for row in rows] for name in self.originals}
        return {**self.stack(rows), **originals, "id": ids, "reason": reasons, "bad": bad}

    def _row(self, index: int, row: int, bad: list[tuple[str, str]]) -> tuple[str, dict[str, Any] | None]:
        identity = f"record {index}"
        try:
            record = self.source[index]
            identity = str(record["id"])
            arrays = self.decode(record)
            height, width = next(iter(arrays.values())).shape[:2]
            if isinstance(self.crop, str):
                made = evaluated(DenseRecord(arrays, self.modalities, self.pictures, self.resize), self.image_size, self.crop)
                row_of = self.dense_example(index, record, arrays, made)
            else:
                geometry = (
                    whole_geometry(height, width, self.image_size)
                    if self.crop is None
                    else center_geometry(height, width, self.image_size, self.crop)
                )
                row_of = self.example(index, record, arrays, geometry, self.resize, row)
            for name in self.originals:
                there = name in arrays
                row_of[f"original/{name}"] = stored_values(arrays[name], self.modalities[name]) if there else self.no_original(name)
            return identity, row_of | self.block_guidance(0, 0, index)
        except READ_ERRORS as error:
            bad.append((identity, str(error)))
            return identity, None

    def no_original(self, name: str) -> np.ndarray:
        """What stands for a modality at its own size that a record lacks: an array of 0 x 0 pixels."""
        modality = self.modalities[name]
        return np.zeros((0, 0) if modality.kind == "categorical" else (0, 0, modality.channels), self.dtypes[name])

    def no_originals(self) -> dict[str, Any]:
        """The same for a row that stands for no record."""
        return {f"original/{name}": self.no_original(name) for name in self.originals}


def _complaint(bad: tuple[str, str]) -> str:
    """One line about a record that cannot be used: its id, and why."""
    return f"{bad[0]!r}: {bad[1]}"
