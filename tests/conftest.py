"""Strict settings for every test: four host devices, full float32 products, a compilation cache, no TensorFlow."""

from __future__ import annotations

import gc
import importlib.machinery
import logging
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Before JAX starts: how many devices the CPU plays is read once. A test that wants another number starts a child process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny models spend their time in the compiler: it need not optimize what runs for milliseconds. Without the fusion emitters, and with
# one LLVM module instead of 32, a step of the smoke forms compiles in less than two thirds of the time. (XLA's own preset for fast
# compilation saves a tenth more, but rounds otherwise: the first version's run and ties in TokenCut's cut come out differently.)
QUICK_COMPILATION = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), QUICK_COMPILATION, "--xla_force_host_platform_device_count=4"]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # programs need not know the line of ours that each operation is from
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # with libtpu installed JAX would ask the network for a TPU first
os.environ.setdefault("MPLBACKEND", "agg")
# Child processes (worker processes, two-process training, commands) find the package from any directory.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
# Tracing makes many small objects, and a long test process holds millions: by default the collector would look at them all the time.
gc.freeze()
gc.set_threshold(100_000, 20, 50)


class _WithoutTensorFlow(importlib.machinery.PathFinder):
    """Hides an installed TensorFlow (some of our dependencies import it wherever they see it): nothing here may need it."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname == "tensorflow" else super().find_spec(fullname, path, target)


sys.meta_path[:] = [_WithoutTensorFlow if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]


# The files that take longest, longest first: begun last, one of them would end the run alone.
LONG_FILES = (
    "test_train.py",
    "test_topologies.py",
    "test_tutorials.py",
    "test_grid.py",
    "test_scenes_learnable.py",
    "test_bench.py",
    "test_masking.py",
    "test_real_frame.py",
)


def pytest_collection_modifyitems(items):
    """Long files first; xdist would begin with the files of most tests (`--no-loadscope-reorder` in the Makefile leaves the order)."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


@pytest.fixture(scope="session")
def fixtures() -> pathlib.Path:
    """The directory of small recorded files that tests compare with."""
    return ROOT / "tests" / "fixtures"


# Linux allows a process 65,530 memory maps, and each compiled program holds several: past that XLA dies of a segmentation fault.
MAPS_BETWEEN_FILES = 20_000


def memory_maps() -> int:
    """How many memory maps this process holds; 0 where the system does not tell."""
    listed = pathlib.Path("/proc/self/maps")
    return listed.read_bytes().count(b"\n") if listed.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """After a file of tests, drops the compiled programs where there are many of them."""
    yield
    if memory_maps() > MAPS_BETWEEN_FILES:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def shared_steps():
    """Starts of this file take over the step that an earlier one compiled, where it is the same program."""
    from tests.runs import share_steps

    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        yield


@pytest.fixture
def one_device(monkeypatch):
    """Starts of this test use one of the four devices: for what is not about several."""
    from tests.runs import on_one_device

    on_one_device(monkeypatch)


@pytest.fixture(autouse=True)
def no_tensorflow():
    """Fails the test that brought TensorFlow in, by whatever way."""
    yield
    assert "tensorflow" not in sys.modules, "TensorFlow was imported: maskvit and its tests run without it"


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """Commands that are called in a test's process set up logging for good: undo it, or the next test's records are lost."""
    loggers = [logging.getLogger(name) for name in (None, "absl", "orbax", "jax", "grain", "asyncio")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
