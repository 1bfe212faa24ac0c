"""The same run on one device, on four, and in two processes: the same losses."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import time
from typing import Any

import numpy as np
import pytest

from maskvit.training import setup
from tests.runs import child, finish, free_port, loader_workers, losses, make_scenes, on_one_device, small_run, write_config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


def twenty_steps(data_dir: str, **changes: Any) -> dict[str, Any]:
    return small_run(data_dir, total="20 steps", checkpoint=dict(every="20 steps", keep=9), **changes)


def on_one(config: dict[str, Any], workdir: pathlib.Path) -> np.ndarray:
    """The losses of a run on one device."""
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        setup.train(str(workdir), **config)
    return losses(workdir)


def start_two(file: str, workdir: pathlib.Path, *flags: str) -> list[subprocess.Popen]:
    cluster = (f"--coordinator=localhost:{free_port()}", "--num_processes=2")
    return [child(file, workdir, *cluster, f"--process_id={i}", *flags, main="tests/one_of_two.py") for i in range(2)]


def wait_for_row(workdir: pathlib.Path, step: int, processes: list[subprocess.Popen]) -> None:
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0][-3000:]
        time.sleep(0.02)


def saved(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_two_processes_stop_together_whichever_is_told_or_fails(data_dir, tmp_path):
    """SIGTERM to one of them during an evaluation, then a dead worker of one of them; resumed, the losses are those of one process.

    Guidance keeps a map of every record, which the two processes hold half each.
    """
    config = twenty_steps(data_dir, guided=True)
    config["objective"] |= dict(guidance=dict(name="average_error"), inputs=config["objective"]["outputs"])
    config["picture_every"] = 15
    one = on_one(config, tmp_path / "one")
    config["evaluators"] = dict(knn=dict(type="knn", every="10 steps", ks=(3,), batch_size=4))
    file, workdir = write_config(tmp_path / "two.py", config), tmp_path / "two"

    processes = start_two(file, workdir)
    wait_for_row(workdir, 10, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], said
    assert saved(workdir) == [10] and "knn/" not in (workdir / "metrics.jsonl").read_text(), said

    processes = start_two(file, workdir, "--config.data.workers=1")
    wait_for_row(workdir, 11, processes)
    os.kill(loader_workers(processes[1].pid)[0], signal.SIGKILL)
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "error: process 1 of 2 has no batch" in said[0] and "error: loader worker 0 of 1" in said[1]
    assert len(saved(workdir)) == 2 and 11 < saved(workdir)[-1] < 20

    finish(*start_two(file, workdir, "--config.sharding.fsdp=2"))  # its state was kept whole; now each holds half of it
    np.testing.assert_allclose(losses(workdir), one, rtol=1e-5)
    assert (workdir / "pictures" / "masking_00000015.png").exists()  # one that cannot be drawn is a warning and no error
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if any(name.startswith("knn/") for name in row)] == [10, 20]


@pytest.mark.parametrize(("guided", "tolerance"), [(False, 1e-5), (True, 1e-4)])
def test_twenty_losses(guided, tolerance, data_dir, tmp_path):
    config = twenty_steps(data_dir, guided=guided)
    one = on_one(config, tmp_path / "one")
    if guided:  # with what else reads the parameters that lie in parts
        knn = dict(type="knn", every="20 steps", ks=(3,), batch_size=4)
        more = dict(sharding=dict(fsdp=2, tensor=2), evaluators=dict(knn=knn), picture_every=20)
        setup.train(str(tmp_path / "four"), **{**config, **more})
        assert "knn/" in (tmp_path / "four" / "metrics.jsonl").read_text() and list((tmp_path / "four" / "pictures").iterdir())
    else:
        setup.train(str(tmp_path / "four"), **config)
    finish(*start_two(write_config(tmp_path / "config.py", config), tmp_path / "two"))
    assert len(one) == 20 and one[-1] < one[0]
    for other in ("four", "two"):
        np.testing.assert_allclose(losses(tmp_path / other), one, rtol=tolerance)
        # Step 0 starts from equal parameters: other masks would show at once.
        np.testing.assert_allclose(losses(tmp_path / other)[0], one[0], rtol=2e-6)
