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

# A part is a file or a folder of maskvit/, and imports parts of lower levels alone.
LEVELS = {
    "core": 0,
    **dict.fromkeys(("masking", "losses", "optim", "sharding", "data", "checkpoints", "metrics", "plots"), 1),
    "nn": 2,
    "heads": 3,
    "guidance": 4,
    **dict.fromkeys(("objectives", "evaluators"), 5),
    "convert": 6,
    "training": 7,
    "features": 8,
    "commands": 9,
    "__main__": 10,
}
# Narrower than their level: what of lower levels a part, or one file of it, must not import.
NARROWER = {
    "nn": {"data", "checkpoints", "optim", "losses", "plots"},
    "heads": {"data", "checkpoints", "optim", "plots"},
    "guidance": {"data", "checkpoints", "plots"},
    "objectives": {"data", "checkpoints", "plots"},
    "evaluators": {"checkpoints", "masking"},
    "convert": {"plots"},
    "training/step.py": {"data", "checkpoints", "plots", "evaluators", "convert"},
}


def alias_of(path: pathlib.Path) -> str | None:
    """The module whose earlier name this file of maskvit/ is: one import of all its names, and nothing else. None for other files."""
    text, *rest = ast.parse(path.read_text()).body or [None]
    alone = path.parent == PACKAGE and isinstance(text, ast.Expr) and len(rest) == 1 and isinstance(rest[0], ast.ImportFrom)
    return rest[0].module if alone and [name.name for name in rest[0].names] == ["*"] else None


def part_of(path: pathlib.Path) -> str:
    """The part a source file belongs to ("nn" for maskvit/nn/attention.py)."""
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
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py" and not alias_of(p))


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
    assert {part_of(path) for path in sources()} == set(LEVELS), "give each part a level in tests/test_imports.py"


def test_direction():
    wrong = []
    for path in sources():
        mine = part_of(path)
        narrower = NARROWER.get(mine, set()) | NARROWER.get(path.relative_to(PACKAGE).as_posix(), set())
        for dotted, line in imports(path):
            if not dotted.startswith("maskvit."):
                continue
            other = dotted.split(".")[1]
            if other == mine or not module_of(dotted):  # within a part; or a name of maskvit/__init__.py such as `load`
                continue
            if other not in LEVELS or LEVELS[other] >= LEVELS[mine] or other in narrower:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {mine} imports {dotted}")
    assert not wrong, "\n".join(sorted(wrong))


def test_earlier_names_are_aliases():
    """Scripts import these; the package itself does not (their parts have no level)."""
    found = {path.stem: module for path in PACKAGE.glob("*.py") if (module := alias_of(path))}
    assert found == {
        "checkpoint": "maskvit.checkpoints",
        "modalities": "maskvit.core.modalities",
        "types": "maskvit.core.types",
    }


def test_files_and_functions_fit_on_a_few_screens():
    long = {}
    for path in sources():
        text = path.read_text()
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        found = [f"{n.name}: {size} lines" for n in functions if (size := (n.end_lineno or 0) - n.lineno + 1) > 80]
        if (size := text.count("\n")) > 450 or found:
            long[path.relative_to(PACKAGE).as_posix()] = [f"{size} lines", *found]
    assert not long, f"over 450 lines, or with functions over 80: {long}"


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


def test_only_networks_know_flax():
    others = [p for p in sources() if part_of(p) not in ("nn", "heads")]
    wrong = [f"{p.relative_to(ROOT)}:{line}" for p in others for name, line in imports(p) if name.split(".")[0] == "flax"]
    assert not wrong, f"only maskvit/nn and maskvit/heads import flax: {wrong}"


def test_only_sharding_names_axes():
    others = [p for p in sources() if part_of(p) != "sharding"]
    wrong = [f"{p.relative_to(ROOT)}:{line}" for p in others for name, line in imports(p) if name.endswith(".PartitionSpec")]
    assert not wrong, f"only maskvit/sharding.py names mesh axes: {wrong}"


def test_no_tensorflow_and_no_utils():
    for path in sources():
        assert path.name not in ("utils.py", "helpers.py", "misc.py"), f"{path.relative_to(ROOT)}: a name that says nothing"
        for name, line in imports(path):
            assert name.split(".")[0] != "tensorflow", f"{path.relative_to(ROOT)}:{line} imports TensorFlow"


LIGHT = ("core", "masking", "losses", "optim", "sharding", "nn", "heads", "guidance", "objectives", "plots", "metrics", "training/step.py")
HEAVY = {"grain", "tensorflow_datasets", "tensorflow", "matplotlib", "torch", "cv2", "PIL", "array_record"}


def light(part: str) -> list[pathlib.Path]:
    return [p for p in sources() if part in (part_of(p), p.relative_to(PACKAGE).as_posix())]


@pytest.mark.parametrize("part", LIGHT)
def test_light_parts_load_no_data_library(part):
    """The step, the networks and all below them run on a machine with jax, flax, optax and little more."""
    assert light(part)
    heavy = [
        f"{p.relative_to(ROOT)}:{line} imports {name}"
        for p in light(part)
        for name, line in imports(p, everywhere=False)
        if name.split(".")[0] in HEAVY
    ]
    assert not heavy, "import inside the function that needs it: " + "; ".join(heavy)


def test_the_step_loads_no_data_library():
    """The same in a real interpreter, whatever our dependencies drag in."""
    files = [p.relative_to(ROOT).with_suffix("") for part in LIGHT for p in light(part)]
    modules = [".".join(file.parts).removesuffix(".__init__") for file in files]
    load = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
    code = load + f"print(sorted({HEAVY!r} & set(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.strip() == "[]", f"importing {modules} loaded {child.stdout.strip()}"
