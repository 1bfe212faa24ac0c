"""What tells data from other data: contents and sizes, not the place where they lie."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from maskvit.checkpoints.resume import other_data
from maskvit.core.modalities import RGB, parse_modalities
from maskvit.data import open_source
from maskvit.data.builders import prepare
from maskvit.data.codec import RecordError
from maskvit.data.identity import COMPARED, data_identity
from maskvit.data.sources import ListSource

MODALITIES = parse_modalities({"rgb": RGB})


def scenes(directory, **options):
    prepare("scenes", str(directory), **dict(num_train=5, num_val=1, size=16) | options)
    return opened(directory)


def opened(directory, **options):
    return data_identity(open_source("tfds", MODALITIES, name="scenes", data_dir=str(directory), **options))


def test_moved_data_are_the_same_and_others_are_not(tmp_path):
    original = scenes(tmp_path / "one")
    assert original["records"] == 5 and original["files"] == 1 and len(original["contents"]) == 5
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere")
    assert opened(tmp_path / "elsewhere") == original and other_data(original, original) == []
    # More validation data are not other training data.
    assert other_data(original, scenes(tmp_path / "val", num_val=3)) == []
    for name, options, expected in (("more", dict(num_train=6), "6 records; they had 5"), ("seed", dict(seed=1), "other data")):
        lines = other_data(original, scenes(tmp_path / name, **options))
        assert lines and expected in lines[0]
    assert other_data(original, opened(tmp_path / "one", split="val"))


@pytest.mark.parametrize("change", [b"other", None, np.zeros(4, np.uint8), np.zeros((2, 2), np.float32)])
def test_equal_sizes_and_other_contents(change):
    records = [{"id": f"/a/{i}", "rgb": bytes([i]) * 5, "label": i} for i in range(COMPARED)]
    others = [{**record, "id": record["id"].replace("/a", "/b")} for record in records]
    assert data_identity(ListSource(records)) == data_identity(ListSource(others))
    others[3]["rgb"] = change
    lines = other_data(data_identity(ListSource(records)), data_identity(ListSource(others)))
    what = f"record 3 of the data has other contents (1 of the {COMPARED} records compared)"
    assert lines == [f"{what}: config.data.train.data_dir names other data"]


def test_a_record_that_cannot_be_read_is_not_compared():
    class Damaged(ListSource):
        def __getitem__(self, index):
            if index == 2:
                raise RecordError("damaged")
            return super().__getitem__(index)

    records = [{"rgb": bytes([i])} for i in range(4)]
    sound, damaged = data_identity(ListSource(records)), data_identity(Damaged(records))
    assert damaged["contents"]["2"] is None and other_data(sound, damaged) == other_data(damaged, sound) == []


def test_large_data_are_sampled_from_end_to_end():
    contents = data_identity(ListSource([{"rgb": b"%d" % i} for i in range(1000)]))["contents"]
    assert len(contents) == COMPARED and {"0", "999"} <= contents.keys()
    assert data_identity(ListSource([]))["contents"] == {}
