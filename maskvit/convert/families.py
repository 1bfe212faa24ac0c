"""Which family a file is of, and what becomes of its tensors: the config of its model and the rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import numpy as np

from maskvit.checkpoints import covering
from maskvit.convert import distillation, fine_tuned, mae, multimae, resnet, vit
from maskvit.convert.containers import model_names
from maskvit.convert.reader import ConversionError
from maskvit.convert.report import Allowed, allow_flags
from maskvit.convert.rules import Rule, check_keys, key_shapes, listed, path_shapes
from maskvit.convert.source import Hints, Source


class Family(NamedTuple):
    """A family of checkpoints.

    Attributes:
      name: what it is called.
      looks: whether a file's keys, without the prefixes of wrappers, are its.
      infer_config: the config of the model in a file.
      rules: its tensors, of file and config.
      left_out: patterns of keys that are no part of the model, and why.
      advice: what to know where tensors are missing.
    """

    name: str
    looks: Callable[[Any], bool]
    infer_config: Callable[[Source, Hints], dict[str, Any]]
    rules: Callable[[Source, Mapping[str, Any]], list[Rule]]
    left_out: tuple[tuple[str, str], ...] = ()
    advice: str = ""


# The first that knows the keys.
FAMILIES = (
    Family("fine-tuned MultiMAE", fine_tuned.is_fine_tuned, fine_tuned.infer_config, fine_tuned.rules, fine_tuned.LEFT_OUT),
    Family("MultiMAE", multimae.is_multimae, multimae.infer_config, lambda _, config: multimae.rules(config)),
    Family(
        "MultiViT (MultiMAE's encoder without decoders)",
        multimae.is_multivit,
        multimae.infer_config,
        lambda _, config: multimae.rules(config),
        advice="the file holds an encoder alone; --allow 'outputs/.*' accepts fresh decoders",
    ),
    Family("CrossMAE", mae.is_crossmae, mae.infer_config, lambda source, config: mae.cross_rules(config, mae.crossing_of(source))),
    Family("MAE", mae.is_mae, mae.infer_config, lambda source, config: mae.rules(config, vit.names_of(source))),
    Family(
        "ViT",
        vit.is_vit,
        vit.infer_config,
        lambda source, config: vit.rules(config, vit.form_of(source, vit.grid_in(config))),
        vit.LEFT_OUT,
    ),
    Family("ResNet", resnet.is_resnet, resnet.infer_config, lambda _, config: resnet.rules(config)),
)
# An encoder that is to become a MAE, because a target was asked for.
FRESH_MAE = Family(
    "MAE's encoder without its decoder",
    vit.is_vit,
    mae.infer_config_with_fresh_decoder,
    lambda source, config: mae.rules(config, vit.names_of(source)),
    advice="the file holds an encoder alone; --allow 'outputs/.*' accepts a fresh decoder (without --target the encoder is taken alone)",
)
# Both models of self-distillation, where they are asked for.
DISTILLED = Family("DINO or iBOT", distillation.is_distilled, distillation.infer_config, lambda _, config: distillation.rules(config))


def _has(*parts: str) -> Callable[[Any], bool]:
    """Whether one of these parts stands in a key."""
    return lambda keys: any(part in key for key in keys for part in parts)


# (what a file is, how its keys look, why it is not converted): of files that otherwise look like a family that is known,
TRAITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "DINOv3",
        lambda k: _has("storage_tokens", "bias_mask")(k) or {"embeddings.register_tokens", "embeddings.patch_embeddings.weight"} <= set(k),
        "its positions are rotary (RoPE), which no model here has",
    ),
    ("a ViT with rotary positions (RoPE), as EVA-02", _has("rope.", "rope_", "rotary", "inv_freq"), "no model here has them"),
    ("Swin", _has("relative_position_bias_table"), "its attention is windowed, which no model here is"),
    ("BEiT", lambda k: any(key.endswith(("gamma_1", "attn.q_bias")) or "relative_position_bias" in key for key in k),
     "its attention has relative positions"),
    ("SAM or ViTDet", _has(".rel_pos_h"), "its attention has relative positions"),
    ("a ViT with gated MLPs (SwiGLU), as DINOv2's giant", _has(".mlp.w12.", ".mlp.w1.", ".mlp.fc1_g.", ".mlp.weights_in."),
     "no model here has them"),
    ("a ViT that normalizes queries and keys", _has("attn.q_norm."), "no model here does"),
    ("a ViT with a norm before its blocks, as CLIP's", lambda k: "norm_pre.weight" in k, "no model here has one"),
    ("a shard of FSDP", _has("flat_param"), "its parameters are flattened: save a full state dict (StateDictType.FULL_STATE_DICT)"),
    ("a model with LoRA adapters", _has("lora_A", "lora_B", ".lora_"), "merge them into the weights first"),
    ("a quantized model", _has("_packed_params", ".qweight", ".SCB", ".absmax"), "give the file of the model before it was quantized"),
    ("a pruned model", _has(".weight_mask"), "make the pruning permanent first (torch.nn.utils.prune.remove)"),
)  # fmt: skip
# and of all others.
OTHER_FAMILIES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("DINO or iBOT", _has("last_layer"), "it holds no whole encoder of theirs"),
    (
        "CLIP",
        lambda k: any(key.startswith(("visual.", "vision_model.", "text_model.", "transformer.resblocks")) for key in k),
        "its encoder has a norm before the blocks and another activation",
    ),
    ("ConvNeXt", _has("dwconv"), "it has no tokens"),
    (
        "a ResNet of another kind",
        lambda k: {"conv1.weight", "layer1.0.conv2.weight"} <= set(k),
        "only bottlenecks with a classifier are read",
    ),
    ("a language model", _has("embed_tokens.", "word_embeddings.", "wte."), "it reads no pictures"),
    ("a diffusion model", _has("diffusion_model.", "down_blocks."), "it has no encoder of pictures"),
)
KNOWN_FAMILIES = "MultiMAE, MultiViT, MAE, CrossMAE, DINO, iBOT, plain ViTs and ResNets"


def family_of(state: Mapping[str, Any], allow: Container[str] = ()) -> tuple[Family | None, str, str]:
    """(the family or None, its name, why it cannot be converted; empty if it can) of the keys that `allow` does not leave out."""
    names = {name for key, name in model_names(state).items() if name not in allow and key not in allow}
    other = next(((name, reason) for name, looks, reason in TRAITS if looks(names)), None)
    found = None if other else next((family for family in FAMILIES if family.looks(names)), None)
    if found is not None:
        return found, found.name, ""
    other = other or next(((name, reason) for name, looks, reason in OTHER_FAMILIES if looks(names)), None)
    return None, *(other or ("unknown", f"its keys are of no known family: {listed(names)}"))


def source_of(state: Mapping[str, np.ndarray], family: Family, where: str, said: list[str], allow: Container[str] = ()) -> Source:
    """The tensors as the family's rules name them; what `allow` leaves out is among them unread. What was done is added to `said`."""
    names = model_names(state)
    tensors: dict[str, np.ndarray] = {}
    keys: dict[str, str] = {}
    left_out: dict[str, tuple[tuple[int, ...], str]] = {}
    for key, name in names.items():
        reason = next((why for pattern, why in family.left_out if re.fullmatch(pattern, name)), None)
        if state[key].size <= 1 and state[key].dtype.kind in "iub" and not name.endswith(".num_batches_tracked"):
            reason = "a counter beside the weights"
        if name in allow or key in allow:
            reason = "allowed"
        if reason:
            left_out[key] = tuple(state[key].shape), reason
            continue
        if name in tensors:
            raise ConversionError(f"{where}: {keys[name]!r} and {key!r} are both {name!r}; --allow with one of them leaves it out")
        tensors[name], keys[name] = state[key], key
    wrong = [key for key, value in tensors.items() if value.dtype.kind not in "fV" and not key.endswith(".num_batches_tracked")]
    if wrong:
        raise ConversionError(
            f"{where}: {keys[wrong[0]]!r} holds {tensors[wrong[0]].dtype} values, not floating point; "
            f"{allow_flags([re.escape(keys[key]) for key in wrong[:4]])} leaves it out"
        )
    for dtype in sorted({str(value.dtype) for value in tensors.values() if value.dtype.kind in "fV"} - {"float32"}):
        count = sum(str(value.dtype) == dtype for value in tensors.values())
        said.append(f"{count} tensors are {dtype}; they are {'rounded' if dtype == 'float64' else 'widened'} to float32")
    for why in dict.fromkeys(why for _, why in left_out.values() if why != "allowed"):
        these = [key for key, (_, reason) in left_out.items() if reason == why]
        said.append(f"left out {why}: {len(these)} tensors, {these[0]} among them")
    if family.name == "ResNet":
        tensors, folded = resnet.tensors(tensors, where)
        keys = {name: keys.get(name, name) for name in tensors}
        said += folded
    return Source(where, tensors, keys, left_out, family.name)


class Understood(NamedTuple):
    """What a conversion does.

    Attributes:
      family: its name.
      config: of the model.
      rules: every tensor that is converted; those of `source`.
      source: the file's tensors.
      fresh: our paths, with shapes, of what stays at its initialization.
      left_out: the file's keys of what is not read: their shapes, and why.
      said: what was done beside, line by line.
    """

    family: str
    config: dict[str, Any]
    rules: list[Rule]
    source: Source
    fresh: dict[str, tuple[int, ...]]
    left_out: dict[str, tuple[tuple[int, ...], str]]
    said: list[str]


def understand_state(
    state: Mapping[str, np.ndarray], family: Family, where: str, hints: Hints, allow: Allowed | None = None, rules: list[Rule] | None = None
) -> Understood:
    """The config and the rules of the tensors of a file, which must be of this family and whole but for what `allow` names.

    `rules` are given where another model of the same file decided them.
    """
    said: list[str] = []
    allow = allow or Allowed(())
    # What is allowed to be left out must not change what the file is taken for.
    source = source_of(state, family, where, said, allow)
    config: dict[str, Any] = {}
    if rules is None:
        try:
            config = family.infer_config(source, hints)
            rules = family.rules(source, config)
        except ConversionError:
            raise
        except ValueError as error:  # shapes that no modality can have
            raise ConversionError(f"{where}: {error}") from error
    return matched(family, config, rules, source, allow, [*said, *dict.fromkeys(hints.said)])


def matched(family: Family, config: dict[str, Any], rules: list[Rule], source: Source, allow: Allowed, said: list[str]) -> Understood:
    """The rules that find their tensors. ConversionError for what is missing or left over and not allowed to be."""
    where, tensors = source.where, source.tensors
    whole: list[Rule] = []
    fresh: dict[str, tuple[int, ...]] = {}
    missing: list[tuple[str, Rule]] = []
    for rule in rules:
        lacking = [key for key in rule.keys if key not in tensors]
        if not lacking:
            whole.append(rule)
        elif all(path in allow for path in rule.paths) or all(key in allow for key in lacking):
            fresh.update(zip(rule.paths, rule.our_shapes(), strict=True))
        else:
            missing += [(key, rule) for key in lacking]
    problems = []
    if missing:
        remedy = allow_flags(covering({path for _, rule in missing for path in rule.paths}, path_shapes(rules)))
        advice = family.advice or f"{remedy} leaves what they become at its initialization"
        start = f"is {family.name}, and " if family.advice else ""
        problems.append(f"{start}{len(missing)} tensors are missing: {listed(key for key, _ in missing)}; {advice}")
    surplus = tensors.keys() - key_shapes(rules).keys()
    if surplus:
        theirs = listed(source.keys[name] for name in surplus)
        problems.append(f"{len(surplus)} tensors are not part of this model: {theirs}; --allow REGEX leaves out what it names")
    if problems:
        raise ConversionError(f"{where}: {'; and '.join(problems)}")
    expected = key_shapes(whole)
    check_keys(where, tensors, expected)
    return Understood(family.name, config, whole, source, fresh, dict(source.left_out), said)


def names_of(plan: Understood) -> list[str]:
    """Every key and path that `--allow` may have meant."""
    names = [*plan.fresh, *plan.left_out, *plan.source.keys, *plan.source.keys.values()]
    return names + [path for rule in plan.rules for path in rule.paths]
