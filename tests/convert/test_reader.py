"""`.pth` without torch: every tensor exact; everything that is not a plain checkpoint refused, and nothing run."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from maskvit.convert.reader import ConversionError, read_checkpoint
from maskvit.convert.stand_ins import Inert

STOLEN: list[str] = []


class Storage:
    """Written as a persistent id, as torch does it."""

    def __init__(self, key: str, count: int, kind: str = "FloatStorage"):
        self.key, self.count, self.kind = key, count, kind


def global_(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def tensor_pickle(key=b"0", count=6, kind="FloatStorage", offset=0, size=(2, 3), stride=(3, 1)) -> bytes:
    """The opcodes of {"w": a tensor}, by hand: protocol 2, as torch writes it."""

    def integers(values) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    pid = b"(X\x07\x00\x00\x00storage" + global_("torch", kind) + b"X" + struct.pack("<I", len(key)) + key + b"X\x03\x00\x00\x00cpu"
    pid += b"J" + struct.pack("<i", count) + b"tQ"
    arguments = (
        b"(" + pid + b"J" + struct.pack("<i", offset) + integers(size) + integers(stride) + b"\x89" + global_("collections", "OrderedDict")
    )
    arguments += b")Rt"
    return b"\x80\x02}X\x01\x00\x00\x00w" + global_("torch._utils", "_rebuild_tensor_v2") + arguments + b"Rs."


def write(path, data_pkl: bytes, members=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, data in (members if members is not None else {"archive/data/0": np.arange(6, dtype=np.float32).tobytes()}).items():
            archive.writestr(name, data)
    return path


def test_tensor_by_hand(tmp_path):
    state = read_checkpoint(write(tmp_path / "a.pth", tensor_pickle()))
    np.testing.assert_array_equal(state["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
    state = read_checkpoint(write(tmp_path / "b.pth", tensor_pickle(offset=1, size=(2, 2), stride=(1, 2))))
    np.testing.assert_array_equal(state["w"], [[1, 3], [2, 4]])


def test_every_type_as_torch_writes_it(tmp_path):
    torch = pytest.importorskip("torch")
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    content = {str(kind): torch.arange(12).reshape(3, 4).to(kind) for kind in kinds}
    content["transposed"] = torch.arange(12.0).reshape(3, 4).T
    content["scalar"], content["empty"] = torch.tensor(3.5), torch.zeros(0, 2)
    content["parameter"] = torch.nn.Parameter(torch.ones(2))
    shared = torch.arange(8.0)
    content["first"], content["second"] = shared[:4], shared[4:]
    args = argparse.Namespace(model="x", depth=3)
    torch.save({"model": collections.OrderedDict(content), "args": args, "epoch": 7}, tmp_path / "all.pth")
    read = read_checkpoint(tmp_path / "all.pth")
    assert isinstance(read["args"], Inert) and read["args"].facts == {"model": "x", "depth": 3} and read["epoch"] == 7
    for name, value in content.items():
        assert tuple(read["model"][name].shape) == tuple(value.shape)
        np.testing.assert_array_equal(read["model"][name].astype(np.float64), value.detach().double().numpy())


class Reduce:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("thing", "named"),
    [
        (Reduce(os.system, "touch PWNED"), "posix.system,"),
        (Reduce(eval, "STOLEN.append(1)"), "eval,"),
        (Reduce(getattr, os, "system"), "getattr,"),
        ({"model": collections.OrderedDict(w=[Reduce(exec, "STOLEN.append(1)")])}, "exec,"),
        (Reduce(np.load, "file"), "numpy"),
        (Reduce(pickle.loads, b"."), "loads,"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_pickles_are_refused_by_name(thing, named, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        data = pickle.dumps(thing, protocol=protocol)
    except TypeError:  # modules do not pickle: write the reference to getattr alone
        data = b"\x80\x02" + global_("builtins", "getattr") + b"."
    with pytest.raises(ConversionError, match=named):
        read_checkpoint(write(tmp_path / "bad.pth", data))
    assert not STOLEN and not (tmp_path / "PWNED").exists()


def test_imports_nothing(tmp_path):
    import sys

    data = b"\x80\x02" + global_("antigravity", "geohash") + b"."
    with pytest.raises(ConversionError, match="antigravity.geohash"):
        read_checkpoint(write(tmp_path / "bad.pth", data))
    data = b"\x80\x04\x8c\x05torch\x8c\x19_utils._rebuild_tensor_v2\x93."  # a dotted name through an allowed module
    with pytest.raises(ConversionError, match="torch._utils._rebuild_tensor_v2"):
        read_checkpoint(write(tmp_path / "bad.pth", data))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(size=(3, 3)), "does not fit"),
        (dict(offset=5), "does not fit"),
        (dict(offset=-1), "offset -1"),
        (dict(stride=(-3, 1)), "stride"),
        (dict(size=(2**20, 2**10), stride=(0, 0)), "share storages"),
        (dict(count=7), "not 7 values"),
        (dict(kind="DoubleStorage"), "24 bytes, not 6 values of float64"),
        (dict(kind="QInt8Storage"), "torch.QInt8Storage"),
        (dict(key=b"../0"), "unsafe storage name"),
        (dict(key=b"1"), "is missing"),
    ],
)
def test_tensors_that_lie(settings, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        read_checkpoint(write(tmp_path / "bad.pth", tensor_pickle(**settings)))


def test_archives_that_lie(tmp_path, fixtures):
    whole = (fixtures / "multimae_tiny_public.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match="cut off"):
        read_checkpoint(tmp_path / "cut.pth")
    with zipfile.ZipFile(fixtures / "multimae_tiny_public.pth") as archive:
        data = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
    at = whole.index(data[:256]) + len(data) // 2
    (tmp_path / "bit.pth").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ConversionError, match="is damaged"):
        read_checkpoint(tmp_path / "bit.pth")
    members = {"archive/data/0": np.zeros(6, np.float32).tobytes()}
    for name in ("../evil", "/etc/evil", "archive/../../evil"):
        with pytest.raises(ConversionError, match="unsafe member name"):
            read_checkpoint(write(tmp_path / "bad.pth", tensor_pickle(), {**members, name: b"x"}))
    with pytest.raises(ConversionError, match="compressed"):
        read_checkpoint(write(tmp_path / "bomb.pth", tensor_pickle(), {"archive/data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(ConversionError, match="more than a state dict needs"):
        read_checkpoint(write(tmp_path / "big.pth", bytes(65 * 2**20)))
    with pytest.raises(ConversionError, match="not little-endian"):
        read_checkpoint(write(tmp_path / "big_endian.pth", tensor_pickle(), {**members, "archive/byteorder": b"big"}))
    with pytest.raises(ConversionError, match="no member"):
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
            archive.writestr("a/b.txt", "hello")
        read_checkpoint(tmp_path / "other.zip")
    (tmp_path / "legacy.pth").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100))
    with pytest.raises(ConversionError, match="before 1.6.*torch.save"):
        read_checkpoint(tmp_path / "legacy.pth")
    for name, data in (("empty.pth", b""), ("text.pth", b"<html>404"), ("text.safetensors", b"<html>404 not found</html>")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConversionError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(ConversionError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")
