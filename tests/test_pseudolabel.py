"""`python -m maskvit data pseudolabel`, with random networks of the real architectures: DPT, and Mask2Former over Swin."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from maskvit.__main__ import main
from maskvit.commands.data.pseudolabel import depth_counts
from maskvit.core.modalities import RGB, SEMSEG, parse_modalities
from maskvit.data import open_source

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NAMES = ["cat/a.jpg", "cat/b.png", "dog/c.jpeg"]
SIZES = [(40, 56), (64, 48), (33, 35)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a depth estimator and of a segmenter of 5 classes, as `save_pretrained` writes them."""
    top = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    depth = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    transformers.DPTForDepthEstimation(depth).save_pretrained(top / "depth")
    transformers.DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(top / "depth")
    swin = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    semseg = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6, num_labels=5,
    )  # fmt: skip
    transformers.Mask2FormerForUniversalSegmentation(semseg).save_pretrained(top / "semseg")
    transformers.Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, num_labels=5).save_pretrained(top / "semseg")
    return {"depth": str(top / "depth"), "semseg": str(top / "semseg")}


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in zip(NAMES, SIZES, strict=True):
        path = tmp_path / "in" / "train" / "rgb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
    return tmp_path / "in"


def label(root, *more):
    return main(["data", "pseudolabel", "--root", str(root), "--device", "cpu", *more])


def test_maps_are_those_of_the_models_and_the_folder_can_be_packed(root, models, tmp_path, capsys):
    assert label(root, "--depth", models["depth"], "--semseg", models["semseg"]) == 0
    said = capsys.readouterr().out
    depth = transformers.DPTForDepthEstimation.from_pretrained(models["depth"]).eval()
    semseg = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(models["semseg"]).eval()
    for name, size in zip(NAMES, SIZES, strict=True):
        picture = Image.open(root / "train" / "rgb" / name).convert("RGB")
        place = (root / "train" / "depth" / name).with_suffix(".png")
        stored = np.array(Image.open(place)).astype(float)
        inputs = transformers.DPTImageProcessorPil.from_pretrained(models["depth"])(images=picture, return_tensors="pt")
        with torch.inference_mode():
            answer = depth(**inputs).predicted_depth
        answer = torch.nn.functional.interpolate(answer[None], size=size, mode="bicubic", align_corners=False)[0, 0].numpy()
        expected = (answer - answer.min()) / np.ptp(answer) * 65535
        assert stored.shape == size and stored.min() == 0 and stored.max() == 65535
        np.testing.assert_allclose(stored, expected, atol=40)  # of 65,535
        processor = transformers.Mask2FormerImageProcessorPil.from_pretrained(models["semseg"])
        with torch.inference_mode():
            outputs = semseg(**processor(images=picture, return_tensors="pt"))
        ids = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0].numpy()
        np.testing.assert_array_equal(np.array(Image.open((root / "train" / "semseg" / name).with_suffix(".png"))), ids)
    words = said[said.index("pack them: python -m maskvit ") :].split()[5:]
    words[words.index("NAME")], words[words.index("data", 1)] = "mine", str(tmp_path / "tfds")
    named = ["--pixel_classes", f"semseg={root / 'semseg.classes.txt'}"]
    assert words[-5:] == ["rgb", "depth,metres_per_count=None", "semseg,num_classes=5", *named] and main(["data", *words[1:]]) == 0
    specs = parse_modalities({"rgb": RGB, "semseg": {**SEMSEG, "num_classes": 5}})
    packed = open_source("tfds", specs, data_dir=str(tmp_path / "tfds"), name="mine")
    assert packed.pixel_classes == {"semseg": tuple(semseg.config.id2label[number] for number in range(5))}


def test_the_manifest_says_how_and_what_is_there_is_not_made_again(root, models, capsys, monkeypatch):
    from maskvit.commands.data import pseudolabel

    estimate, calls = pseudolabel.estimate_depth, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return estimate(*arguments)

    monkeypatch.setattr(pseudolabel, "estimate_depth", interrupted)
    command = ("--depth", models["depth"])
    assert label(root, *command) == 130
    path = root / "depth.manifest.jsonl"
    settings, *files = [json.loads(line) for line in path.read_text().splitlines()]
    assert settings["architecture"] == "DPTForDepthEstimation" and settings["model"] == "depth" and settings["unit"] == "relative"
    assert len(settings["revision"]) == 64 and [entry["file"] for entry in files] == ["train/depth/cat/a.png", "train/depth/cat/b.png"]
    for entry, name in zip(files, NAMES, strict=False):
        assert entry["sha256"] == hashlib.sha256((root / entry["file"]).read_bytes()).hexdigest()
        assert entry["picture_sha256"] == hashlib.sha256((root / "train" / "rgb" / name).read_bytes()).hexdigest()
    with path.open("a") as file:
        file.write('{"file": "train/dep')  # the process was killed while it wrote
    (root / "train" / "depth" / "cat" / "b.png").unlink()
    before = (root / "train" / "depth" / "cat" / "a.png").stat().st_mtime_ns
    assert label(root, *command) == 0
    assert len(calls) == 5 and "1 of 3 are there already" in capsys.readouterr().out  # the lost one and the third
    assert (root / "train" / "depth" / "cat" / "a.png").stat().st_mtime_ns == before
    assert {json.loads(line)["file"] for line in path.read_text().splitlines()[1:]} == {f"train/depth/{n[:5]}.png" for n in NAMES}
    assert label(root, *command, "--depth_unit", "meters") == 2
    assert "unit" in (said := capsys.readouterr().err) and "depth.manifest.jsonl names files" in said
    path.unlink()
    assert label(root, *command) == 2
    assert "holds files already" in capsys.readouterr().err


def test_mistakes_are_one_line(root, models, tmp_path, capsys):
    for words, text in (
        ((), "give --depth MODEL, --semseg MODEL, or both"),
        (("--depth", models["semseg"]), "cannot be had as a model for AutoModelForDepthEstimation"),
        (("--semseg", str(tmp_path / "nowhere")), "nowhere cannot be had"),
    ):
        assert label(root, *words) == 2
        said = capsys.readouterr().err
        assert text in said and said.count("error:") == 1
    (root / "train" / "rgb" / "cat" / "a.jpg").write_bytes(b"no picture")
    assert label(root, "--depth", models["depth"]) == 1
    assert "cat/a.jpg" in (said := capsys.readouterr().out) and "left out" in said


def test_counts_of_meters():
    meters = np.array([[1.0, 127.9, 128.1], [0.0, -1.0, np.nan]])
    np.testing.assert_array_equal(depth_counts(meters, "meters"), [[512, round(127.9 * 512), 0], [0, 0, 0]])
    np.testing.assert_array_equal(depth_counts(np.array([[-2.0, 0.0, 2.0]]), "relative"), [[0, 32768, 65535]])
    np.testing.assert_array_equal(depth_counts(np.full((1, 2), 3.0), "relative"), [[0, 0]])
    with pytest.raises(ValueError, match="not finite"):
        depth_counts(meters, "relative")
