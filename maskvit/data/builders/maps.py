"""The TFDS builder of a map set (`maskvit.data.maps`): id and map of every record of another data set, in its order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxtyping import UInt8
from numpy import ndarray

from maskvit.data.builders.records import RecordBuilder, progress
from maskvit.data.codec import encode_array


class Maps(RecordBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Importance over the whole picture of every record of a data set, uint8 "m h w" for 0 ... 1.

    Args:
      data_dir: TFDS's root.
      name: folder under it.
      records: (id, maps or None where there are none) of every record, in the order of the data set.
      manifest: what the maps were made from, and how; stored as the recipe.
    """

    def __init__(
        self, *, data_dir: str, name: str, records: Iterable[tuple[str, UInt8[ndarray, "m h w"] | None]], manifest: Mapping[str, Any]
    ):
        self.records, self.total = records, manifest["data"]["records"]
        super().__init__(name=name, data_dir=data_dir, modalities={"map": {}}, may_lack=("map",), label_names=(), recipe=manifest)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {"maps": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, (identity, maps) in enumerate(progress(self.records, self.total, self.name)):
            yield number, {"id": identity, "map": b"" if maps is None else encode_array(maps)}
