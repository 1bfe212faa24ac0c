"""PyTorch's pickles as data: a stack machine that knows numbers, strings, containers, tensors and inert stand-ins, and calls nothing.

A pickle is a program for a small machine. Python's own can be led to call methods of what it has made, to hash deep tuples and
to fill dicts with colliding keys; this one cannot, and its work is bounded by the length of the program. torch's own
`_weights_only_unpickler` is of the same kind. Globals are never looked up: those that tensors are made of are known by name,
those that are mere bookkeeping become stand-ins, and any other is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Container
from typing import Any

import numpy as np

from maskvit.convert.formats import ConversionError
from maskvit.convert.stand_ins import RECONSTRUCTORS, STORAGE_TYPES, TORCH_NAMES, Global, Inert, Stored, is_inert

# A state dict of 2,000 tensors with its moments takes 300,000.
MAX_OPCODES = 2**21
MAX_NESTING = 64
MAX_AXES = 64
# Integers may be keys, but not so many of them that a file could choose them to collide.
MAX_INTEGER_KEYS = 2**16
MAX_INTEGER_BITS = 1024


class _Mark:
    """Where a collection on the stack begins."""


_MARK = _Mark()
MakeTensor = Callable[[Stored, Any, tuple[Any, ...], tuple[Any, ...]], np.ndarray]


class Machine:
    """Runs one pickle. `make_tensor`: (storage, offset, size, stride) to an array; `allowed`: further globals that become inert."""

    def __init__(self, program: bytes, where: str, make_tensor: MakeTensor, allowed: Container[str] = ()):
        self.program, self.where, self.make_tensor, self.allowed = program, where, make_tensor, allowed
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.refused: list[str] = []
        self.integer_keys = 0
        self.work = 0

    def run(self) -> Any:
        """What the pickle holds. ConversionError for what it must not ask for, and for what is no pickle."""
        try:
            content = self._run()
        except Exception as error:
            self._raise_refused()
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(f"{self.where}: its pickle cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
        self._raise_refused()
        check_nesting(content, self.where)
        return content

    def _raise_refused(self) -> None:
        names = list(dict.fromkeys(self.refused))
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            flags = " ".join(f"--allow '{name.replace('.', chr(92) + '.')}'" for name in names[:8])
            raise ConversionError(
                f"{self.where}: its pickle asks for {', '.join(names[:8])}{more}, which a checkpoint of tensors does not need; nothing was "
                f"run. {flags} reads the file with inert stand-ins in their place"
            )

    def _run(self) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.program)):
            if count > MAX_OPCODES:
                raise ConversionError(f"{self.where}: its pickle has more than {MAX_OPCODES:,} operations, more than a state dict needs")
            name = opcode.name
            if name in _PUSH:
                if type(argument) is int and argument.bit_length() > MAX_INTEGER_BITS:
                    raise ConversionError(f"{self.where}: its pickle holds an integer of {argument.bit_length():,} bits")
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "STOP":
                return self.stack.pop()
            elif name not in _IGNORED:
                handler = _HANDLERS.get(name)
                if handler is None:
                    raise ConversionError(f"{self.where}: its pickle uses the operation {name}, which torch does not write")
                handler(self, argument)
        raise ConversionError(f"{self.where}: its pickle has no end")

    # The stack

    def _above_mark(self) -> list[Any]:
        """What lies above the topmost mark; both are taken off."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError("no mark on the stack")
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def _count(self, work: int) -> None:
        """Bounds what is done again and again to one large object."""
        self.work += work
        if self.work > 4 * MAX_OPCODES:
            raise ConversionError(f"{self.where}: its pickle copies more than a state dict needs")

    def _put(self, argument: Any) -> None:
        index = len(self.memo) if argument is None else int(argument)
        if not 0 <= index <= min(len(self.program), MAX_OPCODES):
            raise ConversionError(f"{self.where}: its pickle numbers more objects than it can hold")
        self.memo[index] = self.stack[-1]

    def _get(self, argument: Any) -> None:
        self.stack.append(self.memo[int(argument)])

    # Containers

    def _wrap(self, make: Callable[[list[Any]], Any], items: list[Any]) -> None:
        if any(item is _MARK for item in items):
            raise IndexError("a mark where a value belongs")
        self.stack.append(make(items))

    def _tuple(self, size: int) -> None:
        items = self.stack[len(self.stack) - size :] if len(self.stack) >= size else []
        if len(items) != size:
            raise IndexError("the stack is too short")
        del self.stack[len(self.stack) - size :]
        self._wrap(tuple, items)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise ConversionError(f"{self.where}: its pickle appends to a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise IndexError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set_item(target, key, value)

    def _set_item(self, target: Any, key: Any, value: Any) -> None:
        if isinstance(target, Inert):
            if isinstance(key, str):
                target.facts[key] = value
            return
        if not isinstance(target, dict):
            raise ConversionError(f"{self.where}: its pickle writes entries of a {type(target).__name__}")
        if type(key) is int:
            self.integer_keys += 1
            if abs(key) >= 2**31 or self.integer_keys > MAX_INTEGER_KEYS:
                raise ConversionError(f"{self.where}: its pickle has more, or larger, integer keys than a state dict needs")
        elif not isinstance(key, str):
            # Of bookkeeping; a state dict has none. Left where it is, for the report.
            key, value = f"<{key.name if isinstance(key, Inert) else type(key).__name__}>", Inert("an entry whose key is no string")
        target[key] = value

    def _dict(self, items: list[Any]) -> None:
        self.stack.append({})
        self._set_items(items)

    # Globals, and what is made of them

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or not f"{module}{name}".isprintable():
            raise ConversionError(f"{self.where}: its pickle asks for a global that has no name")
        whole = f"{module}.{name}"
        if module == "torch" and name in TORCH_NAMES:
            self.stack.append(whole)
            return
        if "." in name or not (
            whole in _MAKERS
            or is_inert(whole)
            or whole in RECONSTRUCTORS
            or (module == "torch" and name in STORAGE_TYPES)
            or whole in self.allowed
        ):
            self.refused.append(whole)
        self.stack.append(Global(whole))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._global(module, name)

    def _make(self, made_of: Any, arguments: Any) -> Any:
        """What calling `made_of` would give."""
        if type(made_of) is not Global or type(arguments) is not tuple:
            raise ConversionError(f"{self.where}: its pickle calls a {type(made_of).__name__}, which is no function")
        name = made_of.name
        if name in RECONSTRUCTORS:
            return self._make(arguments[0], ())
        if name in _MAKERS:
            return _MAKERS[name](self, *arguments)
        if name.removeprefix("torch.") in STORAGE_TYPES:
            raise ConversionError(f"{self.where}: its pickle makes a storage of its own")
        thing = Inert(name)
        if len(arguments) == 1 and isinstance(arguments[0], dict) and name not in self.refused:
            thing.facts = {key: value for key, value in arguments[0].items() if isinstance(key, str)}
            self._count(len(arguments[0]))
        return thing

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._make(function, arguments))

    def _new_with_keywords(self) -> None:
        self.stack.pop()
        self._reduce()

    def _instance(self, made_of: Any, arguments: list[Any]) -> None:
        self.stack.append(self._make(made_of, tuple(arguments)))

    def _inst(self, argument: str) -> None:
        items = self._above_mark()
        self._global(*argument.split(" ", 1))
        self._instance(self.stack.pop(), items)

    def _obj(self) -> None:
        made_of, *arguments = self._above_mark()
        self._instance(made_of, arguments)

    def _build(self) -> None:
        """Attributes: kept on stand-ins, left out of dicts (torch stores some beside a state dict), refused on all else."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    self._count(len(part))
                    target.facts.update((key, value) for key, value in part.items() if isinstance(key, str))
        elif not isinstance(target, dict):
            raise ConversionError(f"{self.where}: its pickle sets the state of a {type(target).__name__}")

    def _storage(self) -> None:
        pid = self.stack.pop()
        fine = type(pid) is tuple and len(pid) == 5 and pid[0] == "storage" and type(pid[1]) is Global
        kind = pid[1].name.removeprefix("torch.") if fine else ""
        if kind not in STORAGE_TYPES and kind != "storage.UntypedStorage":
            raise ConversionError(f"{self.where}: its pickle holds a reference that is no tensor storage")
        key, count = pid[2], pid[4]
        if not isinstance(key, str) or "/" in key or key in ("", ".", ".."):
            raise ConversionError(f"{self.where}: unsafe storage name {key if isinstance(key, str) else type(key).__name__!r}")
        if type(count) is not int or not 0 <= count < 2**48:
            raise ConversionError(f"{self.where}: storage {key!r} has no count of values")
        self.stack.append(Stored(kind, key, count))

    def _ordered_dict(self, items: Any = (), *_: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        self._count(len(items))
        for key, value in items.items() if isinstance(items, dict) else items:
            self._set_item(found, key, value)
        return found

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
        if not isinstance(storage, Stored):
            raise ConversionError(f"{self.where}: a tensor without a storage")
        if storage.kind not in STORAGE_TYPES:
            raise ConversionError(f"{self.where}: a tensor of a type that is not read here; known: {', '.join(STORAGE_TYPES.values())}")
        if not isinstance(size, (tuple, list)) or not isinstance(stride, (tuple, list)) or len(size) > MAX_AXES or len(size) != len(stride):
            raise ConversionError(f"{self.where}: a tensor whose size or stride is of the wrong type or has over {MAX_AXES} axes")
        return self.make_tensor(storage, offset, tuple(size), tuple(stride))

    def _typed_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> np.ndarray:
        names = {kind: number for kind, number in STORAGE_TYPES.items() if dtype == f"torch.{number}"}
        if not isinstance(storage, Stored) or not names:
            known = ", ".join(STORAGE_TYPES.values())
            raise ConversionError(
                f"{self.where}: a tensor of type {dtype if isinstance(dtype, str) else 'unknown'}, which is not read here; known: {known}"
            )
        (kind,) = names
        width = np.dtype("uint16" if dtype == "torch.bfloat16" else dtype.removeprefix("torch.")).itemsize
        return self._tensor(Stored(kind, storage.key, storage.count // width), offset, size, stride)

    def _parameter(self, tensor: Any, *_: Any) -> np.ndarray:
        if not isinstance(tensor, np.ndarray):
            raise ConversionError(f"{self.where}: a parameter of a {type(tensor).__name__}, not of a tensor")
        return tensor

    def _subclass(self, function: Any, _: Any, arguments: Any, *__: Any) -> Any:
        if type(function) is not Global or not function.name.startswith("torch._utils._rebuild_"):
            raise ConversionError(f"{self.where}: a tensor of an unknown class")
        return self._make(function, arguments)

    def _size(self, sizes: Any = (), *_: Any) -> tuple[Any, ...]:
        if not isinstance(sizes, (tuple, list)) or len(sizes) > MAX_AXES:
            raise ConversionError(f"{self.where}: a size with over {MAX_AXES} axes")
        return tuple(sizes)

    def _text(self, *parts: Any) -> str:
        return ":".join(str(part) for part in parts[:4] if type(part) in (str, int))


_PUSH = frozenset(
    [
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    ]
)
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_IGNORED = frozenset(("PROTO", "FRAME"))
_HANDLERS: dict[str, Callable[[Machine, Any], Any]] = {
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_SET": lambda m, _: m.stack.append(Inert("builtins.set")),
    "FROZENSET": lambda m, _: m._wrap(lambda _: Inert("builtins.frozenset"), m._above_mark()),
    "TUPLE": lambda m, _: m._wrap(tuple, m._above_mark()),
    "TUPLE1": lambda m, _: m._tuple(1),
    "TUPLE2": lambda m, _: m._tuple(2),
    "TUPLE3": lambda m, _: m._tuple(3),
    "LIST": lambda m, _: m._wrap(list, m._above_mark()),
    "DICT": lambda m, _: m._dict(m._above_mark()),
    "APPEND": lambda m, _: m._extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m._extend(m._above_mark()),
    "ADDITEMS": lambda m, _: m._extend(m._above_mark()),
    "SETITEM": lambda m, _: m._set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m._set_items(m._above_mark()),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m._above_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    **{name: lambda m, argument: m._put(argument) for name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")},
    **{name: lambda m, argument: m._get(argument) for name in ("GET", "BINGET", "LONG_BINGET")},
    "GLOBAL": lambda m, argument: m._global(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m._stack_global(),
    "REDUCE": lambda m, _: m._reduce(),
    "NEWOBJ": lambda m, _: m._reduce(),
    "NEWOBJ_EX": lambda m, _: m._new_with_keywords(),
    "INST": lambda m, argument: m._inst(argument),
    "OBJ": lambda m, _: m._obj(),
    "BUILD": lambda m, _: m._build(),
    "BINPERSID": lambda m, _: m._storage(),
}
# What tensors and state dicts are made of.
_MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": Machine._ordered_dict,
    "collections.defaultdict": lambda m, *_: {},
    "collections.Counter": Machine._ordered_dict,
    "torch._utils._rebuild_tensor": Machine._tensor,
    "torch._utils._rebuild_tensor_v2": Machine._tensor,
    "torch._utils._rebuild_tensor_v3": Machine._typed_tensor,
    "torch._utils._rebuild_parameter": Machine._parameter,
    "torch._utils._rebuild_parameter_with_state": Machine._parameter,
    "torch._tensor._rebuild_from_type_v2": Machine._subclass,
    "torch.Size": Machine._size,
    "torch.device": Machine._text,
    "torch.serialization._get_layout": Machine._text,
    "torch.torch_version.TorchVersion": Machine._text,
}


def children(thing: Any) -> list[Any]:
    """What a container or a stand-in holds; empty for all else."""
    if isinstance(thing, (dict, Inert)):
        return list((thing.facts if isinstance(thing, Inert) else thing).values())
    return list(thing) if isinstance(thing, (list, tuple)) else []


def check_nesting(content: Any, where: str) -> None:
    """ConversionError where containers lie deeper than `MAX_NESTING` in one another."""
    seen: set[int] = set()
    level = [content]
    for _ in range(MAX_NESTING):
        fresh = [thing for thing in {id(thing): thing for thing in level}.values() if id(thing) not in seen]
        seen.update(map(id, fresh))
        level = [child for thing in fresh for child in children(thing)]
        if not level:
            return
    raise ConversionError(f"{where}: its pickle nests more than {MAX_NESTING} containers in one another")
