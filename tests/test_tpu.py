"""The guided MultiMAE-B step compiles for TPUs, ahead of time and without one. Needs `libtpu` (the `tpu` extra)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import pytest

TOPOLOGY = os.environ.get("MASKVIT_TPU_TOPOLOGY", "v5e:2x2")
SAMPLES_PER_CHIP = 32
# What XLA itself puts into a program; anything else would be a call out of it.
HARMLESS_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "AllocateBuffer", "annotate_device_placement"}


def compile_step(topology_name: str, per_chip: int) -> dict[str, object]:
    """Lower and compile the bf16 guided step of MultiMAE-B at 224 for a topology; figures per chip."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from maskvit.core.modalities import DEPTH, RGB, SEMSEG
    from maskvit.nn.backbone import frozen_mask
    from maskvit.objectives import build_objective
    from maskvit.optim.schedules import Cosine
    from maskvit.optim.transforms import adamw
    from maskvit.sharding import batch_sharding, make_mesh, parameter_shardings, replicated
    from maskvit.training.step import init_state, train_step

    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices)
    names = ("rgb", "depth", "semseg")
    objective = build_objective(
        dict(
            image_size=(224, 224),
            modalities=dict(rgb=RGB, depth=DEPTH, semseg=SEMSEG),
            objective=dict(
                name="multimae",
                inputs=names,
                outputs=(*names, "norm_rgb"),
                encoder="B",
                scores=dict(name="attention_high"),
                guidance=dict(name="self_attention", query="mean"),
                compute_dtype="bfloat16",
                remat=True,
            ),
        )
    )
    params, _ = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = adamw(params, frozen_mask(params), Cosine(peak=8e-4, total=1_000_000, warmup=25_000, start=937_500))
    state = jax.eval_shape(lambda: init_state(objective, optimizer, 0))
    size = per_chip * len(devices)
    batch = {
        "rgb": jax.ShapeDtypeStruct((size, 224, 224, 3), jnp.uint8),
        "depth": jax.ShapeDtypeStruct((size, 224, 224, 1), jnp.float32),
        "semseg": jax.ShapeDtypeStruct((size, 56, 56), jnp.int32),
    }
    mesh = make_mesh(devices)
    step = jax.jit(
        lambda state, batch: train_step(state, batch, objective=objective, optimizer=optimizer, seed=0),
        in_shardings=(parameter_shardings(state, mesh), batch_sharding(mesh)),
        out_shardings=(parameter_shardings(state, mesh), replicated(mesh)),
        donate_argnums=0,
    )
    began = time.time()
    lowered = step.lower(state, batch)
    text = lowered.as_text()
    lowered_after = time.time() - began
    compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return dict(
        chip=devices[0].device_kind,
        chips=len(devices),
        custom_calls=sorted(set(re.findall(r"custom_call @([\w.$-]+)", text))),
        callbacks=sorted(set(re.findall(r"\w*callback\w*", text))),
        host_transfers=sorted(set(re.findall(r"stablehlo\.(?:send|recv|infeed|outfeed)\b", text))),
        float64="f64" in re.sub(r'"[^"]*"', "", text),
        collectives=sorted(
            set(re.findall(r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\b", compiled.as_text()))
        ),
        gib_arguments=round(memory.argument_size_in_bytes / 2**30, 3),
        gib_temporary=round(memory.temp_size_in_bytes / 2**30, 3),
        gflops=round(cost["flops"] / 1e9, 1),
        seconds_lower=round(lowered_after, 1),
        seconds_compile=round(time.time() - began - lowered_after, 1),
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)  # XLA takes about four minutes of one core, the whole machine's load on top
def test_guided_multimae_b_compiles_for_a_tpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: nothing here can compile for a TPU (pip install 'maskvit[tpu]')")
    # A child process: libtpu takes hold of the process it is loaded into.
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        XLA_FLAGS="",
    )
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(found)
    assert set(found["custom_calls"]) <= HARMLESS_CALLS
    assert not found["callbacks"] and not found["host_transfers"]
    assert not found["float64"]
    # Data parallelism: gradients are summed over the chips, and nothing else crosses them but scalars.
    assert "all-reduce" in found["collectives"] and "all-to-all" not in found["collectives"]
    assert found["gib_arguments"] + found["gib_temporary"] < 16, "does not fit into a v5e chip"


if __name__ == "__main__":
    print(json.dumps(compile_step(TOPOLOGY, SAMPLES_PER_CHIP)))
