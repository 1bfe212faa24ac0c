"""Data sets prepared by TFDS builders, read without TensorFlow; what does not fit is an error that says so."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import DEPTH, RGB, SEMSEG, parse_modalities
from maskvit.data import codec, open_source
from maskvit.data.codec import RecordError
from maskvit.data.decoding import decode_record
from maskvit.data.sources import ListSource, Source, TfdsSource
from maskvit.data.subsets import stratified

MODALITIES = parse_modalities({"rgb": RGB, "depth": DEPTH})
CLASSES = ("cat", "dog", "emu")


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(out, "png")
    return out.getvalue()


def prepare(root, name: str, features, examples, metadata=None, file_format: str = "array_record", split: str = "train"):
    """Write a data set with a TFDS builder of its own and return the folder of its version."""
    import tensorflow_datasets as tfds

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            stored = tfds.core.MetadataDict(metadata) if metadata else None
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), metadata=stored)

        def _split_generators(self, _):
            return {split: iter(enumerate(examples))}

        def _generate_examples(self):
            raise NotImplementedError

    Prepared.name = name
    builder = Prepared(data_dir=str(root), file_format=file_format)
    builder.download_and_prepare()
    return builder.data_dir


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two data sets: one as our builders write them (bytes), one as a third party's (TFDS's own features)."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("prepared")
    data = tfds.features.Tensor(shape=(), dtype=np.object_)
    depth = [codec.encode_array(np.full((20, 30), 100 * i, np.uint16)) for i in range(6)]
    prepare(
        root,
        "packed",
        {"id": tfds.features.Text(), "rgb": data, "depth": data, "label": tfds.features.ClassLabel(names=CLASSES)},
        [{"id": f"s{i}", "rgb": png(i), "depth": b"" if i == 2 else depth[i], "label": i % 3} for i in range(6)],
        {"modalities": {"depth": {"metres_per_count": 1 / 512, "missing": None}}, "may_lack": ["depth"]},
    )
    prepare(
        root,
        "third_party",
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "distance": tfds.features.Tensor(shape=(20, 30), dtype=np.float16),
            "kind": tfds.features.ClassLabel(num_classes=3),
        },
        [{"image": io.BytesIO(png(i)), "distance": np.full((20, 30), i, np.float16), "kind": i % 3} for i in range(6)],
    )
    return root


def test_reads_our_own_form(root):
    source = open_source("tfds", MODALITIES, name="packed", data_dir=str(root))
    assert isinstance(source, Source) and len(source) == 6
    assert source.label_names == CLASSES and source.may_lack == ("depth",)
    assert "packed/1.0.0, split 'train': 6 records" in source.describe()
    seen = {}
    for index in range(6):
        record = source[index]
        value = int(record["id"][1:])
        arrays = decode_record(record, MODALITIES)
        assert (arrays["rgb"] == value).all() and record["label"] == value % 3
        assert ("depth" in arrays) == (value != 2)
        if value != 2:
            assert arrays["depth"].dtype == np.uint16 and (arrays["depth"] == 100 * value).all()
        seen[record["id"]] = index
    assert len(seen) == 6


def test_the_first_records_of_each_class(tmp_path):
    import tensorflow_datasets as tfds

    labels = [0, 0, 1, 0, 2, 1, 0, 2, 2, 1]
    data = tfds.features.Tensor(shape=(), dtype=np.object_)
    features = {"id": tfds.features.Text(), "rgb": data, "label": tfds.features.ClassLabel(names=CLASSES)}
    prepare(tmp_path, "share", features, [{"id": f"s{i}", "rgb": png(i), "label": label} for i, label in enumerate(labels)])
    opened = lambda **share: open_source("tfds", parse_modalities({"rgb": RGB}), name="share", data_dir=str(tmp_path), **share)  # noqa: E731
    stored = [opened()[i] for i in range(10)]
    for share in (1, 2, 3):
        source = opened(per_class=share)
        counts = [0, 0, 0]
        expected = []
        for record in stored:  # in stored order
            counts[record["label"]] += 1
            if counts[record["label"]] <= share:
                expected.append(record["id"])
        assert [source[i]["id"] for i in range(len(source))] == expected and len(expected) == 3 * share
        assert f"{3 * share} records" in source.describe() and "the first of each class" in source.describe()
        copy = pickle.loads(pickle.dumps(source))
        assert copy[len(copy) - 1]["id"] == expected[-1]
    with pytest.raises(ValueError, match="per_class is 4, but class 'dog' of share/1.0.0, split 'train', has 3 records: lower it"):
        opened(per_class=4)
    with pytest.raises(ValueError, match="per_class is 0; it must be at least 1"):
        opened(per_class=0)
    with pytest.raises(ValueError, match="per_class needs labels"):
        opened(per_class=1, label=None)


def test_a_share_or_a_number_of_records_drawn_by_a_seed(root):
    opened = lambda **asked: open_source("tfds", parse_modalities({"rgb": RGB}), name="packed", data_dir=str(root), **asked)  # noqa: E731
    ids = lambda **asked: [record["id"] for source in [opened(**asked)] for record in (source[i] for i in range(len(source)))]  # noqa: E731
    half = opened(share=0.5)  # six records of three classes: one of each
    assert sorted(half[i]["label"] for i in range(3)) == [0, 1, 2] and "3 records" in half.describe()
    assert "drawn by the seed 0, each class with its share" in half.describe()
    assert ids(examples=3) == ids(share=0.5) and ids(share=1.0) == ids()
    assert [identity for identity in ids() if identity in ids(share=0.5)] == ids(share=0.5)  # in stored order
    assert len({tuple(ids(examples=3, subset_seed=seed)) for seed in range(8)}) > 1
    assert len(ids(examples=2, label=None)) == 2
    for asked, text in (
        (dict(share=0.0), "share is 0.0; it must lie above 0"),
        (dict(share=1.5), "share is 1.5"),
        (dict(share=0.01), "share is 0.01: of the 6 records of packed/1.0.0, split 'train' that leaves none"),
        (dict(examples=7), "examples is 7, but packed/1.0.0, split 'train' has 6 records: lower it"),
        (dict(examples=0), "examples is 0; it must be at least 1"),
        (dict(examples=2, share=0.5), "config.data has share and examples; a subset is stated by one of them"),
    ):
        with pytest.raises(ValueError, match=text):
            opened(**asked)


def test_strata_add_up_and_small_classes_are_not_lost():
    labels = np.repeat([0, 1, 2, -1], [60, 30, 7, 3])
    chosen = stratified(np.random.default_rng(1).permutation(labels), 10, seed=0)
    assert len(set(chosen.tolist())) == 10 and (np.diff(chosen) > 0).all()
    counts = lambda count: np.bincount(labels[stratified(labels, count, 0)] + 1, minlength=4).tolist()  # noqa: E731
    assert counts(10) == [0, 6, 3, 1]  # quotas 0.3, 6, 3, 0.7
    assert counts(100) == [3, 60, 30, 7] and sum(counts(33)) == 33 and min(counts(33)) >= 1
    assert set(stratified(labels, 10, 0)) <= set(stratified(labels, 50, 0))


def test_reads_a_third_party_form_by_feature_names(root):
    names = {"rgb": "image", "depth": "distance"}
    source = open_source("tfds", MODALITIES, name="third_party", data_dir=str(root), features=names, label="kind")
    record = source[3]
    assert isinstance(record["rgb"], bytes) and record["depth"].dtype == np.float32
    arrays = decode_record(record, MODALITIES)
    assert (arrays["rgb"] == arrays["depth"]).all() and record["label"] == arrays["rgb"][0, 0, 0] % 3
    assert record["id"] == "third_party/1.0.0/train/3"
    assert open_source("tfds", MODALITIES, name="third_party", data_dir=str(root), features=names).label is None


def test_folder_of_a_version_and_parts_of_splits(root):
    source = TfdsSource(MODALITIES, data_dir=str(root / "packed" / "1.0.0"), split="train[2:5]")
    assert len(source) == 3
    assert source[0]["id"] == TfdsSource(MODALITIES, data_dir=str(root), name="packed")[2]["id"]


def test_travels_by_pickle_and_opens_lazily(root):
    source = open_source("tfds", MODALITIES, name="packed", data_dir=str(root))
    record = source[1]
    data = pickle.dumps(source)
    assert len(data) < 5000
    copy = pickle.loads(data)
    assert copy._reader is None and len(copy) == 6
    assert copy[1] == record


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        (dict(name="absent"), FileNotFoundError, "no prepared data set 'absent' under .*prepare it first"),
        (dict(name=""), FileNotFoundError, "no prepared data set ''"),
        (dict(name="packed", split="test"), ValueError, r"cannot read split 'test' of packed/1.0.0; known: train \(6\)"),
        (dict(name="third_party"), ValueError, "modality 'rgb' has no data: third_party/1.0.0 has the features distance, image, kind"),
        (dict(name="packed", label="klass"), ValueError, "label is 'klass', but packed/1.0.0 has the features depth, id, label, rgb"),
        (dict(name="packed", features={"rbg": "x"}), ValueError, "features names modality 'rbg'; declared .*: rgb, depth"),
        (dict(name="packed", may_lack=("x",)), ValueError, "may_lack names 'x'; declared modalities: rgb, depth"),
        (dict(name="packed", splt="train"), ValueError, "unknown key 'splt'; known: data_dir, name, split, features"),
    ],
)
def test_errors_name_the_thing_and_the_remedy(root, kwargs, error, text):
    with pytest.raises(error, match=text):
        open_source("tfds", MODALITIES, data_dir=str(root), **kwargs)


def test_unknown_source():
    with pytest.raises(ValueError, match="source is 'webdataset'; known: tfds"):
        open_source("webdataset", MODALITIES)


def test_metadata_that_contradict_the_config(root):
    modalities = parse_modalities({"rgb": RGB, "depth": {**DEPTH, "metres_per_count": 0.001}})
    with pytest.raises(ValueError, match=r"states metres_per_count = 0.00195\d* for modality 'depth', config.modalities.depth.* is 0.001"):
        open_source("tfds", modalities, name="packed", data_dir=str(root))


def test_a_missing_value_that_nothing_stored_has_contradicts_nothing(root):
    """Padding needs such a value; a code that may be stored is another matter."""
    for missing, fits in ((-1, True), (float("nan"), True), (0, False)):
        modalities = parse_modalities({"rgb": RGB, "depth": {**DEPTH, "missing": missing}})
        if fits:
            assert len(open_source("tfds", modalities, name="packed", data_dir=str(root))) == 6
            continue
        with pytest.raises(ValueError, match="states missing = None for modality 'depth', config.modalities.depth.missing is 0"):
            open_source("tfds", modalities, name="packed", data_dir=str(root))


def test_declared_modality_without_a_feature(root):
    modalities = parse_modalities({"rgb": RGB, "semseg": SEMSEG})
    with pytest.raises(ValueError, match="modality 'semseg' has no data: packed/1.0.0 has the features depth, id, label, rgb"):
        open_source("tfds", modalities, name="packed", data_dir=str(root))


def test_list_source():
    source = ListSource([{"rgb": png(1)}, {"id": "x", "rgb": png(2)}], label_names=("a",))
    assert len(source) == 2 and source[0]["id"] == "0" and source[1]["id"] == "x" and source.may_lack == ()
    assert isinstance(source, Source)


def test_reading_imports_neither_tensorflow_nor_jax_models(root):
    code = (
        "import sys\n"
        "import maskvit.data, maskvit.data.batches\n"
        "assert 'grain' not in sys.modules and 'tensorflow_datasets' not in sys.modules\n"
        "from maskvit.core.modalities import RGB, parse_modalities\n"
        f"source = maskvit.data.open_source('tfds', parse_modalities({{'rgb': RGB}}), name='packed', data_dir={str(root)!r})\n"
        "source[0]\n"
        "assert 'tensorflow' not in sys.modules and 'maskvit.nn.backbone' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_data_set_cannot_name_code_to_import(root, tmp_path, monkeypatch, key):
    """TFDS imports the module that features.json names: a data set from elsewhere would run whatever lies on the path."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "planted.py").write_text("import os; os.environ['PLANTED'] = 'ran'")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    monkeypatch.delenv("PLANTED", raising=False)
    shutil.copytree(root / "packed", tmp_path / "packed")
    file = tmp_path / "packed" / "1.0.0" / "features.json"
    stored = json.loads(file.read_text())
    stored["featuresDict"]["features"]["rgb"] = {key: "planted.Feature", "content": {}}
    file.write_text(json.dumps(stored))
    for settings in (dict(name="packed", data_dir=str(tmp_path)), dict(data_dir=str(tmp_path / "packed" / "1.0.0"))):
        with pytest.raises(ValueError, match="features.json: names the class 'planted.Feature', which would have to be imported"):
            TfdsSource(MODALITIES, **settings)
    assert "PLANTED" not in os.environ and "planted" not in sys.modules
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="features.json"):
        TfdsSource(MODALITIES, name="packed", data_dir=str(tmp_path))


def test_a_damaged_file_is_a_bad_record_and_nothing_worse(root, tmp_path):
    shutil.copytree(root / "packed", tmp_path / "packed")
    (file,) = (tmp_path / "packed" / "1.0.0").glob("*.array_record*")
    whole = file.read_bytes()
    unread = 0
    for position in range(100, len(whole) - 200, 97):
        file.write_bytes(whole[:position] + bytes(b ^ 0xA5 for b in whole[position : position + 40]) + whole[position + 40 :])
        try:
            source = TfdsSource(MODALITIES, name="packed", data_dir=str(tmp_path))
        except Exception:  # what cannot be opened is no bad record
            continue
        for index in range(len(source)):
            try:
                decode_record(source[index], MODALITIES)
            except RecordError:
                unread += 1
    assert unread
    source = TfdsSource(MODALITIES, name="packed", data_dir=str(root))
    with pytest.raises(IndexError, match="record 6 of 6"):
        source[6]


def test_pictures_of_others_stay_encoded_wherever_they_lie(tmp_path):
    """TFDS would decode them with whatever reader Pillow chooses; class maps must keep their samples besides."""
    import tensorflow_datasets as tfds

    ids = io.BytesIO()
    Image.fromarray(np.arange(600).reshape(20, 30).astype(np.uint8) % 5).save(ids, "png")
    picture = tfds.features.Image(shape=(20, 30, 3), encoding_format="png")
    features = {
        "rgb": picture,
        "semseg": tfds.features.LabeledImage(labels=5, shape=(20, 30, 1)),
        "parts": tfds.features.Sequence(picture),
        "objects": tfds.features.Sequence({"picture": picture, "count": np.int64}),
        "more": {"picture": picture},
    }
    example = lambda: io.BytesIO(png(7))  # noqa: E731
    record = dict(
        rgb=example(),
        semseg=io.BytesIO(ids.getvalue()),
        parts=[example()],
        objects=[dict(picture=example(), count=3)],
        more=dict(picture=example()),
    )
    prepare(tmp_path, "others", features, [record])
    modalities = parse_modalities({"rgb": RGB, "semseg": {**SEMSEG, "num_classes": 5}})
    source = TfdsSource(modalities, name="others", data_dir=str(tmp_path))
    arrays = decode_record(source[0], modalities)
    assert (arrays["rgb"] == 7).all() and arrays["semseg"].max() == 4
    stored = source._open()[0]
    assert {type(value) for value in (stored["parts"][0], stored["objects"]["picture"][0], stored["more"]["picture"])} == {bytes}


@pytest.mark.parametrize(("key", "value"), [("modalities", [1]), ("modalities", {"rgb": 3}), ("may_lack", 5)])
def test_metadata_of_another_form_are_named(root, tmp_path, key, value):
    shutil.copytree(root / "packed", tmp_path / "packed")
    file = tmp_path / "packed" / "1.0.0" / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"metadata.json: '{key}' is"):
        TfdsSource(MODALITIES, name="packed", data_dir=str(tmp_path))
