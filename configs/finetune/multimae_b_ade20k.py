"""MultiMAE-B fine-tuned on ADE20K: ConvNeXt head, 64 epochs, batch 16, 512 pixels.

    python main.py --config=configs/finetune/multimae_b_ade20k.py --workdir=runs/multimae_b_ade20k

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/multimae_b`. Data: `python -m maskvit data ade20k --root
... --data_dir data`.
Published hardware: 4 GPUs with 4 pictures each.
Published mIoU (padded squares at 512, the best of 64 evaluations on the validation set): 46.2; 46.9 after attention-guided
continuation.
Differs: bfloat16 in place of float16. Unknown: seeds.
"""

from configs import tasks


def get_config():
    return tasks.multimae_segmentation("ade20k", 150, size=512, epochs=64, batch=16, every="1 epochs")
