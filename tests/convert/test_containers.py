"""Files as others' training programs write them: wrappers, bookkeeping, several models, facts beside the weights, and what is assumed."""

from __future__ import annotations

import collections
import json
import pathlib
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maskvit import convert
from maskvit.checkpoints import load_objective_state, load_params
from maskvit.convert.containers import find_models, model_names
from maskvit.convert.families import family_of
from maskvit.convert.reader import ConversionError, read_checkpoint
from maskvit.core.types import tree_paths
from tests.convert.test_reader import global_, write
from tests.convert.test_vit_import import DEPTH, HEAD, WIDTH, hugging_face, timm_state

torch = pytest.importorskip("torch")


def tensors(state):
    return collections.OrderedDict((key, torch.tensor(value)) for key, value in state.items())


def understood(path, heads=3, **options):
    return convert.understand(convert.open_checkpoint(path, options.pop("which", "teacher")), heads, **options)


def saved(path, content):
    torch.save(content, path)
    return path


def same_tensors(path, state, **options) -> bool:
    """Whether the model found in a file has these tensors under these names."""
    found = understood(path, **options).source.tensors
    return found.keys() == state.keys() and all(np.array_equal(found[key], state[key]) for key in state)


# ------------------------------------------------------------------------------------------ wrappers


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"module._orig_mod.module._orig_mod.{key}",
        lambda key: f"_forward_module.model.{key}",
        lambda key: f"_fsdp_wrapped_module.{key}".replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda key: key.replace("blocks.0.", "blocks.0._orig_mod."),
        lambda key: f"model.backbone.module.{key}",
        lambda key: f"net.encoder.{key}",
        lambda key: f"lightning.student_net.trunk.{key}",
        lambda key: key.replace("blocks.", "blocks.0.", 1) if key.startswith("blocks.") else key,
    ],
)
def test_wrappers_in_any_order_and_anywhere(wrap, tmp_path):
    state = timm_state()
    assert same_tensors(saved(tmp_path / "x.pth", {"model": tensors({wrap(key): value for key, value in state.items()})}), state)


def test_what_lies_beside_the_wrapped_model_keeps_its_own_name():
    names = model_names(
        ["model.backbone.patch_embed.proj.weight", "model.head.mlp.0.weight", "criterion.weight", "model.backbone.norm.bias"]
    )
    assert list(names.values()) == ["patch_embed.proj.weight", "head.mlp.0.weight", "criterion.weight", "norm.bias"]


def test_weight_normalization_of_torch_2():
    keys = ["backbone.patch_embed.proj.weight", "head.last_layer.parametrizations.weight.original1"]
    assert list(model_names(keys).values()) == ["patch_embed.proj.weight", "head.last_layer.weight_v"]


# ------------------------------------------------------------------------------------------ containers


def module_of(state):
    """A module with these tensors, to be pickled whole."""
    root = torch.nn.Module()
    for key, value in state.items():
        part, (*parents, last) = root, key.split(".")
        for name in parents:
            if name not in part._modules:
                part.add_module(name, torch.nn.Module())
            part = part._modules[name]
        part.register_parameter(last, torch.nn.Parameter(value))
    return root


@pytest.mark.parametrize(
    "content",
    [
        lambda t: {"module": t, "ds_config": {"zero": 1}, "ds_version": "0.14", "buffer_names": []},
        lambda t: {"anything": t},
        lambda t: {"a": {"b": {"weights": t}}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
        lambda t: [t, {"epoch": 3}],
        lambda t: {**t, "epoch": 3, "best": 0.5},
        lambda t: {"model": t, "head": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}},
        lambda t: {"model_ema": t, "epoch": 3},
        lambda t: {"state_dict": t, "model": collections.OrderedDict(t)},
        lambda t: {"averaged": {"n_averaged": torch.tensor(7), **{f"module.{key}": value for key, value in t.items()}}},
        lambda t: {"state_dict": {"loss.weight": torch.ones(3), "ema_model.x": torch.ones(1)}, "weights": t},
        lambda t: module_of(t),
        lambda t: {"model": module_of(t), "epoch": 3},
    ],
)
def test_a_single_model_counts_under_any_name(content, tmp_path):
    state = timm_state()
    assert same_tensors(saved(tmp_path / "x.pth", content(tensors(state))), state)


@pytest.mark.parametrize(
    "names",
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema.state_dict"), ("network.raw", "swa"), ("model", "ema_model")],
)
def test_the_average_is_taken_and_said_and_the_other_can_be_asked_for(names, tmp_path, caplog):
    caplog.set_level("INFO", "maskvit")
    raw, average = timm_state(0), timm_state(1)
    content: dict = {"epoch": 3}
    for name, state in zip(names, (raw, average), strict=True):
        first, _, second = name.partition(".")
        content[first] = {second: tensors(state)} if second else tensors(state)
    path = saved(tmp_path / "x.pth", content)
    assert same_tensors(path, average) and same_tensors(path, raw, which=names[0]) and same_tensors(path, raw, which="student")
    convert.convert(path, tmp_path / "ours", 3)
    line = f"holds 2 models: {', '.join(sorted(names))}; taken is {names[1]} (running averages of the weights); --model {names[0]} takes"
    assert line in caplog.text and line in (tmp_path / "ours" / "conversion.txt").read_text()
    last = names[0].rpartition(".")[2]
    with pytest.raises(ConversionError, match=f"--model is 'other'; known: teacher, student, both, .*{last}"):
        understood(path, which="other")


def test_what_is_not_read_is_named(tmp_path):
    content = {"model": tensors(timm_state()), "head": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}}
    flat = {f"online.{key}": value for key, value in timm_state().items()} | {"ema.decay": np.ones(1, np.float32)}
    flat |= {f"ema.{key}": value for key, value in timm_state(1).items()} | {"initted": np.ones(1, np.float32)}
    assert "not read: head (2 tensors)" in understood(saved(tmp_path / "x.pth", content)).said
    save_file({key: value for key, value in flat.items() if key != "ema.decay"}, tmp_path / "x.safetensors")
    assert "not read: beside them (1 tensors)" in understood(tmp_path / "x.safetensors").said


def test_moments_that_are_not_read_are_named(tmp_path, caplog):
    caplog.set_level("INFO", "maskvit")
    moments = {"state": {0: {"step": 5, "exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
    path = saved(tmp_path / "x.pth", {"model": tensors(timm_state()), "optimizer": moments})
    convert.convert(path, tmp_path / "ours", 3)
    assert "the optimizer's moments are left out: they come along for MultiMAE's pretraining alone" in caplog.text


def test_models_that_no_name_tells_apart_are_asked_for(tmp_path):
    flat = {f"module.base_encoder.{key}": value for key, value in timm_state(0).items()}
    flat |= {f"module.momentum_encoder.{key}": value for key, value in timm_state(1).items()}
    path = saved(tmp_path / "x.pth", {"state_dict": tensors(flat)})
    with pytest.raises(ConversionError, match=r"holds 2 models: state_dict.base_encoder, state_dict.momentum_encoder; --model NAME says"):
        understood(path)
    assert same_tensors(path, timm_state(0), which="base_encoder")


def test_student_and_teacher_in_one_flat_dict_of_dinov2(tmp_path):
    flat = {f"{part}.backbone.{key}": value for part, seed in (("student", 0), ("teacher", 1)) for key, value in timm_state(seed).items()}
    flat |= {f"teacher.dino_{key}": value for key, value in HEAD.items()} | {"dino_loss.center": np.zeros((1, 7), np.float32)}
    path = saved(tmp_path / "x.pth", {"model": tensors(flat), "iteration": 12})
    assert same_tensors(path, timm_state(1)) and same_tensors(path, timm_state(0), which="student")
    assert find_models({"model": flat}).keys() == {"model.student", "model.teacher", "model.dino_loss"}


# ------------------------------------------------------------------------------------------ bookkeeping


class Odd:
    """Of a module that no reader knows."""


def test_bookkeeping_becomes_stand_ins_and_is_named(tmp_path, caplog):
    caplog.set_level("INFO", "maskvit")
    state = timm_state()
    args = types.SimpleNamespace(output=pathlib.PurePosixPath("/x"), lr=0.1)
    content = {
        "model": tensors(state),
        "best": np.float64(71.25),
        "curve": np.arange(3),
        "args": args,
        "counts": collections.Counter("aab"),
        "seen": {1, 2},
        "frozen": frozenset("ab"),
        "queue": collections.deque([1]),
        "by": collections.defaultdict(list, a=[1]),
        "rng": np.random.default_rng(0).bit_generator.state,
        "generator": np.random.RandomState(0),
        "where": torch.device("cpu"),
        "size": torch.Size([2]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scheduler": torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict(),
        "per_size": {(224, 224): 1},
    }
    path = saved(tmp_path / "x.pth", content)
    assert same_tensors(path, state)
    convert.convert(path, tmp_path / "ours", 3)
    assert "left out of the file's bookkeeping: args.output (pathlib.PurePosixPath), best (numpy" in caplog.text


def test_unknown_classes_are_refused_together_and_can_be_allowed(tmp_path):
    state = timm_state()
    path = saved(tmp_path / "x.pth", {"model": tensors(state), "a": Odd(), "hook": print})
    with pytest.raises(ConversionError, match=r"asks for tests.convert.test_containers.Odd, __builtin__.print, which .*; nothing was run"):
        read_checkpoint(path)
    flags = (r"tests\.convert\.test_containers\.Odd", r"__builtin__\.print")
    metadata = convert.convert(path, tmp_path / "ours", 3, allow=flags)
    assert metadata["source"]["family"] == "ViT"


def test_settings_objects_of_others_are_read(tmp_path):
    """As omegaconf pickles a DictConfig: values in nodes, under `_content`."""
    node = global_("omegaconf.nodes", "AnyNode") + b")R}X\x04\x00\x00\x00_valK\x06sb"
    config = global_("omegaconf.dictconfig", "DictConfig") + b")R}X\x08\x00\x00\x00_content}X\x09\x00\x00\x00num_heads" + node + b"ssb"
    content = read_checkpoint(write(tmp_path / "x.pth", b"\x80\x02}X\x03\x00\x00\x00cfg" + config + b"s.", {}))
    from maskvit.convert.facts import settings_in

    assert settings_in(content)["num_heads"] == 6


# ------------------------------------------------------------------------------------------ what shapes do not tell


def wide(tmp_path, **options):
    """A ViT on a grid of 2 x 8, and its file."""
    state = timm_state() | {"pos_embed": np.random.default_rng(1).standard_normal((1, 17, WIDTH)).astype(np.float32)}
    save_file(state, tmp_path / "x.safetensors", **options)
    return state, tmp_path / "x.safetensors"


def test_a_grid_is_assumed_to_be_square_and_said(tmp_path):
    _, path = wide(tmp_path)
    plan = understood(path)
    assert plan.config["image_size"] == (16, 16)
    assert "assumed: a square grid of 4 x 4 positions; --grid ROWSxCOLUMNS changes it" in plan.said
    plan = understood(path, grid=(2, 8))
    assert plan.config["image_size"] == (8, 32) and not any("grid" in line for line in plan.said)
    with pytest.raises(ConversionError, match="--grid 3x5 has 15 places, but its table 17 rows"):
        understood(path, grid=(3, 5))


@pytest.mark.parametrize("fact", [{"img_size": [8, 32]}, {"input_size": (3, 8, 32)}, {"image_size": [8, 32]}])
def test_a_grid_that_the_file_states(fact, tmp_path):
    import argparse

    state, _ = wide(tmp_path)
    path = saved(tmp_path / "x.pth", {"model": tensors(state), "args": argparse.Namespace(**fact)})
    assert understood(path).config["image_size"] == (8, 32)


def test_a_grid_that_is_not_square_is_asked_for(tmp_path):
    save_file(timm_state() | {"pos_embed": np.zeros((1, 7, WIDTH), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="7 rows with the class token, which are no square grid: give --grid ROWSxCOLUMNS"):
        understood(tmp_path / "x.safetensors")
    assert understood(tmp_path / "x.safetensors", grid=(2, 3)).config["image_size"] == (8, 12)


@pytest.mark.parametrize("layout", ["timm", "multimae", "huggingface"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_wide_exports_come_back(layout, suffix, tmp_path):
    _, path = wide(tmp_path)
    rgb = dict(mean=(0.5,), std=(0.25,), scale=1 / 127)
    convert.convert(path, tmp_path / "ours", 3, grid=(2, 8), rgb=rgb)
    allow = ("norm/.*",) if layout == "multimae" else ()
    convert.export(tmp_path / "ours", tmp_path / "hub" / f"x{suffix}", layout, allow=allow)
    options = dict(allow=("outputs/.*",)) if layout == "multimae" else {}
    metadata = convert.convert(tmp_path / "hub" / f"x{suffix}", tmp_path / "again", **options)
    first, second = load_params(tmp_path / "ours"), load_params(tmp_path / "again")
    assert tuple(metadata["config"]["image_size"]) == (8, 32) and metadata["config"]["objective"]["encoder"]["heads"] == 3
    a, b = tree_paths(first[0]), tree_paths(second[0])
    shared = {key for key in a if not key.startswith("norm/")} if layout == "multimae" else set(a)
    assert all(np.array_equal(a[key], b[key]) for key in shared)
    if layout != "multimae":
        found = metadata["config"]["modalities"]["rgb"]
        assert found["scale"] == 1 / 127 and set(found["mean"]) == {0.5} and set(found["std"]) == {0.25}
        assert not any("assumed" in line for line in understood(tmp_path / "hub" / f"x{suffix}", None).said)


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (1280, 16)])
def test_heads_are_assumed_and_said(width, heads):
    from maskvit.convert.source import Hints

    hints = Hints()
    assert hints.heads(width, "file") == heads
    assert hints.said == [f"assumed: {heads} heads in the encoder, as is usual at width {width}; --num-heads changes it"]
    for stated in (Hints(num_heads=heads), Hints(args={"num_heads": heads})):
        assert stated.heads(width, "file") == heads and not stated.said


def channels(tmp_path, count):
    state = timm_state() | {"patch_embed.proj.weight": np.ones((WIDTH, count, 4, 4), np.float32)}
    save_file(state, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("count", "scale", "line"),
    [
        (1, 1 / 255, "assumed: for 1 channel mean 0, std 1, scale 1/255 of stored values; --mean, --std and --scale change them"),
        (10, 1.0, "assumed: for 10 channels mean 0, std 1, scale 1 of stored values; --mean, --std and --scale change them"),
        (3, 1 / 255, "assumed: ImageNet's mean 0.485 0.456 0.406, std 0.229 0.224 0.225, scale 1/255 of stored values; --mean, --std and"),
    ],
)
def test_the_scale_of_the_input_is_assumed_and_said(count, scale, line, tmp_path):
    plan = understood(channels(tmp_path, count))
    assert plan.config["modalities"]["rgb"]["scale"] == scale and any(said.startswith(line) for said in plan.said)
    plan = understood(channels(tmp_path, count), rgb=dict(mean=(0.5,), std=(2.0,), scale=0.1))
    rgb = plan.config["modalities"]["rgb"]
    assert (rgb["mean"], rgb["std"], rgb["scale"]) == ((0.5,), (2.0,), 0.1) and not any("assumed: for" in said for said in plan.said)
    with pytest.raises(ConversionError, match=f"--mean has 2 values for {count} channels"):
        understood(channels(tmp_path, count), rgb=dict(mean=(0.5, 0.4)))


# ------------------------------------------------------------------------------------------ facts beside the weights

HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("preprocessor_config.json", {**HALF, "rescale_factor": 1 / 127.5}, (0.5, 0.5, 1 / 127.5)),
        ("preprocessor_config.json", HALF, (0.5, 0.5, 1 / 255)),
        ("preprocessor_config.json", {**HALF, "do_normalize": False}, (0.0, 1.0, 1 / 255)),
        ("preprocessor_config.json", {**HALF, "do_rescale": False}, (0.5, 0.5, 1.0)),
        ("processor_config.json", {"image_processor": HALF}, (0.5, 0.5, 1 / 255)),
        ("config.json", {"architecture": "vit", "pretrained_cfg": dict(mean=[0.5] * 3, std=[0.5] * 3)}, (0.5, 0.5, 1 / 255)),
        ("config.json", {"architecture": "vit", "mean": [0.5] * 3, "std": [0.5] * 3}, (0.5, 0.5, 1 / 255)),
        ("open_clip_config.json", {"preprocess_cfg": dict(mean=[0.5] * 3, std=[0.5] * 3)}, (0.5, 0.5, 1 / 255)),
    ],
)
def test_preprocessing_beside_the_weights_is_used_and_said(name, content, expected, tmp_path):
    save_file(timm_state(), tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(content))
    plan = understood(tmp_path)
    rgb = plan.config["modalities"]["rgb"]
    assert (rgb["mean"][0], rgb["std"][0], rgb["scale"]) == expected
    assert f"{name}: used for what the tensors do not show" in plan.said and not any("ImageNet" in line for line in plan.said)


@pytest.mark.parametrize(
    "content",
    ["[1, 2", "[]", '{"image_mean": "x", "image_std": [1, 1, 1]}', '{"image_mean": [NaN, 1, 1], "image_std": [1, 1, 1]}',
     '{"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5]}', '{"image_mean": [0, 0, 0], "image_std": [0, 0, 0]}'],
)  # fmt: skip
def test_preprocessing_that_says_nothing_sound(content, tmp_path):
    save_file(timm_state(), tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(content)
    said = understood(tmp_path).said
    assert any("ImageNet's mean" in line for line in said)
    assert any("not used" in line or "holds no mean and deviation" in line for line in said)


@pytest.mark.parametrize("own", ["[", "[]", '{"rgb_mean": [null], "rgb_std": ["x"], "rgb_scale": {}, "num_heads": "3", "image_size": [4]}'])
def test_own_notes_that_say_nothing_sound(own, tmp_path):
    save_file(timm_state(), tmp_path / "x.safetensors", metadata={"format": "pt", "maskvit": own})
    plan = understood(tmp_path / "x.safetensors")
    assert plan.config["image_size"] == (16, 16) and any("ImageNet's mean" in line for line in plan.said)


def test_heads_of_other_models_of_hugging_face(tmp_path):
    save_file(hugging_face(timm_state(scale=True)) | {"embeddings.position_ids": np.arange(17)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="ijepa", hidden_size=WIDTH, num_attention_heads=4)))
    plan = understood(tmp_path, None)
    assert plan.config["objective"]["encoder"]["heads"] == 4 and "embeddings.position_ids" in plan.left_out


def test_the_config_of_another_model_is_not_used(tmp_path):
    save_file(hugging_face(timm_state(scale=True)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="dinov2", hidden_size=768, num_attention_heads=4)))
    plan = understood(tmp_path)
    assert plan.config["objective"]["encoder"] == dict(width=WIDTH, depth=DEPTH, heads=3, mlp_ratio=4.0)
    assert "config.json: of another model (hidden_size 768), and not used" in plan.said


# ------------------------------------------------------------------------------------------ other families


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight", "fc.weight"], "a ResNet of another kind"),
        (["bert.embeddings.word_embeddings.weight"], "a language model"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a diffusion model"),
    ],
)
def test_models_of_other_kinds_are_named(keys, name):
    assert family_of(dict.fromkeys(keys))[:2] == (None, name)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["storage_tokens"], "DINOv3"),
        (["rope.freqs"], "rotary"),
        (["blocks.0.mlp.w12.weight"], "SwiGLU"),
        (["blocks.0.gamma_1"], "BEiT"),
        (["blocks.0.attn.rel_pos_h"], "SAM"),
        (["norm_pre.weight"], "a norm before its blocks"),
        (["blocks.0.attn.q_norm.weight"], "normalizes queries"),
        (["blocks.0.attn.qkv.lora_A.default.weight"], "LoRA"),
        (["_fsdp_wrapped_module._flat_param"], "FSDP"),
    ],
)
def test_other_families_are_named_with_the_reason(more, name):
    keys = [*timm_state(), *more]
    family, found, reason = family_of(dict.fromkeys(keys))
    assert family is None and name in found and reason


def test_what_is_allowed_to_be_left_out_needs_no_floating_point(tmp_path):
    state = timm_state() | {"steps": np.arange(3)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="'steps' holds int64 values, not floating point; --allow 'steps' leaves it out"):
        understood(tmp_path / "x.safetensors")
    assert "steps" in understood(tmp_path / "x.safetensors", allow=("steps",)).left_out


# ------------------------------------------------------------------------------------------ self-distillation, exports, digests


def test_centers_may_be_missing_where_that_is_allowed(fixtures, tmp_path):
    whole = read_checkpoint(fixtures / "ibot_tiny.pth")
    flat = {f"{part}.{key}": np.ascontiguousarray(value) for part in ("student", "teacher") for key, value in whole[part].items()}
    save_file(flat, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=r"2 tensors are missing: center, center2; --allow 'center' --allow 'patch_center' leaves"):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3, model="both")
    for i, allow in enumerate((("center.*",), ("center", "patch_center"))):
        convert.convert(tmp_path / "x.safetensors", tmp_path / str(i), 3, model="both", allow=allow)
        state = load_objective_state(tmp_path / str(i))
        assert not state["center"].any() and state["patch_center"].shape == (24,)
        assert "fresh     objective_state/center (24,)" in (tmp_path / str(i) / "conversion.txt").read_text()


def test_a_decoder_that_is_allowed_to_be_left_out_is_not_written(fixtures, tmp_path):
    convert.convert(fixtures / "mae_tiny_full.pth", tmp_path / "ours", 3, 4, target="raw")
    convert.export(tmp_path / "ours", tmp_path / "hub" / "model.safetensors", "huggingface", allow=("outputs/.*",))
    assert not any("decoder" in key for key in load_file(tmp_path / "hub" / "model.safetensors"))
    written = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert written["architectures"] == ["ViTModel"] and written["model_type"] == "vit"
    with pytest.raises(ConversionError, match=r"--to timm writes its encoder alone"):
        convert.export(tmp_path / "ours", tmp_path / "x.safetensors", "mae", allow=("outputs/.*",))


def test_counts_of_both_sides(fixtures, tmp_path, caplog):
    caplog.set_level("INFO", "maskvit")
    convert.convert(fixtures / "ibot_tiny.pth", tmp_path / "ours", 3)
    convert.export(tmp_path / "ours", tmp_path / "x.safetensors", "timm")
    count = len(load_file(tmp_path / "x.safetensors"))
    assert f"in the layout timm written to {tmp_path / 'x.safetensors'}; {count} tensors converted, 0 left out" in caplog.text
    convert.export(tmp_path / "ours", tmp_path / "y.safetensors", "huggingface")
    assert f"tensors converted to {len(load_file(tmp_path / 'y.safetensors'))}, 0 left out" in caplog.text


def test_a_digest_that_its_name_contradicts(fixtures, tmp_path, caplog):
    caplog.set_level("INFO", "maskvit")
    public = next(iter(convert.PUBLIC_FILES.values())).name
    for name, line in (
        ("vit-deadbeef.pth", "its name says that its SHA-256 begins with deadbeef, but it begins with "),
        (
            public,
            "has the name of a public file (MultiMAE-B, 1600 epochs, with decoders), but another SHA-256: a damaged or changed download?",
        ),
    ):
        (tmp_path / name).write_bytes((fixtures / "multimae_tiny_public.pth").read_bytes())
        assert line in convert.inspect(tmp_path / name, 3, 4)
        convert.convert(tmp_path / name, tmp_path / f"ours_{name}", 3, 4)
        assert line in caplog.text
