"""Checkpoints in and out; torch itself is not needed but for writing .pth and for --verify.

Read are MultiMAE's pretraining files, and encoders alone: plain ViTs with the keys of timm, DINO, iBOT, DINOv2 or fine-tuned
MAE (.pth, .safetensors), DINOv2-like ViTs exported to ONNX, and ResNets with torchvision's keys (for Grad-CAM).

python convert_torch_checkpoint.py --src multimae.pth --dst checkpoints/multimae_b     # then config.init_from.path
python convert_torch_checkpoint.py --src dino_deitsmall16_pretrain.pth --dst checkpoints/dino_s    # guidance from another model
python convert_torch_checkpoint.py --src multimae.pth --inspect
python convert_torch_checkpoint.py --src runs/x --dst x.safetensors --to multimae
python convert_torch_checkpoint.py --src multimae.pth --verify ~/MultiMAE [--images DIR]
"""

import argparse
import logging
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True, help="a .pth, .safetensors or .onnx file; with --to, a checkpoint of ours")
    parser.add_argument("--dst", help="where to write")
    parser.add_argument("--to", choices=["multimae"], help="write a checkpoint of ours in this key layout")
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
    from maskvit.checkpoint import CheckpointError

    heads = (flags.num_heads, flags.decoder_num_heads)
    try:
        if flags.inspect:
            print(convert.inspect(flags.src, *heads))
        if flags.verify:
            from maskvit.convert.verify import verify
            from maskvit.objectives import build_objective

            name, _ = convert.family(convert.open_checkpoint(flags.src).state)
            if name != "MultiMAE":
                raise convert.ConversionError(f"{flags.src}: is {name}; --verify compares MultiMAE's own files with its own code")
            return 0 if verify(flags.src, flags.verify, build_objective, flags.images, *heads) else 1
        if flags.dst and flags.to:
            convert.export(flags.src, flags.dst)
        elif flags.dst:
            convert.convert(flags.src, flags.dst, *heads)
    except (convert.ConversionError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
