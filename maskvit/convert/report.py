"""What became of every tensor of a conversion: which key went where, what was left out, what stayed at its initialization."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import Rule
from maskvit.core.errors import printable

FILE = "conversion.txt"
ACTIONS = ("converted", "fresh", "left out")


class Row(NamedTuple):
    """One tensor, or several that are one on the other side. `why`: of what is left out, in words."""

    action: str
    source: tuple[tuple[str, tuple[int, ...]], ...]
    target: tuple[tuple[str, tuple[int, ...]], ...]
    why: str = ""

    def __str__(self) -> str:
        sides = (" + ".join(f"{name} {shape}" for name, shape in side) for side in (self.source, self.target))
        text = " -> ".join(side for side in sides if side)
        return f"{self.action:<10}{text}" + (f"  ({self.why})" if self.why else "")


def converted(rule: Rule, names: Mapping[str, str], prefix: str = "", backwards: bool = False) -> Row:
    """The row of a rule; `names`: what the file calls its keys, `prefix` stands before our paths."""
    theirs = tuple((names.get(key, key), shape) for key, shape in zip(rule.keys, rule.shapes, strict=True))
    ours = tuple((prefix + path, shape) for path, shape in zip(rule.paths, rule.our_shapes(), strict=True))
    return Row("converted", ours, theirs) if backwards else Row("converted", theirs, ours)


def summary(rows: Iterable[Row]) -> str:
    """How many tensors of the source were converted (to how many) and left out, and how many of the result are fresh, in one line."""
    counts: collections.Counter = collections.Counter()
    for row in rows:
        counts[row.action] += len(row.target if row.action == "fresh" else row.source)
        counts["result"] += len(row.target) * (row.action == "converted")
    result = f" to {counts['result']}" if counts["result"] != counts["converted"] else ""
    return f"{counts['converted']} tensors converted{result}, {counts['left out']} left out, {counts['fresh']} at their initialization"


def write(path: Path, title: str, rows: Sequence[Row], said: Sequence[str]) -> None:
    """The whole report as text."""
    ordered = [str(row) for action in reversed(ACTIONS) for row in rows if row.action == action]
    path.write_text(printable("\n".join([title, summary(rows), *said, "", *ordered, ""])))


class Allowed:
    """What `--allow` names: regular expressions, each matched against whole names."""

    def __init__(self, patterns: Sequence[str]):
        if isinstance(patterns, str):
            raise ConversionError(f"--allow is the string {patterns!r}; it must be a list of regular expressions")
        self.patterns = []
        self.used: set[str] = set()
        for pattern in patterns:
            try:
                self.patterns.append(re.compile(pattern))
            except re.error as error:
                raise ConversionError(f"--allow '{pattern}' is no regular expression: {error}") from error

    def __contains__(self, name: object) -> bool:
        matching = [pattern.pattern for pattern in self.patterns if isinstance(name, str) and pattern.fullmatch(name)]
        self.used.update(matching)
        return bool(matching)

    def check_use(self, names: Iterable[str], where: str) -> None:
        """ConversionError for every expression that matches none of `names`, and nothing that was asked for before."""
        names = list(names)
        idle = [p.pattern for p in self.patterns if p.pattern not in self.used and not any(p.fullmatch(name) for name in names)]
        if idle:
            flags = " and ".join(f"--allow '{pattern}'" for pattern in idle)
            raise ConversionError(
                f"{where}: {flags} match{'es' * (len(idle) == 1)} nothing; it is matched against whole keys and paths such as "
                f"{next(iter(names), 'encoder/block_00/norm1/scale')!r}"
            )


def allow_flags(patterns: Iterable[str]) -> str:
    """Expressions as they are typed."""
    return " ".join(f"--allow '{pattern}'" for pattern in patterns)
