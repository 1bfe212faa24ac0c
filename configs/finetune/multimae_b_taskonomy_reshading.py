"""MultiMAE-B transferred to Taskonomy's reshading: DPT head, masked L1, 800 pictures, 100 epochs, batch 8, 384 pixels.

    python main.py --config=configs/finetune/multimae_b_taskonomy_reshading.py --workdir=runs/reshading

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/multimae_b`. Data: `python -m maskvit data taskonomy
--root ... --data_dir data`.
Published hardware: 1 GPU.
Published: ranks over the tasks (the paper's tables), no single number in what was read.
Unknown: how many rows the training list has beyond the 800 used.
"""

from configs import tasks


def get_config():
    return tasks.multimae_taskonomy("reshading")
