"""Checkpoints in and out; torch itself is not needed but for writing .pth and for --verify.

Read are .pth, .safetensors, folders and shards of Hugging Face, and ViTs exported to ONNX:

  MultiMAE           its pretraining files, with optimiser; MultiViT, its encoder alone, with --allow 'outputs/.*' (fresh decoders)
  MAE, CrossMAE      with their decoders; Hugging Face's ViTMAEForPreTraining. --target says raw or normalized where the file does not;
                     MAE's encoder alone, with --target and --allow 'outputs/.*' (a fresh decoder)
  plain ViTs         timm (with or without class token, LayerScale), MAE's encoder and its fine-tuned forms, DINO, DINOv2, iBOT and
                     AttMask (backbones, or one of two models), Hugging Face's ViTModel, ViTMAEModel, ViTForImageClassification, Dinov2Model
  DINO, iBOT         --model both keeps student, teacher, their heads and the loss's centres, to train on
  ResNets            torchvision's keys, for Grad-CAM

Written (--to) are the key layouts of MultiMAE or MultiViT (multimae), timm, Hugging Face with its config.json (huggingface), MAE,
CrossMAE, DINO and iBOT. What became of every tensor is written beside the result; what is missing or left over is an error unless
--allow names it.

python convert_torch_checkpoint.py --src multimae.pth --dst checkpoints/multimae_b     # then config.init_from.path
python convert_torch_checkpoint.py --src mae_pretrain_vit_base_full.pth --target normalized --dst checkpoints/mae_b
python convert_torch_checkpoint.py --src dino_deitsmall16_pretrain.pth --dst checkpoints/dino_s    # guidance from another model
python convert_torch_checkpoint.py --src multimae.pth --inspect
python convert_torch_checkpoint.py --src runs/x --dst x.safetensors --to multimae
python convert_torch_checkpoint.py --src runs/mae --dst vit.safetensors --to timm --allow 'outputs/.*'    # the encoder alone
python convert_torch_checkpoint.py --src multimae.pth --verify ~/MultiMAE [--images DIR]
"""

import argparse
import logging
import sys

LAYOUTS = ("multimae", "timm", "huggingface", "mae", "crossmae", "dino", "ibot")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True, help="a .pth, .safetensors or .onnx file, or a folder; with --to, a checkpoint of ours")
    parser.add_argument("--dst", help="where to write")
    parser.add_argument("--to", choices=LAYOUTS, help="write a checkpoint of ours in this key layout")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="REGEX",
        help="keys or paths that may be left out or stay at their initialisation; may be given several times",
    )
    parser.add_argument(
        "--model",
        choices=("teacher", "student", "both"),
        default="teacher",
        help="which model of self-distillation to read or write (default: teacher)",
    )
    parser.add_argument("--target", choices=("normalized", "raw"), help="what a masked autoencoder predicts, where the file does not say")
    parser.add_argument("--inspect", action="store_true", help="print what the file is")
    parser.add_argument("--verify", metavar="DIR", help="compare with a checkout of the PyTorch reference")
    parser.add_argument("--images", metavar="DIR", help="pictures for --verify; random ones otherwise")
    parser.add_argument("--num-heads", type=int, help="heads of the encoder, where the file does not say")
    parser.add_argument("--decoder-num-heads", type=int, help="heads of the decoders, where the file does not say")
    flags = parser.parse_args()
    if not (flags.inspect or flags.verify or flags.dst):
        parser.error("give --dst, --inspect or --verify")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "orbax", "jax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    from maskvit import convert
    from maskvit.checkpoints import CheckpointError

    heads = (flags.num_heads, flags.decoder_num_heads)
    choices = dict(allow=flags.allow, model=flags.model)
    try:
        if flags.inspect:
            print(convert.inspect(flags.src, *heads, target=flags.target, **choices))
        if flags.verify:
            from maskvit.convert.verify import verify
            from maskvit.objectives import build_objective

            _, name, _ = convert.family_of(convert.open_checkpoint(flags.src).state)
            if name != "MultiMAE":
                raise convert.ConversionError(f"{flags.src}: is {name}; --verify compares MultiMAE's own files with its own code")
            return 0 if verify(flags.src, flags.verify, build_objective, flags.images, *heads) else 1
        if flags.dst and flags.to:
            convert.export(flags.src, flags.dst, flags.to, **choices)
        elif flags.dst:
            convert.convert(flags.src, flags.dst, *heads, target=flags.target, **choices)
    except (convert.ConversionError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
