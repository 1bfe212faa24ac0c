"""Our checkpoints in others' layouts: encoder transplants, what has no form there, and the shapes that torch expects."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import maskvit
from maskvit import convert, features
from maskvit.checkpoints import load_objective_state, load_params, save_imported
from maskvit.commands import convert as command
from maskvit.convert.reader import ConversionError, read_checkpoint
from maskvit.core.modalities import RGB
from maskvit.core.types import Batch, tree_paths
from maskvit.objectives import build_objective


@pytest.fixture(scope="module")
def imported(fixtures, tmp_path_factory):
    """{name: our checkpoint}."""
    folder = tmp_path_factory.mktemp("imported")
    for name, file, options in (
        ("multimae", "multimae_tiny_public", dict(decoder_num_heads=4)),
        ("mae", "mae_tiny_full", dict(decoder_num_heads=4, target="normalized")),
        ("crossmae", "crossmae_tiny", dict(decoder_num_heads=4, target="raw")),
        ("finetuned", "mae_tiny_finetuned", {}),
        ("ibot", "ibot_tiny", dict(model="both")),
    ):
        convert.convert(fixtures / f"{file}.pth", folder / name, num_heads=3, **options)
    return folder


# ------------------------------------------------------------------------------------------ transplants


def test_multimae_to_vit_and_back(imported, fixtures, tmp_path, caplog):
    caplog.set_level("INFO", "maskvit")
    theirs = read_checkpoint(fixtures / "multimae_tiny_public.pth")["model"]
    with pytest.raises(ConversionError, match=r"no place in the layout 'timm'.*--allow 'outputs/\.\*' leaves them out"):
        convert.export(imported / "multimae", tmp_path / "x.safetensors", "timm")
    allow = ("outputs/.*", "inputs/depth/.*", "inputs/semseg/.*")
    convert.export(imported / "multimae", tmp_path / "vit.safetensors", "timm", allow=allow)
    assert "no final norm" in caplog.text and "final_norm=False" in caplog.text
    vit = load_file(tmp_path / "vit.safetensors")
    assert len(vit) == 4 + 3 * 12 and not any(key.startswith(("norm.", "head.")) for key in vit)
    np.testing.assert_array_equal(vit["cls_token"], theirs["global_tokens"])
    np.testing.assert_array_equal(vit["pos_embed"][0, 0], np.zeros(48))
    np.testing.assert_array_equal(vit["pos_embed"][0, 1:], theirs["input_adapters.rgb.pos_emb"].reshape(48, 16).T)
    for part in ("weight", "bias"):
        np.testing.assert_array_equal(vit[f"patch_embed.proj.{part}"], theirs[f"input_adapters.rgb.proj.{part}"])
    assert all(np.array_equal(vit[f"blocks.{key[8:]}"], theirs[key]) for key in theirs if key.startswith("encoder."))
    convert.convert(tmp_path / "vit.safetensors", tmp_path / "alone", 3)
    convert.export(tmp_path / "alone", tmp_path / "multivit.safetensors", "multimae")
    back = load_file(tmp_path / "multivit.safetensors")
    assert back.keys() == {k for k in theirs if k.startswith(("global_tokens", "encoder.", "input_adapters.rgb."))}
    assert all(np.array_equal(back[key], theirs[key]) for key in back)


def test_mae_to_multimae_keeps_its_tables_and_makes_no_junk(imported, fixtures, tmp_path):
    theirs = read_checkpoint(fixtures / "mae_tiny_full.pth")["model"]
    before = {key: value.copy() for key, value in tree_paths(load_params(imported / "mae")[0]).items()}
    with pytest.raises(ConversionError, match=r"MultiMAE has no final norm; --allow 'norm/\.\*' --allow 'outputs/\.\*' leaves them out"):
        convert.export(imported / "mae", tmp_path / "x.safetensors", "multimae")
    convert.export(imported / "mae", tmp_path / "multivit.safetensors", "multimae", allow=("norm/.*", "outputs/.*"))
    multivit = load_file(tmp_path / "multivit.safetensors")
    assert len(multivit) == 4 + 3 * 12 and not any("decoder" in key for key in multivit)
    np.testing.assert_array_equal(multivit["input_adapters.rgb.pos_emb"].reshape(48, 16).T, theirs["pos_embed"][0, 1:])  # column first
    np.testing.assert_array_equal(multivit["global_tokens"], theirs["cls_token"])
    after = tree_paths(load_params(imported / "mae")[0])
    assert all(np.array_equal(before[key], after[key]) for key in before)
    report = (tmp_path / "multivit.safetensors.conversion.txt").read_text()
    assert "left out  norm/scale (48,)  (allowed)" in report and "converted encoder/block_00/norm1/scale (48,) -> encoder.0.norm1" in report


def test_ibot_as_vit_and_as_multimae(imported, fixtures, tmp_path):
    whole = read_checkpoint(fixtures / "ibot_tiny.pth")
    for model, prefix in (("teacher", "backbone."), ("student", "module.backbone.")):
        convert.export(imported / "ibot", tmp_path / f"{model}.safetensors", "timm", model=model)
        vit = load_file(tmp_path / f"{model}.safetensors")
        expected = {key.removeprefix(prefix): value for key, value in whole[model].items() if "head." not in key and "masked_" not in key}
        assert vit.keys() == expected.keys() and all(np.array_equal(vit[key], expected[key]) for key in vit)
    convert.export(imported / "ibot", tmp_path / "multivit.safetensors", "multimae", allow=("norm/.*",))
    teacher = whole["teacher"]
    expected = teacher["backbone.cls_token"] + teacher["backbone.pos_embed"][:, :1]
    np.testing.assert_array_equal(load_file(tmp_path / "multivit.safetensors")["global_tokens"], expected)


def test_runs_say_their_sizes_by_name(tmp_path):
    """A trained model's config says "Ti", one number for the size and nothing of the decoder: the tensors say the rest."""
    config = dict(image_size=32, modalities=dict(rgb=dict(patch=16)), objective=dict(name="multimae", inputs=("rgb",), outputs=("rgb",)))
    config["objective"] |= dict(encoder="Ti", num_visible=1)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(build_objective(config).init, jax.random.key(0))[0]
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    save_imported(tmp_path / "run", params, dict(config=config))
    convert.export(tmp_path / "run", tmp_path / "multimae.safetensors", "multimae")
    convert.export(tmp_path / "run", tmp_path / "vit.safetensors", "timm", allow=("outputs/.*",))
    convert.convert(tmp_path / "multimae.safetensors", tmp_path / "again")
    first, second = tree_paths(params), tree_paths(load_params(tmp_path / "again")[0])
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
    assert load_file(tmp_path / "vit.safetensors")["pos_embed"].shape == (1, 5, 192)


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("multimae", "huggingface", "has no final norm"),
        ("multimae", "mae", "has no decoder of MAE's"),
        ("mae", "crossmae", "has no decoder of CrossMAE's"),
        ("mae", "ibot", "is of the objective 'mae', which has no form in the layout 'ibot'"),
        ("finetuned", "huggingface", "classifies the mean of its tokens"),
        ("finetuned", "bin", "--to is 'bin'; known: multimae, timm"),
    ],
)
def test_what_has_no_form(name, layout, message, imported, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert.export(imported / name, tmp_path / "x.safetensors", layout)
    assert not (tmp_path / "x.safetensors").exists()


def test_allow_that_names_nothing(imported, tmp_path):
    with pytest.raises(ConversionError, match=r"--allow 'ouputs/\.\*' matches nothing"):
        convert.export(imported / "mae", tmp_path / "x.safetensors", "timm", allow=("ouputs/.*",))
    with pytest.raises(ConversionError, match=r"--allow '\(' is no regular expression"):
        convert.export(imported / "mae", tmp_path / "x.safetensors", "timm", allow=("(",))


def test_several_global_tokens_and_no_rgb(imported, tmp_path):
    params, metadata = load_params(imported / "multimae")
    two = {**params, "global_tokens": np.concatenate([params["global_tokens"]] * 2)}
    save_imported(tmp_path / "two", two, metadata)
    with pytest.raises(ConversionError, match="has 2 global tokens, and a ViT has one class token"):
        convert.export(tmp_path / "two", tmp_path / "x.safetensors", "timm")
    config = metadata["config"]
    objective = {**config["objective"], "inputs": ["depth"], "outputs": []}
    save_imported(
        tmp_path / "depth", {**params, "inputs": {"depth": params["inputs"]["depth"]}}, {"config": {**config, "objective": objective}}
    )
    with pytest.raises(ConversionError, match="has the inputs depth, but no rgb"):
        convert.export(tmp_path / "depth", tmp_path / "x.safetensors", "timm")


def test_the_command_knows_every_layout():
    assert command.LAYOUTS == tuple(convert.LAYOUTS)


# ------------------------------------------------------------------------------------------ torch's own shapes


def torch_block(nn, width: int):
    block = nn.ModuleDict({"norm1": nn.LayerNorm(width), "norm2": nn.LayerNorm(width)})
    block["attn"] = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
    block["mlp"] = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
    return block


def torch_vit(torch, width: int = 48, depth: int = 3, patch: int = 8, rows: int = 17):
    """The parts of a ViT under timm's names; there to be loaded into, not to be run."""
    nn = torch.nn
    vit = nn.Module()
    vit.cls_token, vit.pos_embed = (nn.Parameter(torch.zeros(1, count, width)) for count in (1, rows))
    vit.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
    vit.blocks = nn.ModuleList(torch_block(nn, width) for _ in range(depth))
    vit.norm = nn.LayerNorm(width)
    return vit


def test_files_load_strictly_into_torch(imported, tmp_path):
    torch = pytest.importorskip("torch")
    vit = torch_vit(torch)
    convert.export(imported / "ibot", tmp_path / "vit.pth", "timm")
    vit.load_state_dict(torch.load(tmp_path / "vit.pth", weights_only=True)["model"], strict=True)
    np.testing.assert_array_equal(
        vit.blocks[1]["mlp"]["fc2"].weight.detach().numpy().T,
        np.asarray(load_objective_state(imported / "ibot")["teacher"]["encoder"]["block_01"]["mlp"]["fc2"]["kernel"]),
    )
    whole = torch_vit(torch)
    whole.mask_token, whole.decoder_pos_embed = (torch.nn.Parameter(torch.zeros(1, count, 32)) for count in (1, 17))
    whole.decoder_embed, whole.decoder_pred = torch.nn.Linear(48, 32), torch.nn.Linear(32, 8 * 8 * 3)
    whole.decoder_blocks = torch.nn.ModuleList(torch_block(torch.nn, 32) for _ in range(2))
    whole.decoder_norm = torch.nn.LayerNorm(32)
    convert.export(imported / "mae", tmp_path / "mae.pth", "mae")
    whole.load_state_dict(torch.load(tmp_path / "mae.pth", weights_only=True)["model"], strict=True)
    classifier = torch_vit(torch)
    del classifier.norm
    classifier.fc_norm, classifier.head = torch.nn.LayerNorm(48), torch.nn.Linear(48, 5)
    convert.export(imported / "finetuned", tmp_path / "finetuned.pth", "timm")
    classifier.load_state_dict(torch.load(tmp_path / "finetuned.pth", weights_only=True)["model"], strict=True)


def test_safetensors_that_torch_reads(imported, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors import safe_open
    from safetensors.torch import load_file as load_torch

    convert.export(imported / "mae", tmp_path / "mae.safetensors", "mae")
    assert load_torch(tmp_path / "mae.safetensors")["norm.weight"].dtype == torch.float32
    with safe_open(tmp_path / "mae.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"  # what transformers looks for


def test_without_class_token(tmp_path, capsys):
    """timm's ViTs that pool their tokens: no class token in, none out."""
    rng = np.random.default_rng(0)
    state = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in plain_shapes(classes=3).items()}
    save_file(state, tmp_path / "x.safetensors")
    metadata = convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 2)
    assert metadata["config"]["objective"]["num_global_tokens"] == 0 and metadata["config"]["objective"]["pool"] == "mean"
    convert.export(tmp_path / "ours", tmp_path / "back.safetensors", "timm")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(np.array_equal(back[key], state[key]) for key in back)
    loaded = maskvit.load(tmp_path / "ours")
    encoded = loaded.model.encode(loaded.params, loaded.model.embed(loaded.params, {"rgb": jnp.ones((1, 8, 8, 3))}).tokens)
    assert loaded.objective.predict(loaded.params, (), Batch({"rgb": jnp.ones((1, 8, 8, 3))})).keys() == {"mean"}
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    command = ["--checkpoint", str(tmp_path / "ours"), "--images", str(tmp_path), "--out", str(tmp_path / "x.npz"), "--feature", "global"]
    assert features.main(command) == 2 and "has no global token: give --feature mean" in capsys.readouterr().err
    assert encoded.shape == (1, 4, 8) and loaded.model.logits(loaded.params, encoded).shape == (1, 3)


def test_a_table_without_the_class_tokens_row(tmp_path):
    """timm's `no_embed_class`: the row that is written back is zero."""
    rng = np.random.default_rng(0)
    shapes = {**plain_shapes(classes=3), "cls_token": (1, 1, 8)}
    state = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    save_file(state, tmp_path / "x.safetensors")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 2)
    convert.export(tmp_path / "ours", tmp_path / "back.safetensors", "timm")
    table = load_file(tmp_path / "back.safetensors")["pos_embed"]
    np.testing.assert_array_equal(table, np.concatenate([np.zeros((1, 1, 8)), state["pos_embed"]], axis=1))
    convert.convert(tmp_path / "back.safetensors", tmp_path / "again", 2)
    first, second = (tree_paths(load_params(tmp_path / name)[0]) for name in ("ours", "again"))
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def test_a_classifier_that_no_model_here_has(tmp_path):
    """Without class token, over the mean of normed tokens: refused, or taken without its head."""
    shapes = {key.replace("fc_norm", "norm"): shape for key, shape in plain_shapes(classes=3).items()}
    save_file({key: np.ones(shape, np.float32) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=r"reads the mean of normed tokens .*--allow 'head\\.\.\*'"):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 2)
    metadata = convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 2, allow=(r"head\..*",))
    assert metadata["config"]["objective"]["num_classes"] == 0 and metadata["config"]["objective"]["final_norm"]


def plain_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    shapes = {"pos_embed": (1, 4, 8), "patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,)}
    modules = {"norm1": (8,), "norm2": (8,), "attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.fc1": (16, 8), "mlp.fc2": (8, 16)}
    for name, shape in modules.items():
        shapes |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    return shapes | {"fc_norm.weight": (8,), "fc_norm.bias": (8,), "head.weight": (classes, 8), "head.bias": (classes,)}


# ------------------------------------------------------------------------------------------ fine-tuned here


@pytest.mark.parametrize("pool", [None, "global", "all"])
def test_a_classifier_trained_here_goes_out_as_it_pools(pool, tmp_path):
    """By default the mean of the patch tokens, with the norm behind it, though the config does not say so."""
    block = dict(name="supervised", encoder=dict(width=12, depth=1, heads=2), positions="columns_first", num_global_tokens=1)
    block |= dict(task=dict(name="classification", num_classes=5), **({"pool": pool} if pool else {}))
    config = dict(image_size=(16, 16), modalities=dict(rgb=dict(RGB, patch=8)), objective=block)
    save_imported(tmp_path / "ours", jax.device_get(build_objective(config).init(jax.random.key(0))[0]), {"config": config})
    if pool == "all":
        with pytest.raises(ConversionError, match="classifies the mean of all tokens, and timm that of the patches"):
            convert.export(tmp_path / "ours", tmp_path / "vit.safetensors", "timm")
        return
    convert.export(tmp_path / "ours", tmp_path / "vit.safetensors", "timm")
    names = load_file(tmp_path / "vit.safetensors").keys()
    assert ("fc_norm.weight" in names) == (pool is None) and ("norm.weight" in names) == (pool == "global")
    convert.convert(tmp_path / "vit.safetensors", tmp_path / "again", num_heads=2)
    images = {"rgb": jax.random.normal(jax.random.key(1), (2, 16, 16, 3))}
    logits = []
    for path in ("ours", "again"):
        loaded = maskvit.load(tmp_path / path)
        encoded = loaded.model.encode(loaded.params, loaded.model.embed(loaded.params, images).tokens)
        logits.append(loaded.model.logits(loaded.params, encoded))
    np.testing.assert_allclose(*logits, rtol=1e-6)


def of_a_task(**block):
    """A fine-tuned model's config: two inputs, and a target of each kind."""
    modalities = dict(
        rgb=dict(RGB, patch=8), depth=dict(kind="continuous", channels=1, patch=8, scale=0.001, loss="l1", metres_per_count=0.001),
        parts=dict(kind="categorical", num_classes=4, patch=8, loss="cross_entropy", missing=255),
        heights=dict(kind="continuous", channels=1, patch=8, scale=0.5, mean=(3.0,), loss="l1"),
    )  # fmt: skip
    objective = dict(name="supervised", inputs=("rgb", "depth"), encoder=dict(width=24, depth=4, heads=3), **block)
    return dict(image_size=(32, 32), modalities=modalities, objective=objective)


SEGMENTATION, HEIGHTS = dict(name="segmentation", target="parts"), dict(name="regression", target="heights")
TASKS = {
    "convnext": dict(task=SEGMENTATION, head=dict(name="convnext", width=32, preds_per_patch=4, depth=1), read_from=("depth",)),
    "segmenter": dict(task=SEGMENTATION, head=dict(name="segmenter", width=24, depth=1, heads=2), read_from=("rgb", "depth")),
    "dpt": dict(task=HEIGHTS, head=dict(name="dpt", form="regression", width=8, layer_dims=(8, 8, 8, 8))),
    "classes": dict(task=dict(name="classification", num_classes=5), pool="all"),
    "class token": dict(task=dict(name="classification", num_classes=5), pool="global"),
}


def saved(folder, config):
    params, state = jax.device_get(build_objective(config).init(jax.random.key(0)))
    save_imported(folder, params, {"config": config}, objective_state=state)
    return maskvit.load(folder)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_fine_tuned_models_go_out_as_multimaes_and_come_back(task, suffix, tmp_path):
    """With their heads, whose tokens they read and in what units they answer; the answers are the same."""
    if suffix == ".pth":
        pytest.importorskip("torch")
    before = saved(tmp_path / "ours", of_a_task(**TASKS[task]))
    convert.export(tmp_path / "ours", tmp_path / f"x{suffix}", "multimae")
    written = convert.open_checkpoint(tmp_path / f"x{suffix}").state
    adapters = {key.split(".")[1] for key in written if key.startswith("output_adapters.")}
    assert adapters == {TASKS[task]["task"].get("target", "cls")}
    convert.convert(tmp_path / f"x{suffix}", tmp_path / "again")
    after = maskvit.load(tmp_path / "again")
    rng = np.random.default_rng(0)
    given = dict(rgb=rng.integers(0, 256, (2, 32, 32, 3), np.uint8), depth=rng.uniform(500, 9000, (2, 32, 32, 1)).astype(np.float32))
    two = [loaded.objective.answers(loaded.params, loaded.state, given) for loaded in (before, after)]
    for name, value in two[0].items():
        np.testing.assert_allclose(value, two[1][name], rtol=1e-5, atol=1e-5, err_msg=name)
    if task == "dpt":
        assert after.model.modality("heights").scale == 0.5 and after.model.modality("heights").metres_per_count is None


def test_heads_that_multimae_has_not(tmp_path):
    """What is said of them, and that the encoder goes out without them."""
    cases = {
        "upernet": (dict(task=SEGMENTATION, head=dict(name="upernet", width=8)), "has the head 'upernet', and for pixels MultiMAE"),
        "attentive": (dict(task=TASKS["classes"]["task"], head=dict(name="attentive", queries=4)), "has the head 'attentive', and Multi"),
        "mean": (dict(task=TASKS["classes"]["task"]), "classifies by pool = 'mean', and MultiMAE by the mean of all tokens or"),
        "layers": (dict(TASKS["convnext"], layers=(2,)), r"reads the blocks \(2,\), and MultiMAE's reads \(4,\)"),
    }
    for name, (block, message) in cases.items():
        saved(tmp_path / name, of_a_task(**block))
        with pytest.raises(ConversionError, match=message):
            convert.export(tmp_path / name, tmp_path / "x.safetensors", "multimae")
    convert.export(tmp_path / "upernet", tmp_path / "x.safetensors", "multimae", allow=["upernet/.*"])
    assert not any(key.startswith("output_adapters.") for key in load_file(tmp_path / "x.safetensors"))
