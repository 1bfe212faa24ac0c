"""MultiMAE-B with CrossMAE decoders: 98 of 588 tokens shown, 30 % of each modality's hidden tokens rebuilt.

    python main.py --config=configs/pretrain/multimae_b_crossmae.py --workdir=runs/multimae_b_crossmae

The published MultiMAE recipe, 1600 epochs at batch 2048, but each output's mask tokens attend to weighted sums of the encoder's
blocks, 4 decoder blocks of width 256, and at most 59 of 196 are decoded. Cost: 61.6 GFLOP per image and step (MultiMAE-B: 67.0;
all hidden tokens rebuilt by these decoders: 71.7). The learning rate is MultiMAE's own: how to scale it with the number of
rebuilt tokens is known for one modality only. Nobody has published a figure for this run.
"""

from configs import common


def get_config():
    config = common.multimae_b()
    with config.unlocked():
        config.objective.decoder = dict(name="crossmae", width=256, depth=4, heads=8)
        config.objective.predicted = dict(share=0.3, by="random")
    return config
