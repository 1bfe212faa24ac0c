"""Small real runs for the tests of training: rendered scenes, the shipped configs' smoke forms, child processes."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from configs import common
from maskvit.checkpoints import load_params
from maskvit.core.types import tree_paths
from maskvit.data.builders import prepare
from maskvit.training import parts, setup

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_TRAIN = 40


def make_scenes(directory: pathlib.Path, **settings: Any) -> str:
    """A few rendered scenes."""
    prepare("scenes", str(directory), **{"num_train": NUM_TRAIN, "num_val": 12, "size": 48, **settings})
    return str(directory)


def shipped_configs() -> list[str]:
    """Every config file of the repository that `main.py` takes."""
    files = [ROOT / "configs" / "demo.py", *sorted((ROOT / "configs" / "pretrain").rglob("*.py"))]
    return [str(f.relative_to(ROOT)) for f in files if f.name != "__init__.py"]


def distinct_smoke_forms() -> list[str]:
    """One shipped config of each smoke form: those that differ in sizes, rates and epochs alone shrink to the same experiment."""
    forms = {}
    for path in shipped_configs()[::-1]:
        form = on_scenes(common.smoke(get_config(path)), "").to_dict()
        del form["schedule"], form["evaluators"], form["optimizer"]["base_lr"]
        forms[json.dumps(form, sort_keys=True)] = path
    return sorted(forms.values())


def get_config(path: str) -> Any:
    """The config of a file, as `--config` would load it."""
    spec = importlib.util.spec_from_file_location("experiment", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def on_scenes(config: Any, data_dir: str) -> Any:
    """A config pointed at the rendered scenes: their classes, and their sky without depth."""
    with config.unlocked():
        config.data.train = dict(source="tfds", name="scenes", data_dir=data_dir, split="train")
        if "semseg" in config.modalities:
            config.modalities.semseg.num_classes = 14
        if "depth" in config.modalities:
            config.modalities.depth.missing = 0.0
        if config.objective.get("guidance", {}).get("name") == "stored":  # nobody made maps of these scenes
            config.objective.guidance = dict(name="random_map")
    return config


def small_run(data_dir: str, guided: bool = False, **changes: Any) -> dict[str, Any]:
    """The smoke form of the scenes experiment as plain data; `changes` are top-level keys."""
    config = common.scenes()
    if guided:
        config = common.attention_guided(config)
    config = on_scenes(common.smoke(config), data_dir)
    config.objective.outputs = ("rgb", "depth")  # two decoders compile faster than four
    config.micro_batch = 0
    config.optimizer.base_lr = 3.2e-3  # 1e-4 at a batch of 8
    config.schedule = dict(total_epochs=100.0, start_epochs=0.0, warmup_epochs=1.0, min_lr=0.0)
    return {**config.to_dict(), "picture_every": 0, **changes}


def write_config(path: pathlib.Path, config: dict[str, Any]) -> str:
    """A config file for child processes."""
    path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({config!r})\n")
    return str(path)


def child(config: str, workdir: pathlib.Path, *flags: str, devices: int = 1, main: str = "main.py") -> subprocess.Popen:
    """`python main.py` in a process of its own with so many CPU devices. `main`: another file that ends in it."""
    env = {**os.environ, "XLA_FLAGS": re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])}
    command = [sys.executable, str(ROOT / main), f"--config={config}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> list[str]:
    """Wait for children and return what they said; an exit status but 0 fails with it."""
    said = [process.communicate(timeout=600)[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-3000:]
    return said


def loader_workers(pid: int) -> list[int]:
    """The loader's worker processes of process `pid`."""
    # ps ends with 1 where there are none.
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "multiprocessing.spawn" in line]


def free_port() -> int:
    """A port of this machine nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def losses(workdir: pathlib.Path) -> np.ndarray:
    """The logged losses of a run."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["loss"] for row in rows if "loss" in row])


def same_params(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same bits."""
    one, two = (tree_paths(load_params(path)[0]) for path in (first, second))
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def share_steps(patch: Any) -> None:
    """From now on starts take over the step that an earlier one compiled, where nothing differs of what it was compiled from.

    That is the objective, the optimizer's settings and schedule, the shapes, types and places of all arguments, the mesh and all that
    `compile_step` is told. `patch`: a `pytest.MonkeyPatch`, which ends it.
    """
    compile_step, build_optimizer = setup.compile_step, setup.build_optimizer
    optimizers: dict[Any, Any] = {}
    steps: dict[Any, Any] = {}

    def signature(*everything: Any) -> Any:
        leaves, structure = jax.tree.flatten(everything)
        return structure, *(
            (type(x), x.shape, x.dtype, getattr(x, "sharding", None)) if hasattr(x, "dtype") else (type(x), x) for x in leaves
        )

    def optimizer_of(*arguments: Any, **settings: Any) -> Any:
        # The same functions for the same settings: they are part of the step's signature.
        key = signature(arguments, settings)
        if key not in optimizers:
            optimizers[key] = build_optimizer(*arguments, **settings)
        return optimizers[key]

    def step_of(step: Any, arguments: Any, *, before: int, **settings: Any) -> Any:
        key = signature(step.func, step.args, step.keywords, setup.train_step, arguments, settings)
        if key not in steps or before not in (0, steps[key][1]):  # another number of micro-batches before the stop is another program
            steps[key] = compile_step(step, arguments, before=before, **settings)
        return steps[key]

    patch.setattr(setup, "build_optimizer", optimizer_of)
    patch.setattr(setup, "compile_step", step_of)


def on_one_device(patch: Any) -> None:
    """From now on starts use one of the four devices: a program for several takes longer to compile."""
    make_mesh = parts.make_mesh
    patch.setattr(parts, "make_mesh", lambda **sharding: make_mesh(jax.devices()[:1]))
