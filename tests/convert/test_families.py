"""Every family in and out: each key used once, values where they belong, import, export, import the same to the bit."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import maskvit
from maskvit import convert
from maskvit.checkpoints import load_objective_state, load_params, with_stored_teacher
from maskvit.convert.families import DISTILLED, FAMILIES, family_of, understand_state
from maskvit.convert.reader import ConversionError, read_checkpoint
from maskvit.convert.rules import path_shapes, to_ours
from maskvit.convert.source import Hints
from maskvit.core.types import tree_paths
from maskvit.features import extract
from maskvit.objectives import build_objective

# (file, how it is imported, the layout it goes back to)
ROUND_TRIPS = {
    "MultiMAE": ("multimae_tiny_public.pth", dict(num_heads=3, decoder_num_heads=4), "multimae"),
    "MAE": ("mae_tiny_full.pth", dict(num_heads=3, decoder_num_heads=4, target="normalized"), "mae"),
    "MAE at Hugging Face": ("mae_tiny_full.pth", dict(num_heads=3, decoder_num_heads=4, target="raw"), "huggingface"),
    "MAE fine-tuned": ("mae_tiny_finetuned.pth", dict(num_heads=3), "timm"),
    "CrossMAE": ("crossmae_tiny.pth", dict(num_heads=3, decoder_num_heads=4, target="normalized"), "crossmae"),
    "iBOT, teacher": ("ibot_tiny.pth", dict(num_heads=3), "timm"),
    "iBOT, student at Hugging Face": ("ibot_tiny.pth", dict(num_heads=3, model="student"), "huggingface"),
    "iBOT, both": ("ibot_tiny.pth", dict(num_heads=3, model="both"), "ibot"),
}


def equal(a, b) -> bool:
    a, b = tree_paths(a), tree_paths(b)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip(name, fixtures, tmp_path):
    file, options, layout = ROUND_TRIPS[name]
    convert.convert(fixtures / file, tmp_path / "ours", **options)
    convert.export(tmp_path / "ours", tmp_path / "back" / "x.safetensors", layout)
    convert.convert(tmp_path / "back" / "x.safetensors", tmp_path / "again", **options)
    first, second = load_params(tmp_path / "ours"), load_params(tmp_path / "again")
    assert equal(first[0], second[0]) and first[1]["config"] == second[1]["config"]
    assert equal(load_objective_state(tmp_path / "ours"), load_objective_state(tmp_path / "again"))
    theirs = read_checkpoint(fixtures / file)
    back = load_file(tmp_path / "back" / "x.safetensors")
    report = (tmp_path / "back" / "x.safetensors.conversion.txt").read_text()
    assert all(f" {key} (" in report for key in back)
    if layout == "ibot":
        flat = {f"{part}.{key}": value for part in ("student", "teacher", "ibot_loss") for key, value in theirs[part].items()}
        assert flat.keys() == back.keys() and all(np.array_equal(flat[key], back[key]) for key in flat)
    elif layout in ("multimae", "mae", "crossmae"):
        assert theirs["model"].keys() == back.keys() and all(np.array_equal(theirs["model"][key], back[key]) for key in back)


def test_pth_has_the_form_of_the_reference(fixtures, tmp_path):
    torch = pytest.importorskip("torch")
    convert.convert(fixtures / "ibot_tiny.pth", tmp_path / "ours", 3, model="both")
    convert.export(tmp_path / "ours", tmp_path / "x.pth", "ibot")
    back, theirs = torch.load(tmp_path / "x.pth", weights_only=True), read_checkpoint(fixtures / "ibot_tiny.pth")
    assert back.keys() == {"student", "teacher", "ibot_loss", "maskvit"} and back["ibot_loss"]["center2"].shape == (1, 1, 24)
    for part in ("student", "teacher"):
        assert back[part].keys() == theirs[part].keys() and all(np.array_equal(back[part][k].numpy(), theirs[part][k]) for k in back[part])


# ------------------------------------------------------------------------------------------ full size


def of_shapes(fixtures, name: str) -> dict[str, np.ndarray]:
    """Every tensor of a real model, without its memory."""
    shapes = json.loads((fixtures / f"{name}_state_dict_shapes.json").read_text())
    return {key: np.broadcast_to(np.float16(0), shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "objective", "trained", "tensors"),
    [("mae_b", "mae", 111_655_680, 254), ("crossmae_b", "crossmae", 127_034_268, 347), ("attmask_s", "ibot", 29_280_768, 160)],
)
def test_every_key_is_used_once_at_full_size(name, objective, trained, tensors, fixtures):
    state = of_shapes(fixtures, name)
    family = DISTILLED if objective == "ibot" else family_of(state)[0]
    plan = understand_state(state, family, "file", Hints(target="normalized"))
    used = [key for rule in plan.rules for key in rule.keys]
    assert len(used) == len(set(used)) == len(state) and not plan.fresh and not plan.left_out
    assert {plan.source.keys[key] for key in used} == state.keys()
    shapes = path_shapes(plan.rules)
    paths = [path for rule in plan.rules for path in rule.paths]
    assert len(paths) == len(set(paths)) == tensors
    assert sum(int(np.prod(shape)) for path, shape in shapes.items() if not path.endswith("/pos_embed")) == trained
    assert plan.config["objective"]["name"] == objective
    sizes = plan.config["objective"]["encoder"]
    assert (sizes["width"], sizes["depth"], sizes["heads"]) == ((384, 12, 6) if objective == "ibot" else (768, 12, 12))
    if objective != "ibot":
        decoder = plan.config["objective"]["decoder"]
        assert (decoder["width"], decoder["depth"], decoder["heads"]) == (512, 8 if objective == "mae" else 12, 16)


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("mae_tiny_full.pth", dict(target="raw", decoder_num_heads=4)),
        ("crossmae_tiny.pth", dict(target="normalized", decoder_num_heads=4)),
        ("ibot_tiny.pth", dict(model="both")),
        ("mae_tiny_finetuned.pth", {}),
    ],
)
def test_the_tree_is_that_of_the_objective(file, options, fixtures, tmp_path):
    """Nothing of a model is left to its initialization unsaid."""
    metadata = convert.convert(fixtures / file, tmp_path / "ours", num_heads=3, **options)
    objective = build_objective(metadata["config"])
    params, state = jax.eval_shape(objective.init, jax.random.key(0))
    shapes = lambda tree: {path: tuple(leaf.shape) for path, leaf in tree_paths(tree).items()}  # noqa: E731
    assert shapes(params) == shapes(load_params(tmp_path / "ours")[0])
    assert shapes(state) == shapes(load_objective_state(tmp_path / "ours"))


# ------------------------------------------------------------------------------------------ values where they belong


def test_mae_values(fixtures, tmp_path):
    convert.convert(fixtures / "mae_tiny_full.pth", tmp_path / "ours", 3, 4, target="raw")
    params, metadata = load_params(tmp_path / "ours")
    state = read_checkpoint(fixtures / "mae_tiny_full.pth")["model"]
    assert metadata["config"]["objective"]["outputs"] == ["rgb"] and metadata["source"]["family"] == "MAE"
    decoder = params["outputs"]["rgb"]
    np.testing.assert_array_equal(decoder["pos_embed"][2, 1], state["decoder_pos_embed"][0, 1 + 2 * 4 + 1])
    np.testing.assert_array_equal(params["inputs"]["rgb"]["pos_embed"][3, 0], state["pos_embed"][0, 13])
    np.testing.assert_array_equal(decoder["context_proj"]["kernel"], state["decoder_embed.weight"].T)
    np.testing.assert_array_equal(decoder["head"]["kernel"], state["decoder_pred.weight"].T)
    np.testing.assert_array_equal(params["norm"]["scale"], state["norm.weight"])
    np.testing.assert_array_equal(params["global_tokens"], state["cls_token"][0])


def test_crossmae_values(fixtures, tmp_path):
    convert.convert(fixtures / "crossmae_tiny.pth", tmp_path / "ours", 3, 4, target="normalized")
    params, metadata = load_params(tmp_path / "ours")
    state = read_checkpoint(fixtures / "crossmae_tiny.pth")["model"]
    decoder = params["outputs"]["norm_rgb"]
    np.testing.assert_array_equal(decoder["feature_weights"], state["wfm.linear.weight"])
    np.testing.assert_array_equal(decoder["context_norm_01"]["bias"], state["dec_norms.1.bias"])
    np.testing.assert_array_equal(decoder["block_01"]["cross_attn"]["kv"]["kernel"], state["decoder_blocks.1.cross_attn.kv.weight"].T)
    assert "norm" not in params and "context_proj" not in decoder and metadata["source"]["epochs_done"] == 800


def test_ibot_values(fixtures, tmp_path):
    convert.convert(fixtures / "ibot_tiny.pth", tmp_path / "ours", 3, model="both")
    params, kept = load_params(tmp_path / "ours")[0], load_objective_state(tmp_path / "ours")
    whole = read_checkpoint(fixtures / "ibot_tiny.pth")
    student, teacher = whole["student"], whole["teacher"]
    np.testing.assert_array_equal(params["inputs"]["rgb"]["mask_embed"], student["module.backbone.masked_embed"][0])
    np.testing.assert_array_equal(params["inputs"]["rgb"]["learned_pos_embed"][1, 2], student["module.backbone.pos_embed"][0, 7])
    np.testing.assert_array_equal(params["global_pos_embed"], student["module.backbone.pos_embed"][0, :1])
    np.testing.assert_array_equal(kept["teacher"]["projection"]["prototypes"]["kernel"], teacher["head.last_layer.weight_v"].T)
    np.testing.assert_array_equal(kept["teacher"]["projection"]["prototypes"]["scale"], teacher["head.last_layer.weight_g"][:, 0])
    np.testing.assert_array_equal(kept["patch_center"], whole["ibot_loss"]["center2"][0, 0])
    assert "mask_embed" not in kept["teacher"]["inputs"]["rgb"] and "patch_prototypes" not in params["projection"]


def test_both_models_open_as_the_teacher(fixtures, tmp_path):
    """`maskvit.load` of student and teacher gives what the teacher's encoder alone gives."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(picture).save(tmp_path / "pictures" / "a.png")
    features = []
    for model in ("both", "teacher"):
        convert.convert(fixtures / "ibot_tiny.pth", tmp_path / model, 3, model=model)
        ((_, _, found),) = extract(maskvit.load(tmp_path / model), [tmp_path / "pictures" / "a.png"], batch_size=1)
        features.append(found)
    for name in ("global", "mean"):
        np.testing.assert_allclose(features[0][name], features[1][name], rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_with_the_imported_teacher(fixtures, tmp_path):
    for model in ("both", "teacher"):
        metadata = convert.convert(fixtures / "ibot_tiny.pth", tmp_path / model, 3, model=model)
        if model == "both":
            objective = build_objective(metadata["config"])
    params = load_params(tmp_path / "both")[0]
    fresh = jax.device_get(objective.init_state(params))
    state = with_stored_teacher(fresh, tmp_path / "both")
    assert equal(state, load_objective_state(tmp_path / "both")) and not equal(state, fresh)
    assert with_stored_teacher(fresh, tmp_path / "teacher") is fresh  # a plain encoder has none
    assert with_stored_teacher({}, tmp_path / "both") == {}  # nor does another objective want one


def test_which_of_two_models(fixtures, tmp_path):
    whole = read_checkpoint(fixtures / "ibot_tiny.pth")
    for model, key in (("teacher", "backbone."), ("student", "module.backbone.")):
        convert.convert(fixtures / "ibot_tiny.pth", tmp_path / model, 3, model=model)
        params, metadata = load_params(tmp_path / model)
        np.testing.assert_array_equal(params["encoder"]["block_02"]["norm1"]["scale"], whole[model][f"{key}blocks.2.norm1.weight"])
        assert metadata["source"]["family"] == "ViT" and "projection" not in params
        said = (tmp_path / model / "conversion.txt").read_text()
        assert f"left out  {'module.' if model == 'student' else ''}head.last_layer2.weight_g" in said
    with pytest.raises(ConversionError, match="--model both needs a file with a student and a teacher; this one is MAE"):
        convert.convert(fixtures / "mae_tiny_full.pth", tmp_path / "x", 3, 4, target="raw", model="both")


def untied(fixtures) -> dict:
    whole = {part: dict(value) for part, value in read_checkpoint(fixtures / "ibot_tiny.pth").items() if isinstance(value, dict)}
    for part, prefix in (("student", "module."), ("teacher", "")):
        whole[part][f"{prefix}head.last_layer2.weight_v"] = whole[part][f"{prefix}head.last_layer2.weight_v"] + 1
    return {f"{part}.{key}": np.ascontiguousarray(value) for part in whole for key, value in whole[part].items()}


def test_a_head_of_its_own_for_patches(fixtures, tmp_path):
    flat = untied(fixtures)
    save_file(flat, tmp_path / "x.safetensors")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3, model="both")
    params, kept = load_params(tmp_path / "ours")[0], load_objective_state(tmp_path / "ours")
    first, second = params["projection"]["prototypes"]["kernel"], params["projection"]["patch_prototypes"]["kernel"]
    np.testing.assert_array_equal(second, first + 1)
    assert kept["teacher"]["projection"]["patch_prototypes"]["kernel"].shape == (16, 24)
    teacher = {key: value for key, value in flat.items() if key.startswith("teacher.")}
    flat |= {key: teacher[key.replace("last_layer2", "last_layer")] for key in teacher if "last_layer2" in key}
    flat |= {key: flat[key.replace("last_layer2", "last_layer")] for key in flat if key.startswith("student.") and "last_layer2" in key}
    flat["teacher.head.last_layer2.weight_v"] = flat["teacher.head.last_layer2.weight_v"] + 1
    save_file(flat, tmp_path / "y.safetensors")  # shared in the student, not in the teacher
    with pytest.raises(ConversionError, match="teacher.*'head.last_layer.weight_v' and 'head.last_layer2.weight_v' differ"):
        convert.convert(tmp_path / "y.safetensors", tmp_path / "other", 3, model="both")
    assert not (tmp_path / "other").exists()


def test_dino_has_one_head_and_no_token_for_hidden_patches(fixtures, tmp_path):
    whole = read_checkpoint(fixtures / "ibot_tiny.pth")
    flat = {f"{part}.{key}": np.ascontiguousarray(value) for part in ("student", "teacher") for key, value in whole[part].items()}
    flat = {key: value for key, value in flat.items() if "last_layer2" not in key and "masked_embed" not in key}
    flat["dino_loss.center"] = np.ascontiguousarray(whole["ibot_loss"]["center"])
    save_file(flat, tmp_path / "x.safetensors")
    metadata = convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3, model="both")
    assert metadata["source"]["family"] == "DINO" and metadata["config"]["objective"]["name"] == "dino"
    assert load_objective_state(tmp_path / "ours").keys() == {"teacher", "center"}
    convert.export(tmp_path / "ours", tmp_path / "back.safetensors", "dino")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == flat.keys() and all(np.array_equal(back[key], flat[key]) for key in back)
    with pytest.raises(ConversionError, match="of the objective 'dino', which has no form in the layout 'ibot'"):
        convert.export(tmp_path / "ours", tmp_path / "z.safetensors", "ibot")


def test_trees_of_self_attention_and_of_the_last_block_alone(fixtures):
    """Two of CrossMAE's variants, by their keys."""
    state = dict(read_checkpoint(fixtures / "crossmae_tiny.pth")["model"])
    rng = np.random.default_rng(0)
    for i in range(2):
        for name, shape in (("norm0", (32,)), ("self_attn.qkv", (96, 32)), ("self_attn.proj", (32, 32))):
            state[f"decoder_blocks.{i}.{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
            state[f"decoder_blocks.{i}.{name}.bias"] = rng.standard_normal(shape[:1]).astype(np.float32)
    del state["wfm.linear.weight"]
    plan = understand_state(state, family_of(state)[0], "file", Hints(3, 4, "raw"))
    params = to_ours(plan.rules, plan.source.tensors, "file")
    decoder = params["outputs"]["rgb"]
    assert "feature_weights" not in decoder and decoder["block_01"]["self_attn"]["qkv"]["kernel"].shape == (32, 96)
    assert plan.config["objective"]["decoder"].items() >= dict(name="crossmae", weighted=False, self_attention=True).items()
    for columns, args, options in (
        (3, {}, dict(use_input=False)),
        (2, dict(use_fm=[0, 2], use_input=False), dict(features=(0, 2), use_input=False)),
        (2, dict(use_fm=[-1], use_input=True), dict(features=(-1,), use_input=True)),
    ):
        state["wfm.linear.weight"] = np.zeros((2, columns), np.float32)
        plan = understand_state(state, family_of(state)[0], "file", Hints(3, 4, "raw", args))
        assert plan.config["objective"]["decoder"].items() >= options.items()
    with pytest.raises(ConversionError, match="weighs 2 features of an encoder of 3 blocks, and the file does not say which"):
        understand_state(state, family_of(state)[0], "file", Hints(3, 4, "raw"))


def test_families_are_known_by_one_table(fixtures):
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for file, name in (("mae_tiny_full", "MAE"), ("crossmae_tiny", "CrossMAE"), ("mae_tiny_finetuned", "ViT")):
        assert family_of(read_checkpoint(fixtures / f"{file}.pth")["model"])[1] == name
