"""Data sets we write ourselves: `scenes`, a folder of pictures, and published archives. TFDS builders, `array_record` files, no TensorFlow.

`python -m maskvit data scenes --data_dir D`, `... folder --root R --data_dir D --name N` and `... imagenet --root R --data_dir D` prepare
them; `ARCHIVES` lists the published ones.
"""

from __future__ import annotations

from typing import Any

from maskvit.data.builders.archives import Archive, build

_CLASSES = dict(metavar="PATH", help="the folder train of ImageNet, or a file with its 1000 wnids in order (not needed for 1000 folders)")
_VAL_LABELS = dict(metavar="PATH", help="of a flat val: the folder ILSVRC2012_devkit_t12/data, or Kaggle's LOC_val_solution.csv")

ARCHIVES = {
    "imagenet": Archive("imagenet:imagenet", "ImageNet-1K", "train/<wnid>/*.JPEG and val/", {"val_labels": _VAL_LABELS}),
    "imagenette": Archive("imagenet:imagenet", "Imagenette, ten classes of ImageNet", "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"),
    "imagenet_test": Archive(
        "imagenet:imagenet_test", "ImageNet-V2, -A, -R or -Sketch", "<wnid or number>/*", {"classes": _CLASSES},
    ),
    "imagenet_real": Archive(
        "imagenet:imagenet_real", "ImageNet's validation pictures with ReaL's sets of labels", "ILSVRC2012_val_*.JPEG or <wnid>/*.JPEG",
        {"real": dict(required=True, metavar="FILE", help="real.json of google-research/reassessed-imagenet"), "classes": _CLASSES},
    ),
    "imagenet_c": Archive(
        "imagenet:imagenet_c", "ImageNet-C", "<corruption>/<severity>/<wnid>/*.JPEG",
        {
            "classes": _CLASSES,
            "corruptions": dict(nargs="+", metavar="NAME", help="corruptions to pack (all)"),
            "severities": dict(nargs="+", type=int, metavar="N", help="severities to pack (1 2 3 4 5)"),
        },
    ),
    "imagenet_9": Archive(
        "imagenet:imagenet_9", "ImageNet-9, backgrounds challenge", "<variant>/val/<number_class>/*.JPEG",
        {"variants": dict(nargs="+", metavar="NAME", help="variants to pack, such as original mixed_same mixed_rand (all)")},
    ),
    "ade20k": Archive("ade20k:ade20k", "ADE20K, 150 classes", "images/ and annotations/, each with training/ and validation/"),
    "coco": Archive(
        "coco:coco", "COCO with a class per pixel, 133 classes", "train2017/, val2017/ and annotations/panoptic_*2017.json",
        {"maps": dict(choices=("panoptic", "semantic"), help="read segments, or ready maps of panoptic_semseg_*2017 (panoptic)")},
    ),
    "nyuv2": Archive(
        "nyuv2:nyuv2", "NYU Depth V2, labeled frames", "nyu_depth_v2_labeled.mat, splits.mat and classMapping40.mat",
        {"depth": dict(choices=("filled", "raw"), help="depth with its holes painted in, or as measured (filled)")},
    ),
    "hypersim": Archive(
        "hypersim:hypersim", "Hypersim", "<scene>/images/scene_<camera>_{final_preview,geometry_hdf5}/frame.*",
        {"split_file": dict(metavar="FILE", help="metadata_images_split_scene_v1.csv (<root>'s own)")},
    ),
    "taskonomy": Archive(
        "taskonomy:taskonomy", "Taskonomy, tiny split", "<task>/<building>/point_<p>_view_<v>_domain_<task>.png",
        {
            "splits": dict(metavar="DIR", help="folder of tiny_train.csv, tiny_val.csv and tiny_test.csv (<root>/splits)"),
            "tasks": dict(nargs="+", metavar="NAME", help="targets to pack, such as depth_zbuffer normal (all eight)"),
            "num_train": dict(type=int, metavar="N", help="rows of the list train (800); 0 leaves a split out"),
            "num_val": dict(type=int, metavar="N", help="rows of the list val (200)"),
            "num_test": dict(type=int, metavar="N", help="rows of the list test (all)"),
            "side": dict(type=int, metavar="PIXELS", help="shorter side of what is stored (384)"),
        },
    ),
    "fashion_mnist": Archive("fashion_mnist:fashion_mnist", "Fashion-MNIST, padded to 32 x 32", "four files *-ubyte.gz"),
}  # fmt: skip
BUILDERS = ("folder", "scenes", *ARCHIVES)


def prepare(builder: str, data_dir: str, **settings: Any) -> str:
    """Prepare a data set unless it is there already, complete and made with the same settings.

    Args:
      builder: one of `BUILDERS`.
      data_dir: TFDS's root; the data land in <data_dir>/<name>/1.0.0.
      settings: arguments of `builders.scenes.Scenes`, `builders.folder.Folder` or `builders.archives.build`.

    Returns: the folder that holds the data set.

    Raises:
      ValueError: unknown builder; or the folder holds a data set made with other settings.
      FolderError: what is wrong with the pictures of a folder, as one list.
    """
    if builder == "scenes":
        from maskvit.data.builders.scenes import Scenes

        return Scenes(data_dir=data_dir, **settings).prepare()
    if builder == "folder":
        from maskvit.data.builders.folder import Folder

        return Folder(data_dir=data_dir, **settings).prepare()
    if builder in ARCHIVES:
        return build(builder, ARCHIVES[builder], data_dir, **settings)
    raise ValueError(f"builder {builder!r} is unknown; known: {', '.join(BUILDERS)}")
