"""Files that are not what is needed, in parts, or of other types: an exact error that says what would do, or what was done."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert_torch_checkpoint
from maskvit import convert
from maskvit.checkpoints import CheckpointError, load_params
from maskvit.convert.reader import ConversionError, read_checkpoint
from maskvit.convert.source import Hints
from maskvit.core.types import tree_paths


@pytest.fixture(scope="module")
def mae(fixtures):
    return dict(read_checkpoint(fixtures / "mae_tiny_full.pth")["model"])


@pytest.fixture(scope="module")
def multivit(fixtures):
    state = read_checkpoint(fixtures / "multimae_tiny_public.pth")["model"]
    return {key: np.ascontiguousarray(value) for key, value in state.items() if not key.startswith("output_adapters")}


def encoder_of(state):
    return {key: np.ascontiguousarray(value) for key, value in state.items() if "decoder" not in key and key != "mask_token"}


def same(a, b) -> bool:
    a, b = tree_paths(a), tree_paths(b)
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------ encoders without decoders


def test_multivit_is_no_multimae(multivit, tmp_path):
    save_file(multivit, tmp_path / "x.safetensors")
    with pytest.raises(
        ConversionError,
        match=r"is MultiViT \(MultiMAE's encoder without decoders\), and 147 tensors are missing: .*; the file holds an encoder alone; "
        r"--allow 'outputs/\.\*' accepts fresh decoders",
    ):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3)
    assert not (tmp_path / "ours").exists()
    assert "family      MultiViT" in convert.inspect(tmp_path / "x.safetensors", 3)


def test_multivit_with_fresh_decoders(multivit, tmp_path):
    save_file(multivit, tmp_path / "x.safetensors")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3, allow=("outputs/.*",))
    params, metadata = load_params(tmp_path / "ours")
    assert metadata["config"]["objective"]["outputs"] == ["rgb", "depth", "semseg"]
    np.testing.assert_array_equal(params["global_tokens"], multivit["global_tokens"][0])
    assert params["outputs"]["semseg"]["head"]["kernel"].shape == (256, 7 * 4)
    report = (tmp_path / "ours" / "conversion.txt").read_text()
    assert "47 tensors converted, 0 left out, 147 at their initialization" in report
    assert "fresh     outputs/rgb/mask_token (256,)" in report
    # The encoder goes back as it came.
    convert.export(tmp_path / "ours", tmp_path / "back.safetensors", "multimae")
    back = load_file(tmp_path / "back.safetensors")
    assert all(np.array_equal(back[key], multivit[key]) for key in multivit)


def test_encoder_of_a_mae_where_a_decoder_is_needed(mae, tmp_path):
    save_file(encoder_of(mae), tmp_path / "x.safetensors")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "alone", 3)  # an encoder is asked for
    with pytest.raises(
        ConversionError, match=r"is MAE's encoder without its decoder, and .*--allow 'outputs/\.\*' accepts a fresh decoder"
    ):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3, target="raw")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3, target="raw", allow=("outputs/.*",))
    params, metadata = load_params(tmp_path / "ours")
    assert metadata["config"]["objective"]["name"] == "mae" and params["outputs"]["rgb"]["context_proj"]["kernel"].shape == (48, 512)
    np.testing.assert_array_equal(params["norm"]["bias"], mae["norm.bias"])


def test_what_a_mae_predicts_must_be_said(fixtures, tmp_path):
    with pytest.raises(ConversionError, match=r"does not say whether its decoder predicts raw pixels .*: give --target raw or --target"):
        convert.convert(fixtures / "mae_tiny_full.pth", tmp_path / "ours", 3, 4)
    with pytest.raises(ConversionError, match="--target is 'pixels'; known: normalized, raw"):
        convert.convert(fixtures / "mae_tiny_full.pth", tmp_path / "ours", 3, 4, target="pixels")
    with pytest.raises(ConversionError, match="--model is 'ema'; known: teacher, student, both"):
        convert.convert(fixtures / "ibot_tiny.pth", tmp_path / "ours", 3, model="ema")


def test_args_in_the_file_say_it(fixtures, tmp_path):
    torch = pytest.importorskip("torch")
    import argparse

    state = {key: torch.tensor(value) for key, value in read_checkpoint(fixtures / "crossmae_tiny.pth")["model"].items()}
    args = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.8)
    torch.save({"model": state, "args": args, "epoch": 9}, tmp_path / "x.pth")
    metadata = convert.convert(tmp_path / "x.pth", tmp_path / "ours", 3, 4)
    assert metadata["config"]["objective"]["outputs"] == ("norm_rgb",) and metadata["config"]["objective"]["mask_ratio"] == 0.8
    assert metadata["source"]["epochs_done"] == 10


def test_args_of_self_distillation(fixtures, tmp_path):
    torch = pytest.importorskip("torch")
    import argparse

    whole = read_checkpoint(fixtures / "ibot_tiny.pth")
    content = {part: {key: torch.tensor(value) for key, value in whole[part].items()} for part in ("student", "teacher", "ibot_loss")}
    args = dict(norm_last_layer=False, shared_head=True)
    torch.save({**content, "epoch": 100, "args": argparse.Namespace(**args)}, tmp_path / "x.pth")
    metadata = convert.convert(tmp_path / "x.pth", tmp_path / "ours", 3, model="both")
    assert metadata["config"]["objective"]["projection"]["fixed_scale"] is False and metadata["source"]["epochs_done"] == 100
    key = "head.last_layer2.weight_v"
    content["student"][f"module.{key}"] = content["student"][f"module.{key}"] + 1
    torch.save({**content, "args": argparse.Namespace(**args)}, tmp_path / "y.pth")  # the args say that both are one
    with pytest.raises(ConversionError, match="'head.last_layer.weight_v' and 'head.last_layer2.weight_v' differ, but this model has one"):
        convert.convert(tmp_path / "y.pth", tmp_path / "other", 3, model="both")


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_usual_heads(width, heads):
    assert Hints().heads(width, "file") == heads


def test_a_mae_decoder_with_a_position_for_its_class_token(mae, tmp_path):
    state = {key: np.array(value) for key, value in mae.items()}
    state["decoder_pos_embed"][0, 0, 3] = 1
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="'decoder_pos_embed' gives the class token a position of its own"):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3, 4, target="raw")


# ------------------------------------------------------------------------------------------ what --allow accepts


def test_missing_and_surplus_tensors_are_named_with_their_remedy(mae, tmp_path):
    state = {key: np.ascontiguousarray(value) for key, value in encoder_of(mae).items()}
    state["ema.decay"] = np.zeros(3, np.float32)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="1 tensors are not part of this model: ema.decay; --allow REGEX leaves out what it names"):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3)
    with pytest.raises(ConversionError, match=r"--allow 'emma\\\.\.\*' matches nothing"):
        convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3, allow=(r"ema\..*", r"emma\..*"))
    convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3, allow=(r"ema\..*",))
    assert "left out  ema.decay (3,)  (allowed)" in (tmp_path / "ours" / "conversion.txt").read_text()
    del state["ema.decay"], state["blocks.1.norm2.bias"]
    save_file(state, tmp_path / "y.safetensors")
    with pytest.raises(
        ConversionError,
        match=r"1 tensors are missing: blocks.1.norm2.bias; --allow 'encoder/block_01/norm2/bias' leaves what they become at its init",
    ):
        convert.convert(tmp_path / "y.safetensors", tmp_path / "other", 3)
    convert.convert(tmp_path / "y.safetensors", tmp_path / "other", 3, allow=("encoder/block_01/norm2/bias",))
    np.testing.assert_array_equal(load_params(tmp_path / "other")[0]["encoder"]["block_01"]["norm2"]["bias"], np.zeros(48))


def test_the_encoder_out_of_a_whole_mae(mae, fixtures, tmp_path):
    """What may be left out decides what the file is taken for."""
    save_file(encoder_of(mae), tmp_path / "x.safetensors")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "a", 3)
    convert.convert(fixtures / "mae_tiny_full.pth", tmp_path / "b", 3, allow=(r"decoder_.*|mask_token",))
    assert same(load_params(tmp_path / "a")[0], load_params(tmp_path / "b")[0])


def test_report_lists_every_tensor_of_both_sides(mae, fixtures, tmp_path):
    convert.convert(fixtures / "mae_tiny_full.pth", tmp_path / "ours", 3, 4, target="raw")
    lines = (tmp_path / "ours" / "conversion.txt").read_text().splitlines()
    assert lines[1] == "74 tensors converted, 0 left out, 0 at their initialization"
    text = "\n".join(lines)
    assert "cls_token (1, 1, 48) + pos_embed (1, 17, 48) -> global_tokens (1, 48) + inputs/rgb/pos_embed (4, 4, 48)" in text
    assert "patch_embed.proj.weight (48, 3, 8, 8) -> inputs/rgb/proj/kernel (192, 48)" in text
    assert all(f" {key} (" in text for key in mae)
    assert all(f" {path} (" in text for path in tree_paths(load_params(tmp_path / "ours")[0]))


# ------------------------------------------------------------------------------------------ number types


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (np.float16, "44 tensors are float16; they are widened to float32"),
        (ml_dtypes.bfloat16, "44 tensors are bfloat16; they are widened to float32"),
        (np.float64, "44 tensors are float64; they are rounded to float32"),
    ],
)
def test_other_number_types_are_converted_and_said(dtype, said, fixtures, tmp_path, caplog):
    caplog.set_level("INFO", "maskvit")
    state = read_checkpoint(fixtures / "mae_tiny_finetuned.pth")["model"]
    save_file({key: np.ascontiguousarray(value).astype(dtype) for key, value in state.items()}, tmp_path / "x.safetensors")
    convert.convert(tmp_path / "x.safetensors", tmp_path / "ours", 3)
    assert said in caplog.text and said in (tmp_path / "ours" / "conversion.txt").read_text()
    scale = load_params(tmp_path / "ours")[0]["encoder"]["block_00"]["norm1"]["scale"]
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, state["blocks.0.norm1.weight"].astype(dtype).astype(np.float32))


def test_half_precision_pth(fixtures, tmp_path):
    torch = pytest.importorskip("torch")
    state = read_checkpoint(fixtures / "mae_tiny_finetuned.pth")["model"]
    torch.save({"model": {key: torch.tensor(value).bfloat16() for key, value in state.items()}}, tmp_path / "x.pth")
    convert.convert(tmp_path / "x.pth", tmp_path / "ours", 3)
    kernel = load_params(tmp_path / "ours")[0]["encoder"]["block_00"]["attn"]["proj"]["kernel"]
    expected = torch.tensor(state["blocks.0.attn.proj.weight"]).bfloat16().float().numpy().T
    np.testing.assert_array_equal(kernel, expected)


# ------------------------------------------------------------------------------------------ other containers


def test_tar_of_the_first_torch_versions(tmp_path):
    with tarfile.open(tmp_path / "x.pth", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickle.dumps({}, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ConversionError, match="before 1.6 .*a tar.*torch.save"):
        read_checkpoint(tmp_path / "x.pth")


def test_forbidden_globals_stop_a_conversion(tmp_path):
    """As `read_checkpoint`'s own tests, from end to end."""
    torch = pytest.importorskip("torch")
    torch.save({"model": {"w": torch.zeros(2)}, "hook": print}, tmp_path / "x.pth")
    with pytest.raises(ConversionError, match="asks for __builtin__.print|asks for builtins.print"):
        convert.convert(tmp_path / "x.pth", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def shards(state, folder, count=3, suffix="safetensors"):
    folder.mkdir()
    keys, names = list(state), [f"model-{i:05d}-of-{count:05d}.{suffix}" for i in range(1, count + 1)]
    parts = [keys[i::count] for i in range(count)]
    for name, part in zip(names, parts, strict=True):
        save_file({key: np.ascontiguousarray(state[key]) for key in part}, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def test_shards(fixtures, tmp_path):
    state = read_checkpoint(fixtures / "mae_tiny_finetuned.pth")["model"]
    names = shards(state, tmp_path / "hub")
    convert.convert(fixtures / "mae_tiny_finetuned.pth", tmp_path / "whole", 3)
    for i, src in enumerate((tmp_path / "hub", tmp_path / "hub" / names[1], tmp_path / "hub" / "model.safetensors.index.json")):
        metadata = convert.convert(src, tmp_path / str(i), 3)
        assert same(load_params(tmp_path / "whole")[0], load_params(tmp_path / str(i))[0])
    (tmp_path / "hub" / names[2]).unlink()
    assert len(metadata["source"]["sha256"]) == 64
    with pytest.raises(ConversionError, match=f"belongs to a model in 3 shards, of which 1 are missing: {names[2]}; fetch them all"):
        convert.convert(tmp_path / "hub", tmp_path / "x", 3)
    (tmp_path / "hub" / "model.safetensors.index.json").unlink()  # the name alone says how many there are
    with pytest.raises(ConversionError, match=f"1 are missing: {names[2]}"):
        convert.convert(tmp_path / "hub" / names[0], tmp_path / "x", 3)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("not json", "not an index of shards"),
        ('{"weight_map": []}', "not an index of shards"),
        ('{"weight_map": {}}', "belongs to a model in 0 shards"),
        ('{"weight_map": {"a": "../evil.safetensors"}}', "names '../evil.safetensors', which does not lie beside it"),
        ('{"weight_map": {"a": 3}}', "not an index of shards"),
    ],
)
def test_indices_that_lie(index, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConversionError, match=message):
        convert.inspect(tmp_path)


def test_shards_that_overlap(fixtures, tmp_path):
    state = read_checkpoint(fixtures / "mae_tiny_finetuned.pth")["model"]
    names = shards(state, tmp_path / "hub", 2)
    (tmp_path / "hub" / names[1]).write_bytes((tmp_path / "hub" / names[0]).read_bytes())
    with pytest.raises(ConversionError, match="which another shard holds too"):
        convert.inspect(tmp_path / "hub", 3)


def test_folders(fixtures, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="is a folder without model.safetensors or .*; it holds no .safetensors, .pth"):
        convert.inspect(tmp_path / "empty")
    below = tmp_path / "hub" / "imagenet-mae-cross-vitb" / "model.pth"
    below.parent.mkdir(parents=True)
    below.write_bytes((fixtures / "crossmae_tiny.pth").read_bytes())
    with pytest.raises(ConversionError, match=f"is a folder without .*; give one of {below}"):
        convert.inspect(tmp_path / "hub")


def test_the_command_refuses_in_one_line(multivit, tmp_path, capsys, monkeypatch):
    save_file(multivit, tmp_path / "x.safetensors")
    command = ["convert", "--src", str(tmp_path / "x.safetensors"), "--dst", str(tmp_path / "ours"), "--num-heads", "3"]
    monkeypatch.setattr("sys.argv", command)
    assert convert_torch_checkpoint.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "--allow 'outputs/.*'" in said and said.count("\n") == 1
    monkeypatch.setattr("sys.argv", [*command, "--allow", "outputs/.*"])
    assert convert_torch_checkpoint.main() == 0
    monkeypatch.setattr("sys.argv", ["convert", "--src", str(tmp_path / "ours"), "--dst", str(tmp_path / "y.safetensors"), "--to", "timm"])
    assert convert_torch_checkpoint.main() == 2 and "no place in the layout 'timm'" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        convert.export(tmp_path / "absent", tmp_path / "y.safetensors")
