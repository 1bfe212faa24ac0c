"""The same run on one device, on four, and in two processes: the same losses."""

from __future__ import annotations

import numpy as np
import pytest

from tests.runs import child, finish, free_port, losses, make_scenes, small_run, write_config


@pytest.mark.parametrize(("guided", "tolerance"), [(False, 1e-5), (True, 1e-4)])
def test_twenty_losses(guided, tolerance, tmp_path):
    config = small_run(make_scenes(tmp_path / "data"), guided=guided, total="20 steps", checkpoint=dict(every="20 steps", keep=1))
    file = write_config(tmp_path / "config.py", config)
    finish(child(file, tmp_path / "one"), child(file, tmp_path / "four", devices=4))
    cluster = (f"--coordinator=localhost:{free_port()}", "--num_processes=2")
    finish(*[child(file, tmp_path / "two", *cluster, f"--process_id={i}") for i in range(2)])
    one = losses(tmp_path / "one")
    assert len(one) == 20 and one[-1] < one[0]
    for other in ("four", "two"):
        np.testing.assert_allclose(losses(tmp_path / other), one, rtol=tolerance)
        # Step 0 starts from equal parameters: other masks would show at once.
        np.testing.assert_allclose(losses(tmp_path / other)[0], one[0], rtol=2e-6)
