"""Small files made to hang, crash or fill the memory of a reader, to change a library behind its back, or to be taken for weights."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskvit import convert
from maskvit.convert import pickles
from maskvit.convert.formats import ConversionError
from maskvit.convert.reader import find_files, read_checkpoint
from maskvit.convert.stand_ins import Inert
from tests.convert.test_reader import global_, tensor_pickle, write

BFLOAT16 = np.arange(3, dtype=np.float32).astype(ml_dtypes.bfloat16)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    return b"\x8a" + bytes([len(data := pickle.encode_long(value))]) + data


# ------------------------------------------------------------------------------------------ no object of a library is touched


@pytest.mark.parametrize(
    "target",
    [
        global_("torch", "BFloat16Storage"),
        global_("torch._utils", "_rebuild_parameter") + global_("torch", "BFloat16Storage") + b"\x88" + b"N\x87R",
        b"(" + text("storage") + global_("torch", "BFloat16Storage") + text("0") + text("cpu") + b"K\x03tQ",
        global_("torch", "float32"),
        global_("torch", "Size") + b")R",
        tensor_pickle()[2:-1].replace(b"}X\x01\x00\x00\x00w", b"", 1).removesuffix(b"s"),
    ],
    ids=["storage type", "rebuilt storage type", "storage", "number type", "size", "array"],
)
def test_no_state_is_set_on_what_is_no_stand_in(target, tmp_path):
    before = ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16).itemsize, BFLOAT16.tobytes()
    state = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"  # as numpy sets a type's own
    members = {"archive/data/0": BFLOAT16.tobytes() if b"BFloat16" in target else np.arange(6, dtype=np.float32).tobytes()}
    path = write(tmp_path / "x.pth", b"\x80\x02" + target + state + b"b.", members)
    with pytest.raises(ConversionError, match="its pickle sets the state of a|a parameter of a Global"):
        read_checkpoint(path)
    assert (ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16).itemsize, BFLOAT16.tobytes()) == before
    assert (np.frombuffer(BFLOAT16.tobytes(), ml_dtypes.bfloat16).astype(np.float32) == [0, 1, 2]).all()


# ------------------------------------------------------------------------------------------ bounded work


def test_keys_that_collide(tmp_path):
    """Multiples of Python's hash modulus, all with the hash 0: quadratic in a dict."""
    many = b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(1, 60_000))
    with pytest.raises(ConversionError, match="more, or larger, integer keys than a state dict needs"):
        read_checkpoint(write(tmp_path / "a.pth", b"\x80\x02}(" + many + b"u."))
    small = b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(70_000))
    with pytest.raises(ConversionError, match="more, or larger, integer keys"):
        read_checkpoint(write(tmp_path / "b.pth", b"\x80\x02}(" + small + b"u."))


def test_a_deep_tuple_as_key(tmp_path):
    deep = b"\x80\x02}N" + b"\x85" * 300_000 + b"Ns."
    content = read_checkpoint(write(tmp_path / "a.pth", deep))
    assert list(content) == ["<tuple>"] and isinstance(content["<tuple>"], Inert)
    with pytest.raises(ConversionError, match="nests more than 64 containers"):
        read_checkpoint(write(tmp_path / "b.pth", b"\x80\x02N" + b"\x85" * 300_000 + b"."))
    with pytest.raises(ConversionError, match="nests more than 64 containers"):  # a list that holds itself
        read_checkpoint(write(tmp_path / "c.pth", b"\x80\x02]q\x00" + b"]h\x00a" * 100 + b"a" * 100 + b"."))


@pytest.mark.parametrize("axes", [65, 400_000])
def test_many_axes(axes, tmp_path):
    with pytest.raises(ConversionError, match="over 64 axes"):
        read_checkpoint(write(tmp_path / "a.pth", tensor_pickle(size=(1,) * axes, stride=(0,) * axes)))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1] * axes, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ConversionError, match="'w' has more than 64 axes"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_long_programs_and_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 2**15)  # of 2**21: the same in less time
    with pytest.raises(ConversionError, match="more than 32,768 operations"):
        read_checkpoint(write(tmp_path / "a.pth", b"\x80\x02" + b"N0" * 2**15 + b"."))
    entries = b"".join(text(str(i)) + b"N" for i in range(1000))
    copies = (global_("collections", "OrderedDict") + b"h\x00\x85R0") * 1000
    with pytest.raises(ConversionError, match="copies more than a state dict needs"):
        read_checkpoint(write(tmp_path / "b.pth", b"\x80\x02}(" + entries + b"uq\x00" + copies + b"."))
    with pytest.raises(ConversionError, match="an integer of 80,000 bits|integer"):
        read_checkpoint(write(tmp_path / "c.pth", b"\x80\x02\x8b" + struct.pack("<i", 10_000) + b"\x01" * 10_000 + b"."))


def test_thousands_of_blocks_take_no_quadratic_time(tmp_path):
    """3,000 blocks of width 1 took over 90 s; the time limit of the suite would find it."""
    state = {"cls_token": np.zeros((1, 1, 64)), "pos_embed": np.zeros((1, 5, 64)), "patch_embed.proj.weight": np.zeros((64, 3, 2, 2))}
    state |= {f"blocks.{i}.norm1.weight": np.zeros(64) for i in range(1000)} | {"blocks.0.mlp.fc1.weight": np.zeros((256, 64))}
    save_file({key: value.astype(np.float32) for key, value in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match="tensors are missing"):
        convert.inspect(tmp_path / "x.safetensors") and convert.convert(tmp_path / "x.safetensors", tmp_path / "ours")


def test_directories_and_headers_of_absurd_size(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.pth", "w") as archive:
        for i in range(1000):
            archive.writestr(f"archive/{'x' * 60_000}{i}", b"")
    with pytest.raises(ConversionError, match="its directory has 60,.* bytes, more than a checkpoint needs"):
        read_checkpoint(tmp_path / "many.pth")
    header = b"{" + b" " * (9 * 2**20) + b"}"
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConversionError, match="its header has 9,437,186 bytes, more than"):
        read_checkpoint(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", 2**62) + b'{"a": 1}')
    with pytest.raises(ConversionError, match="claims 4,611,686,018,427,387,904 of 16 bytes; cut off"):
        read_checkpoint(tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ConversionError, match="not an index of shards"):
        find_files(tmp_path)
    index.write_text(" " * (9 * 2**20))
    with pytest.raises(ConversionError, match="has 9,437,184 bytes, more than such a file needs"):
        find_files(tmp_path)


# ------------------------------------------------------------------------------------------ one line, not a traceback


def test_safetensors_of_other_types_and_with_a_name_twice(tmp_path):
    def written(header: str) -> None:
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))

    written('{"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}')
    with pytest.raises(ConversionError, match="its tensors are of type F8_E4M3; read are F64, F32"):
        read_checkpoint(tmp_path / "a.safetensors")
    entry = '"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    written("{" + entry + ", " + entry + "}")
    with pytest.raises(ConversionError, match="a name stands there twice"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 5000, "\x1b[2J"])
def test_names_in_an_index_that_no_shard_has(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ConversionError, match="does not lie beside it|are missing"):
        find_files(tmp_path)


def test_names_reach_no_terminal_as_commands(tmp_path):
    save_file({"\x1b[2Jw": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ConversionError, match=r"'\\x1b\[2Jw'.*control characters"):
        convert.inspect(tmp_path / "x.safetensors")


@pytest.mark.parametrize("epoch", [10**5000, 2**40, -1, True], ids=["5001 digits", "large", "negative", "true"])
def test_epochs_that_are_none(epoch, fixtures, tmp_path):
    with zipfile.ZipFile(fixtures / "multimae_tiny_public.pth") as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    program = members.pop("data.pkl")
    number = b"\x88" if epoch is True else b"\x8b" + struct.pack("<i", len(data := pickle.encode_long(epoch))) + data
    program = program[:-1] + text("epoch") + number + b"s."
    path = write(tmp_path / "x.pth", program, {f"archive/{name}": data for name, data in members.items()})
    if epoch == 10**5000:
        with pytest.raises(ConversionError, match=r"an integer of 16,610 bits"):
            convert.inspect(path)
    else:
        assert "epochs done: not said" in convert.inspect(path, 3, 4)


def test_an_onnx_file_opens_no_other(tmp_path):
    onnx = pytest.importorskip("onnx")
    os.mkfifo(tmp_path / "fifo")
    tensor = onnx.TensorProto(name="embeddings.cls_token", data_type=1, dims=[1, 1, 4], data_location=1)
    tensor.external_data.add(key="location", value=str(tmp_path / "fifo"))
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "x.onnx")
    with pytest.raises(ConversionError, match="lie in another file"):
        convert.inspect(tmp_path / "x.onnx")
    words = onnx.helper.make_tensor("embeddings.cls_token", onnx.TensorProto.STRING, [2], [b"x" * 10_000, b""])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [words])), tmp_path / "y.onnx")
    with pytest.raises(ConversionError, match="is of a type that is not read"):
        convert.inspect(tmp_path / "y.onnx")
    product = onnx.helper.make_node("MatMul", ["a"], ["b"])
    values = onnx.helper.make_tensor("onnx::MatMul_1", 1, [2, 2], [0.0] * 4)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([product], "g", [], [], [values])), tmp_path / "z.onnx")
    with pytest.raises(ConversionError, match="not the export of a Vision Transformer"):
        convert.inspect(tmp_path / "z.onnx")


# ------------------------------------------------------------------------------------------ what came in place of the weights


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 343249461\n"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ".onnx"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (POINTER, "is a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><title>Quota</title></html>", r"is a web page \(HTML\)"),
        (b"\n  <html><body>", r"is a web page \(HTML\)"),
        (b'{"error": "Repository not found"}', 'is text that begins \'{"error"'),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file, as Keras and TensorFlow write"),
        (b"\x1f\x8b\x08" + bytes(100), "compressed with gzip: unpack it"),
        (b"\x93NUMPY\x01\x00", "one numpy array"),
        (bytes(300), "holds zeros alone"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(90), "TensorFlow Lite"),
        (b"\xff\xd8\xff\xe0" + bytes(90), "JPEG picture"),
        (b"abc\xff" * 40 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "a part of a TensorFlow checkpoint"),
    ],
)
def test_what_a_file_is_instead(content, named, suffix, tmp_path):
    if suffix == ".onnx" and b"\x57\xfb\x80" in content:
        pytest.skip("tables of TensorFlow are never called so")
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=named) as error:
        convert.inspect(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("members", "named"),
    [
        (("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"), "a TorchScript program.*torch.jit.load"),
        (("Transformer/posembed_input/pos_embedding.npy", "cls.npy"), "arrays of numpy .*JAX"),
        (("m/archive_format", "m/models/model.json"), "torch.export"),
        (("config.json", "model.weights.h5"), "a Keras model"),
        (("inner/checkpoint.pth",), "a zip around a checkpoint; unpack it"),
        (("a.txt",), "no member <name>/data.pkl, but 'a.txt'"),
    ],
)
def test_what_a_zip_is_instead(members, named, tmp_path):
    zipped(tmp_path / "x.pth", *members)
    with pytest.raises(ConversionError, match=named):
        read_checkpoint(tmp_path / "x.pth")


def test_contents_count_and_not_the_name(tmp_path):
    save_file({"w": np.arange(3, dtype=np.float32)}, tmp_path / "x.pth")
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "x.pth")["w"], [0, 1, 2])
    write(tmp_path / "y.safetensors", tensor_pickle())
    assert read_checkpoint(tmp_path / "y.safetensors")["w"].shape == (2, 3)


def test_the_advice_for_old_files_works(tmp_path):
    """The command that the error prints, on files as torch 1.5 wrote them, with a Namespace; the result converts."""
    torch = pytest.importorskip("torch")
    import argparse
    import re
    import subprocess
    import sys

    content = {"model": {"w": torch.arange(3.0)}, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"model": {"w": np.arange(3.0)}}))
    for name in ("old.pth", "bare.pkl"):
        with pytest.raises(ConversionError, match="before 1.6") as error:
            read_checkpoint(tmp_path / name)
        command = re.search(r'python -c "(.*)"$', str(error.value))[1]
        command = command.replace("OLD", str(tmp_path / name)).replace("NEW", str(tmp_path / "new.pth"))
        subprocess.run([sys.executable, "-c", command], check=True, timeout=300)
        assert "model" in read_checkpoint(tmp_path / "new.pth")


def test_values_that_are_repeated_along_an_axis(tmp_path):
    """`torch.zeros(1).expand(3)`: a stride of 0."""
    state = read_checkpoint(write(tmp_path / "a.pth", tensor_pickle(size=(3, 2), stride=(0, 1))))
    np.testing.assert_array_equal(state["w"], [[0, 1]] * 3)
