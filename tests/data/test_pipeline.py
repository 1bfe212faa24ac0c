"""The same global batches whatever the processes, workers and stops; every record once; damage contained."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types

import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import DEPTH, RGB, SEMSEG, parse_modalities
from maskvit.data import codec, costs, order, records
from maskvit.data.augment import geometry
from maskvit.data.batches import eval_batches, train_batches
from maskvit.data.order import epoch_order, record_rng
from maskvit.data.sources import ListSource
from maskvit.data.workers import IDLE, LoaderError, WorkerTable

SIZE = (32, 32)
MODALITIES = parse_modalities({"rgb": RGB, "depth": {**DEPTH, "missing": 0.0}, "semseg": SEMSEG})
PLAIN = {"crop": "none", "flip": 0.0}


def encoded(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def record(index: int) -> dict:
    """A picture whose depth holds the record's number, so that it can be told after any augmentation."""
    rng = np.random.default_rng(index)
    return {
        "id": f"s{index}",
        "label": index % 7,
        "rgb": encoded(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)),
        "depth": codec.encode_array(np.full((40, 50), index + 1, np.uint16)),
        "semseg": encoded(rng.integers(0, 133, (40, 50), dtype=np.uint8)),
    }


@pytest.fixture(scope="module")
def source() -> ListSource:
    return ListSource([record(index) for index in range(50)])


def numbers(batch) -> list[int]:
    """Record numbers of the rows, read from their depth."""
    return [int(value) - 1 for value in np.nanmedian(batch["depth"], axis=(1, 2, 3)).round()]


def take(source, count: int, **kwargs) -> list[dict]:
    settings = {"seed": 3, "global_batch": 8, "image_size": SIZE, **kwargs}
    with train_batches(source, MODALITIES, **settings) as batches:
        return [next(batches) for _ in range(count)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert sorted(one) == sorted(other)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_batch_has_the_declared_form(source):
    (batch,) = take(source, 1)
    forms = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert forms == {
        "rgb": ((8, 32, 32, 3), "uint8"),
        "depth": ((8, 32, 32, 1), "float32"),
        "semseg": ((8, 8, 8), "int32"),
        "label": ((8,), "int32"),
    }
    assert batch["label"].tolist() == [number % 7 for number in numbers(batch)]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_one_global_order(source, processes):
    whole = take(source, 9)
    parts = [take(source, 9, process_index=index, process_count=processes) for index in range(processes)]
    joined = [{name: np.concatenate([part[step][name] for part in parts]) for name in whole[0]} for step in range(9)]
    assert_same(joined, whole)


def test_batches_larger_than_a_chunk_join_in_order(source, monkeypatch):
    whole = take(source, 3, global_batch=40)
    monkeypatch.setattr(records, "CHUNK", 64)
    assert_same(take(source, 3, global_batch=40), whole)


@pytest.mark.parametrize("step", [1, 5, 6, 13])
def test_starts_at_any_step(source, step):
    assert_same(take(source, 3, start_step=step), take(source, step + 3)[step:])


def test_workers_give_the_same_batches(source):
    whole = take(source, 6, global_batch=36)
    assert_same(take(source, 3, global_batch=36, start_step=3, workers=2), whole[3:])


def test_an_epoch_has_every_record_at_most_once(source):
    seen = [number for batch in take(source, 18) for number in numbers(batch)]
    epochs = [seen[48 * epoch : 48 * (epoch + 1)] for epoch in range(3)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    dropped = [tuple(sorted(set(range(50)) - set(epoch))) for epoch in epochs]
    assert len(set(dropped)) == 3 and len({tuple(epoch) for epoch in epochs}) == 3


def test_order_and_augmentation_depend_on_seed_and_epoch(source):
    assert numbers(take(source, 1)[0]) != numbers(take(source, 1, seed=4)[0])
    one = ListSource([record(0)])
    pictures = [batch["rgb"].tobytes() for batch in take(one, 6, global_batch=1)]
    assert len(set(pictures)) == 6  # six epochs of one record: six crops
    assert not np.array_equal(epoch_order(3, 1, 50), epoch_order(4, 0, 50))
    np.testing.assert_array_equal(np.sort(epoch_order(3, 1, 50)), np.arange(50))
    # pinned: the order of a run must outlive releases of NumPy
    assert epoch_order(0, 0, 10).tolist() == [0, 8, 1, 2, 3, 5, 6, 7, 4, 9]
    np.testing.assert_allclose(record_rng(0, 1, 2).random(2), [0.05868554095267242, 0.7570638449782937], rtol=1e-12)


@pytest.mark.parametrize("count", [2, 17, 1000, 4096, 4097])
def test_a_computed_order_has_every_record_once(count):
    """It leaves no trace of the stored order: neighbors are as far apart as chance has it, and every record comes early as often."""
    orders = np.array([[order.scattered(i, count, (seed, 7, 8, 9, seed + 1, 3)) for i in range(count)] for seed in range(5)])
    np.testing.assert_array_equal(np.sort(orders), np.broadcast_to(np.arange(count), (5, count)))
    if count < 1000:
        return
    assert len({tuple(row) for row in orders.tolist()}) == 5
    steps = np.abs(np.diff(orders)) / count
    assert abs(steps.mean() - 1 / 3) < 0.02 and abs(np.corrcoef(orders[0], np.arange(count))[0, 1]) < 0.1
    early = orders[:, : count // 10] / count
    assert abs(early.mean() - 0.5) < 0.05 and abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.1


def test_large_data_sets_are_not_sorted(monkeypatch):
    """Pinned, and the same for every process; below the bound it is the sorted order."""
    found = [order.record_at(0, 0, position, 10**7) for position in range(4)]
    assert found == [8249220, 1991635, 7196369, 3955702]
    assert order.record_at(1, 0, 0, 10**7) != found[0] != order.record_at(0, 1, 0, 10**7)
    assert [order.record_at(0, 0, position, 10) for position in range(10)] == epoch_order(0, 0, 10).tolist()
    monkeypatch.setattr(order, "SORTED", 8)
    stream = take(ListSource([record(number) for number in range(20)]), 5, global_batch=4)
    assert sorted(sum((numbers(batch) for batch in stream), [])) == list(range(20))


def test_augmentation_belongs_to_the_record_not_to_its_row(source):
    by_number = {}
    for batch in take(source, 6, global_batch=8):
        by_number.update(dict(zip(numbers(batch), batch["rgb"], strict=True)))
    for batch in take(source, 3, global_batch=16):
        for number, picture in zip(numbers(batch), batch["rgb"], strict=True):
            if number in by_number:
                np.testing.assert_array_equal(picture, by_number[number])


def corrupted(kinds: dict[int, str], count: int = 400) -> ListSource:
    records = [record(index % 50) | {"id": f"s{index}"} for index in range(count)]
    for index, kind in kinds.items():
        if kind == "truncated":
            records[index]["rgb"] = records[index]["rgb"][:200]
        elif kind == "size":
            records[index]["rgb"] = encoded(np.zeros((1, 1, 3), np.uint8))
        elif kind == "deep":
            records[index]["rgb"] = encoded(np.zeros((40, 50), np.uint16))
        elif kind == "lacking":
            del records[index]["depth"]
        elif kind == "classes":
            records[index]["semseg"] = encoded(np.full((40, 50), 200, np.uint8))
    return ListSource(records)


def test_bad_records_are_replaced_by_the_next_in_order(caplog):
    kinds = {30: "truncated", 77: "size", 150: "deep", 222: "lacking", 301: "classes"}
    settings = dict(seed=1, global_batch=40, augment=PLAIN)
    with caplog.at_level(logging.WARNING), train_batches(corrupted(kinds), MODALITIES, SIZE, **settings) as batches:
        damaged = [next(batches) for _ in range(10)]
        assert batches.bad_samples >= 5
    for index in kinds:
        assert f"bad sample 's{index}'" in caplog.text
    for text in (
        "truncated",
        "is 1 x 1 pixels",
        "where 3 channels of 8 bits are expected",
        "lacks modality 'depth'",
        "class id 200 is out of range",
    ):
        assert text in caplog.text
    order = epoch_order(1, 0, 400)
    whole = [batch for batch in take(corrupted({}), 10, **settings)]
    flat, expected = (np.concatenate([batch["rgb"] for batch in batches]) for batches in (damaged, whole))
    for position in range(400):
        follower = position
        while int(order[follower % 400]) in kinds:
            follower += 1
        np.testing.assert_array_equal(flat[position], expected[follower % 400])
    assert_same(take(corrupted(kinds), 4, start_step=6, **settings), damaged[6:])


def test_too_many_bad_records_stop_the_run():
    kinds = dict.fromkeys(range(3, 400, 9), "truncated")
    with train_batches(corrupted(kinds), MODALITIES, SIZE, seed=1, global_batch=40) as batches:
        with pytest.raises(RuntimeError, match=r"of \d+ records could not be used, more than 1%.*truncated"):
            for _ in range(10):
                next(batches)
        with pytest.raises(RuntimeError, match="could not be used"):  # and it stays stopped
            next(batches)


def test_absent_modalities_are_marked():
    records = [record(index) for index in range(20)]
    for index in range(0, 20, 2):
        records[index]["semseg"] = b""
    del records[1]["rgb"]
    source = ListSource(records, may_lack=("rgb", "semseg"))
    with train_batches(source, MODALITIES, SIZE, seed=0, global_batch=20, inputs=("semseg", "rgb", "depth")) as batches:
        batch = next(batches)
    assert batch["present"].dtype == bool
    for row, number in enumerate(numbers(batch)):
        assert batch["present"][row].tolist() == [number % 2 == 1, number != 1, True]
        assert (batch["semseg"][row] == -1).all() == (number % 2 == 0)
        assert (batch["rgb"][row] == 0).all() == (number == 1)
    with eval_batches(source, MODALITIES, SIZE, batch_size=20) as batches:
        np.testing.assert_array_equal(next(batches)["present"][:, 2], np.arange(20) % 2 == 1)


def test_what_is_only_an_output_is_marked_behind_the_inputs():
    records = [record(index) for index in range(20)]
    for index in range(0, 20, 2):
        records[index]["semseg"] = b""
    source = ListSource(records, may_lack=("semseg",))
    with train_batches(source, MODALITIES, SIZE, seed=0, global_batch=20, inputs=("depth",)) as batches:
        batch = next(batches)
    semseg = [number % 2 == 1 for number in numbers(batch)]
    assert batch["present"].tolist() == [[True, True, there] for there in semseg]  # depth, then rgb and semseg
    with eval_batches(source, MODALITIES, SIZE, batch_size=16, inputs=("depth",)) as batches:
        first, last = list(batches)
    assert first["present"][:, 2].tolist() == [index % 2 == 1 for index in range(16)] and last["present"].shape == (16, 3)
    views = dict(views=dict(local_crops=1, local_size=(16, 16)))
    with train_batches(source, MODALITIES, SIZE, seed=0, global_batch=20, inputs=("depth",), augment=views) as batches:
        np.testing.assert_array_equal(np.sort(next(batches)["present"][:, 2]), np.sort(semseg))


@pytest.mark.parametrize(
    ("processes", "batch_size", "limit", "workers"), [(1, 16, None, 0), (2, 16, None, 0), (4, 64, 49, 0), (2, 8, 3, 0), (1, 40, None, 2)]
)
def test_evaluation_sees_every_record_once(source, processes, batch_size, limit, workers):
    runs = []
    for index in range(processes):
        settings = dict(batch_size=batch_size, process_index=index, process_count=processes, limit=limit, workers=workers)
        with eval_batches(source, MODALITIES, SIZE, **settings) as batches:
            runs.append(list(batches))
    assert len({len(run) for run in runs}) == 1
    count = limit or 50
    expected = [slot * 50 // count for slot in range(count)]
    rows = {name: np.concatenate([batch[name] for batches in zip(*runs, strict=True) for batch in batches]) for name in runs[0][0]}
    assert rows["valid"].tolist() == [True] * count + [False] * (len(rows["valid"]) - count)
    assert rows["index"][rows["valid"]].tolist() == expected and (rows["index"][~rows["valid"]] == -1).all()
    assert rows["id"][:count].tolist() == [f"s{number}" for number in expected]
    assert numbers({"depth": rows["depth"][:count]}) == expected
    assert rows["label"].tolist() == [number % 7 for number in expected] + [-1] * (len(rows["label"]) - count)
    assert np.isfinite(rows["depth"]).all()


def test_unusable_record_in_evaluation_is_not_valid():
    with eval_batches(corrupted({3: "truncated"}, 10), MODALITIES, SIZE, batch_size=10) as batches:
        (batch,) = list(batches)
        assert batches.bad_samples == 1
    assert batch["valid"].tolist() == [index != 3 for index in range(10)]
    assert batch["index"].tolist() == list(range(10)) and batch["id"][3] == "s3"


def test_reasons_come_with_an_evaluation_batch():
    with eval_batches(corrupted({3: "truncated"}, 10), MODALITIES, SIZE, batch_size=12) as batches:
        (batch,) = list(batches)
    assert "truncated" in batch["reason"][3] and [index for index, reason in enumerate(batch["reason"]) if reason] == [3]


def test_a_fault_of_ours_is_no_bad_sample(monkeypatch):
    """An error that data cannot cause ends the run; as "bad sample" under 1 % of the records it would go unseen."""
    real = geometry.apply_geometry

    def faulty(array, *arguments, **settings):
        if array.ndim == 3 and array[0, 0, 0] % 17 == 3:
            raise ValueError("an array of the wrong shape")
        return real(array, *arguments, **settings)

    monkeypatch.setattr(geometry, "apply_geometry", faulty)
    with train_batches(corrupted({}), MODALITIES, SIZE, seed=1, global_batch=40, augment=PLAIN) as batches:
        with pytest.raises(ValueError, match="an array of the wrong shape"):
            for _ in range(10):
                next(batches)
        assert batches.bad_samples == 0


def test_directions_keep_their_colors():
    """Normals are stored like pictures, but their channels are directions: views change the colors of pictures alone."""
    normals = np.full((40, 40, 3), 90, np.uint8)
    specs = parse_modalities({"normals": dict(scale=2 / 255, mean=(1.0,), mirrored_channels=(0,))})
    settings = dict(seed=0, global_batch=4, augment=dict(flip=0.0, views=dict(local_crops=1, local_size=(16, 16), jitter=1.0, grey=1.0)))
    with train_batches(ListSource([{"normals": encoded(normals)}] * 4), specs, SIZE, **settings) as batches:
        assert (next(batches)["global/normals"] == 90).all()


def test_new_modalities_and_non_square_sizes():
    modalities = parse_modalities({"normals": dict(channels=3, scale=2 / 255, mean=(1.0,)), "bands": dict(channels=10, patch=8, stride=2)})
    rng = np.random.default_rng(0)
    pixels = [(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8), rng.integers(0, 9000, (40, 50, 10)).astype(np.uint16)) for _ in range(4)]
    source = ListSource([{"normals": encoded(normals), "bands": codec.encode_array(bands)} for normals, bands in pixels])
    with train_batches(source, modalities, (32, 48), seed=0, global_batch=4) as batches:
        batch = next(batches)
    assert batch["normals"].shape == (4, 32, 48, 3) and batch["normals"].dtype == np.uint8
    assert batch["bands"].shape == (4, 16, 24, 10) and batch["bands"].dtype == np.float32
    assert (batch["label"] == -1).all()


def test_errors_before_the_first_batch(source):
    def start(use=source, modalities=MODALITIES, size=SIZE, **kwargs):
        train_batches(use, modalities, size, **{"seed": 0, "global_batch": 8, **kwargs})

    for kwargs, text in [
        (dict(global_batch=9, process_count=2), "config.global_batch = 9 does not divide by the 2 processes: set it to a multiple of 2"),
        (dict(global_batch=64), "hold 50 records, fewer than config.global_batch = 64: set it to 50 or less"),
        (dict(size=(32, 40)), "image width 40 is not a multiple of modality 'rgb''s patch 16"),
        (dict(augment={"flips": 1}), "unknown key 'flips'"),
        (dict(workers=-1), "workers is -1"),
        (dict(prefetch=0), "prefetch is 0"),
        (dict(start_step=-1), "must not be negative"),
        (dict(inputs=("rgb", "normals")), "input 'normals' is not declared in config.modalities"),
        (dict(use=corrupted(dict.fromkeys(range(20), "truncated"), 20)), "none of 20 records tried is readable .*truncated"),
        (dict(use=corrupted(dict.fromkeys(range(20), "lacking"), 20)), "modality 'depth' has no data in 20 records in memory: drop it"),
        (dict(use=corrupted(dict.fromkeys(range(20), "classes"), 20)), "class id 200 is out of range; .*num_classes = 133"),
    ]:
        with pytest.raises(ValueError, match=text):
            start(**kwargs)
    for kwargs, text in [(dict(crop=0.0), "crop is 0"), (dict(limit=0), "limit is 0"), (dict(resize="gpu"), "resize is 'gpu'")]:
        with pytest.raises(ValueError, match=text):
            eval_batches(source, MODALITIES, SIZE, batch_size=8, **kwargs)


def test_closing_ends_everything(source):
    batches = train_batches(source, MODALITIES, SIZE, seed=0, global_batch=8)
    next(batches)
    batches.close()
    batches.close()
    assert not batches._thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    dropped = train_batches(source, MODALITIES, SIZE, seed=0, global_batch=8)
    thread = dropped._thread
    del dropped
    thread.join(timeout=10)
    assert not thread.is_alive()


CHILD = """
import os, signal, sys, time, multiprocessing
sys.path.insert(0, {tests!r})
import test_pipeline as t

if __name__ == "__main__":
    source = t.ListSource([t.record(index) for index in range(50)])
    batches = t.train_batches(source, t.MODALITIES, t.SIZE, seed=0, global_batch=16, workers=2)
    for _ in range(4): next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2, workers
    print("workers", *[worker.pid for worker in workers], flush=True)
    {then}
"""


def child(then: str) -> subprocess.Popen:
    code = CHILD.format(tests=os.path.dirname(os.path.abspath(__file__)), then=then.replace("\n", "\n    "))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


# --- what a batch holds when asked ------------------------------------------------------------------------------------

ASKED = dict(extras=("index", "box", "flip"), whole_every=4)


def test_asking_for_more_changes_nothing_else(source):
    plain = take(source, 6, global_batch=40)
    more = take(source, 6, global_batch=40, **ASKED)
    assert_same([{name: batch[name] for name in plain[0]} for batch in more], plain)
    forms = {name: (more[0][name].shape, more[0][name].dtype.name) for name in set(more[0]) - set(plain[0])}
    assert forms == {
        "index": ((40,), "int32"),
        "box": ((40, 4), "float32"),
        "flip": ((40,), "bool"),
        "whole/rgb": ((10, 32, 32, 3), "uint8"),
        "whole/depth": ((10, 32, 32, 1), "float32"),
        "whole/semseg": ((10, 8, 8), "int32"),
    }


def test_box_and_flip_say_what_was_cut(source):
    for batch in take(source, 6, global_batch=16, **ASKED):
        assert batch["index"].tolist() == numbers(batch)
        assert (batch["box"] >= 0).all() and (batch["box"][:, :2] + batch["box"][:, 2:] <= 1 + 1e-6).all()
        for row, (index, box, flip) in enumerate(zip(batch["index"], batch["box"], batch["flip"], strict=True)):
            top, left, height, width = np.rint(box * (40, 50, 40, 50)).astype(int)
            picture = codec.decode(source[int(index)]["rgb"])[top : top + height, left : left + width]
            picture = np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC))
            np.testing.assert_array_equal(batch["rgb"][row], picture[:, ::-1] if flip else picture)
    flips = np.concatenate([batch["flip"] for batch in take(source, 6, global_batch=16, **ASKED)])
    assert 0 < flips.mean() < 1


def whole(index: int) -> np.ndarray:
    return np.asarray(Image.fromarray(codec.decode(record(index)["rgb"])).resize((32, 32), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("every", "chunk"), [(1, 16), (4, 16), (5, 16), (20, 16), (40, 16), (4, 7), (8, 64)])
def test_whole_pictures_are_those_of_every_kth_row(source, monkeypatch, every, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    for batch in take(source, 2, global_batch=40, extras=("index",), whole_every=every):
        wanted = batch["index"][::every]
        assert (np.nanmedian(batch["whole/depth"], axis=(1, 2, 3)).round() - 1).tolist() == wanted.tolist()
        np.testing.assert_array_equal(batch["whole/rgb"], np.stack([whole(index) for index in wanted]))


def test_whole_pictures_whatever_the_processes_and_workers(source):
    alone = take(source, 3, global_batch=40, **ASKED)
    assert_same(take(source, 3, global_batch=40, workers=2, **ASKED), alone)
    parts = [take(source, 3, global_batch=40, process_index=index, process_count=2, **ASKED) for index in range(2)]
    assert_same([{name: np.concatenate([part[step][name] for part in parts]) for name in alone[0]} for step in range(3)], alone)


def test_whole_pictures_and_index_are_those_of_the_replacement():
    bad = {index: "truncated" for index in (30, 77, 150, 222, 301)}
    settings = dict(seed=1, global_batch=40, extras=("index",), whole_every=1)
    with train_batches(corrupted(bad), MODALITIES, SIZE, **settings) as batches:
        for batch in (next(batches) for _ in range(10)):
            assert (batch["index"] % 50).tolist() == numbers(batch) and not set(batch["index"]) & set(bad)
            np.testing.assert_array_equal(batch["whole/rgb"], np.stack([whole(index % 50) for index in batch["index"]]))


def test_whole_pictures_mark_what_is_absent_and_leave_out_what_is_no_input():
    records = [record(index) for index in range(8)]
    del records[1]["rgb"]
    source = ListSource(records, may_lack=("rgb",))
    with train_batches(source, MODALITIES, SIZE, seed=0, global_batch=8, inputs=("rgb", "depth"), **ASKED | {"whole_every": 1}) as batches:
        batch = next(batches)
    assert "whole/semseg" not in batch
    assert [(picture == 0).all() for picture in batch["whole/rgb"]] == [index == 1 for index in batch["index"]]


def test_evaluation_gives_them_too(source):
    with eval_batches(source, MODALITIES, SIZE, batch_size=20, crop=0.5, **ASKED) as batches:
        first, _, last = list(batches)
    assert first["whole/rgb"].shape == (5, 32, 32, 3) and not first["flip"].any()
    np.testing.assert_allclose(first["box"][0], [0.25, 0.3, 0.5, 0.4], atol=0.01)  # 64 x 80, of which the middle 32 x 32
    assert last["valid"].sum() == 10 and last["box"][-1].tolist() == [0, 0, 1, 1] and np.isfinite(last["whole/depth"]).all()
    with eval_batches(source, MODALITIES, SIZE, batch_size=20, crop=None, start_batch=1) as batches:
        squeezed = list(batches)
    assert [batch["index"][0] for batch in squeezed] == [20, 40]
    np.testing.assert_array_equal(squeezed[0]["rgb"], np.stack([whole(index) for index in range(20, 40)]))


def test_asking_for_what_cannot_be(source):
    with pytest.raises(ValueError, match="extra batch key 'boxes' is unknown; known: index, box, flip"):
        take(source, 1, extras=("boxes",))
    for every in (3, -1, 16):
        with pytest.raises(ValueError, match="config.objective.guidance asks for the whole picture .*each process, now 8"):
            take(source, 1, whole_every=every)
    with pytest.raises(ValueError, match="each process, now 4"):
        take(source, 1, whole_every=8, process_count=2)


@linux
def test_killed_worker_is_an_error_that_says_so():
    start = time.monotonic()
    process = child(
        "os.kill(workers[0].pid, signal.SIGKILL)\n"
        "try:\n    for _ in range(100): next(batches)\n"
        "except RuntimeError as error: print('said', error); sys.exit(7)"
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    assert re.search(rf"loader worker \d of 2 \(process {out.split()[1]}\) died", out) and "lower config.data workers (now 2)" in out
    assert time.monotonic() - start < 30


WORKER = """
import multiprocessing.util, os, pickle, sys
from maskvit.data.workers import start_worker

start_worker(pickle.loads(bytes.fromhex(sys.argv[1])), int(sys.argv[2]), 3)
if sys.argv[2] == "1":
    os._exit(1)
"""


@linux
def test_a_worker_that_ended_when_its_data_were_exhausted_is_not_dead():
    table = WorkerTable(3)
    for number in (0, 1):
        subprocess.run([sys.executable, "-c", WORKER, pickle.dumps(table).hex(), str(number)], check=False)
    assert [bool(worker.pid) for worker in table.read()] == [True, True, False]
    assert [worker.number for worker in table.dead()] == [1] and table.hanging() is None
    table.close()


@linux
def test_a_worker_that_is_stopped_while_it_starts_is_named_and_ended():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    process.start()
    table = WorkerTable(2)
    assert table.hanging() is None  # it may yet enter the table
    os.kill(process.pid, signal.SIGSTOP)
    while (worker := table.hanging()) is None:
        time.sleep(0.01)
    assert (worker.number, worker.pid, worker.chunk) == (0, process.pid, IDLE) and 0 <= time.time() - worker.since < 60
    table.kill()
    process.join(timeout=30)
    assert process.exitcode == -signal.SIGKILL
    table.close()


def test_without_workers_nothing_is_on_the_disk_that_a_kill_could_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    table = WorkerTable(0)
    assert not list(tmp_path.iterdir()) and not table.read() and table.hanging() is None
    table.close()
    WorkerTable(1).close()
    assert not list(tmp_path.iterdir())


@linux
def test_a_worker_that_hangs_is_named_and_ended():
    process = child(
        "batches._timeout = 3\nos.kill(workers[1].pid, signal.SIGSTOP)\n"
        "try:\n    for _ in range(100): next(batches)\n"
        "except RuntimeError as error: print('said', error); sys.exit(7)"
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    stopped = int(out.split()[2])
    assert re.search(rf"worker \d of 2 \(process {stopped}\) hangs", out) and "no batch for 3 s (config.data.timeout)" in out
    assert "in _put_dataset_elements_in_buffer" in err  # the stacks of the other worker
    assert not any(alive(int(word)) for word in out.splitlines()[0].split()[1:])


class Waiting(ListSource):
    """Its record 20 comes when `event` is set."""

    event = threading.Event()

    def __getitem__(self, index: int) -> dict:
        if index == 20:
            self.event.wait()
        return super().__getitem__(index)


def test_a_thread_that_hangs_is_an_error_in_time(source, capfd, monkeypatch):
    monkeypatch.setattr(records, "probe", lambda source, modalities: dict(rgb=np.uint8, depth=np.float32, semseg=np.int32))
    batches = train_batches(Waiting(source.records), MODALITIES, SIZE, seed=0, global_batch=50, timeout=1.0)
    try:
        with pytest.raises(LoaderError, match="a thread that reads records hangs.*look at the disk"):
            next(batches)
        assert "in wait" in capfd.readouterr().err
    finally:
        Waiting.event.set()


@linux
def test_workers_survive_the_groups_sigterm_and_end_with_their_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = child(
        "signal.signal(signal.SIGTERM, lambda *_: None)\nos.killpg(0, signal.SIGTERM)\n"
        "for _ in range(20): next(batches)\nprint('went on', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    out, err = process.communicate(timeout=60)
    assert "went on" in out, err
    workers = [int(word) for word in out.splitlines()[0].split()[1:]]
    deadline = time.monotonic() + 15
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.returncode == -signal.SIGKILL and not any(map(alive, workers))
    assert not list(tmp_path.iterdir())  # nor is anything left on the disk


@linux
def test_leaving_without_closing_does_not_hang():
    process = child("")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert not any(alive(int(word)) for word in out.splitlines()[0].split()[1:])


def test_block_masks_come_with_the_batch_and_depend_on_epoch_and_record_alone(source):
    def masks(**settings) -> dict:
        batches = take(source, 12, extras=("index",), blocks=(0.4, 0.1), **settings)  # two epochs of six steps
        rows = [
            (step // 6, int(i), m) for step, batch in enumerate(batches) for i, m in zip(batch["index"], batch["guidance"], strict=True)
        ]
        return {(epoch, index): mask for epoch, index, mask in rows}

    one, again = masks(), masks(workers=2)
    assert one.keys() == again.keys() and all(np.array_equal(one[key], again[key]) for key in one)
    assert {mask.shape for mask in one.values()} == {(1, 2, 2)}
    large = take(source, 4, image_size=(224, 224), blocks=(0.4, 0.1))
    masks = np.concatenate([batch["guidance"] for batch in large])
    assert masks.shape == (32, 1, 14, 14) and set(np.unique(masks)) == {0.0, 1.0}
    assert 0.3 < masks.mean() < 0.45 and masks.mean(axis=(1, 2, 3)).max() <= 0.5
    with pytest.raises(ValueError, match="ratio 0.9"):
        take(source, 1, blocks=(0.9, 0.2))


# What a record costs


@pytest.mark.parametrize(
    ("augment", "after"),
    [
        (dict(flip=0.5), ["crop rgb", "crop depth", "crop semseg", "colors"]),
        (dict(flip=0.5, views=dict(local_crops=1, local_size=(16, 16))), ["views"]),
    ],
)
def test_stages_of_the_pipeline_are_timed(source, monkeypatch, augment, after):
    """By a clock that only stands still outside the stage at hand; a record that cannot be read counts nowhere."""
    now, slow = [0.0], codec.decode_picture

    def decode(data, modality):
        if threading.current_thread() is threading.main_thread():  # others prepare batches
            now[0] += {"rgb": 3.0, "semseg": 0.5}[modality.name]
        return slow(data, modality)

    monkeypatch.setattr(costs, "time", types.SimpleNamespace(perf_counter=lambda: 0.0, thread_time=lambda: now[0]))
    monkeypatch.setattr(codec, "decode_picture", decode)
    broken = ListSource([*(record(index) for index in range(3)), {**record(3), "rgb": b"no picture"}])
    with train_batches(broken, MODALITIES, SIZE, seed=0, global_batch=3, augment=augment) as batches:
        next(batches)
        stages = batches.stage_seconds()
    assert list(stages) == ["read", "decode rgb", "decode depth", "decode semseg", *after]
    assert (stages["decode rgb"], stages["decode semseg"]) == (3.0, 0.5) and sum(stages.values()) == 3.5
    assert costs.describe_stages(stages) == "3500.0 ms of a core: decode rgb 3000.0, decode semseg 500.0"
