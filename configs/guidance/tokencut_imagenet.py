"""TokenCut maps with a DINO ViT-B/16 for loss weights or masking scores: the best map of attention-guided MAE.

python convert_torch_checkpoint.py --src dino_vitbase16_pretrain.pth --dst checkpoints/dino_vitb16
python -m maskvit maps --config configs/guidance/tokencut_imagenet.py

Cost of a picture: one pass of the ViT up to its last keys (about 33 GFLOP) and the eigenvectors of a 196 x 196 matrix.
The data set is that of the pretraining experiments; for another one
`--config.data.name=imagenet2012 --config.data.features.rgb=image`. Then, in the experiment,
`config.objective.guidance = dict(name="stored", path="data/multimodal_folder_tokencut")`.
A map takes up to 400 bytes on disk.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            data=dict(source="tfds", name="multimodal_folder", data_dir="data", split="train", features=dict(rgb="rgb")),
            modalities=dict(rgb=dict()),
            model=dict(checkpoint="checkpoints/dino_vitb16"),
            # "eigenvector" grades the object, "mask" is 1 inside it. Raw keys ("keys") are the published features.
            source=dict(name="tokencut", features="keys_without_bias", value="eigenvector", tau=0.2, eps=1e-5, graph="binary"),
            out=dict(data_dir="data", name="multimodal_folder_tokencut"),
            image_size=224,
            batch_size=128,
            workers=8,
        )
    )
