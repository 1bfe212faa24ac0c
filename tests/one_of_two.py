"""main.py as one of two processes of a test: process 1 takes over the programs that process 0 compiles, as they are the same.

JAX lets process 0 alone write to the compilation cache, and on the CPU a program's key there holds the device of the process, so that
process 1 finds nothing and compiles all of it itself, at every start. Here the key is the program and the number of its devices, and
process 1 waits for what takes long to compile.
"""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import runpy
import sys
import time
from typing import Any

import jaxlib
from jax._src import compilation_cache, distributed

MAIN = pathlib.Path(__file__).resolve().parent.parent / "main.py"
LARGE = 30_000  # bytes of a program that is worth waiting for: its compilation takes seconds
PATIENCE = 60.0  # seconds; then process 1 compiles it itself
waited: set[str] = set()


def key_of(module: Any, devices: Any, *_: Any) -> str:
    """The program's name and digest; large ones are noted."""
    text = io.BytesIO()
    module.operation.write_bytecode(file=text)
    said = f"{devices.size} {jaxlib.__version__} {os.environ['XLA_FLAGS']}".encode()
    key = f"two_processes-{hashlib.sha256(said + text.getvalue()).hexdigest()}"
    if distributed.global_state.process_id and len(text.getvalue()) > LARGE:
        waited.add(key)
    return key


def read(key: str, *arguments: Any) -> Any:
    """The compiled program, or (None, None); of a large one process 1 waits for process 0's."""
    end = time.monotonic() + PATIENCE * (key in waited)
    while True:
        try:
            found = from_cache(key, *arguments)
        except Exception:  # process 0 is writing it at this moment
            found = None, None
        if found[0] is not None or time.monotonic() >= end:
            return found
        time.sleep(0.1)


if __name__ == "__main__":
    if all(hasattr(compilation_cache, name) for name in ("get_executable_and_time", "get_cache_key")):  # else each compiles its own
        from_cache = compilation_cache.get_executable_and_time
        compilation_cache.get_cache_key = key_of
        compilation_cache.get_executable_and_time = read
    sys.argv[0] = str(MAIN)
    runpy.run_path(str(MAIN), run_name="__main__")
