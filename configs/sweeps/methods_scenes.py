"""The masks of every method in docs/methods, on rendered scenes of 64 x 64 pixels: for pictures of what they hide.

python -m maskvit data scenes --data_dir data/methods_scenes --num_train 16 --num_val 64
python convert_torch_checkpoint.py --src assets/multimae_scenes.pth --dst checkpoints/scenes
python -m maskvit report masks --config configs/sweeps/methods_scenes.py --checkpoint checkpoints/scenes --split "val[3:4]" --images 1 \\
    --strategies multimae,attention_high,attention_low,stochastic,random_heads --out masks.png

Where a method looks at something that the small checkpoint lacks, its row looks at the nearest thing that it has: its attention for
stored maps of another network, its measured error for a predicted one.
"""

from configs import common

SIZES = dict(width=128, depth=4, heads=2)  # of assets/multimae_scenes.pth
ATTENTION = dict(name="self_attention", query="global")
HINTS = dict(name="attention_hint", show_max=0.3)  # of a tenth of 64 tokens, the default, next to none would be shown


def get_config():
    config = common.scenes()
    config.total = "100 steps"
    config.global_batch = 16
    config.schedule = dict(total_epochs=100.0, start_epochs=0.0, warmup_epochs=5.0, min_lr=0.0)
    config.data.train.name = "scenes"
    config.data.train.data_dir = "data/methods_scenes"
    config.picture_every = "0 steps"
    return config


def rgb(name: str, **block) -> dict:
    """A row of a method of one modality: MAE's decoder or CrossMAE's, small."""
    sizes = dict(encoder=SIZES, decoder=dict(width=64, depth=1, heads=2))
    return {"objective": dict(dict(name=name, inputs=("rgb",), outputs=("norm_rgb",), **sizes), **block)}


def views(**block) -> dict:
    """A row of self-distillation; every view is masked, so that a picture shows how."""
    sizes = dict(encoder=SIZES, projection=dict(hidden=128, bottleneck=32, num_prototypes=128))
    masking = dict(ratio=0.3, ratio_var=0.2, probability=1.0, per="view")
    augment = dict(scale=(0.25, 1.0), flip=0.5, views=dict(local_crops=2, local_size=(32, 32), local_scale=(0.05, 0.25)))
    return {"objective": dict(name="ibot", inputs=("rgb",), **sizes, masking=masking, **block), "data.augment": augment}


def all_inputs(scores: dict, guidance: dict = ATTENTION, **more) -> dict:
    """A row of MultiMAE."""
    return {"objective.scores": scores, "objective.guidance": guidance, **{f"objective.{key}": value for key, value in more.items()}}


def get_sweep():
    high = dict(name="attention_high")
    error = dict(name="reconstruction_error", passes=4)
    return {
        "multimae": {},
        "attention_high": all_inputs(high),
        "attention_low": all_inputs(dict(name="attention_low")),
        "stochastic": all_inputs(dict(name="attention_stochastic", alpha=0.5)),
        "random_heads": all_inputs(high, dict(ATTENTION, heads="random")),
        "mae": rgb("mae", mask_ratio=0.75),
        "mae_half": rgb("mae", mask_ratio=0.5),
        "mae_90_percent": rgb("mae", mask_ratio=0.9),
        "crossmae": rgb("crossmae", kept_mask_ratio=0.25),
        "crossmae_all": rgb("crossmae", kept_mask_ratio=0.75),
        "attg": rgb("mae", guidance=ATTENTION, loss_weight=dict(tau=0.75)),
        "ibot_random": views(),
        "ibot_blocks": views(scores=dict(name="block")),
        "attmask_high": views(scores=high),
        "attmask_hint": views(scores=HINTS),
        "attmask_low": views(scores=dict(name="attention_low")),
        "hpm_start": all_inputs(high, error, guided_share=dict(share=(0.0, 0.0))),
        "hpm_end": all_inputs(high, error, guided_share=dict(share=(0.0, 0.5), ramp="100 percent")),
        "error_alone": all_inputs(high, error),
        "milan": rgb("mae", scores=dict(name="gumbel", hide="low"), guidance=ATTENTION),
        "amt": rgb(
            "mae", mask_ratio=0.85, scores=dict(name="gumbel", hide="high"), guidance=ATTENTION, predicted=dict(share=0.53, by="scores")
        ),
        "self_guided": rgb("mae", scores=HINTS, guidance=dict(name="bipartition")),
        "no_hints": rgb("mae", scores=high, guidance=dict(name="bipartition")),
        "block": rgb("mae", scores=dict(name="block")),
        "multi_block": rgb("mae", scores=dict(name="multi_block")),
        **{f"color_{kind}": rgb("mae", scores=dict(name="color", kind=kind)) for kind in ("red", "green", "blue", "purple")},
    }
