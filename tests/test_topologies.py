"""The same run on one device, on four, and in two processes: the same losses."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.runs import child, finish, free_port, loader_workers, losses, make_scenes, small_run, write_config


def start_two(file: str, workdir: pathlib.Path) -> list[subprocess.Popen]:
    cluster = (f"--coordinator=localhost:{free_port()}", "--num_processes=2")
    return [child(file, workdir, *cluster, f"--process_id={i}") for i in range(2)]


def wait_for_row(workdir: pathlib.Path, step: int, processes: list[subprocess.Popen]) -> None:
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0][-3000:]
        time.sleep(0.02)


def saved(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_two_processes_stop_together_whichever_is_told_or_fails(tmp_path):
    """SIGTERM to one of them during an evaluation, then a dead worker of one of them; resumed, the losses are those of one process.

    Guidance keeps a map of every record, which the two processes hold half each.
    """
    config = small_run(make_scenes(tmp_path / "data"), guided=True, total="20 steps", checkpoint=dict(every="20 steps", keep=9))
    config["objective"]["guidance"] = dict(name="average_error")
    config["picture_every"] = 10
    finish(child(write_config(tmp_path / "one.py", config), tmp_path / "one"))
    config["data"]["workers"] = 1
    config["evaluators"] = dict(knn=dict(type="knn", every="5 steps", ks=(3,), batch_size=4))
    file, workdir = write_config(tmp_path / "two.py", config), tmp_path / "two"

    processes = start_two(file, workdir)
    wait_for_row(workdir, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], said
    assert saved(workdir)[0] == 5 and len(saved(workdir)) == 1 and "knn/" not in (workdir / "metrics.jsonl").read_text(), said

    processes = start_two(file, workdir)
    wait_for_row(workdir, 8, processes)
    os.kill(loader_workers(processes[1].pid)[0], signal.SIGKILL)
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "error: process 1 of 2 has no batch" in said[0] and "error: loader worker 0 of 1" in said[1]
    assert len(saved(workdir)) in (2, 3) and saved(workdir)[-1] > 8

    finish(*start_two(file, workdir))
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "one"), rtol=1e-5)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if any(name.startswith("knn/") for name in row)] == [5, 10, 15, 20]


@pytest.mark.parametrize(("guided", "tolerance"), [(False, 1e-5), (True, 1e-4)])
def test_twenty_losses(guided, tolerance, tmp_path):
    config = small_run(make_scenes(tmp_path / "data"), guided=guided, total="20 steps", checkpoint=dict(every="20 steps", keep=1))
    file = write_config(tmp_path / "config.py", config)
    finish(child(file, tmp_path / "one"), child(file, tmp_path / "four", devices=4))
    finish(*start_two(file, tmp_path / "two"))
    one = losses(tmp_path / "one")
    assert len(one) == 20 and one[-1] < one[0]
    for other in ("four", "two"):
        np.testing.assert_allclose(losses(tmp_path / other), one, rtol=tolerance)
        # Step 0 starts from equal parameters: other masks would show at once.
        np.testing.assert_allclose(losses(tmp_path / other)[0], one[0], rtol=2e-6)
