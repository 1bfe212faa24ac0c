"""The benchmark command at a tiny size, and the arithmetic that its TFLOP/s and MFU stand on."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from tiny import MODALITIES, fresh_params, tiny_objective

from maskvit.commands.bench import distillation, guidance, step, timing
from maskvit.commands.bench.__main__ import main
from maskvit.commands.bench.loader import stated_modalities
from maskvit.core import flops
from maskvit.data.views import MultiCrop
from maskvit.objectives import build_objective
from tests.runs import make_scenes

TINY = dict(width=16, depth=1, heads=2)


@pytest.fixture(scope="module")
def base():
    """MultiMAE-B at 224 as benchmarked: (random, guided)."""
    return tuple(build_objective(step.step_config("B", 224, "float32", guided)) for guided in (False, True))


def test_flops_of_multimae_b(base):
    """Counted by hand from the sizes: 98 visible tokens and the global one in the encoder, four decoders of 196 queries."""
    random, guided = base
    model = random.model
    embed = 2 * 196 * (768 + 256 + 1024) * 768  # rgb 16x16x3, depth 16x16, semseg 4x4x64
    encoder = 12 * (2 * 99 * 12 * 768**2 + 4 * 99**2 * 768)
    shared = 2 * 99 * 768 * 256 + (4 * 196 + 4 * 99) * 256**2 + 4 * 196 * 99 * 256 + 16 * 196 * 256**2
    blocks = 2 * (24 * 196 * 256**2 + 4 * 196**2 * 256)
    heads = 2 * 196 * 256 * (768 + 256 + 16 * 133 + 768)
    assert flops.embed_flops(model) == embed
    assert flops.encoder_flops(model, 98) == encoder
    assert flops.forward_flops(model, 98) == embed + encoder + 4 * (shared + blocks) + heads
    assert flops.forward_flops(model, 98) / 1e9 == pytest.approx(22.34, abs=0.01)
    assert random.flops() / 1e9 == pytest.approx(67.01, abs=0.01)


def test_flops_of_the_guidance_pass(base):
    """A whole pass over all 589 tokens costs 112.8 GFLOP; stopping at the last block's product of the needed rows saves 8.7."""
    random, guided = base
    assert flops.encoder_flops(random.model, 588) / 1e9 == pytest.approx(112.84, abs=0.01)
    assert guided.guidance.flops(guided.model) / 1e9 == pytest.approx(104.14, abs=0.01)
    assert guided.flops() - random.flops() == guided.guidance.flops(guided.model)


def records_of(name):
    return step.step_record(name, {name: [1e-3] * 3}, 8, 1e9, jax.devices()[0], 1) | dict(size="B", batch=8, dtype="bfloat16")


@pytest.fixture(scope="module")
def records():
    """One tiny run, torch beside it where it is installed."""
    with_torch = importlib.util.find_spec("torch") is not None
    return step.bench_step(
        TINY, batch=4, image=32, dtype="float32", steps=3, warmup=1, with_torch=with_torch,
        num_visible=3, decoder=dict(width=16, depth=1, heads=2), outputs=("rgb", "semseg"),
    )  # fmt: skip


def test_measures_every_step_in_turns(records):
    by_name = {record["measurement"]: record for record in records}
    assert {"random", "guided"} <= set(by_name)
    for record in records:
        assert 0 < record["min_s"] <= record["median_s"] <= record["max_s"]
        assert record["images_per_s"] == pytest.approx(record["batch"] / record["median_s"])
        assert record["tflops_per_s"] == pytest.approx(record["gflop_per_image"] * record["images_per_s"] / 1e3)
        assert record["mfu"] is None  # no peak is known for a CPU
        json.dumps(record)
    assert by_name["guided"]["gflop_per_image"] > by_name["random"]["gflop_per_image"]
    assert by_name["random"]["planned_gb"] > 0 and by_name["random"]["resident_peak_gb"] > 0
    assert by_name["random"]["measured_gb"] is None or 0 < by_name["random"]["measured_gb"] < by_name["random"]["resident_peak_gb"]
    ratios = by_name["guided"]["ratio_to_random"], by_name["random"]["ratio_to_guided"]
    assert ratios[0] * ratios[1] == pytest.approx(1.0, rel=1e-3)
    assert all(step.table_row(record).startswith(record["measurement"]) for record in records)


def test_objectives_are_compared_in_one_run():
    sizes = dict(batch=4, image=32, dtype="float32", steps=3, warmup=1, decoder=dict(width=16, depth=1, heads=2))
    mae, cross = step.bench_objectives(TINY, **sizes)
    assert (mae["measurement"], cross["measurement"]) == ("mae", "crossmae")
    assert cross["gflop_per_image"] < mae["gflop_per_image"] and cross["decoder_gmac_per_image"] < mae["decoder_gmac_per_image"]
    assert mae["ratio_to_crossmae"] * cross["ratio_to_mae"] == pytest.approx(1.0, rel=1e-3)
    for record in (mae, cross):
        assert record["planned_gb"] > 0 and record["resident_peak_gb"] > 0
        json.dumps(record)
        assert step.table_row(record).startswith(record["measurement"])


def test_beside_a_measured_time_stands_the_floor_of_that_program(monkeypatch):
    """The planner's figure for the same compiled step, on devices that it knows; none for a CPU."""
    compiled = jax.jit(lambda x: x @ x).lower(jnp.zeros((64, 64))).compile()
    assert step.floor_record(compiled, "cpu", 1.0) == {}
    found = step.floor_record(compiled, "NVIDIA H100 80GB HBM3", 1e-3)
    assert found == dict(floor_s=pytest.approx(2e-6), ratio_to_floor=pytest.approx(500))  # one launch
    record = dict(records_of("random"), **found)
    assert "500.000 x floor" in step.table_row(record)


def test_torch_yardstick_has_the_same_sizes(records):
    pytest.importorskip("torch")
    record = {record["measurement"]: record for record in records}["torch"]
    assert record["ratio_to_random"] > 0


def test_in_turns_alternates():
    order = []
    seconds = timing.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, warmup=1)
    assert order == list("ababab")
    order.clear()
    seconds = timing.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, warmup=1, settle=1)
    assert order == list("ab" + "aabb" * 2) and all(len(found) == 2 for found in seconds.values())
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_ratio_is_taken_inside_a_round():
    """A machine that is ten times slower in one round must not bend the ratio."""
    assert timing.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


def test_needs_no_data_library():
    """It runs on an accelerator machine with JAX, flax and optax alone: all else is hidden here."""
    hidden = ("grain", "tensorflow_datasets", "tensorflow", "matplotlib", "PIL", "cv2", "clu", "torch", "ml_collections", "array_record")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({hidden!r}))\n"  # None: importing it fails
        "from maskvit.commands.bench import step, timing\n"
        "import maskvit.training.step, maskvit.objectives, maskvit.core.flops\n"
        "assert 0 < timing.utilization(1e12, 'NVIDIA H200', 1) < 1\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "float16"], "'float16' is not one of float32, bfloat16"),
        (["--steps", "0"], "--steps: 0 must be at least 1"),
        (["loader"], "loader needs --data-dir"),
        (["distillation", "--reference", "."], "--reference is timed beside MultiMAE's steps"),
        (["step", "--compare", "objectives", "--reference", "."], "--reference is timed beside MultiMAE's steps"),
        (["guidance", "--checkpoint", "c", "--images", "i"], "--checkpoint needs --images and --learn-from"),
    ],
)
def test_bad_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


# Cheap guidance

SMALL = dict(num_visible=3, decoder=dict(width=16, depth=1, heads=2), outputs=("rgb",))  # what guides reads no output


def test_every_kind_of_guidance_is_timed():
    shallow = dict(width=16, depth=2, heads=2)
    model = build_objective(step.step_config(shallow, 32, "float32", False, **SMALL)).model
    every = guidance.options(model)
    assert "predicted after 1" in every and "predicted after 2" not in every  # the model has two blocks
    one_of_each = ("random", "exact", "coarse 0.5", "predicted after 1, 4 crops")
    rows = {name: option for name, option in every.items() if name in one_of_each or (name.startswith("re-used") and "16" not in name)}
    records = guidance.bench_cost(rows, size=shallow, batch=4, image=32, dtype="float32", steps=2, warmup=1, **SMALL)
    by_name = {record["option"]: record for record in records}
    assert list(by_name) == list(rows)
    assert by_name["random"]["gflop_per_image"] == 0 and by_name["random"]["time_ratio"] == 1.0
    exact = by_name["exact"]
    assert exact["step_gflop_per_image"] - by_name["random"]["step_gflop_per_image"] == pytest.approx(exact["gflop_per_image"])
    assert by_name["coarse 0.5"]["gflop_per_image"] < exact["gflop_per_image"]
    # Rows with the same source share their time.
    assert by_name["re-used, 1 crops"]["median_s"] == by_name["re-used, 4 crops"]["median_s"]


@pytest.fixture(scope="module")
def agreed():
    """Agreement of a few options on rendered scenes with random weights."""
    from maskvit.commands.bench.agreement import agreements, scenes

    modalities = copy.deepcopy(MODALITIES)
    modalities["depth"]["missing"] = 0.0
    modalities["semseg"]["num_classes"] = 14
    objective = tiny_objective(modalities)
    params = fresh_params(objective)
    names = ("random", "exact", "exact of the mirror image", "coarse 0.75", "re-used, whole picture", "re-used, 4 crops")
    rows = {
        name: option
        for name, option in guidance.options(objective.model).items()
        if name in names or name.startswith("predicted after 1, 4")
    }
    return agreements("random weights", objective, params, rows, scenes(0, 12, (32, 32)), scenes(12, 8, (32, 32)), fit_crops=8)


def test_agreement_is_measured_between_chance_and_the_mirror_image(agreed):
    by_name = {record["option"]: record for record in agreed}
    assert by_name["exact"]["low"] == by_name["exact"]["high"] == 1.0
    assert by_name["exact of the mirror image"]["low_corrected"] == pytest.approx(1.0)
    assert abs(by_name["random"]["spearman"]) < 0.15
    assert by_name["exact"]["samples"] == 24
    for name in ("coarse 0.75", "re-used, 4 crops", "predicted after 1, 4 crops"):
        assert by_name[name]["spearman"] > 0.2, name
        assert {"rgb/low", "depth/high", "semseg/spearman_corrected"} <= set(by_name[name])
    assert by_name["coarse 0.75"]["cost_share"] < by_name["exact"]["cost_share"] == 1.0


def test_records_become_a_table_and_a_plot(agreed, tmp_path):
    text = guidance.table(agreed)
    assert len(text.splitlines()) == len(agreed) + 2 and "re-used, whole picture" in text
    guidance.write(tmp_path, agreed)
    lines = (tmp_path / "guidance_cost.jsonl").read_text().splitlines()
    assert [json.loads(line)["option"] for line in lines] == [record["option"] for record in agreed]
    assert (tmp_path / "guidance_cost.svg").read_bytes().startswith(b"<?xml")


def test_distillation_times_attmask_against_ibot():
    head = dict(hidden=16, bottleneck=8, num_prototypes=16)
    records = distillation.bench_distillation(
        TINY, batch=4, image=32, dtype="float32", steps=2, warmup=1, local_crops=1, projection=head
    )  # fmt: skip
    assert [record["measurement"] for record in records] == list(distillation.METHODS)
    assert all(record["ratio_to_ibot"] > 0 for record in records[1:]) and records[0]["median_s"] > 0


def test_flops_of_ibot_at_vit_s():
    objective = build_objective(distillation.distillation_config("S", 224, "float32", "attmask_high"))
    large = 2 * 196 * 768 * 384 + 12 * (2 * 197 * 12 * 384**2 + 4 * 197**2 * 384)
    small = 2 * 36 * 768 * 384 + 12 * (2 * 37 * 12 * 384**2 + 4 * 37**2 * 384)
    head = 2 * (384 * 2048 + 2048**2 + 2048 * 256 + 256 * 8192)
    counted = objective.flops(MultiCrop(local_crops=10, local_size=(96, 96)))
    assert counted == 8 * (large + 197 * head) + 30 * (small + head)
    assert counted / 1e9 == pytest.approx(146.53, abs=0.01)


CHECKOUT = {
    "utils/__init__.py": "import a_package_that_nobody_has",
    "utils/registry.py": "",
    "multimae/__init__.py": """
from torch import nn
from .multimae import MultiMAE

class Adapter(nn.Module):
    def __init__(self, num_channels=0, num_classes=0, **options):
        super().__init__()
        self.options = options

class Loss(nn.Module):
    def __init__(self, patch_size, stride, norm_pix=False):
        super().__init__()
        self.stride = stride

    def forward(self, prediction, target, mask):
        assert target.shape[-1] == 32 // self.stride and mask.shape == (2, 16)
        return prediction.mean() ** 2

PatchedInputAdapter = SemSegInputAdapter = SpatialOutputAdapter = Adapter
MaskedMSELoss = MaskedL1Loss = MaskedCrossEntropyLoss = Loss
""",
    "multimae/multimae.py": """
import torch
from torch import nn
import utils.registry

SEEN = []

class MultiMAE(nn.Module):
    def __init__(self, inputs, outputs, num_global_tokens, dim_tokens, depth, num_heads, mlp_ratio):
        super().__init__()
        assert set(inputs) == {"rgb", "depth", "semseg"} and outputs["norm_rgb"].options["task"] == "rgb"
        assert (dim_tokens, depth, num_heads, mlp_ratio) == (48, 2, 3, 4.0)
        self.outputs = list(outputs)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, values, num_encoded_tokens, alphas, fp32_output_adapters):
        assert abs(values["depth"].mean()) < 0.5 and num_encoded_tokens == 12 and fp32_output_adapters == ["semseg"]
        SEEN.append(self.weight.detach().clone())
        return {name: self.weight * 2 for name in self.outputs}, {name: torch.ones(2, 16) for name in values}
""",
}


def test_a_checkout_of_the_reference_is_timed(tmp_path):
    """A package with the reference's names, whose `utils` cannot be imported as a whole: masks reach its losses, its parameters move."""
    pytest.importorskip("torch")
    from maskvit.commands.bench.reference_model import reference_step

    for name, text in CHECKOUT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    try:
        run = reference_step(tmp_path, tiny_objective(), 2, "float32")
        run()
        run()
        first, second = sys.modules["multimae.multimae"].SEEN
        assert (second < first).all()
        assert not any(name.split(".")[0] == "utils" for name in sys.modules)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "multimae"]:
            del sys.modules[name]
    assert main(["step", "--reference", str(tmp_path / "utils")]) == 2


def test_the_loader_by_itself_and_by_stages(tmp_path, capsys):
    make_scenes(tmp_path)
    assert main(["loader", "--data-dir", str(tmp_path), "--image", "48", "--batch", "4", "--steps", "2", "--resize", "cv2"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["records_per_s"] > 0 and record["records_per_s_of_a_core"] > 0 and record["resize"] == "cv2"
    assert list(record["stages_ms"])[:4] == ["read", "decode rgb", "decode depth", "decode semseg"]


def test_the_loader_reads_what_a_data_set_has(monkeypatch):
    class Info:
        metadata = {"modalities": {"rgb": {"channels": 3}, "bands": {"channels": 10}, "parts": {"kind": "categorical", "num_classes": 5}}}

    class Builder:
        info = Info()

    monkeypatch.setattr("maskvit.data.sources.open_builder", lambda *_: Builder())
    specs = stated_modalities("data", "mine")
    assert list(specs) == ["rgb", "bands", "parts"] and specs["rgb"].scale == 1 / 255
    assert specs["bands"].channels == 10 and specs["parts"].num_classes == 5 and specs["parts"].loss == "cross_entropy"
    Info.metadata = {}
    assert list(stated_modalities("data", "mine")) == ["rgb", "depth", "semseg"]
