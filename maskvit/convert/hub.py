"""What stands beside the weights in a folder for Hugging Face's transformers or for timm: their config files, and a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from maskvit.core.modalities import Modality, parse_modalities

WEIGHTS = "model.safetensors"

# Licences as the model hub abbreviates them; others are "other", with their name.
LICENCES = {"CC-BY-NC 4.0": "cc-by-nc-4.0", "CC-BY 4.0": "cc-by-4.0", "Apache-2.0": "apache-2.0", "MIT": "mit"}

# The shapes of timm's registered ViTs by width. What else differs stands in `model_args`, which overrides all of theirs.
TIMM_MODELS = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}


def _rgb(config: Mapping[str, Any]) -> Modality:
    return parse_modalities(config["modalities"])["rgb"]


def _per_channel(values: Sequence[float], rgb: Modality) -> list[float]:
    return list(values) * (rgb.channels if len(values) == 1 else 1)


# transformers


def hugging_face_preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessor_config.json that an image processor needs beside the weights."""
    rgb, (height, width) = _rgb(config), config["image_size"]
    return dict(
        image_processor_type="ViTImageProcessor",
        do_resize=True,
        size=dict(height=height, width=width),
        do_rescale=True,
        rescale_factor=rgb.scale,
        do_normalize=True,
        image_mean=_per_channel(rgb.mean, rgb),
        image_std=_per_channel(rgb.std, rgb),
    )


def hugging_face_config(config: Mapping[str, Any], decoder: str, names: Sequence[str]) -> dict[str, Any]:
    """The config.json that `from_pretrained` needs beside the weights. `names`: of the classes, () where they have none."""
    objective, rgb = config["objective"], config["modalities"]["rgb"]
    encoder, size, count = objective["encoder"], config["image_size"], objective["num_classes"]
    found = dict(
        model_type="vit",
        architectures=["ViTForImageClassification" if count else "ViTModel"],
        hidden_size=encoder["width"],
        num_hidden_layers=encoder["depth"],
        num_attention_heads=encoder["heads"],
        intermediate_size=round(encoder["width"] * encoder["mlp_ratio"]),
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=size[0] if size[0] == size[1] else list(size),
        patch_size=rgb["patch"],
        num_channels=rgb["channels"],
        qkv_bias=True,
    )
    if count:
        names = names or [f"LABEL_{i}" for i in range(count)]
        found["id2label"] = {str(i): name for i, name in enumerate(names)}
        found["label2id"] = {name: i for i, name in enumerate(names)}
    if decoder:
        block = objective["decoder"]
        found |= dict(
            model_type="vit_mae",
            architectures=["ViTMAEForPreTraining"],
            decoder_hidden_size=block["width"],
            decoder_num_hidden_layers=block["depth"],
            decoder_num_attention_heads=block.get("heads", 16),
            decoder_intermediate_size=round(block["width"] * block["mlp_ratio"]),
            mask_ratio=objective.get("mask_ratio", 0.75),
            norm_pix_loss=objective["outputs"][0].startswith("norm_"),
        )
    return found


# timm


def timm_config(config: Mapping[str, Any], names: Sequence[str], licence: Any) -> dict[str, Any]:
    """The config.json of timm's folders: the architecture, how to build it in these sizes, and how pictures are prepared."""
    objective, rgb, size = config["objective"], _rgb(config), list(config["image_size"])
    encoder, pooled, with_token = objective["encoder"], objective["pool"] == "mean", objective["num_global_tokens"] == 1
    width, hidden = encoder["width"], round(encoder["width"] * encoder["mlp_ratio"])
    unit = 255 * rgb.scale  # timm's pictures run from 0 to 1 before mean and deviation
    arguments = dict(
        img_size=size,
        patch_size=rgb.patch,
        in_chans=rgb.channels,
        num_classes=objective["num_classes"],
        global_pool="avg" if pooled or not with_token else "token",
        embed_dim=width,
        depth=encoder["depth"],
        num_heads=encoder["heads"],
        mlp_ratio=hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width,  # timm rounds down
        class_token=with_token,
        final_norm=objective["final_norm"],
        fc_norm=pooled and objective["final_norm"],
    )
    prepared = dict(
        custom_load=False,
        input_size=[rgb.channels, *size],
        fixed_input_size=True,
        interpolation="bilinear",
        crop_pct=0.875,
        crop_mode="center",
        mean=[value / unit for value in _per_channel(rgb.mean, rgb)],
        std=[value / unit for value in _per_channel(rgb.std, rgb)],
        num_classes=objective["num_classes"],
        pool_size=None,
        first_conv="patch_embed.proj",
        classifier="head",
        **({"license": LICENCES.get(licence, str(licence))} if licence else {}),
    )
    return dict(
        architecture=TIMM_MODELS.get(width, "vit_base_patch16_224"),
        num_classes=objective["num_classes"],
        num_features=width,
        global_pool=arguments["global_pool"],
        **({"label_names": list(names)} if names else {}),
        model_args=arguments,
        pretrained_cfg=prepared,
    )


# The model card

_LOADING = {
    "timm": """import timm

model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # at a hub: "hf-hub:USER/{name}"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
{answer} = model(transform(picture)[None])""",
    "classes": """from transformers import AutoImageProcessor, ViTForImageClassification

processor = AutoImageProcessor.from_pretrained("{name}")
model = ViTForImageClassification.from_pretrained("{name}")
logits = model(**processor(images=picture, return_tensors="pt")).logits
print(model.config.id2label[logits.argmax(-1).item()])""",
    "features": """from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}", add_pooling_layer=False)
features = model(**processor(images=picture, return_tensors="pt")).last_hidden_state  # the class token first""",
    "decoder": """from transformers import AutoImageProcessor, AutoModel, ViTMAEForPreTraining

processor = AutoImageProcessor.from_pretrained("{name}")
autoencoder = ViTMAEForPreTraining.from_pretrained("{name}")  # hides and rebuilds patches
encoder = AutoModel.from_pretrained("{name}", mask_ratio=0.0)  # sees all of them, in an order of its own
features = encoder(**processor(images=picture, return_tensors="pt")).last_hidden_state  # the class token first""",
}


def model_card(
    layout: str, name: str, config: Mapping[str, Any], decoder: str, metadata: Mapping[str, Any], parameters: int, version: str
) -> str:
    """README.md: what the model is, how to load it, how it was trained and under which licence, as far as the checkpoint says."""
    objective, licence = config["objective"], metadata.get("licence")
    count, encoder = objective["num_classes"], objective["encoder"]
    height, width = config["image_size"]
    if layout == "timm":
        loading = _LOADING["timm"].format(name=name, answer="logits" if count else "features")
    else:
        loading = _LOADING["decoder" if decoder else "classes" if count else "features"].format(name=name)
    purpose = f"a classifier of {count} classes" if count else "an encoder with MAE's decoder" if decoder else "an encoder"
    front = dict(library_name="timm" if layout == "timm" else "transformers")
    front["pipeline_tag"] = "image-classification" if count else "image-feature-extraction"
    if licence:
        known = LICENCES.get(licence)
        front |= {"license": known} if known else {"license": "other", "license_name": '"' + str(licence).replace('"', "'") + '"'}
    front["tags"] = "[vision, masked-image-modeling]"
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "---", "", f"# {name}", ""]
    lines += [f"A Vision Transformer, {purpose}, written by maskvit {version} in the layout of {front['library_name']}.", ""]
    lines += ["| | |", "|---|---|", f"| width, depth, heads | {encoder['width']}, {encoder['depth']}, {encoder['heads']} |"]
    lines += [f"| pictures | {height} x {width}, {_rgb(config).channels} channels, patches of {_rgb(config).patch} |"]
    lines += [f"| parameters | {parameters:,} |", "", "## How to load it", "", "```python", loading, "```", ""]
    if layout == "timm" and not objective["final_norm"]:
        lines += ["The encoder has no final norm, as MultiMAE's has none; config.json says so.", ""]
    lines += ["## How it was trained", "", *_training(metadata), "", "## Licence of the weights", "", _licence(metadata)]
    return "\n".join(lines) + "\n"


def _training(metadata: Mapping[str, Any]) -> list[str]:
    """What a checkpoint records of its training, as a list; what it does not record is not guessed."""
    config = metadata.get("config") or {}
    said = _converted_from(metadata.get("source"))
    if "global_batch" in config:
        objective, data = config.get("objective") or {}, (config.get("data") or {}).get("train") or {}
        task = (objective.get("task") or {}).get("name")
        said.append(f"- objective: {objective.get('name')}" + (f", of the task {task}" if task else ""))
        records = (metadata.get("data") or {}).get("records")
        said.append(f"- data: {data.get('name', 'not named')}" + (f", {records:,} records" if isinstance(records, int) else ""))
        said.append(f"- length of the run: {config.get('total')}, {config['global_batch']} samples a step")
        optimizer = config.get("optimizer") or {}
        said.append(f"- optimizer: {optimizer.get('name', 'adamw')}, base learning rate {optimizer.get('base_lr')}")
    if start := _started_from(metadata):
        said.append(f"- started from the weights in `{start}`")
        said += _converted_from(_origin(metadata).get("source"), of="these weights were ")
    return said or ["The checkpoint records nothing of it."]


def _converted_from(source: Any, of: str = "") -> list[str]:
    """The file that weights were imported from; nothing where none is recorded."""
    if not isinstance(source, Mapping):
        return []
    what = source.get("what") or source.get("family")
    said = [f"- {of}converted from `{source.get('file')}` (SHA-256 {source.get('sha256')}), {what}"]
    return said + ([f"- epochs before that: {source['epochs_done']}"] if source.get("epochs_done") else [])


def _origin(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a run records of the checkpoint that it started from; {} where it is older than that record, or started fresh."""
    found = metadata.get("started_from")
    return found if isinstance(found, Mapping) else {}


def _started_from(metadata: Mapping[str, Any]) -> str:
    return str(((metadata.get("config") or {}).get("init_from") or {}).get("path") or "")


def _licence(metadata: Mapping[str, Any]) -> str:
    if licence := metadata.get("licence"):
        whose = " of the weights that it started from" if _origin(metadata) else ""
        return f"{licence}, as the checkpoint records it{whose}." + (" Not for commercial use." if "NC" in str(licence) else "")
    start = _started_from(metadata)
    return "The checkpoint records none." + (f" It was trained on from `{start}`: the licence of those weights holds on." if start else "")


def parameter_count(tensors: Mapping[str, Any]) -> int:
    """Values in all tensors of a file."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
