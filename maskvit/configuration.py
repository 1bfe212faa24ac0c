"""From names and plain data to functions: tables are looked up and arguments checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def check_arguments(where: str, function: Callable[..., Any], arguments: Mapping[str, Any], given: tuple[str, ...] = ()) -> None:
    """Raise unless `arguments` are keyword arguments of `function`; `given` are those the caller supplies itself."""
    parameters = inspect.signature(function).parameters
    known = [name for name in parameters if name not in given]
    for key in arguments:
        if key not in known:
            raise ValueError(f"{where} has unknown key {key!r}; known: {', '.join(known) or 'none'}")
    needed = [
        n for n in known if parameters[n].default is inspect.Parameter.empty and parameters[n].kind is not inspect.Parameter.VAR_KEYWORD
    ]
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise ValueError(f"{where} lacks the key {missing[0]!r}")


def look_up(where: str, table: Mapping[str, Any], name: str) -> Any:
    """`table[name]`, or an error that lists the known names."""
    if name not in table:
        raise ValueError(f"{where} is {name!r}; known: {', '.join(table)}")
    return table[name]


def hashable(value: Any) -> Any:
    """Lists to tuples, so that what holds config values can be a static argument of `jit`."""
    return tuple(hashable(item) for item in value) if isinstance(value, (list, tuple)) else value


def named_function(
    where: str, table: Mapping[str, Any], block: Mapping[str, Any], given: tuple[str, ...]
) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """`{"name": ..., **arguments}` to (function, its arguments as sorted pairs), checked; `given` as in `check_arguments`."""
    if "name" not in block:
        raise ValueError(f"{where} lacks the key 'name'; known names: {', '.join(table)}")
    function = look_up(f"{where}.name", table, block["name"])
    arguments = {key: hashable(value) for key, value in block.items() if key != "name"}
    check_arguments(where, function, arguments, given)
    return function, tuple(sorted(arguments.items()))
