"""MultiMAE-B fine-tuned to NYUv2's depth from rgb: DPT head, reverse Huber, 2000 epochs, batch 128, 256 pixels.

    python main.py --config=configs/finetune/multimae_b_nyuv2_depth_estimation.py --workdir=runs/multimae_b_nyuv2_depth_estimation

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/multimae_b`. Data: `python -m maskvit data nyuv2 --root
... --data_dir data`.
Published hardware: 2 GPUs with 64 pictures each, float32.
Published delta1: 86.4 on 100 of the 654 test pictures; users of the code report about 89 whatever the weights.
Differs: evaluated on all 654, in meters, mean over pictures; the best by delta1, not by the loss. Unknown: the scale of the
reference's depth files.
"""

from configs import tasks


def get_config():
    return tasks.multimae_depth()
