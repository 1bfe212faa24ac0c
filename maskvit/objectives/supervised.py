"""Supervised training of an encoder with a head: fine-tuning and probing are this objective, with or without a frozen encoder.

Recipes: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021; Bachmann et al., "MultiMAE: Multi-modal Multi-task Masked
Autoencoders", 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from maskvit.core.flops import embed_flops, encoder_flops
from maskvit.core.keys import stream_keys
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch, DataNeeds, Metrics, Params, batch_of, path_name, tree_paths
from maskvit.heads import HEADS, check_layers, check_pooled_layers, head_options
from maskvit.heads.network import Network
from maskvit.heads.task_network import TaskNetwork
from maskvit.heads.values import ReadsFeatures, prepare
from maskvit.nn.attention import attention_kernel
from maskvit.nn.backbone import encoder_sizes
from maskvit.nn.encoder import drop_path
from maskvit.objectives.options import ToSteps, check_inputs
from maskvit.objectives.tasks import Classification, build_task
from maskvit.optim.transforms import guarded

STATISTICS = "statistics/"  # metrics of this name are running means and variances of a head on their way to the state


@dataclasses.dataclass(frozen=True)
class Supervised(ReadsFeatures):
    """The objective. Hashable and without arrays.

    Attributes:
      model: backbone and head.
      task: a row of `maskvit.objectives.tasks.TASKS`.
      drop_path: share of the last block's branches that training leaves out (stochastic depth).
      ema_decay: share of the averaged weights that stays at a step; None: no average is kept.

    State, a dict that holds only what is kept: "ema" (averaged parameters), "statistics" (the head's running means and variances).
    """

    model: TaskNetwork
    task: Any
    drop_path: float = 0.0
    ema_decay: float | None = None

    guidance = None

    @property
    def num_visible(self) -> int:
        """Tokens that the encoder sees: all."""
        return self.model.layout.num_tokens

    # What training asks

    @property
    def needs(self) -> DataNeeds:
        """Labels of classes, or nothing but the modalities."""
        return DataNeeds(num_classes=0 if self.task.dense else self.task.num_classes)

    def check(self) -> None:
        """There is always something to train for."""

    def flops(self, views: Any = None) -> float:
        """The arithmetic of one training step per image: forward, backward at twice the forward; the head is left out."""
        return 3 * (embed_flops(self.model) + encoder_flops(self.model, self.num_visible))

    # The protocol

    def init(self, key: Key[Array, ""], num_records: int = 1) -> tuple[Params, Any]:
        """Fresh parameters and the state that goes with them."""
        params = self.model.init(key)
        return params, self.init_state(params, num_records)

    def init_state(self, params: Params, num_records: int = 1) -> dict[str, Any]:
        """The average starts as the parameters, in arrays of its own; running statistics as mean 0 and variance 1."""
        state: dict[str, Any] = {}
        if self.ema_decay is not None:
            state["ema"] = jax.tree.map(jnp.array, params)
        statistics = self.model.init_statistics()
        if statistics:
            state["statistics"] = statistics
        return state

    def resolve(self, to_steps: ToSteps) -> Supervised:
        """There are no durations."""
        return self

    def recall(self, state: Any, index: Int[Array, " b"] | None) -> tuple[Any, None]:
        """All of the state holds for every sample, but the averaged weights, which no sample needs."""
        return {name: value for name, value in state.items() if name != "ema"}, None

    def plan(
        self, params: Params, batch: Batch, keys: Key[Array, " b"], state: Any = None, step: Int[Array, ""] | int = 0
    ) -> tuple[tuple[()], dict[str, Float[Array, ""]]]:
        """Nothing is hidden; how many labels the loss is a mean over."""
        return (), self.task.counts(batch, prepare(self.model, batch))

    def loss(
        self,
        params: Params,
        state: Any,
        batch: Batch,
        keys: Key[Array, " b"],
        step: Int[Array, ""],
        plan: Any = None,
        counts: Mapping[str, Float[Array, ""]] | None = None,
        shared_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], tuple[None, Metrics]]:
        """The mean loss over the labels of the batch, and (None, metrics); arguments as in `maskvit.objectives.Objective`."""
        prepared = prepare(self.model, batch)
        # Images are mixed within their part of the batch, so each part draws for itself, from its first sample's key.
        key = stream_keys(keys[0], "part")
        values, targets = self.task.augment(
            stream_keys(key, "mix"), stream_keys(keys, "erase"), prepared.values_of(self.model.inputs), batch
        )
        branches = drop_path(stream_keys(keys, "drop path"), dict(self.model.encoder)["depth"], self.drop_path) if self.drop_path else None
        output, statistics = self._output(params, state or {}, values, prepared.present, branches, True, stream_keys(key, "head"))
        sums = self.task.losses(output, targets, batch, prepared)
        total = jnp.zeros(())
        for name, (loss_sum, count) in sums.items():
            total += loss_sum / jnp.maximum(count if counts is None else counts[name], 1e-6)  # nothing has a label: the sum is 0 then
        one = jnp.ones(())
        kept = {STATISTICS + name: (value, one) for name, value in tree_paths(statistics).items()}
        return total, (None, jax.lax.stop_gradient({**sums, **kept}))

    def _output(
        self,
        params: Params,
        state: Any,
        values: Mapping[str, Num[Array, "b h w *c"]],
        present: Bool[Array, "b n"] | None,
        branches: Float[Array, "depth two b"] | None = None,
        train: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Any, Mapping[str, Any]]:
        """What the head gives, and its running statistics."""
        tokens = self.model.embed(params, values, present)
        size = next(iter(values.values())).shape[1:3]
        spec = self.model.modality(tokens.layout.names[0])
        size = size[0] * spec.stride, size[1] * spec.stride
        return self.model.read(params, tokens, size, state.get("statistics", {}), branches, train, key)

    def after_update(
        self, state: Any, params: Params, batch: Batch, keys: Key[Array, " b"], step: Int[Array, ""], observed: Any, metrics: Metrics,
        accepted: Bool[Array, ""] | bool = True,
    ) -> Any:  # fmt: skip
        """The averaged weights and the running statistics after a step; nothing changes unless `accepted`."""
        new = dict(state)
        if "ema" in state:
            decay = float(self.ema_decay or 0.0)
            new["ema"] = jax.tree.map(lambda average, now: decay * average + (1 - decay) * now, state["ema"], params)
        if "statistics" in state:  # each part of the batch moved them by its own; their mean is a step by the mean of all parts
            mean = lambda path, _: jnp.divide(*metrics[STATISTICS + path_name(path)])  # noqa: E731
            new["statistics"] = jax.tree_util.tree_map_with_path(mean, state["statistics"])
        return guarded(accepted, new, state)

    def summarize(self, metrics: Metrics, step: Int[Array, ""]) -> Metrics:
        """The losses; running statistics are no figures."""
        return {name: value for name, value in metrics.items() if not name.startswith(STATISTICS)}

    # The weights of another model

    def differences(self, stored: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
        """(Own tensors that begin fresh, stored ones that are not needed) where weights of `stored` shapes are the beginning.

        The head is fresh unless the checkpoint holds this very one; so is the norm behind pooled tokens, which belongs to it. What an
        encoder with other inputs or a decoder has beside is not needed. What is missing of the encoder is no difference but a mistake.
        """
        head = self.model.task_head or "head"
        of_head = [name for name in own if name.startswith(f"{head}/")]
        if all(stored.get(name) == own[name] for name in of_head):
            fresh = []
        else:
            fresh = of_head + [name for name in own if name.startswith("norm/") and self.model.pool != "global"]
        return fresh, [name for name in stored if name not in own]

    # What evaluators, pictures and users read

    def answers(
        self, params: Params, state: Any, batch: Batch | Mapping[str, Any], inputs: tuple[str, ...] | None = None
    ) -> dict[str, Float[Array, "b ..."]]:
        """What the model says of images, all or some `inputs` of it: "logits" "b k" or "b h w k", or "values" "b h w c" in stored units."""
        names = inputs or self.model.inputs
        batch = batch if isinstance(batch, Batch) else batch_of(batch)
        prepared = prepare(self.model, batch.only(names))
        output, _ = self._output(params, state or {}, prepared.values_of(names), prepared.present)
        specs = {spec.name: spec for spec in self.model.modalities}
        return self.task.answers(output, specs)

    def visualize(
        self, params: Params, state: Any, batch: Batch, keys: Key[Array, " b"], step: Int[Array, ""] | int = 0
    ) -> dict[str, dict[str, Array]]:
        """For a dense task its inputs, its target and the answer, in stored units or class ids; nothing to see for classes."""
        shown = {"inputs": {spec.name: batch.values[spec.name] for spec in self.model.modalities if spec.name in batch.values}}
        nothing: dict[str, dict[str, Array]] = {"masked": {}, "guidance": {}, "reconstructions": {}}
        if not self.task.dense:
            return {**shown, **nothing}
        answers = self.answers(params, state, batch)
        answer = answers["logits"].argmax(axis=-1).astype(jnp.int32) if "logits" in answers else answers["values"]
        return {**shown, **nothing, "reconstructions": {self.task.target: answer}}


def classifier_of(model: Network) -> Supervised:
    """The answers of an encoder that came with a classifier, as of timm or Hugging Face."""
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return Supervised(TaskNetwork(**fields), Classification(model.num_classes))


def supervised(
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    *,
    task: Mapping[str, Any],
    head: Mapping[str, Any] | None = None,
    inputs: tuple[str, ...] = ("rgb",),
    read_from: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    encoder: str | Mapping[str, Any] = "B",
    num_global_tokens: int = 1,
    positions: str = "rows_first",
    train_positions: bool = False,
    final_norm: bool = False,
    pool: str = "mean",
    drop_path: float | int = 0.0,
    ema_decay: float | None = None,
    compute_dtype: str = "float32",
    remat: bool | str = False,
    attention: str = "auto",
) -> Supervised:
    """Build the objective from `config.objective`. Every mistake is an error that names the key.

    `task`: {"name": "classification", "segmentation" or "regression", and that row's fields}. `head`: {"name": ..., and its options}.
    For a class per image "linear", a linear layer on `pool`ed tokens ("mean": the norm of the mean of the patch tokens, as MAE; "all":
    of all tokens, as MultiMAE; "global": the normed last global token, as DINO), or the probes of `maskvit.heads.HEADS`; for a value
    per pixel its dense heads. `layers`: the blocks that a head reads, counted from 1, in place of its own; "probe" joins their global
    tokens, and takes the mean of the last one's patches.
    `inputs`: what the encoder is shown; `read_from`: whose tokens a dense head reads, by default the first input's.
    `final_norm`: whether the pretrained encoder's last norm follows on every token that a head reads; "linear" always has one.
    `encoder`, `num_global_tokens`, `positions`: as the encoder was pretrained.
    `attention`: what computes it, "plain", "cudnn", "splash" or "auto" (`maskvit.nn.attention.attention_kernel`).
    """
    check_inputs(modalities, inputs)
    if not 0 <= drop_path < 1:
        raise ValueError(f"config.objective.drop_path is {drop_path}; it must be at least 0 and below 1")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"config.objective.ema_decay is {ema_decay}; it must be between 0 and 1, or None for no average")
    inputs, built, sizes = tuple(inputs), build_task(task, modalities, tuple(inputs)), encoder_sizes(encoder)
    read_from = tuple(read_from) or inputs[:1]
    if wrong := [name for name in read_from if name not in inputs]:
        raise ValueError(f"config.objective.read_from names {wrong[0]!r}, which is not one of config.objective.inputs {inputs}")
    chosen = _head(head or {}, built, modalities, layers, sizes, num_global_tokens, len(read_from))
    linear = not chosen["task_head"]
    names = dict.fromkeys((*inputs, built.target) if built.target else inputs)
    model = TaskNetwork(
        modalities=tuple(modalities[name] for name in names),
        inputs=inputs,
        image_size=image_size,
        encoder=tuple(sorted(sizes.items())),
        num_global_tokens=num_global_tokens,
        positions=positions,
        final_norm=final_norm or linear,
        pool=pool if linear else "global",
        compute_dtype=compute_dtype,
        remat=remat,
        attention_kernel=attention_kernel(attention, compute_dtype),
        read_from=read_from,
        train_positions=train_positions,
        **chosen,
    )
    for spec in model.modalities:
        spec.size(image_size)
    return Supervised(model, built, float(drop_path), ema_decay)


def _head(
    block: Mapping[str, Any], task: Any, modalities: Mapping[str, Modality], layers: tuple[int, ...], sizes: Mapping[str, Any],
    num_global_tokens: int, num_maps: int,
) -> dict[str, Any]:  # fmt: skip
    """`config.objective.head` and `layers` to the fields of `TaskNetwork` that say which head there is."""
    where, depth = "config.objective.head", sizes["depth"]
    block = {"name": "linear", **block}
    fitting = [name for name, row in HEADS.items() if row.reads == ("maps" if task.dense else "pooled")]
    fitting = fitting if task.dense else ["linear", *fitting]
    if block["name"] not in fitting:
        raise ValueError(f"{where}.name is {block['name']!r}; for this task: {', '.join(fitting)}")
    outputs = task.channels(modalities)
    if block["name"] == "linear" and not task.dense:
        if wrong := [key for key in block if key != "name"]:
            raise ValueError(f"{where} has unknown key {wrong[0]!r}; the linear head has no options")
        if layers:
            raise ValueError("config.objective.layers is set, but the linear head reads the end of the encoder: remove it")
        return dict(task_head="", heads=(("head", (("num_classes", outputs),)),))
    row = HEADS[block["name"]]
    name, options = head_options(where, block, sizes["width"] * (num_maps if task.dense else 1), num_global_tokens)
    if layers:
        check_layers("config.objective.layers", layers, depth)
    if not task.dense:
        check_pooled_layers("config.objective.layers", name, dict(options), layers)
    usual = row.layers(depth)
    if layers and len(usual) > 1 and len(layers) != len(usual):
        raise ValueError(f"config.objective.layers names {len(layers)} blocks; the head {name!r} reads {len(usual)}")
    given = ("channels" if task.dense else "num_classes", outputs)
    return dict(task_head=name, task_options=(*options, given), layers=tuple(layers) or usual)
