"""Files made to harm or merely strange: each refused in one line, in little memory and time, and nothing in them is called."""

from __future__ import annotations

import collections
import io
import json
import pickle
import random
import re
import struct
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from maskvit import convert
from maskvit.convert import multimae, opening
from maskvit.convert.reader import ConversionError, read_checkpoint
from maskvit.convert.rules import check_keys, key_shapes
from maskvit.convert.source import Hints, Source
from maskvit.convert.stand_ins import Inert, Stored
from tests.convert.test_reader import global_, tensor_pickle, write


@pytest.fixture(scope="module")
def tiny(fixtures):
    return fixtures / "multimae_tiny_public.pth"


@pytest.fixture(scope="module")
def state(tiny):
    return dict(read_checkpoint(tiny)["model"])


HINTS = Hints(3, 4)


def source(state):
    return Source("file", state, {key: key for key in state}, {})


def examine(path):
    """All that a conversion does before it writes."""
    return convert.understand(convert.open_checkpoint(path), 3, 4)


# ------------------------------------------------------------------------------------------ pickles


NOT_LOADED = ("nt", "antigravity", "turtledemo")


@pytest.fixture
def calls():
    """What the interpreter imports, looks up for a pickle, runs or opens while a file is read."""
    seen: list[str] = []
    listening = [True]
    names = ("os.system", "os.exec", "subprocess.Popen", "socket.connect", "pickle.find_class")

    def hook(event, arguments):
        # The type checker of these tests itself compiles and imports; of imports only the file's own wishes count.
        if listening[0] and (event in names or (event == "import" and str(arguments[0]).partition(".")[0] in NOT_LOADED)):
            seen.append(event)

    sys.addaudithook(hook)
    yield seen
    listening[0] = False


@pytest.mark.parametrize(
    "asks_for",
    [
        ("os", "system"), ("nt", "system"), ("antigravity", "geohash"), ("turtledemo.clock", "main"),
        ("builtins", "eval"), ("__builtin__", "getattr"), ("subprocess", "Popen"),
        ("torch.storage", "_load_from_bytes"), ("torch", "load"), ("torch._utils", "__builtins__"), ("collections", "namedtuple"),
        ("collections", "OrderedDict.__class__"), ("argparse", "FileType"), ("numpy", "load"), ("maskvit.convert", "export"),
    ],
)  # fmt: skip
def test_globals_are_refused_before_anything_happens(asks_for, tmp_path, calls):
    data = b"\x80\x02" + global_(*asks_for) + b"(X\x01\x00\x00\x00xtR."
    path = write(tmp_path / "bad.pth", data)
    calls.clear()
    with pytest.raises(ConversionError, match="asks for " + re.escape(".".join(asks_for))):
        read_checkpoint(path)
    assert not calls and not set(NOT_LOADED) & sys.modules.keys()


def test_nothing_can_be_planted_on_what_a_pickle_may_have(tmp_path):
    planted = b"}X\x03\x00\x00\x00getX\x01\x00\x00\x00xs"  # {"get": "x"}: would hide the method of a real OrderedDict
    data = b"\x80\x02" + global_("collections", "OrderedDict") + b")R" + planted + b"b."
    content = read_checkpoint(write(tmp_path / "a.pth", data))
    assert content.get("model", 7) == 7
    for target in (global_("torch", "FloatStorage"), global_("argparse", "Namespace"), global_("collections", "OrderedDict")):
        data = b"\x80\x02" + target + b"N" + planted + b"\x86b."
        try:
            read_checkpoint(write(tmp_path / "b.pth", data))
        except ConversionError:
            pass
    assert not hasattr(Inert, "get") and not hasattr(Stored, "get") and collections.OrderedDict(a=1).get("a") == 1
    np.testing.assert_array_equal(read_checkpoint(write(tmp_path / "c.pth", tensor_pickle()))["w"].ravel(), np.arange(6))


def test_messages_do_not_spell_out_what_doubles(tmp_path):
    laughs = b"\x80\x02N" + b"2\x86" * 60 + b"Q."  # a tuple of 2 ** 60 leaves, as persistent id
    with pytest.raises(ConversionError, match="no tensor storage"):
        read_checkpoint(write(tmp_path / "a.pth", laughs))
    data = tensor_pickle().replace(b"(J\x02\x00\x00\x00J\x03\x00\x00\x00t", b"(N" + b"2\x86" * 60 + b"t", 1)  # as a size
    with pytest.raises(ConversionError, match="wrong type"):
        read_checkpoint(write(tmp_path / "b.pth", data))


# ------------------------------------------------------------------------------------------ small files, large memory


def test_tensors_on_one_storage(tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.arange(2**16, dtype=torch.float32)
    tied = {"a": values, "b": values, "c": values.reshape(256, 256).T}
    torch.save(tied, tmp_path / "tied.pth")
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "tied.pth")["c"], values.reshape(256, 256).T.numpy())
    torch.save({str(i): values.as_strided((256, 256), (1, 256)) for i in range(40)}, tmp_path / "bomb.pth")
    with pytest.raises(ConversionError, match="share storages"):
        read_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize("put", [b"r" + struct.pack("<I", 2**31), b"p2147483648\n"])
def test_a_large_memo_index(put, tmp_path):
    with pytest.raises(ConversionError, match="more objects than it can hold"):
        read_checkpoint(write(tmp_path / "x.pth", b"\x80\x02N" + put + b"."))


def test_overlapping_members(tmp_path):
    path = write(tmp_path / "a.pth", tensor_pickle(), {"archive/data/0": bytes(2**16)})
    raw = bytearray(path.read_bytes())
    start = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 1)  # the directory's entry of the storage, once more
    end = raw.rindex(b"PK\x05\x06")
    again = bytes(raw[start:end]).replace(b"archive/data/0", b"archive/data/1")
    count, size = struct.unpack("<H", raw[end + 10 : end + 12])[0] + 1, end - raw.index(b"PK\x01\x02") + len(again)
    tail = bytearray(raw[end:])
    tail[8:16] = struct.pack("<HHI", count, count, size)
    path.write_bytes(bytes(raw[:end]) + again + bytes(tail))
    with pytest.raises(ConversionError, match="overlap"):
        read_checkpoint(path)


def test_a_large_block_number_is_not_counted_to(state):
    state = {**state, "encoder.999999999.norm1.weight": np.zeros(48, np.float32)}
    rules = multimae.rules(multimae.infer_config(source(state), HINTS))
    assert len(rules) < 400
    with pytest.raises(ConversionError, match="missing: encoder.3"):
        check_keys("file", state, key_shapes(rules))


# ------------------------------------------------------------------------------------------ damaged files


def test_damage_at_random_places(tiny, tmp_path):
    whole = tiny.read_bytes()
    source = zipfile.ZipFile(io.BytesIO(whole))
    members = {name: source.read(name) for name in source.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    rng = random.Random(0)
    refused = 0
    for trial in range(90):
        if trial % 3 == 0:  # in the pickle, its checksum made right
            damaged = bytearray(members[name])
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                for member, data in members.items():
                    archive.writestr(member, bytes(damaged) if member == name else data)
            data = out.getvalue()
        else:  # in the directory, anywhere
            damaged = bytearray(whole)
            for _ in range(3):
                damaged[rng.randrange(source.start_dir if trial % 3 == 1 else 0, len(whole))] = rng.randrange(256)
            data = bytes(damaged)
        (tmp_path / "x.pth").write_bytes(data)
        try:
            examine(tmp_path / "x.pth")
        except ConversionError:
            refused += 1  # anything else is an error of the reader's
    assert refused > 60


def test_damaged_safetensors(state, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path)
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(length)] = rng.choice(b'0123456789[]{},":FBIU ')
        path.write_bytes(damaged)
        try:
            examine(path)
        except ConversionError:
            pass
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match="not a sound safetensors"):
        examine(path)


# ------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("input_adapters.rgb.pos_emb", (1, 48, 0, 0), "none of them empty"),
        ("input_adapters.rgb.proj.weight", (48, 3, 0, 0), "none of them empty"),
        ("input_adapters.rgb.proj.weight", (48, 3, 8, 4), "not square"),
        ("input_adapters.depth.pos_emb", (1, 48, 4, 5), r"another shape: input_adapters.depth.pos_emb"),
        ("global_tokens", (1, 48), "3 axes expected"),
        ("encoder.0.mlp.fc1.weight", (193, 48), "another shape"),
        ("input_adapters.a/b.pos_emb", (1, 48, 4, 4), "named 'a/b'"),
        ("output_adapters.normals.mask_token", (1, 1, 16), "'normals' belongs to none of the inputs"),
    ],
)
def test_shapes_that_no_model_has(key, shape, message, state, tmp_path):
    state = {name: np.ascontiguousarray(value) for name, value in state.items()}
    save_file({**state, key: np.zeros(shape, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=message):
        examine(tmp_path / "x.safetensors")


def test_a_known_name_with_other_contents(state):
    """A modality named rgb, but with four channels: rgb's own mean and deviation do not belong to it."""
    four = {**state, "input_adapters.rgb.proj.weight": np.zeros((48, 4, 8, 8), np.float32)}
    config = multimae.infer_config(source(four), HINTS)
    assert config["modalities"]["rgb"]["channels"] == 4 and config["modalities"]["rgb"]["mean"] == (0.0,)
    assert multimae.infer_config(source(state), HINTS)["modalities"]["rgb"]["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("heads", ["3", 0, -3, True, 2.0, None, [3]])
def test_heads_that_the_args_cannot_mean(heads, state):
    with pytest.raises(ConversionError, match="give --num-heads"):
        multimae.infer_config(source(state), Hints(None, 4, args={"num_heads": heads, "model": ["?"], "num_encoded_tokens": "98"}))
    with pytest.raises(ConversionError, match="does not divide into"):
        multimae.infer_config(source(state), Hints(0 if heads is None else -3, 4))


def optimizer(state, **change):
    names = [key for key in state if not key.endswith(".pos_emb")]
    entries = {i: {"step": 5, "exp_avg": state[key], "exp_avg_sq": state[key]} for i, key in enumerate(names)}
    entries[3] |= change
    return {"state": entries, "param_groups": [{"params": list(entries)}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(step=float("nan")), "no counts"),
        (dict(step=2**40), "no counts"),
        (dict(step=6), "different numbers of steps"),
        (dict(step="x"), "not AdamW's"),
        (dict(exp_avg=3), "a moment is no tensor"),
        (dict(max_exp_avg_sq=3), "also holds .'max_exp_avg_sq'"),
    ],
)
def test_optimizers_that_are_not_adamw(change, message, state):
    with pytest.raises(ConversionError, match=message):
        multimae.adam_by_key(optimizer(state, **change), state, "file")


def test_learned_loss_weights_are_left_out(state):
    holds = optimizer(state)
    holds["param_groups"].append({"params": [10_000]})
    holds["state"][10_000] = {"step": 5, "exp_avg": np.zeros(1), "exp_avg_sq": np.zeros(1)}
    with pytest.raises(ConversionError, match="states for"):
        multimae.adam_by_key(holds, state, "file")
    adam = multimae.adam_by_key(holds, state, "file", others=1)
    assert adam["count"] == 5 and adam["mu"].keys() == {key for key in state if not key.endswith(".pos_emb")}


# ------------------------------------------------------------------------------------------ what else files are


def test_families(tmp_path):
    for keys, name in (
        (["module.head.last_layer.weight"], "DINO or iBOT"),
        (["layers.0.blocks.0.attn.relative_position_bias_table"], "Swin"),
        (["visual.transformer.resblocks.0.ln_1.weight"], "CLIP"),
        (["vision_model.encoder.layers.0.layer_norm1.weight", "text_model.final_layer_norm.weight"], "CLIP"),
        (["blocks.0.gamma_1", "blocks.0.attn.q_bias"], "BEiT"),
        (["stages.0.0.dwconv.weight"], "ConvNeXt"),
        (["conv1.weight"], "unknown"),
    ):
        save_file({key: np.zeros((1, 2), np.float32) for key in keys}, tmp_path / "x.safetensors")
        with pytest.raises(ConversionError, match=f"is {name}, and .*; only MultiMAE, .* and ResNets can be converted"):
            convert.convert(tmp_path / "x.safetensors", tmp_path / "ours")
        assert name in convert.inspect(tmp_path / "x.safetensors")
    assert not (tmp_path / "ours").exists()


def test_student_and_teacher_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    model = {"module.backbone.cls_token": torch.zeros(1, 1, 4), "module.head.last_layer.weight_g": torch.ones(3, 1)}
    torch.save({"student": model, "teacher": model, "epoch": 100}, tmp_path / "x.pth")
    with pytest.raises(ConversionError, match="is DINO or iBOT"):
        convert.convert(tmp_path / "x.pth", tmp_path / "ours")
    assert "epochs done: not said" in convert.inspect(tmp_path / "x.pth")


def test_inspect_does_not_need_the_heads(tiny):
    said = convert.inspect(tiny)
    assert "conversion  not as it is: the encoder's width 48 is no multiple of 64: give --num-heads" in said
    assert "keys        model\n" in said and "149,860 trained" in said


def test_only_the_whole_digest_names_the_known_file(tiny, monkeypatch):
    digest = next(digest for digest in convert.PUBLIC_FILES if len(digest) == 64)
    monkeypatch.setattr(opening, "sha256", lambda path: digest)
    said = convert.inspect(tiny)
    assert "multimae-b_98_rgb+-depth-semseg_1600e_multivit-afff3f8c.pth" in said and "CC-BY-NC 4.0" in said
    monkeypatch.setattr(opening, "sha256", lambda path: digest[:63] + "0")
    assert "not one of the known public files" in convert.inspect(tiny)


def test_licence_is_recorded_and_said(tiny, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "maskvit")
    monkeypatch.setattr(opening, "sha256", lambda path: next(iter(convert.PUBLIC_FILES)))
    metadata = convert.convert(tiny, tmp_path / "ours", 3, 4)
    assert metadata["licence"] == "CC-BY-NC 4.0" and "CC-BY-NC 4.0" in caplog.text
    json.dumps(metadata)


def test_types_and_devices_in_args(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"args": {"device": torch.device("cuda", 0), "dtype": torch.bfloat16}}, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth") == {"args": {"device": "cuda:0", "dtype": "torch.bfloat16"}}


def test_verify_wants_a_checkout(tiny, tmp_path):
    from maskvit.convert.verify import verify
    from maskvit.objectives import build_objective

    before = list(sys.path)
    with pytest.raises(ConversionError, match="no checkout of the PyTorch reference"):
        verify(tiny, tmp_path, build_objective, None, 3, 4)
    assert sys.path == before


def test_bare_pickles_and_unknown_extensions(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(ConversionError, match="bare pickle"):
        read_checkpoint(tmp_path / "x.bin")
    with pytest.raises(ConversionError, match="no such file"):
        read_checkpoint(tmp_path)
