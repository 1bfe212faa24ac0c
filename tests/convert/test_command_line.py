"""convert_torch_checkpoint.py: every mistake is one line, several are one list; flags reach what they are for."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

import convert_torch_checkpoint
from maskvit.checkpoints import load_params
from tests.convert.test_vit_import import WIDTH, timm_state


def command(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["convert_torch_checkpoint.py", *map(str, arguments)])
    try:
        status = convert_torch_checkpoint.main()
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: the following arguments are required: --src"),
        (("--bad",), "error: the following arguments are required: --src"),
        (("--src", "{src}", "--surprise"), "error: unrecognized arguments: --surprise"),
        (("--src", "{src}"), "error: nothing to do: give --dst, --inspect or --verify"),
        (("--src", "absent", "--inspect"), "error: --src absent: no such file or folder"),
        (("--src", "{src}", "--dst", "x", "--num-heads", "-3"), "error: --num-heads is '-3'; give a positive whole number"),
        (("--src", "{src}", "--dst", "x", "--grid", "14"), "error: --grid is '14'; give rows and columns, such as 14x28"),
        (("--src", "{src}", "--dst", "x", "--std", "1,0"), "error: --std is '1,0'; must be above 0"),
        (("--src", "{src}", "--dst", "x", "--scale", "1/0"), "error: --scale is '1/0'; give numbers such as 0.5 or 1/255"),
        (("--src", "{src}", "--dst", "x", "--allow", "("), "error: --allow '(' is no regular expression"),
        (("--src", "{src}", "--dst", "x.pth", "--to", "tim"), "error: --to is 'tim'; known: multimae, timm"),
        (("--src", "{src}", "--dst", "x.pth", "--to", "timm", "--grid", "2x2"), "error: --grid: for reading a foreign file"),
        (("--src", "{src}", "--inspect", "--images", "."), "error: --images is for --verify"),
        (("--src", "{src}", "--dst", "x", "--model", "ema"), "--model is 'ema'; known: teacher, student, both"),
        (("--src", "{src}", "--dst", "x"), "the encoder's width 12 is no multiple of 64: give --num-heads"),
    ],
)
def test_every_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    save_file(timm_state(), tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    status, said = command(monkeypatch, capsys, *(str(a).format(src=tmp_path / "x.safetensors") for a in arguments))
    assert status == 2 and message in said and said.count("\n") == 1 and said.startswith("error: ")


def test_checkpoints_of_ours_where_others_belong(tmp_path, monkeypatch, capsys):
    save_file(timm_state(), tmp_path / "x.safetensors")
    convert = ("--src", tmp_path / "x.safetensors", "--dst", tmp_path / "ours", "--num-heads", "3")
    assert command(monkeypatch, capsys, *convert)[0] == 0
    status, said = command(monkeypatch, capsys, *convert)
    assert status == 2 and said == f"error: {tmp_path / 'ours'}: holds a checkpoint already; choose another folder\n"
    for folder in ("ours", "ours/0"):
        status, said = command(monkeypatch, capsys, "--src", tmp_path / folder, "--inspect")
        assert status == 2 and "it is a checkpoint of ours: --to LAYOUT writes it for others" in said and said.count("\n") == 1


def test_several_mistakes_are_one_list(tmp_path, monkeypatch, capsys):
    save_file(timm_state(), tmp_path / "x.safetensors")
    arguments = ["--src", tmp_path / "y.safetensors", "--dst", tmp_path / "ours", "--num-heads", "x", "--target", "odd", "--allow", "("]
    status, said = command(monkeypatch, capsys, *arguments)
    assert status == 2 and said.startswith("error: 4 mistakes:\n") and said.count("\n  - ") == 4


def test_flags_for_what_shapes_do_not_tell(tmp_path, monkeypatch, capsys):
    save_file(timm_state() | {"pos_embed": np.zeros((1, 17, WIDTH), np.float32)}, tmp_path / "x.safetensors")
    flags = ["--num-heads", "3", "--grid", "2x8", "--mean", "0.5,0.4,0.3", "--std", "0.5", "--scale", "1/127"]
    assert command(monkeypatch, capsys, "--src", tmp_path / "x.safetensors", "--dst", tmp_path / "ours", *flags)[0] == 0
    config = load_params(tmp_path / "ours")[1]["config"]
    assert config["image_size"] == [8, 32] and config["modalities"]["rgb"]["mean"] == [0.5, 0.4, 0.3]
