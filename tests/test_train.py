"""The loop: every shipped config runs, resumes bit for bit, survives being killed, and refuses what cannot work."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from maskvit.checkpoints import CheckpointError, CheckpointStore, find_checkpoint
from maskvit.core.durations import to_steps
from maskvit.core.types import tree_paths
from maskvit.data.batches import Batches
from maskvit.data.workers import LoaderError
from maskvit.evaluators import EVALUATORS
from maskvit.objectives import build_objective
from maskvit.training import setup
from maskvit.training.config import make_schedule
from maskvit.training.loop import Loop, Stopped
from maskvit.training.microbatches import compile_step
from maskvit.training.start import warn_of_low_rate
from tests.runs import (
    child,
    distinct_smoke_forms,
    finish,
    get_config,
    loader_workers,
    make_scenes,
    on_one_device,
    on_scenes,
    same_params,
    shipped_configs,
    small_run,
    write_config,
)

# `test_resuming_after_any_step_is_bit_equal` compiles a step anew where it resumes.
pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.mark.parametrize("path", shipped_configs())
def test_shipped_config_has_its_full_size(path):
    config = get_config(path).to_dict()
    global_batch, steps_per_epoch = config["global_batch"], 1_281_167 // config["global_batch"]
    base_lr = config["optimizer"]["base_lr"]
    schedule = make_schedule(base_lr, global_batch, steps_per_epoch, imported_epochs=1600.0, **config["schedule"])
    steps = to_steps(config["total"], steps_per_epoch=steps_per_epoch, global_batch=global_batch)
    assert 0 < steps <= schedule.total - schedule.start
    objective = build_objective(config)
    params = jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) > 1_000_000
    if "multimae_b" in path and objective.model.decoder_name == "spatial":
        assert sum(x.size for x in jax.tree.leaves(params)) == 98_569_360


# An objective of each kind; the others, which differ in their masks and decoders, run on one device.
ON_ALL_DEVICES = ("configs/demo.py", "configs/pretrain/ibot_s_800e.py")


# Forms that differ from one that is run in these values alone: their step is traced on their first batch, and not compiled.
TRACED = {
    "configs/pretrain/scenes.py": ("configs/pretrain/multimae_b_1600e.py", {"compute_dtype", "embed_dim"}),  # as in configs/demo.py
    "configs/pretrain/multimae_b_attention_low_tail.py": ("configs/pretrain/multimae_b_attention_restart.py", {"name"}),  # of the scores
    "configs/pretrain/crossmae_h.py": ("configs/pretrain/crossmae_b.py", {"kept_mask_ratio"}),
    "configs/pretrain/attmask_s_20percent_100e.py": ("configs/pretrain/attmask_s_100e.py", {"teacher_momentum"}),
}


class Traced(Exception):
    """The step was traced."""


@pytest.mark.parametrize("path", TRACED)
def test_smoke_form_is_traced(path, data_dir, tmp_path, monkeypatch, one_device):
    def trace(step, arguments, *, global_batch, micro_batch, **_):
        state, results = jax.eval_shape(functools.partial(step, micro_batches=global_batch // micro_batch), *arguments)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, arguments[0]) and results.metrics["loss"][0].shape == ()
        raise Traced

    run, differing = TRACED[path]
    assert run in distinct_smoke_forms()
    settings, other = (on_scenes(common.smoke(get_config(name)), data_dir).to_dict() for name in (path, run))
    ours, theirs = (tree_paths({part: form[part] for part in ("modalities", "objective", "data")}) for form in (settings, other))
    assert {name.split("/")[-1] for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} == differing
    monkeypatch.setattr(setup, "compile_step", trace)
    with pytest.raises(Traced):
        setup.train(str(tmp_path), **settings | dict(evaluators={}))


@pytest.mark.parametrize("path", [path for path in distinct_smoke_forms() if path not in TRACED])
def test_smoke_form_runs_saves_and_resumes(path, data_dir, tmp_path, monkeypatch):
    if path not in ON_ALL_DEVICES:
        on_one_device(monkeypatch)
    settings = on_scenes(common.smoke(get_config(path)), data_dir).to_dict()
    watched = path == "configs/demo.py"  # pictures and evaluation are the same code for all
    evaluators = dict(knn=dict(type="knn", every="2 steps", ks=(3,), batch_size=8)) if watched else {}
    settings |= dict(evaluators=evaluators, picture_every="2 steps" if watched else 0, checkpoint=dict(every="1 steps", keep=2))
    setup.train(str(tmp_path), **settings)
    shutil.rmtree(tmp_path / "checkpoints" / "2")  # not a smaller `total`, which is another run where a schedule is as long as the run
    state = setup.train(str(tmp_path), **settings)
    assert int(state.step) == 2 and int(state.skipped) == 0
    assert "| encoder/block_00/attn/qkv/kernel " in (tmp_path / "parameters.txt").read_text()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert find_checkpoint(tmp_path).name == "2"
    if watched:
        assert any(key.startswith("knn/mean/") for row in rows for key in row)
        assert (tmp_path / "pictures" / "masking_00000002.png").stat().st_size > 1000


def test_resuming_after_any_step_is_bit_equal(data_dir, tmp_path):
    config = small_run(data_dir, guided=True, total="6 steps", log_every=4, checkpoint=dict(every="6 steps", keep=2))
    setup.train(str(tmp_path / "whole"), **config)
    for stop in (1, 5):  # 5 steps are an epoch
        workdir = tmp_path / f"stopped_{stop}"
        stop_at(stop, str(workdir), config)
        with pytest.MonkeyPatch.context() as patch:
            if stop == 5:
                patch.setattr(setup, "compile_step", compile_step)  # anew, as another process does
            setup.train(str(workdir), **config)
        assert same_params(workdir, tmp_path / "whole")
        assert measured(workdir) == measured(tmp_path / "whole")


def stop_at(step: int, workdir: str, config: dict) -> None:
    """Run until SIGTERM comes while step `step - 1` is handed over. On the way: how many steps are under way, and when."""
    take_step, fetch, save = Loop._take_step, Loop._fetch, CheckpointStore.save
    loops = []

    def then_fetch(loop):
        assert len(loop._flight._steps) <= 1  # what is waited for then is the loader
        fetch(loop)

    def then_save(*arguments):
        assert not loops[-1]._flight._steps  # or the devices' work would count as a pause
        save(*arguments)

    def then_stop(loop):
        loops.append(loop)
        take_step(loop)
        assert len(loop._flight._steps) <= 2
        if loop.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
            while not loop._signals.asked:
                time.sleep(0.001)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(Loop, "_take_step", then_stop)
        patch.setattr(Loop, "_fetch", then_fetch)
        patch.setattr(CheckpointStore, "save", then_save)
        setup.train(workdir, **config)
    assert stopped.value.code == 128 + signal.SIGTERM


def measured(workdir) -> list[dict]:
    """The rows of a run without the figures of its speed."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "steps_per_second", "data_wait")} for row in rows]


def skip_steps(monkeypatch, first: int, end: int) -> None:
    """The updates of steps first ... end - 1 are refused, as for a gradient that is not finite."""
    compile_step = setup.compile_step

    def refusing(*arguments, **settings):
        step, *figures = compile_step(*arguments, **settings)

        def refuse(state, batch, seed, loss_limit, word):
            refused = (state.step >= first) & (state.step < end)
            return step(state, batch, seed, jnp.where(refused, -jnp.inf, loss_limit), word)

        return refuse, *figures

    monkeypatch.setattr(setup, "compile_step", refusing)


def test_skips_in_a_row_go_back_to_a_healthy_checkpoint_that_nothing_replaced(data_dir, tmp_path, monkeypatch, capsys, one_device):
    config = small_run(data_dir, total="16 steps", log_every=1, checkpoint=dict(every="2 steps", keep=1), guard=dict(max_skipped=3))
    skip_steps(monkeypatch, 8, 11)
    whole = setup.train(str(tmp_path / "whole"), **config)
    # Known at step 12, two steps later: back to step 8, of whose successors (10) none was healthy.
    assert "step 12: 3 updates in a row were skipped. Back to the parameters of step 8" in capsys.readouterr().err
    assert int(whole.step) == 16 and int(whole.skipped) == 4
    stop_at(11, str(tmp_path / "stopped"), config)
    assert {p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir() if p.name.isdigit()} == {"8", "11"}
    resumed = setup.train(str(tmp_path / "stopped"), **config)
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_skips_that_never_end_stop_the_run_with_what_is_true(data_dir, tmp_path, monkeypatch, one_device):
    config = small_run(data_dir, total="40 steps", log_every=1, checkpoint=dict(every="2 steps", keep=1), guard=dict(max_skipped=3))
    skip_steps(monkeypatch, 2, 1000)
    with pytest.raises(FloatingPointError, match="step 10: 3 updates in a row were skipped, and it was so again after returning to step 2"):
        setup.train(str(tmp_path), **config)
    skip_steps(monkeypatch, 0, 1000)
    with pytest.raises(FloatingPointError, match="there is no checkpoint from before to return to"):
        setup.train(str(tmp_path / "from_the_start"), **config)


class Faulty:
    """An evaluator that fails at first, then is told to stop in the middle, then works."""

    calls = 0

    def __init__(self, objective, modalities, image_size, mesh, data):
        del objective, modalities, image_size, mesh, data

    def protocol(self):
        return dict(figure="the number of calls")

    def run(self, params, objective_state, between):
        Faulty.calls += 1
        if Faulty.calls == 1:
            raise RuntimeError("no figures today")
        if Faulty.calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        yield "figure", float(Faulty.calls)


def test_an_evaluation_that_fails_or_is_stopped_loses_nothing_and_is_made_up_for(data_dir, tmp_path, monkeypatch, one_device):
    monkeypatch.setitem(EVALUATORS, "faulty", Faulty)
    evaluators = dict(faulty=dict(type="faulty", every="2 steps"))
    config = small_run(data_dir, total="3 steps", checkpoint=dict(every="100 steps", keep=2), evaluators=evaluators)
    with pytest.raises(RuntimeError, match="no figures today"):
        setup.train(str(tmp_path), **config)
    assert find_checkpoint(tmp_path).name == "2"
    start = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        setup.train(str(tmp_path), **config)
    assert stopped.value.code == 130 and time.monotonic() - start < 50
    setup.train(str(tmp_path), **config)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["faulty/figure"]) for row in rows if "faulty/figure" in row] == [(2, 3.0), (3, 4.0)]
    setup.train(str(tmp_path), **config)  # nothing is left to do
    assert Faulty.calls == 4
    # Killed between the save of the last step and its evaluation: the evaluation alone is left.
    metrics = tmp_path / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if '"faulty/figure": 4' not in line]
    metrics.write_text("".join(kept))
    setup.train(str(tmp_path), **config)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(row["step"], row["faulty/figure"]) for row in rows if "faulty/figure" in row] == [(2, 3.0), (3, 5.0)]


def test_what_an_objective_remembers_is_resumed_bit_for_bit(data_dir, tmp_path, one_device):
    config = small_run(data_dir, total="4 steps", checkpoint=dict(every="4 steps", keep=2))
    config["objective"] |= dict(
        outputs=config["objective"]["inputs"],  # the budget follows the loss of each
        scores=dict(name="attention_high"),
        guidance=dict(name="teacher_attention", momentum=0.9),
        budget=dict(name="adaptive_dirichlet", momentum=0.5),
        guided_share=dict(share=(0.0, 1.0), start="1 steps", ramp="2 steps"),
        loss_weight=dict(tau=(0.8, 0.7), over="4 steps"),
    )
    whole = setup.train(str(tmp_path / "whole"), **config)
    setup.train(str(tmp_path / "stopped"), **{**config, "total": "2 steps"})
    resumed = setup.train(str(tmp_path / "stopped"), **config)
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert set(whole.objective_state) == {"guidance", "averages"}


def test_killed_and_terminated_runs_and_those_that_lost_a_worker_go_on(data_dir, tmp_path, one_device):
    config = small_run(data_dir, guided=True, total="26 steps", checkpoint=dict(every="2 steps", keep=2))
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    setup.train(str(whole), **config)
    file = write_config(tmp_path / "config.py", config)

    def run_three_steps(act, *flags: str) -> tuple[str, int]:
        """Act on a child once it has logged three steps more than were there; its words and exit status."""
        metrics = workdir / "metrics.jsonl"
        step = 3 + max(map(int, re.findall(r'"step": (\d+),', metrics.read_text() if metrics.exists() else "")), default=0)
        process = child(file, workdir, *flags)
        while process.poll() is None and not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            time.sleep(0.02)
        act(process)
        return process.communicate(timeout=120)[0], process.returncode

    worker = "--config.data.workers=1"
    assert run_three_steps(lambda process: process.kill(), worker)[1] == -signal.SIGKILL
    said, status = run_three_steps(lambda process: os.kill(loader_workers(process.pid)[0], signal.SIGKILL), worker)
    assert status == 2 and "Traceback" not in said
    assert re.search(r"\nthe state of step (\d+) is saved.*\nerror: loader worker 0 of 1 \(process \d+\) died", said), said[-2000:]
    said, status = run_three_steps(lambda process: process.send_signal(signal.SIGTERM), worker)
    assert status == 128 + signal.SIGTERM and re.search(r"stopped by SIGTERM at step \d+, state saved", said)
    said = finish(child(file, workdir))[0]
    assert "resuming at step" in said
    assert same_params(workdir, whole)
    assert not [p for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name or p.name.startswith(".unfinished")]


def test_a_loader_that_hangs_can_be_stopped_and_one_that_fails_loses_nothing(data_dir, tmp_path, monkeypatch, one_device):
    config = small_run(data_dir, total="5 steps", checkpoint=dict(every="100 steps", keep=3))
    deliver = Batches.__next__

    def from_batch(number: int, act) -> None:
        taken = iter(range(100))
        monkeypatch.setattr(Batches, "__next__", lambda batches: act() if next(taken) >= number else deliver(batches))

    def hang():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait(60)

    from_batch(0, hang)
    with pytest.raises(Stopped) as stopped:
        setup.train(str(tmp_path / "at_once"), **config)
    assert stopped.value.code == 143

    from_batch(2, hang)
    with pytest.raises(Stopped) as stopped:
        setup.train(str(tmp_path), **config)
    assert stopped.value.code == 143 and find_checkpoint(tmp_path).name == "2"

    def fail():
        raise LoaderError("no batch for 600 s")

    from_batch(2, fail)
    with pytest.raises(LoaderError, match="600 s"):
        setup.train(str(tmp_path), **config)
    assert find_checkpoint(tmp_path).name == "4"
    metadata = json.loads((find_checkpoint(tmp_path) / "metadata" / "metadata").read_text())
    assert metadata["micro_batches"] == 1 and metadata["healthy"] is True and metadata["due"] == []


def test_evaluation_alone(data_dir, tmp_path, one_device):
    evaluators = dict(knn=dict(type="knn", ks=(3,), batch_size=8))
    setup.train(str(tmp_path), **small_run(data_dir, total=0, evaluators=evaluators))
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["step"] == 0 and "knn/global/top1_k3" in row


def test_an_error_at_the_start_leaves_nothing_open(data_dir, tmp_path, monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError("the compiler gave up")

    monkeypatch.setattr(setup, "compile_step", fail)
    for _ in range(2):  # the second start finds no lock of the first
        with pytest.raises(RuntimeError, match="the compiler gave up"):
            setup.train(str(tmp_path), **small_run(data_dir))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("maskvit")]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def change(config, path, value):
    """Set a dotted key of a nested dict."""
    *parents, last = path.split(".")
    for key in parents:
        config = config[key]
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("objective.name", "multimea", "config.objective.name is 'multimea'; known: multimae"),
        ("objective.num_visibel", 3, "config.objective has unknown key 'num_visibel'; known: .*num_visible"),
        ("objective.scores", {"name": "loud"}, "config.objective.scores.name is 'loud'; known: random"),
        ("objective.num_visible", 48, "num_visible is 48, but an image of .* has 48 tokens"),
        ("objective.inputs", ("rgb", "thermal"), "config.objective.inputs names 'thermal'; declared"),
        ("objective.outputs", ("norm_semseg",), "cannot be normalized per patch"),
        ("objective.scores", {"name": "attention_high"}, "needs config.objective.guidance"),
        ("objective.budget", {"name": "dirichlet", "alphas": (1.0, 2.0)}, "alphas has 2 values for 3 modalities"),
        ("image_size", (36, 32), "image height 36 is not a multiple of modality 'rgb'"),
        ("image_size", (32, 32, 3), r"config.image_size is \(32, 32, 3\); give \(height, width\)"),
        ("modalities.rgb.lose", "mse", "config.modalities.rgb has unknown key 'lose'; known: .*loss"),
        ("modalities.rgb.loss", "huber", "config.modalities.rgb.loss is 'huber'"),
        ("modalities.semseg.num_classes", 5, "num_classes"),
        ("optimizer.momentum", 0.9, "config.optimizer has unknown key 'momentum'; known: base_lr, name, b1"),
        ("schedule.warmup_epochs", 200.0, "warm-up of .* does not fit"),
        ("total", "600 steps", "past the schedule's end"),
        ("total", "ten", "ten"),
        ("global_batch", 6, "not divisible by 4 devices"),
        ("global_batch", 64, "64"),
        ("micro_batch", 3, "config.micro_batch is 3"),
        ("data.train.split", "test", "known: train"),
        ("data.train.data_dir", "/nowhere", "nowhere"),
        ("data.wokers", 1, "config.data has unknown key 'wokers'; known: train, augment, workers"),
        ("data.augment", {"flipp": 1.0}, "flipp"),
        ("evaluators", {"knn": {"type": "nearest"}}, "config.evaluators.knn.type is 'nearest'; known: knn"),
        ("evaluators", {"knn": {"type": "knn", "kay": 3}}, "config.evaluators.knn has unknown key 'kay'"),
        ("init_from", {"path": "/nowhere"}, "nowhere"),
        ("writers", ("paper",), "paper"),
        ("checkpoint", {"every": "1 steps", "keep": 0}, "config.checkpoint.keep is 0"),
    ],
)  # fmt: skip
def test_bad_config_is_refused_before_the_first_step(path, value, message, data_dir, tmp_path):
    config = small_run(data_dir)
    change(config, path, value)
    with pytest.raises((ValueError, CheckpointError, FileNotFoundError), match=message):
        setup.train(str(tmp_path), **config)
    metrics = tmp_path / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()


def test_a_low_learning_rate_is_told_with_its_numbers(caplog):
    with caplog.at_level("WARNING"):
        warn_of_low_rate(make_schedule(1e-4, 2048, 100, total_epochs=1600.0, start_epochs=1500.0), 0, 10_000, 1e-4, 2048)
        assert not caplog.text
        warn_of_low_rate(make_schedule(1e-4, 8, 100, total_epochs=1600.0, start_epochs=1500.0), 0, 10_000, 1e-4, 8)
    assert "config.optimizer.base_lr 0.0001 x config.global_batch 8 / 256 = 3.1e-06 at its peak" in caplog.text


def test_unknown_top_level_key_and_one_line_errors(data_dir, tmp_path):
    config = small_run(data_dir, global_bach=8)
    said = child(write_config(tmp_path / "config.py", config), tmp_path / "run").communicate(timeout=120)[0]
    assert "config has unknown key 'global_bach'; known: " in said and "Traceback" not in said


def test_modality_without_data(data_dir, tmp_path):
    config = small_run(data_dir)
    config["modalities"]["thermal"] = dict(channels=1, patch=8, loss="l1")
    config["objective"]["inputs"] = ("rgb", "thermal")
    config["objective"]["outputs"] = ("rgb", "thermal")
    with pytest.raises(ValueError, match="thermal"):
        setup.train(str(tmp_path), **config)


def test_checkpoint_of_another_size_needs_a_named_remedy(data_dir, tmp_path, one_device):
    setup.train(str(tmp_path / "first"), **small_run(data_dir, total="1 steps"))
    config = small_run(data_dir, init_from=dict(path=str(tmp_path / "first")))
    config["objective"]["decoder"] = dict(width=32, depth=1, heads=2)
    with pytest.raises(CheckpointError, match="outputs/"):
        setup.train(str(tmp_path / "second"), **config)
    config["init_from"]["fresh"] = ("outputs/.*",)
    assert int(setup.train(str(tmp_path / "third"), **{**config, "total": "1 steps"}).step) == 1


def test_workdir_of_another_run_and_unwritable_workdir(data_dir, tmp_path, one_device):
    setup.train(str(tmp_path / "run"), **small_run(data_dir, total="1 steps"))
    with pytest.raises(ValueError, match="seed: 0 in the checkpoint, 1 in this config"):
        setup.train(str(tmp_path / "run"), **small_run(data_dir, seed=1))
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match="file"):
        setup.train(str(tmp_path / "file"), **small_run(data_dir))
