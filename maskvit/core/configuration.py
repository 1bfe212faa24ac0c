"""From names and plain data to functions: tables are looked up and arguments checked before anything runs."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from maskvit.core.errors import Mistakes


def check_arguments(where: str, function: Callable[..., Any], arguments: Any, given: tuple[str, ...] = ()) -> None:
    """Raise unless `arguments` are keyword arguments of `function`, of the types it declares; `given` are those the caller supplies.

    The error is a ValueError that names keys as `where`.key, and holds all that is wrong where that is more than one thing.
    """
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where} is {shown(arguments)}; it must be a block of keys and values")
    parameters = _signature(function).parameters
    known = [name for name in parameters if name not in given]
    mistakes = [f"{where} has unknown key {key!r}; known: {', '.join(known) or 'none'}" for key in arguments if key not in known]
    for name in known:
        if name in arguments:
            hint = parameters[name].annotation
            if not fits(arguments[name], hint):
                mistakes.append(f"{where}.{name} is {shown(arguments[name])}; it must be {wanted(hint)}")
        elif parameters[name].default is inspect.Parameter.empty and parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
            mistakes.append(f"{where} lacks the key {name!r}")
    if mistakes:
        raise Mistakes(mistakes)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature with types instead of their names; names that are imported for type checkers alone remain."""
    signature = inspect.signature(function)
    try:
        # Of a dataclass, so that each field is looked up where its own class is.
        initializer = inspect.isclass(function) and not dataclasses.is_dataclass(function)
        hints = get_type_hints(function.__init__ if initializer else function)
    except NameError:
        return signature
    return signature.replace(parameters=[p.replace(annotation=hints.get(p.name, p.annotation)) for p in signature.parameters.values()])


def fits(value: Any, hint: Any) -> bool:
    """Whether a config's value is of an annotated type; types that are no plain data fit everything.

    A whole number is a number, True is none, a list passes for a tuple, and text is no sequence of letters.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint in (None, type(None), str, bool):
        return value is None if hint in (None, type(None)) else isinstance(value, hint)
    if _is(origin or hint, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if _is(origin or hint, Sequence):
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(item, inner[0]) for item in value) if inner else True
    return True


def _is(hint: Any, kind: Any) -> bool:
    """Whether an annotation is a kind of collection; text is one for Python, but not here."""
    return isinstance(hint, type) and issubclass(hint, kind) and not issubclass(hint, (str, bytes))


def wanted(hint: Any) -> str:
    """An annotated type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(wanted(one) for one in inner if not (one is int and float in inner)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    plain = {int: "a whole number", float: "a number", str: "text", bool: "True or False", None: "None", type(None): "None"}
    if hint in plain:
        return plain[hint]
    if _is(origin or hint, Mapping):
        return "a block {...}"
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return "(" + ", ".join(map(wanted, inner)) + ")"
    if not inner or inner[0] is Any:
        return "several values (a, b)"
    return f"several values (a, b), each {wanted(inner[0])}"


def shown(value: Any) -> str:
    """A value as a config writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def look_up(where: str, table: Mapping[str, Any], name: Any) -> Any:
    """`table[name]`, or an error that lists the known names."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{where} is {name!r}; known: {', '.join(table)}")
    return table[name]


def hashable(value: Any) -> Any:
    """Lists to tuples, so that what holds config values can be a static argument of `jit`."""
    return tuple(hashable(item) for item in value) if isinstance(value, (list, tuple)) else value


def named_function(where: str, table: Mapping[str, Any], block: Any, given: tuple[str, ...]) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """`{"name": ..., **arguments}` to (function, its arguments as sorted pairs), checked; `given` as in `check_arguments`."""
    if not isinstance(block, Mapping):
        raise ValueError(f"{where} is {shown(block)}; it must be a block such as {{'name': {next(iter(table))!r}}}")
    if "name" not in block:
        raise ValueError(f"{where} lacks the key 'name'; known names: {', '.join(table)}")
    function = look_up(f"{where}.name", table, block["name"])
    arguments = {key: hashable(value) for key, value in block.items() if key != "name"}
    check_arguments(where, function, arguments, given)
    return function, tuple(sorted(arguments.items()))
