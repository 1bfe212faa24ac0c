"""The accelerators that a step can be compiled for on any machine, and what their makers say of them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from maskvit.core.configuration import look_up


class Device(NamedTuple):
    """`memory` in bytes, `rate` of that memory in bytes/s, `peak` in dense bfloat16 FLOP/s, `link` to the others in bytes/s (one way).

    `launch`: the least time between two kernels; a TPU is given a whole program at once. `smallest`: the topology of a TPU when no other
    is asked for. `gpu`: what the compiler wants to know of a GPU. `kinds`: how JAX's names of such a device begin.
    """

    platform: str
    memory: float
    rate: float
    peak: float
    link: float
    launch: float = 2e-6
    smallest: str = ""
    gpu: dict[str, Any] | None = None
    kinds: tuple[str, ...] = ()


def _gpu(cores: int, capability: tuple[int, int], l2: int, shared: int, per_block: int) -> dict[str, Any]:
    return dict(cores=cores, capability=capability, l2=l2, shared=shared, per_block=per_block)


# NVIDIA's data sheets (SXM); Google Cloud's TPU pages. A link is NVLink's, or all ICI links of a chip.
DEVICES = {
    "a100": Device("cuda", 85094105088, 2.039e12, 312e12, 300e9, gpu=_gpu(108, (8, 0), 41943040, 167936, 166912), kinds=("NVIDIA A100",)),
    "h100": Device("cuda", 84929347584, 3.35232e12, 989e12, 450e9, gpu=_gpu(132, (9, 0), 52428800, 233472, 232448), kinds=("NVIDIA H100",)),
    "h200": Device("cuda", 150754820096, 4.8e12, 989e12, 450e9, gpu=_gpu(132, (9, 0), 62914560, 233472, 232448), kinds=("NVIDIA H200",)),
    "v5e": Device("tpu", 16e9, 0.819e12, 197e12, 100e9, launch=0.0, smallest="2x2", kinds=("TPU v5 lite", "TPU v5e")),
    "v5p": Device("tpu", 95e9, 2.765e12, 459e12, 300e9, launch=0.0, smallest="2x2x1", kinds=("TPU v5", "TPU v5p")),
    "v6e": Device("tpu", 32e9, 1.64e12, 918e12, 224e9, launch=0.0, smallest="2x2", kinds=("TPU v6 lite", "TPU v6e")),
    # A core with AVX-512 and a share of the memory of a server; a name for "this program on CPUs", not for one model.
    "cpu": Device("cpu", 16e9, 20e9, 160e9, 10e9, launch=0.0),
}

_GPU_TEXT = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {rate} l2_cache_size: {l2} clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: {per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}" """

# Choices that need the device itself: which of several kernels is the fastest. Left at the compiler's defaults.
COMPILER_OPTIONS: dict[str, dict[str, str | bool | int]] = {
    "cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
    "tpu": {},
    "cpu": {},
}
EXTRAS = {"cuda": "pip install 'maskvit[plan]'", "tpu": "pip install 'maskvit[tpu]'"}


def device_of(kind: str) -> Device | None:
    """The row of a device by JAX's name of it, None where there is none. Of a slower form of it the memory's rate is too high."""
    rows = [(len(start), device) for device in DEVICES.values() for start in device.kinds if kind.startswith(start)]
    return max(rows, key=lambda row: row[0])[1] if rows else None


def parse_devices(text: str) -> tuple[str, str]:
    """ "h100:8" or "v5e:4x4" to (name, how many or the topology). Raises ValueError for what is neither."""
    name, _, count = text.partition(":")
    device = look_up("--devices", DEVICES, name)
    form, example = (r"\d+(x\d+)+", device.smallest) if device.platform == "tpu" else (r"[1-9]\d*", "8")
    count = count or device.smallest or "1"
    if not re.fullmatch(form, count):
        raise ValueError(f"--devices is {text!r}; of {name} write for example {name}:{example}")
    return name, count


def make_devices(name: str, count: str) -> list[Any]:
    """Device descriptions to compile for. Raises ValueError naming what must be installed, or a topology that there is not."""
    import jax
    from jax.experimental import topologies

    device = DEVICES[name]
    if device.platform == "cpu":
        if int(count) > len(jax.devices("cpu")):
            raise ValueError(f"--devices cpu:{count}: set XLA_FLAGS=--xla_force_host_platform_device_count={count}")
        return jax.devices("cpu")[: int(count)]
    try:
        if device.gpu is None:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{count}").devices)
        major, minor = device.gpu["capability"]
        fields = dict(device.gpu, rate=int(device.rate), memory=int(device.memory), name=name.upper(), major=major, minor=minor)
        options = dict(topology=f"1x1x{count}", target_config=_GPU_TEXT.format(**fields))
        return list(topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices)
    except Exception as error:  # of JAX and of the plugins, of many types
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        needs = EXTRAS[device.platform]
        raise ValueError(f"--devices {name}:{count} cannot be compiled for here ({first}). What it takes: {needs}") from error
