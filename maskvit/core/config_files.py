"""Config files and what is changed in them on the command line: `--config=FILE.py[:ARGUMENT] --config.key=value ...`

A config file is Python with a function `get_config()` that returns an ml_collections `ConfigDict`. An override sets one dotted key
and may name any block, also one that the file leaves empty or out: which keys there are is checked where the blocks are used
(`maskvit.core.configuration.check_arguments`), for files and overrides alike.
"""

from __future__ import annotations

import ast
import importlib.machinery
import os
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from maskvit.core.errors import all_mistakes
from maskvit.core.shipped import bring_configs, find, shipped

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
# Blocks whose entries are named by the config alone: in them a name nobody declared is a slip, not a key left out.
DECLARING = ("modalities",)


# Files


def run_file(path: str | os.PathLike) -> ModuleType:
    """Run a config file, one below configs/ that is not there as it came with the package (`maskvit.core.shipped`).

    Raises FileNotFoundError, or ValueError naming file, line and error where it does not run to its end.
    """
    bring_configs()
    path = find(path)
    if not path.is_file():
        what = "is a folder; give a config file" if path.is_dir() else "does not exist"
        came = shipped("configs") if path.parts[:1] == ("configs",) else None
        raise FileNotFoundError(f"the config file {path} {what}" + (f"; those that come with maskvit lie in {came}" if came else ""))
    module = ModuleType("experiment")
    module.__file__ = str(path)
    loader = importlib.machinery.SourceFileLoader("experiment", str(path))
    run_part(path, lambda: exec(compile(loader.get_data(str(path)), str(path), "exec"), module.__dict__))
    return module


def load_config(text: str) -> ConfigDict:
    """The config of "FILE.py" or "FILE.py:ARGUMENT" (`get_config(ARGUMENT)`).

    Raises FileNotFoundError or ValueError, in one line, for a file that is not there, cannot be run, or gives no ConfigDict.
    """
    given, colon, argument = text.partition(":")
    path = find(given)  # where lines of it are told
    return config_of(run_file(path), path, *([argument] if colon else []))


def config_of(module: ModuleType, path: str | os.PathLike, *argument: str) -> ConfigDict:
    """What `get_config` of a config file that was run returns. Raises ValueError as `load_config` does."""
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"{path} defines no function get_config()")
    config = run_part(path, lambda: module.get_config(*argument))
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() of {path} returns {type(config).__name__}, not an ml_collections.ConfigDict")
    return config


def run_part(path: str | os.PathLike, function: Callable[[], Any]) -> Any:
    """Call code of a config file; what it raises becomes a ValueError that says where."""
    try:
        return function()
    except SyntaxError as error:
        raise ValueError(f"{error.filename or path}:{error.lineno}: {error.msg}" + _quoted(error.text)) from error
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{own[-1].lineno}" if own else str(path)
        # Of a KeyError (ml_collections has one for unknown keys) `str` gives the repr of what it says.
        told = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
        told = " ".join(told.split())
        raise ValueError(f"{where}: {type(error).__name__}: {told}" + (_quoted(own[-1].line) if own else "")) from error


def _quoted(line: str | None) -> str:
    return f" (in: {line.strip()})" if line and line.strip() else ""


# Overrides


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Command-line words to (the others, [(dotted key, value as text)]).

    `--config.key=value`, `--config.key value`, and for switches `--config.key` and `--noconfig.key`. Raises ValueError for an
    override without a key.
    """
    others: list[str] = []
    found: list[tuple[str, str]] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        match = _OVERRIDE.fullmatch(word)
        if word == "--":
            others += [word, *words]
            break
        if match is None:
            others.append(word)
            continue
        negated, key, value = match.groups()
        if not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", key):
            form = f"set the whole tuple, --config.{key.partition('[')[0]}='(a, b)'" if "[" in key else "write --config.block.key=value"
            raise ValueError(f"{word!r} names no key of the config: {form}")
        if negated and value is not None:
            raise ValueError(f"{word!r} sets a value and denies it: write --config.{key}=false")
        if value is None:
            value = "false" if negated else words.pop(0) if words and not words[0].startswith("--") else "true"
        found.append((key, value))
    return others, found


def parse_value(text: str, current: Any = None) -> Any:
    """What `text` means in the place of `current`: a Python literal where it is one, else text.

    true and false are literals too. Where the config has text, digits remain text ("20" as a duration: 20 steps); where it has a
    block, () and {} are the empty block.
    """
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    if isinstance(current, str) and isinstance(value, (bool, int, float, complex)):
        return text
    return {} if value == () and isinstance(current, (Mapping, ConfigDict)) else value


def set_value(config: Any, key: str, value: Any, where: str) -> None:
    """Set a dotted key of a config (a ConfigDict, or plain dicts) in place; blocks on the way that are empty or missing are made.

    A value that is a dict replaces the whole block. Raises ValueError, naming `where`, for a key below a value that is no block,
    and for a name that a declaring block (`DECLARING`) does not have.
    """
    *blocks, last = key.split(".")
    node = config
    for depth, name in enumerate(blocks):
        inside = ".".join(["config", *blocks[:depth]])
        known = name in node and node[name] is not None
        if not known and depth and blocks[depth - 1] in DECLARING:
            raise ValueError(
                f"{where} sets {key!r}, but {inside} has no {name!r}; it has: {', '.join(node) or 'nothing'}. "
                f"A new one is given as a whole block: {inside}.{name}={{...}}"
            )
        if not known:
            node[name] = {}
        if not isinstance(node[name], (dict, ConfigDict)):
            raise ValueError(f"{where} sets {key!r}, but {inside}.{name} is {node[name]!r}, not a block: set {inside}.{name} itself")
        node = node[name]
    node[last] = value


def get_value(config: Any, key: str) -> Any:
    """The value of a dotted key, None where the config lacks it."""
    for name in key.split("."):
        if not isinstance(config, (dict, ConfigDict)) or name not in config:
            return None
        config = config[name]
    return config


def apply_overrides(config: ConfigDict, overrides: Sequence[tuple[str, str]]) -> None:
    """Set `split_overrides`'s pairs in a ConfigDict, in their order. Raises ValueError with all that cannot be set."""
    with all_mistakes() as checks, config.unlocked(), config.ignore_type():
        for key, text in overrides:
            with checks.check():
                set_value(config, key, parse_value(text, get_value(config, key)), f"--config.{key}={text}")


# absl's flags


def define_config(help_text: str) -> flags.FlagHolder:
    """The flag --config of a command that parses its line with `parse_flags`."""
    # The library would find overrides in sys.argv by itself, and allow the keys alone that the file has, with values of their types.
    return config_flags.DEFINE_config_file("config", None, help_text, lock_config=False, sys_argv=[""])


def parse_flags(argv: Sequence[str], required: Sequence[str] = ("config",)) -> ConfigDict:
    """Parse a command line with absl's flags, and apply the overrides to the config of --config, which is returned.

    Raises ValueError or FileNotFoundError for unknown flags, wrong values, leftover words, and a config that cannot be had.
    """
    app.define_help_flags()
    bring_configs()
    others, overrides = split_overrides(argv)
    try:
        rest = flags.FLAGS(others)
        config = flags.FLAGS.config
    except Exception as error:
        given = _config_text(others)
        if given is not None:
            load_config(given)  # says what is wrong with the file where it is the file
        raise ValueError(str(error)) from error
    if len(rest) > 1:
        raise ValueError(f"unknown argument {rest[1]!r}: write --config.key=value, with the equals sign and no spaces")
    with all_mistakes() as checks:
        for name in required:
            with checks.check():
                if (_config_text(others) if name == "config" else flags.FLAGS[name].value) in (None, ""):
                    raise ValueError(f"the flag --{name} is missing")
    if not isinstance(config, ConfigDict):  # the library's stand-in for a file it could not read, or what get_config returned
        config = load_config(_config_text(others) or "")
    apply_overrides(config, overrides)
    return config


def _config_text(arguments: Sequence[str]) -> str | None:
    """What --config is given on a command line; the last one counts."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word in ("--config", "-config"):
            found = following
        elif word.startswith(("--config=", "-config=")):
            found = word.partition("=")[2]
    return found
