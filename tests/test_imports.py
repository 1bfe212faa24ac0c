"""Who may import whom: the layers of the package, read from the source, and what stays out of the training step."""

from __future__ import annotations

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "maskvit"

# A part is a file or a folder of maskvit/; a part may import parts of lower levels, and of its own level what `BESIDE` names.
LEVELS = {
    **dict.fromkeys(("types", "modalities", "patches", "durations", "configuration", "config_files", "arguments", "errors", "keys"), 0),
    "processes": 0,
    **dict.fromkeys(("masking", "scores", "losses", "optim", "sharding", "metrics", "figures", "flops", "pictures"), 1),
    **dict.fromkeys(("disk", "profiling", "signals", "spikes", "watchdog"), 1),
    **dict.fromkeys(("models", "data", "checkpoints"), 2),
    "checkpoint": 3,
    **dict.fromkeys(("guidance", "objectives", "evaluators", "convert"), 3),
    **dict.fromkeys(("step", "flight", "microbatches", "painter", "loop"), 4),
    **dict.fromkeys(("train", "bench", "plan", "report", "features", "sweep", "maps", "demo", "init"), 5),
    "__main__": 6,
}
BESIDE = {
    "configuration": {"errors"},
    "modalities": {"configuration", "errors"},
    "config_files": {"errors"},
    "durations": {"errors"},
    "patches": {"modalities"},
    "objectives": {"guidance"},
    "convert": {"objectives"},
    "bench": {"features"},
    "report": {"features", "sweep", "train"},
    "maps": {"features"},
    "loop": {"flight"},
    "sweep": {"train"},
    "init": {"train"},
    "demo": {"train", "report", "features", "bench"},
}
# Narrower than their level: (part, what of lower levels it must not import).
FORBIDDEN = {
    "models": {"data", "checkpoints"},
    "data": {"models", "checkpoints", "optim", "losses"},
    "checkpoints": {"models", "data"},
    "objectives": {"data", "checkpoints", "figures"},
    "guidance": {"data", "checkpoints", "figures"},
    "evaluators": {"checkpoints", "masking"},
    "convert": {"data", "figures"},
    "step": {"data", "checkpoints", "figures", "evaluators", "convert"},
}


def part_of(path: pathlib.Path) -> str:
    """The part a source file belongs to ("models" for maskvit/models/vit.py). The command that makes maps stands above guidance."""
    if path == PACKAGE / "guidance" / "maps.py":
        return "maps"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def imports(path: pathlib.Path, everywhere: bool = True) -> frozenset[tuple[str, int]]:
    """All modules that a file imports as (dotted name, line); with `everywhere` also those inside functions."""
    tree = ast.parse(path.read_text(), str(path))
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    type_only = {id(n) for guard in guards for statement in guard.body for n in ast.walk(statement)}
    found: set[tuple[str, int]] = set()
    for node in ast.walk(tree):
        if id(node) in type_only or (not everywhere and id(node) in inside):
            continue
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts
            base = ".".join((*package[: len(package) - node.level], node.module or "")).rstrip(".") if node.level else (node.module or "")
            found |= {(f"{base}.{alias.name}", node.lineno) for alias in node.names}
    return frozenset(found)


def sources() -> list[pathlib.Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def module_of(dotted: str) -> pathlib.Path | None:
    """The file of ours that a dotted name lies in, None where it is not ours."""
    parts = dotted.split(".")
    for length in range(len(parts), 1, -1):
        base = ROOT.joinpath(*parts[:length])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file() and PACKAGE in file.parents:
                return file
    return None


def test_every_part_has_a_level():
    unknown = {part_of(path) for path in sources()} - set(LEVELS)
    assert not unknown, f"give {sorted(unknown)} a level in tests/test_imports.py"


def test_direction():
    wrong = []
    for path in sources():
        mine = part_of(path)
        for dotted, line in imports(path):
            if not dotted.startswith("maskvit."):
                continue
            other = dotted.split(".")[1]
            if other == mine or other not in LEVELS:  # within a part; or a name of maskvit/__init__.py such as `load`
                continue
            allowed = LEVELS[other] < LEVELS[mine] or other in BESIDE.get(mine, ())
            if not allowed or other in FORBIDDEN.get(mine, ()):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {mine} (level {LEVELS[mine]}) imports {other} (level {LEVELS[other]})")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_cycles():
    """Between files, imports inside functions not counted (those are how heavy packages stay out)."""
    graph = {p: {m for d, _ in imports(p, everywhere=False) if (m := module_of(d)) and m != p} for p in sources()}
    done: set[pathlib.Path] = set()

    def visit(path: pathlib.Path, trail: tuple[pathlib.Path, ...]) -> None:
        if path in trail:
            cycle = " -> ".join(str(p.relative_to(ROOT)) for p in (*trail[trail.index(path) :], path))
            raise AssertionError(f"import cycle: {cycle}")
        if path not in done:
            for other in sorted(graph.get(path, ())):
                visit(other, (*trail, path))
            done.add(path)

    for path in graph:
        visit(path, ())


def test_nothing_imports_the_commands():
    commands = {"main", "convert_torch_checkpoint"}
    wrong = [f"{p.relative_to(ROOT)}:{line}" for p in sources() for name, line in imports(p) if name.split(".")[0] in commands]
    assert not wrong, f"maskvit/ must not import the commands: {wrong}"


def test_only_models_know_flax():
    others = [p for p in sources() if part_of(p) != "models"]
    wrong = [f"{p.relative_to(ROOT)}:{line}" for p in others for name, line in imports(p) if name.split(".")[0] == "flax"]
    assert not wrong, f"only maskvit/models imports flax: {wrong}"


def test_only_sharding_names_axes():
    others = [p for p in sources() if part_of(p) != "sharding"]
    wrong = [f"{p.relative_to(ROOT)}:{line}" for p in others for name, line in imports(p) if name.endswith(".PartitionSpec")]
    assert not wrong, f"only maskvit/sharding.py names mesh axes: {wrong}"


def test_no_tensorflow_and_no_utils():
    for path in sources():
        assert path.name not in ("utils.py", "helpers.py", "misc.py"), f"{path.relative_to(ROOT)}: a name that says nothing"
        for name, line in imports(path):
            assert name.split(".")[0] != "tensorflow", f"{path.relative_to(ROOT)}:{line} imports TensorFlow"


LIGHT = ("types", "masking", "losses", "optim", "sharding", "models", "guidance", "objectives", "step", "figures", "metrics")
HEAVY = {"grain", "tensorflow_datasets", "tensorflow", "matplotlib", "torch", "cv2", "PIL", "array_record"}


@pytest.mark.parametrize("part", LIGHT)
def test_light_parts_load_no_data_library(part):
    """The step, the models and all below them run on a machine with jax, flax, optax and little more."""
    heavy = [
        f"{p.relative_to(ROOT)}:{line} imports {name}"
        for p in sources()
        if part_of(p) == part
        for name, line in imports(p, everywhere=False)
        if name.split(".")[0] in HEAVY
    ]
    assert not heavy, "import inside the function that needs it: " + "; ".join(heavy)


def test_the_step_loads_no_data_library():
    """The same in a real interpreter, whatever our dependencies drag in."""
    modules = [name for name in LIGHT if (PACKAGE / f"{name}.py").is_file() or (PACKAGE / name).is_dir()]
    load = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module('maskvit.' + m)\n"
    code = load + f"print(sorted({HEAVY!r} & set(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.strip() == "[]", f"importing {modules} loaded {child.stdout.strip()}"
