"""The planner: what it reads out of a program by hand, a real plan on the CPU, and, where the plugin is installed, one of an H100."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from maskvit.commands.plan import __main__ as command
from maskvit.commands.plan import devices, growth, program
from maskvit.training.config import check_config
from tests.runs import ROOT, small_run, write_config

DEVICE = devices.DEVICES["h100"]
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_rows (p.1: f32[1000,64], p.2: s32[]) -> f32[8,64] {
  %p.1 = f32[1000,64]{1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %rows = f32[8,64]{1,0} dynamic-slice(%p.1, %p.2, %zero), dynamic_slice_sizes={8,64}
  ROOT %twice = f32[8,64]{1,0} add(%rows, %rows)
}

%fused_write (q.1: f32[1000,64], q.2: f32[8,64], q.3: s32[]) -> f32[1000,64] {
  %q.1 = f32[1000,64]{1,0} parameter(0)
  %q.2 = f32[8,64]{1,0} parameter(1)
  %q.3 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %update = f32[1000,64]{1,0} dynamic-update-slice(%q.1, %q.2, %q.3, %none)
}

%body (state: (s32[], bf16[256,512])) -> (s32[], bf16[256,512]) {
  %state = (s32[], bf16[256,512]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %x = bf16[256,512]{1,0} get-tuple-element(%state), index=1
  %weights = bf16[512,512]{1,0} constant({...})
  %product = bf16[256,512]{1,0} dot(%x, %weights), lhs_contracting_dims={1}, metadata={op_name="jit(step)/Encoder/mlp/dot"}
  ROOT %pair = (s32[], bf16[256,512]{1,0}) tuple(%count, %product)
}

%condition (state.2: (s32[], bf16[256,512])) -> pred[] {
  %state.2 = (s32[], bf16[256,512]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (table: f32[1000,64], x.0: bf16[256,512], i: s32[]) -> f32[1000,64] {
  %table = f32[1000,64]{1,0:T(8,128)} parameter(0)
  %x.0 = bf16[256,512]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %start = (s32[], bf16[256,512]{1,0:T(8,128)(2,1)}) tuple(%i, %x.0)
  %loop = (s32[], bf16[256,512]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %end = bf16[256,512]{1,0} get-tuple-element(%loop), index=1
  %lib = (bf16[256,128]{1,0}, s8[4194304]{0}) custom-call(%end, %x.0), LIBRARY
  %sum = f32[8,64]{1,0} all-reduce(%rows.2), replica_groups=[1,8]<=[8], to_apply=%add
  %rows.2 = f32[8,64]{1,0} fusion(%table, %i), kind=kLoop, calls=%fused_rows
  ROOT %new = f32[1000,64]{1,0} fusion(%table, %rows.2, %i), kind=kLoop, calls=%fused_write
}
"""


LIBRARY = (
    'custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/transpose(jvp(Decoder))/attn/dot"}, '
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
)


def test_a_program_by_hand():
    """Loops as often as they run, rows of a table and not the table, FLOPs of products, what is sent; shapes of any layout."""
    rows = {row.name: row for row in program.kernels(program.parse(PROGRAM.replace("LIBRARY", LIBRARY)))}
    product = 2 * 256 * 512 * 512
    assert (rows["product"].times, rows["product"].flops) == (3, product) and rows["product"].bytes == 2 * (2 * 256 * 512 + 512 * 512)
    assert rows["lib"].flops == 2 * 256 * 128 * 512 and rows["lib"].op == "__cublas$lt$matmul"
    assert rows["rows.2"].bytes == rows["new"].bytes == 2 * 8 * 64 * 4 + 4  # read or written once each, and an index
    assert program.collectives(list(rows.values())) == {"all-reduce": (1, 2 * 7 / 8 * 8 * 64 * 4)}
    assert program.part_of(rows["lib"].source) == "decoder attention backward" and program.part_of("") == "rest of the step forward"
    least = max(product / (0.78 * DEVICE.peak), rows["product"].bytes / (0.85 * DEVICE.rate), 2e-6)
    assert rows["product"].seconds(DEVICE) == pytest.approx(3 * least)
    parts = program.parts(list(rows.values()), DEVICE)
    assert parts["encoder mlp forward"].kernels == 3 and sum(part.kernels for part in parts.values()) == 7
    with pytest.raises(ValueError, match="no line that begins with ENTRY"):
        program.parse("nothing")


TPU_PROGRAM = """
HloModule step

ENTRY %main (x.0: bf16[64,100], y.0: f32[8,16,16]) -> bf16[64,100] {
  %x.0 = bf16[64,100]{1,0:T(8,128)(2,1)} parameter(0)
  %y.0 = f32[8,16,16]{2,1,0:T(8,128)} parameter(1)
  %fetch = (bf16[64,100]{1,0:T(8,128)(2,1)S(1)}, bf16[64,100]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x.0)
  %x.1 = bf16[64,100]{1,0:T(8,128)(2,1)S(1)} copy-done(%fetch)
  %part = ((f32[8,16,16]{2,1,0:T(8,128)}), f32[2,16,16]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%y.0), slice={[0:2], [0:16], [0:16]}
  %y.1 = f32[2,16,16]{2,1,0:T(8,128)S(1)} slice-done(%part)
  %q.0 = f32[64,8,32,99]{2,3,1,0:T(8,128)} parameter(2)
  %k.0 = f32[64,8,32,99]{2,3,1,0:T(8,128)S(1)} parameter(3)
  %product = f32[64,8,99,99]{2,3,1,0:T(8,128)} convolution(%q.0, %k.0), WINDOW, dim_labels=01fb_01io->01bf
  ROOT %sum = bf16[64,100]{1,0:T(8,128)(2,1)} add(%x.1, %x.1)
}
"""


def test_a_program_of_a_tpu_by_hand():
    """What lies on the chip crosses no bus; fetching runs beside the rest; a product of batches is no convolution of them all."""
    device, window = devices.DEVICES["v5e"], "window={size=64x8 stride=63x7 lhs_dilate=64x8}"
    rows = {row.name: row for row in program.kernels(program.parse(TPU_PROGRAM.replace("WINDOW", window)))}
    assert rows["fetch"].bytes == 2 * 64 * 128 and rows["part"].bytes == 4 * 2 * 16 * 128 and rows["sum"].bytes == 2 * 64 * 128
    assert rows["fetch"].beside and rows["part"].beside and not rows["sum"].beside
    assert rows["product"].flops == 2 * 64 * 8 * 99 * 99 * 32
    assert rows["product"].bytes == 4 * 64 * 8 * (128 * 104 + 128 * 104)  # 32 columns take a tile of 128, and 99 rows 13 of 8
    moved = sum(row.bytes for row in rows.values()) / (0.85 * device.rate)
    alone = rows["product"].seconds(device) + rows["sum"].seconds(device)
    assert program.least_seconds(list(rows.values()), device) == pytest.approx(max(moved, alone))


@pytest.mark.parametrize(
    ("given", "kernel", "result", "window", "labels", "products"),
    [
        ((2, 3, 8, 8), (3, 5, 3, 3), (2, 5, 8, 8), "size=3x3 pad=1_1x1_1", "bf01_io01->bf01", 2 * 5 * 3 * 22 * 22),  # of 24 two are padding
        ((2, 8, 8, 3), (2, 2, 3, 5), (2, 4, 4, 5), "size=2x2 stride=2x2", "b01f_01io->b01f", 2 * 5 * 3 * 8 * 8),
        # Heads beside each other, as TPUs write them.
        ((4, 99, 48, 1), (12, 8, 48, 1), (4, 99, 12, 8), "size=1x12 pad=0_0x11_11 rhs_reversal=0x1", "0bf1_1oi0->0b1f", 4 * 99 * 96 * 48),
        ((2, 9, 3), (3, 3, 5), (2, 5, 5), "size=3 rhs_dilate=2", "b0f_0io->b0f", 2 * 5 * 3 * 5 * 3),
    ],
)
def test_only_what_meets_the_input_is_a_product_of_a_convolution(given, kernel, result, window, labels, products):
    shapes = {"x": f"f32[{','.join(map(str, given))}]", "w": f"f32[{','.join(map(str, kernel))}]"}
    shape, rest = f"f32[{','.join(map(str, result))}]", f"window={{{window}}}, dim_labels={labels}"
    assert program.product_flops(program.Instruction("a", shape, "convolution", ("x", "w"), rest, False), shapes) == 2 * products


def test_fused_attention_counts_its_products():
    rest = 'custom_call_target="__cudnn$fmhaSoftmax"'
    attention = program.Instruction("a", "(bf16[4,2,6,8]{3,1,2,0})", "custom-call", ("q", "k", "v"), rest, False)
    shapes = dict(q="bf16[4,6,2,8]{3,2,1,0}", k="bf16[4,10,2,8]{3,2,1,0}", v="bf16[4,10,2,8]{3,2,1,0}")
    assert program.product_flops(attention, shapes) == 2 * 2 * 4 * 2 * 6 * 10 * 8
    backward = attention._replace(rest='custom_call_target="__cudnn$fmhaSoftmaxBackward"')
    assert program.product_flops(backward, shapes) == 2.5 * program.product_flops(attention, shapes)


def test_splash_attention_counts_its_products():
    rest = 'custom_call_target="tpu_custom_call"'
    forward = program.Instruction("splash_mha_fwd_segmented.2", "bf16[4,2,6,8]", "custom-call", ("mask", "q", "k", "v", "ids"), rest, False)
    shapes = dict(mask="s8[1,1,1]", q="bf16[4,2,6,8]", k="bf16[4,2,10,8]", v="bf16[4,2,10,8]", ids="s32[4,8,10]")
    assert program.product_flops(forward, shapes) == 2 * 2 * 4 * 2 * 6 * 10 * 8
    backward = forward._replace(name="splash_mha_dkv_segmented.1")
    assert program.product_flops(backward, shapes) == 2.5 * program.product_flops(forward, shapes)


def test_arrays_lie_in_whole_tiles_on_tpus():
    assert program.size_of("bf16[64,12,640,64]{3,2,1,0:T(8,128)(2,1)}") == 2 * 64 * 12 * 640 * 128
    assert program.size_of("(f32[3,5]{0,1:T(8,128)}, f32[7]{0:T(1024)}, u32[]{:T(128)S(2)})") == 4 * (128 * 8 + 1024 + 1)
    assert program.size_of("f32[64,99]{1,0}") == 4 * 64 * 99


def test_rows_by_the_names_that_jax_gives():
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100", "TPU v5 lite": "v5e", "TPU v5": "v5p"}
    assert all(devices.device_of(kind) is devices.DEVICES[name] for kind, name in {**names, "TPU v6 lite": "v6e"}.items())
    assert devices.device_of("cpu") is None and devices.device_of("NVIDIA GeForce RTX 4090") is None


def test_devices_by_name():
    found = {text: devices.parse_devices(text) for text in ("h100", "h200:8", "v5e", "v6e:4x4")}
    assert found == {"h100": ("h100", "1"), "h200:8": ("h200", "8"), "v5e": ("v5e", "2x2"), "v6e:4x4": ("v6e", "4x4")}


@pytest.mark.parametrize(
    ("text", "message"),
    [("h300", "--devices is 'h300'; known: "), ("h100:0", "write for example h100:8"), ("v5e:8", "for example v5e:2x2")],
)
def test_devices_that_there_are_not(text, message):
    with pytest.raises(ValueError, match=message):
        devices.parse_devices(text)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="the plugin is installed")
def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"--devices h100:1 cannot be .* What it takes: pip install 'maskvit\[plan\]'"):
        devices.make_devices("h100", "1")


def test_a_plan_of_this_machine(tmp_path, capsys):
    """A grid over the batch: every field, a comparison that passes and one that does not, the plot; no data are looked at."""
    path = write_config(tmp_path / "run.py", small_run("nowhere"))
    arguments = ["--config", str(path), "--devices", "cpu", "--num-records", "1000", "--top", "3"]
    assert command.main([*arguments, "--batch", "8,16", "--json", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "plain attention" in said and "floor, from the compiled program" in said
    assert "encoder mlp backward" in said and "| plan |" in said
    small, large = (json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert small["batch"] == 8 and large["devices"] == "cpu:1" and not small["collectives"] and small["fits"]
    assert 0 < small["floor_ms"] < large["floor_ms"]
    assert large["temporary_gb"] > small["temporary_gb"] > 0 and 0 < small["share_of_peak"] < 1
    assert (tmp_path / "out" / "plan.svg").read_bytes().startswith(b"<?xml")
    assert "ENTRY" in (tmp_path / "out" / "cpu_1_8.txt").read_text()

    earlier = dict(small, floor_ms=small["floor_ms"] / 1.1, kernels=2 * small["kernels"])
    (tmp_path / "b.jsonl").write_text(json.dumps(earlier) + "\n")
    assert command.main([*arguments, "--batch", "8", "--against", str(tmp_path / "b.jsonl")]) == 1
    said = capsys.readouterr().out
    assert re.search(r"floor_ms .* WORSE", said) and re.search(r"kernels .* better", said) and re.search(r"gb_moved .* the same", said)
    (tmp_path / "b.jsonl").write_text("{}\n")
    assert command.main([*arguments, "--against", str(tmp_path / "b.jsonl")]) == 2
    assert "b.jsonl, line 1 is no plan: write such files with --json" in capsys.readouterr().err


def test_points_of_growth():
    """What is planned of a config, each of them once; sizes and inputs that can be had."""
    plain, asked = small_run("nowhere"), []

    def plan(name, config):
        check_config(config)
        asked.append((name, config["global_batch"], config["image_size"], config["objective"]["inputs"], config["objective"]["outputs"]))
        return dict(parameters=1e6 * len(asked), floor_ms=float(len(asked)))

    found = growth.grown(plain, plan)
    assert [place for place, _ in found["batch"]] == [2, 4, 8, 16] and found["batch"][2][1] is found["tokens"][2][1]
    assert [place for place, _ in found["tokens"]] == [12, 27, 48, 108]  # on 2, 3, 4 and 6 rows and columns
    assert [place for place, _ in found["modalities"]] == [1, 2, 3] and [place for place, _ in found["parameters, millions"]][0] > 1
    assert ("objective.inputs=('rgb',), objective.outputs=('rgb',)", 8, (32, 32), ("rgb",), ("rgb",)) in asked
    assert len(asked) == len({str(one) for one in asked}) == 4 + 3 + 2 + 3  # the config itself stands on three axes
    alone = dict(plain, objective=dict(plain["objective"], inputs=("rgb",)))
    assert list(growth.studies(alone)) == ["batch", "tokens", "parameters, millions"]


def test_a_start_does_not_grow_with_the_data(tmp_path):
    (small, _, least), (large, seconds, most) = growth.starts((1000, 10**7))
    assert (small, large) == (1000, 10**7) and not most > least + 0.2  # to sort them would take twice that
    record = dict(floor_ms=2.0, state_gb=1.0, temporary_gb=0.5, images_per_s=100.0, kernels=7)
    result = {"batch": [(8, record), (16, record)], "modalities": [(1, record)]}
    growth.draw(result, [(small, 0.1, least), (large, seconds, most)], tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_bytes().startswith(b"<?xml")
    assert "| batch | 16 | 2.0 | 100 | 1.50 | 7 |" in growth.table(result)


def test_growth_of_one_config_on_one_kind_of_device(tmp_path, capsys):
    path = str(write_config(tmp_path / "run.py", small_run("nowhere")))
    for more in ([], ["--out", str(tmp_path), "--grid", "global_batch=8"], ["--out", str(tmp_path), "--batch", "8,16"]):
        assert command.main(["--config", path, "--devices", "cpu", "--growth", *more]) == 2
        assert "--growth needs --out, and takes one entry of --devices" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="no CUDA plugin: pip install 'maskvit[plan]'")
def test_a_step_for_an_h100(tmp_path):
    """What must hold of every program for a GPU: fused attention in each block, nothing of 64 bits, no call back to Python."""
    config = small_run("nowhere")
    config["objective"]["compute_dtype"] = "bfloat16"
    line = [sys.executable, "-m", "maskvit", "plan", "--config", write_config(tmp_path / "run.py", config)]
    line += ["--json", str(tmp_path / "plan.jsonl"), "--out", str(tmp_path)]
    for more in (["--devices", "h100,h100:8"], ["--devices", "h100:8", "--grid", "sharding={'fsdp': 2, 'tensor': 2}"]):
        done = subprocess.run([*line, *more], cwd=ROOT, capture_output=True, text=True, timeout=550, env=os.environ)
        assert done.returncode == 0, done.stderr[-2000:]
    one, eight, spread = (json.loads(text) for text in (tmp_path / "plan.jsonl").read_text().splitlines())
    assert spread["attention"] == "cudnn" and {"all-gather", "reduce-scatter"} <= set(spread["collectives"])
    assert one["attention"] == "cudnn" and one["collectives"] == {} and set(eight["collectives"]) == {"all-reduce"}
    text = next(tmp_path.glob("h100_1_*.txt")).read_text()
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    assert calls.count("__cudnn$fmhaSoftmax") == calls.count("__cudnn$fmhaSoftmaxBackward") > 0
    assert "f64[" not in text and not [call for call in calls if "callback" in call]
