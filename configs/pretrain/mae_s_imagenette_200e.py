"""MAE ViT-S on Imagenette, 200 epochs: an afternoon on one card, with published figures to compare with.

    python -m maskvit data imagenette --root DIR --data_dir data
    python main.py --config=configs/pretrain/mae_s_imagenette_200e.py --workdir=runs/mae_s_imagenette

9,469 pictures of ten of ImageNet's classes. Published by stable-pretraining, one A100, 200 epochs, figures of probes that were trained
along: MAE k-NN 72.1, linear 84.1 (DINO 83.8 and 86.1). Unknown: its batch, rates and decoder; here MAE's recipe at batch 256, and the
k-NN and the linear probe are taken at the end on frozen features.
"""

from configs import common


def get_config():
    config = common.masked_autoencoder("mae", "S")
    config.data.train.name = "imagenette"
    config.global_batch = 256
    config.total = "200 epochs"
    config.schedule.total_epochs = 200.0
    with config.unlocked():
        config.evaluators.knn = dict(type="knn", every="50 epochs", ks=(10, 20), batch_size=256)
        config.evaluators.probe = dict(type="probe", every="100 percent", batch_size=256)
    return config
