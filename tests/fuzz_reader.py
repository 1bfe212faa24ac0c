"""Give the converter broken and hostile files, many: each ends with a result or a ConversionError, in little time and memory.

    python -m tests.fuzz_reader --count 100000 --seed 0

Batches run in child processes with a limit on their memory and an alarm for every file. A failure is any other exception, a death
or a hang, or a batch after which an object of a library, of the interpreter or of the reader is another than before. Of the number
that is printed with a failure `--first NUMBER --count 1` makes the same file again.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import copyreg
import mmap
import multiprocessing
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.fuzz_files import Right, make, right_files

BATCH, WARM_UP = 1000, 40
SECONDS_PER_FILE = 20
MEMORY = 2**30  # beyond what the libraries take
NUMBER_TYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")


# ------------------------------------------------------------------------------------------ one batch


def state_of_the_world() -> dict[str, Any]:
    """What no file may change."""
    from maskvit.convert import pickles, reader, stand_ins

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    kinds = {name: np.dtype(name) for name in NUMBER_TYPES} | {"bfloat16": bfloat16}
    classes = (dict, list, tuple, collections.OrderedDict, argparse.Namespace, stand_ins.Inert, pickles.Machine, reader._Archive)
    owned = {f"{cls.__module__}.{cls.__name__}": {k: id(v) for k, v in vars(cls).items()} for cls in classes[3:]}
    return dict(
        kinds={name: (kind.str, kind.itemsize, kind.alignment, kind.byteorder, id(kind), str(kind.fields)) for name, kind in kinds.items()},
        values=np.array([1.5, -2.0], np.float32).astype(ml_dtypes.bfloat16).tobytes(),
        read=np.frombuffer(b"\xc0\x3f\x00\xc0", bfloat16).astype(np.float32).tolist(),
        builtins={name: id(value) for name, value in vars(builtins).items() if name != "_"},
        modules=set(sys.modules),
        classes=owned,
        tables={name: {k: id(v) for k, v in getattr(pickles, name).items()} for name in ("_HANDLERS", "_MAKERS", "_CONSTANTS")},
        known=(stand_ins.INERT, stand_ins.INERT_PACKAGES, dict(stand_ins.STORAGE_TYPES)),
        copyreg=(dict(copyreg.dispatch_table), dict(copyreg._extension_registry)),  # type: ignore[attr-defined]
        environment=dict(os.environ),
        settings=(sys.getrecursionlimit(), sys.get_int_max_str_digits(), os.getcwd(), np.geterr(), sys.path.copy()),
    )


def examine(path: Path) -> None:
    """All that a conversion does before it writes."""
    from maskvit import convert

    convert.understand(convert.open_checkpoint(path), 2, 2)


def _resize() -> None:
    """What a graph's position table goes through."""
    from maskvit.core.patches import resample_pos_embed

    resample_pos_embed(np.ones((2, 2, 4), np.float32), (3, 3))


def kind_of(error: str, path: Path) -> str:
    """A refusal without what differs between two of its kind."""
    line = error.replace(str(path), "").replace(str(path.parent), "").splitlines()[0].lstrip(": ")
    line = re.sub(r"'[^']*'|\"[^\"]*\"|\([^)]*\)?|\S*[\d._\\<]\S+", "#", line)
    return re.sub(r"(asks for|are missing:|not part of this model:|its keys are|bookkeeping:) .*", r"\1 #", line)[:70].strip()


def batch(first: int, count: int, seed: int, results: Any, progress: mmap.mmap) -> None:
    """Examine the files of these numbers; put (refusals by kind, failures, seconds of the slowest, peak memory) into `results`."""
    from maskvit.convert import ConversionError

    right = right_files()
    refusals: collections.Counter = collections.Counter()
    failures, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for warm_up in range(WARM_UP):  # what libraries import at their first use is no change
            _one(-1 - warm_up, seed, folder, right, ConversionError)
        _resize()
        before = state_of_the_world()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for number in range(first, first + count):
            progress[:8] = struct.pack("<Q", number)
            signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_FILE)
            started = time.monotonic()
            kind, failure = _one(number, seed, folder, right, ConversionError)
            slowest = max(slowest, time.monotonic() - started)
            refusals[kind] += 1
            if failure:
                failures.append((number, failure))
        signal.setitimer(signal.ITIMER_REAL, 0)
        after = state_of_the_world()
        changed = [part for part in before if before[part] != after[part]]
        if changed:
            failures.append(
                (first, f"after this batch other than before: {', '.join(changed)}; {sorted(after['modules'] - before['modules'])[:5]}")
            )
    results.put((refusals, failures, slowest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def _one(number: int, seed: int, folder: Path, right: Right, refusal: type[Exception]) -> tuple[str, str]:
    """(kind of result, failure or nothing) of one file."""
    path = make(number, seed, folder, right)
    try:
        examine(path)
        return "understood", ""
    except refusal as error:
        try:
            str(error).encode()
        except UnicodeError:
            return "failure", f"its message cannot be printed: {str(error)[:200]!r}"
        return kind_of(str(error), path), ""
    except BaseException:
        return "failure", traceback.format_exc()
    finally:
        for file in folder.iterdir():
            file.unlink()


# ------------------------------------------------------------------------------------------ the whole


def fuzz(count: int, seed: int, first: int = 0, size: int = BATCH) -> dict[str, Any]:
    """Run all batches, each in a process of its own; the figures and the failures."""
    import maskvit.convert  # noqa: F401  # once, before the processes are forked

    context = multiprocessing.get_context("fork")
    refusals: collections.Counter = collections.Counter()
    failures: list[tuple[int, str]] = []
    slowest, peak, started = 0.0, 0, time.monotonic()
    for start in range(first, first + count, size):
        results, progress = context.SimpleQueue(), mmap.mmap(-1, 8)
        process = context.Process(target=batch, args=(start, min(size, first + count - start), seed, results, progress))
        process.start()
        process.join(60 + SECONDS_PER_FILE * size)
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == 0 and not results.empty():
            part, more, seconds, memory = results.get()
            refusals += part
            failures += more
            slowest, peak = max(slowest, seconds), max(peak, memory)
        else:
            number = struct.unpack("<Q", progress[:8])[0]
            reason = signal.Signals(-process.exitcode).name if process.exitcode and process.exitcode < 0 else f"status {process.exitcode}"
            failures.append((number, f"the process ended with {reason}{' (a hang)' if 'ALRM' in reason else ''}"))
    seconds = time.monotonic() - started
    return dict(count=count, seconds=seconds, slowest=slowest, peak=peak, refusals=refusals, failures=failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    flags = parser.parse_args()
    found = fuzz(flags.count, flags.seed, flags.first)
    refusals = found["refusals"]
    for kind, number in refusals.most_common(40):
        print(f"{number:>8} {kind}")
    print(f"{len(refusals)} kinds of results; {refusals['understood']} files were understood")
    for number, failure in found["failures"][:20]:
        print(f"FAILURE at {number}: {failure}")
    print(f"{found['count']} files in {found['seconds']:.0f} s, the slowest {found['slowest']:.2f} s")
    print(f"peak memory {found['peak'] / 2**20:.0f} MiB; {len(found['failures'])} failures")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
