"""What the page asks for, as plain data that JSON can hold: pictures as data URLs, tokens as numbers, masks as strings of 0 and 1."""

from __future__ import annotations

import base64
import collections
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from maskvit.commands.explore import look
from maskvit.commands.explore.samples import read_one
from maskvit.core.keys import sample_keys
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch
from maskvit.data.builders.layout import Task
from maskvit.features import LoadedModel
from maskvit.guidance.attention import SelfAttention
from maskvit.masking.scores import GUIDED_SCORES, SCORES
from maskvit.objectives.masked import MaskedAutoencoder
from maskvit.plots import components, pictures

FITTED = 16  # samples that the main components are fitted to, at most
KEPT = 8  # samples whose attention and features are kept at hand
ALPHA = 0.5  # of attention_stochastic, where the checkpoint's config gives none
Answer = dict[str, Any]


class Sample(NamedTuple):
    """A sample as the model sees it: stored values "h w c" or ids "h w" of what it has, the batch of it, and the rest as `look.Seen`."""

    stored: dict[str, Shaped[np.ndarray, "h w *c"]]
    batch: Batch
    features: Float[np.ndarray, "n d"]
    attention: Float[np.ndarray, "l e e"]
    present: Bool[np.ndarray, " n"]


class Colors(NamedTuple):
    """How features of one modality are colored: with and without what their place says."""

    basis: components.Basis
    place: components.Place
    content: components.Basis


def data_url(picture: Shaped[np.ndarray, "_ _ 3"]) -> str:
    """A picture as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(pictures.png_bytes(picture)).decode("ascii")


def to_bits(flags: Bool[np.ndarray, " n"]) -> str:
    """"1" for True."""
    return "".join("1" if flag else "0" for flag in flags)


def from_bits(text: Any, count: int) -> Bool[np.ndarray, " n"]:
    """What `to_bits` made. Raises ValueError for anything but `count` digits 0 and 1."""
    if not isinstance(text, str) or len(text) != count or set(text) - {"0", "1"}:
        raise ValueError(f"a mask is {count} digits 0 (shown) and 1 (hidden)")
    return np.frombuffer(text.encode("ascii"), np.uint8) == ord("1")


def pasted(
    spec: Modality,
    rebuilt: Shaped[np.ndarray, "h w *c"],
    stored: Shaped[np.ndarray, "h w *c"] | None,
    masked: Bool[np.ndarray, "gh gw"] | None,
) -> pictures.Picture:
    """A rebuilt map as a picture, with the given pixels where tokens are visible.

    `stored` None: there is no true map, and the picture has its own scale of colors; `masked` None: nothing of it is an input.
    """
    if stored is None:
        return pictures.to_picture(spec, rebuilt)
    picture = pictures.to_picture(spec, rebuilt, like=stored)
    if masked is None:
        return picture
    cells = np.kron(masked, np.ones([side // grid for side, grid in zip(picture.shape, masked.shape, strict=False)], bool))
    return np.where(cells[..., None], picture, pictures.to_picture(spec, stored))


class Explorer:
    """Answers about the samples `tasks` by one checkpoint. May be called from several threads.

    Raises ValueError where none of the samples can be read.
    """

    def __init__(self, loaded: LoadedModel, tasks: Sequence[Task], checkpoint: str, crop: float | int):
        self.objective, self.model, self.params = loaded.objective, loaded.model, loaded.params
        self.name = loaded.config["objective"]["name"]
        self.tasks, self.checkpoint, self.crop = list(tasks), checkpoint, crop
        self.layout = self.model.layout
        self.specs: dict[str, Modality] = {spec.name: spec for spec in self.model.modalities}
        self._kept: collections.OrderedDict[int, Sample] = collections.OrderedDict()
        self._lock = threading.RLock()
        self.guidance = self._guidance()
        self.strategies = self._strategies()
        self.colors = self._fit()

    # The checkpoint

    def _guidance(self) -> tuple[int, str]:
        """(block, row) of the attention that strategies read: the config's own where it reads the model's attention."""
        source, depth = getattr(self.objective, "guidance", None), dict(self.model.encoder)["depth"]
        if isinstance(source, SelfAttention):
            return source.block % depth, source.query
        return depth - 1, "global" if self.model.num_global_tokens else "mean"

    def _strategies(self) -> dict[str, look.Options]:
        """The options of every row of `SCORES`: the config's of the one that it trained with, else the defaults."""
        function, options = getattr(self.objective, "scores", (None, ()))
        needed: dict[str, look.Options] = {"attention_stochastic": (("alpha", ALPHA),)}
        return {name: tuple(options) if score is function else needed.get(name, ()) for name, score in SCORES.items()}

    def _fit(self) -> dict[str, Colors]:
        """The colors of every input, fitted to the first samples that have it."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.layout.names}
        problem = ""
        for number in range(min(len(self.tasks), FITTED)):
            try:
                sample = self.sample(number)
            except ValueError as error:
                problem = problem or f"{self.tasks[number].key}: {error}"
                continue
            for name in self.layout.names:
                if name in sample.stored:
                    found[name].append(self._grid(name, sample.features))
        if not any(found.values()):
            raise ValueError(f"none of the samples can be read; the first: {problem}")
        fitted = {}
        for name, grids in found.items():
            if grids:
                features = np.stack(grids)
                place = components.fit_place(features)
                flat = features.reshape(-1, features.shape[-1])
                fitted[name] = Colors(
                    components.fit_basis(flat), place, components.fit_basis(place.removed(features).reshape(-1, features.shape[-1]))
                )
        return fitted

    def _grid(self, name: str, values: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "gh gw ..."]:
        """The tokens of one input on their grid."""
        rows, columns = self.layout.grids[self.layout.names.index(name)]
        values = np.asarray(values)[self.layout.span(name)]
        return values.reshape(rows, columns, *values.shape[1:])

    @property
    def cannot_rebuild(self) -> str:
        """Why nothing can be rebuilt; "" where it can."""
        if not isinstance(self.objective, MaskedAutoencoder):
            return f"This checkpoint is of the objective {self.name!r}, which rebuilds nothing: it has no decoder."
        if not self.model.outputs:
            return "This checkpoint has no decoder: it was converted or trained without outputs."
        return ""

    def about(self) -> Answer:
        """What the page must know before it asks for a sample."""
        inputs = [
            {"name": name, "rows": grid[0], "columns": grid[1], "start": self.layout.span(name).start}
            for name, grid in zip(self.layout.names, self.layout.grids, strict=True)
        ]
        function, _ = getattr(self.objective, "scores", (None, ()))
        budget, _ = getattr(self.objective, "budget", (None, ()))
        block, query = self.guidance
        row = "the global token's row" if query == "global" else "the mean over all queries"
        trained = getattr(self.objective, "guidance", None)
        words = f"Guided strategies read the attention of block {block + 1} ({row}, mean over heads)."
        if trained is not None and not isinstance(trained, SelfAttention):
            words += f" The run itself was guided by {type(trained).__name__}, which is not read here."
        encoder, visible = dict(self.model.encoder), int(getattr(self.objective, "num_visible", self.layout.num_tokens))
        return {
            "checkpoint": self.checkpoint,
            "model": f"width {encoder['width']}, {encoder['depth']} blocks, {encoder['heads']} heads",
            "samples": [task.key for task in self.tasks],
            "tokens": self.layout.num_tokens,
            "globals": self.model.num_global_tokens,
            "size": list(self.model.image_size),
            "inputs": inputs,
            "outputs": [] if self.cannot_rebuild else list(self.model.outputs),
            "cannot_rebuild": self.cannot_rebuild,
            "strategies": [
                {"name": name, "options": ", ".join(f"{k} = {v}" for k, v in options), "guided": name in GUIDED_SCORES}
                for name, options in self.strategies.items()
            ],
            "budgets": list(look.BUDGET_NAMES) if len(inputs) > 1 else ["equal"],
            "start": {
                "strategy": next((name for name, score in SCORES.items() if score is function), "random"),
                "budget": next((n for n in look.BUDGET_NAMES if len(inputs) > 1 and look.BUDGETS[n] is budget), "equal"),
                "visible": visible if visible < self.layout.num_tokens else max(1, self.layout.num_tokens // 4),
            },
            "blocks": encoder["depth"],
            "guidance": words,
            "heat": pictures.color_table("inferno"),
        }

    # One sample

    def sample(self, number: int) -> Sample:
        """Sample `number`, of those kept at hand or read anew. Raises ValueError where there is none, or it cannot be used."""
        if not 0 <= number < len(self.tasks):
            raise ValueError(f"there is no sample {number}: they count from 0 to {len(self.tasks) - 1}")
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            arrays = read_one(self.tasks[number], self.model, self.crop)
            columns = (*self.model.inputs, *(name for name in self.specs if name not in self.model.inputs))
            has = dict(zip(columns, arrays["present"][0], strict=True))
            # One type of numbers, whatever the files hold: programs are compiled for types too.
            values = {
                name: jnp.asarray(arrays[name], None if spec.kind == "categorical" else jnp.float32) for name, spec in self.specs.items()
            }
            batch = Batch(values, jnp.asarray(arrays["present"]))
            seen = look.see(self.model, self.params, batch)
            stored = {name: arrays[name][0] for name in self.specs if has[name]}
            made = Sample(stored, batch, *(np.asarray(part[0]) for part in (seen.features, seen.attention, seen.present)))
            self._kept[number] = made
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return made

    def readable(self) -> Iterator[int]:
        """The numbers of the samples that can be used."""
        for number in range(len(self.tasks)):
            try:
                self.sample(number)
            except ValueError:
                continue
            yield number

    def picture(self, number: int) -> Answer:
        """The inputs of a sample, which of their tokens exist, and their features as colors."""
        sample = self.sample(number)
        inputs = {}
        for name in self.layout.names:
            present = self._grid(name, sample.present)
            inputs[name] = {"absent": name not in sample.stored, "present": to_bits(present.reshape(-1))}
            if name in sample.stored:
                inputs[name]["picture"] = data_url(pictures.to_picture(self.specs[name], sample.stored[name]))
                if name in self.colors:
                    basis, place, content = self.colors[name]
                    features = self._grid(name, sample.features)
                    inputs[name]["components"] = data_url(components.component_colors(basis, features))
                    inputs[name]["content"] = data_url(components.component_colors(content, place.removed(features)))
        return {"name": self.tasks[number].key, "inputs": inputs}

    def draw(self, number: int, strategy: str, budget: str, visible: int, seed: int) -> Answer:
        """The mask that a strategy draws. Raises ValueError for names and numbers that are none."""
        if strategy not in self.strategies:
            raise ValueError(f"strategy is {strategy!r}; known: {', '.join(self.strategies)}")
        if budget not in look.BUDGET_NAMES:
            raise ValueError(f"budget is {budget!r}; known: {', '.join(look.BUDGET_NAMES)}")
        if not 1 <= visible <= self.layout.num_tokens:
            raise ValueError(f"{visible} tokens shown; there are 1 to {self.layout.num_tokens}")
        sample, (block, query) = self.sample(number), self.guidance
        keys, present = sample_keys(seed, number, 1), jnp.asarray(sample.present[None])
        guidance = look.importance(jnp.asarray(sample.attention[None, block]), self.layout, present, query)
        scores = look.score(keys, self.layout, guidance, present, strategy, self.strategies[strategy])
        masked = look.spend(keys, self.layout, scores, present, jnp.int32(visible), budget)
        return {"masked": to_bits(np.asarray(masked[0]))}

    def rebuild(self, number: int, masked: str) -> Answer:
        """Every output for exactly that mask, the visible patches kept, and how long it took. Raises ValueError without a decoder."""
        if self.cannot_rebuild:
            raise ValueError(self.cannot_rebuild)
        hidden, sample = from_bits(masked, self.layout.num_tokens), self.sample(number)
        began = time.perf_counter()
        with self._lock:
            rebuilt = look.rebuild(self.objective, self.params, sample.batch, jnp.asarray(hidden[None]))
            jax.block_until_ready(rebuilt)
        outputs = {name: self._output(name, rebuilt, sample, hidden) for name in self.model.outputs}
        return {"outputs": outputs, "milliseconds": 1000 * (time.perf_counter() - began)}

    def _output(self, name: str, rebuilt: look.Rebuilt, sample: Sample, hidden: Bool[np.ndarray, " n"]) -> Answer:
        """One output: its picture, and its loss on what was hidden."""
        spec = self.model.modality(name)
        stored = sample.stored.get(spec.name)
        if stored is None and name != spec.name:
            return {"note": f"needs the mean and deviation of {spec.name}'s own patches, and {spec.name} is absent"}
        masked = self._grid(spec.name, hidden | ~sample.present) if spec.name in self.layout.names else None
        total, count = (float(part) for part in rebuilt.losses[name])
        note = "absent: on a scale of its own" if stored is None else f"{spec.loss} {total:.4g}" if count else "nothing hidden"
        picture = data_url(pasted(spec, np.asarray(rebuilt.maps[name][0]), stored, masked))
        return {"picture": picture, "note": note, "loss": float(f"{total:.6g}") if stored is not None and count else None}

    def token(self, number: int, token: int, block: int) -> Answer:
        """What a token attends to in a block, mean over heads, and the cosine of every feature to its own."""
        if not 0 <= token < self.layout.num_tokens or not 0 <= block < dict(self.model.encoder)["depth"]:
            raise ValueError(f"there is no token {token} or no block {block}")
        sample = self.sample(number)
        if not sample.present[token]:
            raise ValueError("this token is absent: it attends to nothing")
        row, like = sample.attention[block, token], components.cosine(sample.features, sample.features[token])
        return {"attention": _rounded(row[: self.layout.num_tokens]), "similarity": _rounded(like)}

    def tokens(self, number: int) -> Answer:
        """`token` of every token in the last block, in 256 levels: attention of the row's own greatest, similarity from -1 to 1."""
        sample, n = self.sample(number), self.layout.num_tokens
        rows = sample.attention[-1, :n, :n]
        most = np.maximum(rows.max(axis=1), 1e-12)
        features = sample.features.astype(np.float64)
        unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-15)
        return {
            "most": _rounded(most),
            "attention": _packed(rows / most[:, None]),
            "similarity": _packed((unit @ unit.T + 1) / 2),
        }


def _rounded(values: Float[np.ndarray, " n"]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _packed(unit: Float[np.ndarray, "n n"]) -> str:
    """Numbers in 0 ... 1 as bytes, in base64."""
    return base64.b64encode((np.clip(unit, 0, 1) * 255).round().astype(np.uint8).tobytes()).decode("ascii")


def stored_answers(explorer: Explorer, shares: Sequence[float], strategies: Sequence[str]) -> Mapping[str, Any]:
    """All that a page without a server can choose from: samples x strategies x shares of tokens shown.

    A sample that cannot be read has the reason, as "problem", in place of its answers.
    """
    n, start = explorer.layout.num_tokens, explorer.about()["start"]
    visible = [min(n, max(1, round(share * n))) for share in shares]
    samples = []
    for number, task in enumerate(explorer.tasks):
        try:
            made = explorer.picture(number)
        except ValueError as error:
            samples.append({"name": task.key, "problem": str(error)})
            continue
        made["drawn"] = {}
        for strategy in strategies:
            drawn = [explorer.draw(number, strategy, start["budget"], count, 0) for count in visible]
            if not explorer.cannot_rebuild:
                drawn = [one | {"outputs": explorer.rebuild(number, one["masked"])["outputs"]} for one in drawn]
            made["drawn"][strategy] = drawn
        if n <= MOST_STORED:
            made["tokens"] = explorer.tokens(number)
        samples.append(made)
    return {"samples": samples, "visible": visible, "strategies": list(strategies), "budget": start["budget"]}


MOST_STORED = 1024  # tokens up to which a page without a server holds all pairs of them
