"""Maps of where a DINO ViT-B/16 looks: the class token's attention in the last block, mean over the heads.

python convert_torch_checkpoint.py --src dino_vitbase16_pretrain.pth --dst checkpoints/dino_vitb16
python -m maskvit maps --config configs/guidance/dino_attention_imagenet.py

Cost of a picture: one pass of the ViT up to its last attention, about 33 GFLOP.
The data set is that of the pretraining experiments; for another one
`--config.data.name=imagenet2012 --config.data.features.rgb=image`. Then, in the experiment,
`config.objective.guidance = dict(name="stored", path="data/multimodal_folder_dino_attention")`.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            data=dict(source="tfds", name="multimodal_folder", data_dir="data", split="train", features=dict(rgb="rgb")),
            modalities=dict(rgb=dict()),
            model=dict(checkpoint="checkpoints/dino_vitb16"),
            # 60 % of the attention, as in DINO's own pictures: the background is then exactly 0, as a loss weight wants it.
            source=dict(name="dino_attention", mass=0.6),
            out=dict(data_dir="data", name="multimodal_folder_dino_attention"),
            image_size=224,
            batch_size=256,
            workers=8,
        )
    )
