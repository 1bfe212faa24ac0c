"""MultiMAE-B fine-tuned on 1 % of the labels of ImageNet-1K, drawn class by class by subset_seed 0.

    python main.py --config=configs/finetune/multimae_b_imagenet_1percent.py --workdir=runs/multimae_b_imagenet_1percent

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/multimae_b`. Data: `python -m maskvit data imagenet --root
... --data_dir data`.
The recipe is that of the whole data set, with as many epochs; none was published for subsets.
Published: no number of MultiMAE.
Unknown: which pictures, rates and lengths were used.
"""

from configs import tasks


def get_config():
    return tasks.low_shot(tasks.multimae_imagenet("checkpoints/multimae_b"), share=0.01)
