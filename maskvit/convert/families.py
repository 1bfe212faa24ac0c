"""Which family a file is of, and what becomes of its tensors: the config of its model and the rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from maskvit.checkpoints import covering
from maskvit.convert import distillation, mae, multimae, resnet, vit
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
    Family("MultiMAE", multimae.is_multimae, multimae.infer_config, lambda _, config: multimae.rules(config)),
    Family(
        "MultiViT (MultiMAE's encoder without decoders)",
        multimae.is_multivit,
        multimae.infer_config,
        lambda _, config: multimae.rules(config),
        advice="the file holds an encoder alone; --allow 'outputs/.*' accepts fresh decoders",
    ),
    Family("CrossMAE", mae.is_crossmae, mae.infer_config, lambda source, config: mae.cross_rules(config, mae.crossing_of(source))),
    Family("MAE", mae.is_mae, mae.infer_config, lambda source, config: mae.rules(config, vit.form_of(source).names)),
    Family("ViT", vit.is_vit, vit.infer_config, lambda source, config: vit.rules(config, vit.form_of(source)), vit.LEFT_OUT),
    Family("ResNet", resnet.is_resnet, resnet.infer_config, lambda _, config: resnet.rules(config)),
)
# An encoder that is to become a MAE, because a target was asked for.
FRESH_MAE = Family(
    "MAE's encoder without its decoder",
    vit.is_vit,
    mae.infer_config_with_fresh_decoder,
    lambda source, config: mae.rules(config, vit.form_of(source).names),
    advice="the file holds an encoder alone; --allow 'outputs/.*' accepts a fresh decoder (without --target the encoder is taken alone)",
)
# Both models of self-distillation, where they are asked for.
DISTILLED = Family("DINO or iBOT", distillation.is_distilled, distillation.infer_config, lambda _, config: distillation.rules(config))
# (family, how its keys look, why it is not converted)
OTHER_FAMILIES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("DINO or iBOT", lambda k: any("last_layer" in key for key in k), "it holds no whole encoder of theirs"),
    ("Swin", lambda k: any("relative_position_bias_table" in key for key in k), "its attention is windowed, which no model here is"),
    (
        "CLIP",
        lambda k: any(key.startswith(("visual.", "vision_model.", "text_model.", "transformer.resblocks")) for key in k),
        "its encoder has a norm before the blocks and another activation",
    ),
    ("BEiT", lambda k: any(key.endswith(("gamma_1", "attn.q_bias")) for key in k), "its attention has relative positions"),
    ("ConvNeXt", lambda k: any("dwconv" in key for key in k), "it has no tokens"),
)
KNOWN_FAMILIES = "MultiMAE, MultiViT, MAE, CrossMAE, DINO, iBOT, plain ViTs and ResNets"


def family_of(state: Mapping[str, Any], allow: Allowed | None = None) -> tuple[Family | None, str, str]:
    """(the family or None, its name, why it cannot be converted; empty if it can) of the keys that `allow` does not leave out."""
    allow = allow or Allowed(())
    names = {name for key, name in vit.without_prefixes(list(state)).items() if name not in allow and key not in allow}
    found = next((family for family in FAMILIES if family.looks(names)), None)
    if found is not None:
        return found, found.name, ""
    other = next(((name, reason) for name, looks, reason in OTHER_FAMILIES if looks(names)), ("unknown", "its keys are of no known family"))
    return None, *other


def source_of(state: Mapping[str, np.ndarray], family: Family, where: str, said: list[str]) -> Source:
    """The tensors as the family's rules name them. What was done is added to `said`."""
    names = vit.without_prefixes(list(state))
    tensors: dict[str, np.ndarray] = {}
    keys: dict[str, str] = {}
    left_out: dict[str, tuple[tuple[int, ...], str]] = {}
    for key, name in names.items():
        reason = next((why for pattern, why in family.left_out if re.fullmatch(pattern, name)), None)
        if reason:
            left_out[key] = tuple(state[key].shape), reason
            continue
        if name in tensors:
            raise ConversionError(f"{where}: {keys[name]!r} and {key!r} are both {name!r}; which is meant?")
        tensors[name], keys[name] = state[key], key
    wrong = [key for key, value in tensors.items() if value.dtype.kind not in "fV" and not key.endswith(".num_batches_tracked")]
    if wrong:
        raise ConversionError(f"{where}: {keys[wrong[0]]!r} holds {tensors[wrong[0]].dtype} values, not floating point")
    for dtype in sorted({str(value.dtype) for value in tensors.values() if value.dtype.kind in "fV"} - {"float32"}):
        count = sum(str(value.dtype) == dtype for value in tensors.values())
        said.append(f"{count} tensors are {dtype}; they are {'rounded' if dtype == 'float64' else 'widened'} to float32")
    for why in dict.fromkeys(why for _, why in left_out.values()):
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
      fresh: our paths, with shapes, of what stays at its initialisation.
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
    source = source_of(state, family, where, said)
    # What is allowed to be left out must not change what the file is taken for.
    unread = {name for name in source.tensors if name in allow or source.keys[name] in allow}
    described = source._replace(tensors={name: value for name, value in source.tensors.items() if name not in unread})
    config: dict[str, Any] = {}
    if rules is None:
        try:
            config = family.infer_config(described, hints)
            rules = family.rules(described, config)
        except ConversionError:
            raise
        except ValueError as error:  # shapes that no modality can have
            raise ConversionError(f"{where}: {error}") from error
    return _matched(family, config, rules, source, unread, allow, said)


def _matched(
    family: Family, config: dict[str, Any], rules: list[Rule], source: Source, unread: set[str], allow: Allowed, said: list[str]
) -> Understood:
    """The rules that find their tensors. ConversionError for what is missing or left over and not allowed to be."""
    where, tensors = source.where, {name: value for name, value in source.tensors.items() if name not in unread}
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
    if missing:
        remedy = allow_flags(covering({path for _, rule in missing for path in rule.paths}, path_shapes(rules)))
        advice = family.advice or f"{remedy} leaves what they become at its initialisation"
        start = f"is {family.name}, and " if family.advice else ""
        raise ConversionError(f"{where}: {start}{len(missing)} tensors are missing: {listed(key for key, _ in missing)}; {advice}")
    expected = key_shapes(whole)
    surplus = tensors.keys() - expected.keys()
    if surplus:
        raise ConversionError(
            f"{where}: {len(surplus)} tensors are not part of this model: {listed(source.keys[name] for name in surplus)}; "
            "--allow REGEX leaves out what it names"
        )
    check_keys(where, tensors, expected)
    left_out = dict(source.left_out)
    left_out |= {source.keys[name]: (tuple(source.tensors[name].shape), "allowed") for name in unread}
    return Understood(family.name, config, whole, source._replace(tensors=tensors), fresh, left_out, said)


def names_of(plan: Understood) -> list[str]:
    """Every key and path that `--allow` may have meant."""
    names = [*plan.fresh, *plan.left_out, *plan.source.keys, *plan.source.keys.values()]
    return names + [path for rule in plan.rules for path in rule.paths]
