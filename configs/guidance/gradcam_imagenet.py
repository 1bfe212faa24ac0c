"""Grad-CAM maps of a ResNet-50 classifier, for the class that it predicts.

python convert_torch_checkpoint.py --src resnet50-0676ba61.pth --dst checkpoints/resnet50
python -m maskvit maps --config configs/guidance/gradcam_imagenet.py

Behind the last stage a map is 7 x 7 at 224 pixels; it is enlarged (bilinear) to the 14 x 14 tokens of a ViT with patches of 16.
Cost of a picture: one pass of the network, about 8 GFLOP; the gradient is that of pooling and classifier alone.
The data set is that of the pretraining experiments; for another one
`--config.data.name=imagenet2012 --config.data.features.rgb=image`. Then, in the experiment,
`config.objective.guidance = dict(name="stored", path="data/multimodal_folder_gradcam")`.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            data=dict(source="tfds", name="multimodal_folder", data_dir="data", split="train", features=dict(rgb="rgb")),
            modalities=dict(rgb=dict()),
            model=dict(checkpoint="checkpoints/resnet50"),
            source=dict(name="gradcam", stage=4),
            out=dict(data_dir="data", name="multimodal_folder_gradcam", grid=(14, 14)),
            image_size=224,
            batch_size=256,
            workers=8,
        )
    )
