"""Accumulation, files that survive a resume, throughput and utilization, progress."""

import io
import json
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit.metrics import accumulate, throughput
from maskvit.metrics import writers as writers_module
from maskvit.metrics.accumulate import Accumulator
from maskvit.metrics.progress import Progress
from maskvit.metrics.throughput import Throughput
from maskvit.metrics.writers import JsonlWriter, make_writers


def pair(numerator, denominator):
    return jnp.float32(numerator), jnp.float32(denominator)


def test_summarize_weighs_by_the_denominators():
    parts = [{"loss": pair(6.0, 3.0)}, {"loss": pair(2.0, 1.0), "depth": pair(0.0, 0.0)}, {"loss": pair(8.0, 4.0)}]
    summary = accumulate.summarize(parts)
    assert summary["loss"] == 2.0 and np.isnan(summary["depth"])
    assert accumulate.summarize(parts[0]) == {"loss": 2.0}


def test_accumulator_starts_anew_after_a_summary():
    accumulator = Accumulator()
    accumulator.add({"loss": pair(6.0, 3.0)})
    assert accumulator.summarize() == {"loss": 2.0}
    accumulator.add({"loss": pair(1.0, 1.0)})
    assert accumulator.summarize() == {"loss": 1.0}
    assert accumulator.summarize() == {}


def test_an_accumulator_continues_exactly_where_it_was_saved():
    rng = np.random.default_rng(0)
    parts = [{"loss": pair(*rng.random(2)), "nan": pair(np.nan, 1.0)} for _ in range(20)]
    whole, stopped = Accumulator(), Accumulator()
    for part in parts:
        whole.add(part)
        stopped.add(part)
        stopped = Accumulator(json.loads(json.dumps(stopped.as_json(), allow_nan=False)))
    assert stopped.sums()["loss"] == whole.sums()["loss"] and np.isnan(stopped.summarize()["nan"])


def write_run(workdir, resume_step, steps):
    writer = JsonlWriter(workdir, {}, resume_step)
    for step in steps:
        writer.write_scalars(step, {"loss": 1 / step, "lr": 0.5})
        writer.write_scalars(step, {"knn/top1": step / 10})
    writer.close()


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    write_run(whole, None, range(1, 9))
    write_run(stopped, None, range(1, 7))
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    write_run(stopped, 4, range(5, 9))
    assert (stopped / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_new_run_keeps_the_file_of_one_that_left_no_checkpoint(tmp_path):
    write_run(tmp_path, None, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write_run(tmp_path, None, [1])
    write_run(tmp_path, None, [1, 2])
    assert (tmp_path / "metrics_1.jsonl").read_bytes() == before
    assert [len(path.read_text().splitlines()) for path in sorted(tmp_path.glob("*.jsonl"))] == [4, 6, 2]


def test_damaged_lines_are_dropped_and_the_others_kept(tmp_path, caplog):
    write_run(tmp_path, None, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [
        lines[1].replace(b"step", b"st\xf4p"),  # one flipped bit, no UTF-8
        lines[2].replace(b'"step": 2', b'"step": 2e0'),
        b"\x00\x00\x00\n",
        b"[" * 100_000 + b"\n",
        b'{"step": true}\n',
        b"7\n",
    ]
    path.write_bytes(b"".join([lines[0], *damaged, *lines[3:]]))
    with caplog.at_level("WARNING"):
        JsonlWriter(tmp_path, {}, 3).close()
    assert path.read_bytes().splitlines(keepends=True) == [lines[0], *lines[3:6]]
    assert caplog.text.count("dropped the broken line") == len(damaged)


def test_what_was_written_of_a_step(tmp_path):
    writers = make_writers([], tmp_path, {}, None)
    writers.write_scalars(2, {"loss": 1.0})
    writers.write_scalars(3, {"knn/top1": 1.0})
    writers.write_images(3, {"masking": np.zeros((4, 4, 3), np.uint8)})
    assert writers.written(3) == {"step", "knn/top1", "masking"} and writers.written(4) == set()
    writers.close()


def test_rows_are_json_whatever_the_values(tmp_path):
    writer = JsonlWriter(tmp_path, {}, None)
    writer.write_scalars(3, {"loss": float("nan"), "grad_norm": float("inf"), "lr": np.float32(0.25)})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 3, "loss": None, "grad_norm": None, "lr": 0.25, "non_finite": {"loss": "nan", "grad_norm": "inf"}}
    writer.close()


def test_pictures_are_png_files(tmp_path):
    writers = make_writers(["jsonl"], tmp_path, {}, None)
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    writers.write_images(12, {"masks/rgb": picture})
    writers.close()
    with Image.open(tmp_path / "pictures" / "masks_rgb_00000012.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture)


def test_unknown_writer_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match="'csv'.*jsonl, tensorboard, wandb"):
        make_writers(["csv"], tmp_path, {}, None)


@pytest.mark.parametrize("name, module", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "maskvit\[{name}\]"'):
        make_writers([name], tmp_path, {}, None)


def tensorboard_events(folder):
    """All events of a folder's event files, by length and checksum of every record, without TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted(folder.iterdir()):
        rest = path.read_bytes()
        while rest:
            length, checksum = struct.unpack("<QI", rest[:12])
            content = rest[12 : 12 + length]
            assert masked_crc32c(rest[:8]) == checksum
            assert struct.unpack("<I", rest[12 + length : 16 + length]) == (masked_crc32c(content),)
            found.append(Event.FromString(content))
            rest = rest[16 + length :]
    return found


def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    writers = make_writers(["tensorboard"], tmp_path, {}, None)
    writers.write_scalars(4, {"loss": 1.5, "knn/mean/top1_k20": 62.5})
    writers.write_scalars(5, {"loss": float("nan")})
    writers.write_images(5, {"masking": picture})
    writers.close()
    values = [(event.step, value) for event in tensorboard_events(tmp_path / "tensorboard") for value in event.summary.value]
    scalars = [(step, value.tag, value.simple_value) for step, value in values if not value.HasField("image")]
    assert scalars[:2] == [(4, "loss", 1.5), (4, "knn/mean/top1_k20", 62.5)]
    assert scalars[2][:2] == (5, "loss") and np.isnan(scalars[2][2]) and len(scalars) == 3
    ((step, image),) = [(step, value) for step, value in values if value.HasField("image")]
    assert (step, image.tag, image.image.height, image.image.width) == (5, "masking", 4, 6)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.image.encoded_image_string))), picture)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2  # beside it


def test_tensorboard_forgets_what_lies_behind_the_checkpoint_of_a_resumed_run(tmp_path):
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    for resume_step, steps in ((None, (3, 4, 5)), (3, (4, 5))):
        writers = make_writers(["tensorboard"], tmp_path, {}, resume_step)
        for step in steps:
            writers.write_scalars(step, {"loss": float(10 * step)})
        writers.close()
        for path in (tmp_path / "tensorboard").glob("events.*"):  # their names hold the second, and here both have the same
            path.rename(path.with_name(f"{resume_step or 0}_{path.name}"))
    events = tensorboard_events(tmp_path / "tensorboard")
    # TensorBoard leaves out earlier events from the step of a session's start on.
    starts = [event.step for event in events if event.HasField("session_log") and event.session_log.status == 1]
    assert starts == [4]
    assert sorted(event.step for event in events if event.summary.value) == [3, 4, 4, 5, 5]


class Wandb(types.ModuleType):
    """Stands in for the package: keeps what is asked of it."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0
        self.run = types.SimpleNamespace(id="abc123", log=self._log, finish=self._finish)

    def Image(self, array):  # noqa: N802 (the package calls it so)
        return "picture", array.copy()

    def init(self, **arguments):
        self.started.append(arguments)
        return self.run

    def _log(self, values, step):
        self.logged.append((step, values))

    def _finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_is_given_config_scalars_and_pictures(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = {"seed": 0, "objective": {"name": "mae"}}
    writers = make_writers(["wandb"], tmp_path, config, None)
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    writers.write_scalars(2, {"loss": 0.5, "epoch": 1})
    writers.write_images(2, {"masking": picture})
    writers.close()
    # Project, entity and mode are the package's own affair (its environment variables): a mode given here would override them.
    assert wandb.started == [dict(dir=str(tmp_path), id=None, resume=None, config=config)]
    (first, scalars), (second, pictures) = wandb.logged
    assert (first, scalars) == (2, {"loss": 0.5, "epoch": 1.0}) and all(type(value) is float for value in scalars.values())
    kind, shown = pictures["masking"]
    assert (second, kind) == (2, "picture")
    np.testing.assert_array_equal(shown, picture)
    assert wandb.finished == 1 and (tmp_path / "wandb_id.txt").read_text() == "abc123"


def test_wandb_continues_the_run_that_is_resumed_and_no_other(tmp_path, wandb):
    asked = []
    for resume_step in (None, 4, None):  # a new run, the same resumed, and one that left no checkpoint begun again
        make_writers(["wandb"], tmp_path, {}, resume_step).close()
        asked.append((wandb.started[-1]["id"], wandb.started[-1]["resume"]))
    assert asked == [(None, None), ("abc123", "allow"), (None, None)]
    (tmp_path / "wandb_id.txt").unlink()  # the writer is new to a run that is resumed
    make_writers(["wandb"], tmp_path, {}, 4).close()
    assert wandb.started[-1]["id"] is None


def test_other_processes_write_nothing(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(writers_module.jax, "process_index", lambda: 1)
    writers = make_writers(["wandb", "jsonl"], tmp_path, {}, None)
    writers.write_scalars(1, {"loss": 1.0})
    writers.close()
    assert not wandb.started and not list(tmp_path.iterdir())


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_throughput_leaves_pauses_out():
    clock = Clock()
    throughput = Throughput(global_batch=8, clock=clock)
    with throughput.paused():  # first compilation
        clock.now += 60
        throughput.step()
    for _ in range(4):
        with throughput.waiting():
            clock.now += 0.5
        clock.now += 1.5
        throughput.step()
    with throughput.paused(), throughput.waiting():  # an evaluator reading its own data
        clock.now += 30
    assert throughput.read() == {"images_per_second": 4.0, "steps_per_second": 0.5, "data_wait": 0.25}
    assert throughput.read() == {}


def test_utilization_is_known_or_absent_and_never_above_one(monkeypatch):
    h200 = dict(device_kind="NVIDIA H200", device_count=2)
    assert throughput.flops_utilization(989e12, 1.0, **h200) == pytest.approx(0.5)
    assert throughput.flops_utilization(1e12, 1.0, device_kind="cpu") is None
    with pytest.raises(throughput.MeasurementError, match="clock"):
        throughput.flops_utilization(989e12, 3.0, **h200)
    monkeypatch.setitem(throughput.PEAK_FLOPS, "cpu", 1e3)
    clock = Clock()
    measured = Throughput(global_batch=8, flops_per_step=1e9, clock=clock)
    clock.now += 1
    measured.step()
    assert measured.read() == {}  # impossible, so not reported


def test_no_device_is_as_fast_as_a_clock_that_was_read_too_early():
    clock = Clock()
    throughput = Throughput(global_batch=8, flops_per_step=1e15, clock=clock)  # on the CPU, whose peak is not known
    clock.now += 1
    throughput.step()
    assert throughput.read()["steps_per_second"] == 1
    clock.now += 1e-4
    throughput.step()
    assert throughput.read() == {}


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
        ("TPU v4 lite", None),
    ],
)
def test_peaks(kind, peak):
    assert throughput.peak_flops(kind) == peak


class Terminal(io.StringIO):
    def isatty(self):
        return True


VALUES = {"loss": 0.25, "images_per_second": 123.4, "steps_per_second": 0.5, "data_wait": 0.05, "lr": 1e-4}


def test_progress_writes_plain_lines_without_a_terminal():
    stream = io.StringIO()
    progress = Progress(total=100, start=20, stream=stream)
    progress.update(39)
    progress.report(40, VALUES)
    progress.message("saved")
    progress.close()
    assert stream.getvalue() == "step 40/100 (40%)  loss 0.2500  123.4 img/s  data wait 5%  ETA 0:02:00\nsaved\n"


def test_progress_is_a_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(total=100, start=20, stream=stream)
    progress.report(40, VALUES)
    progress.close()
    assert "40/100" in stream.getvalue() and "loss 0.2500" in stream.getvalue()
