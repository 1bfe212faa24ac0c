"""What fine-tuning does to a batch on the device: mixup, CutMix, soft targets, random erasing. Pure, of static shapes.

The rules are timm's in batch mode, which MAE's and MultiMAE's recipes use: Zhang et al., "mixup" (2018); Yun et al., "CutMix" (2019);
Zhong et al., "Random Erasing Data Augmentation" (2020).

One draw of `mix` serves a whole batch, and a sample's partner is the one in its place of the reversed batch. Where samples are spread
over devices, or taken in micro-batches, each of these works on its own samples as if alone: that is the reference's "one draw per GPU
and batch". Their keys must differ then. The key of the first sample, of a purpose of its own, does:

    mixed, targets = mix(stream_keys(keys, "mix")[0], images, labels, ...)
    erased = erase(stream_keys(keys, "erase"), mixed, probability)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

ERASED_SHARE = (0.02, 1 / 3)  # of the picture's area
ERASED_RATIO = (0.3, 1 / 0.3)  # of height over width
TRIES = 10  # boxes drawn before a picture is left as it is


def check_mixing(where: str, mixup: float, cutmix: float, switch: float, smoothing: float) -> None:
    """Raise ValueError for settings that `mix` cannot follow; `where` is the config's block that holds them."""
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{where}.{name} is {value}; it is the parameter of a Beta distribution, above 0, or 0 for none")
    for name, value in (("switch", switch), ("smoothing", smoothing)):
        if not 0 <= value <= 1:
            raise ValueError(f"{where}.{name} is {value}; it must be between 0 and 1")


def soft_targets(labels: Int[Array, " b"], num_classes: int, smoothing: float = 0.0) -> Float[Array, "b k"]:
    """Class distributions: 1 - smoothing for the label, and smoothing spread over all classes, the label's own too.

    A label outside 0 ... num_classes - 1 means none: its row is 0, and no cross-entropy is taken on it.
    """
    off = smoothing / num_classes
    known = (labels >= 0) & (labels < num_classes)
    return jnp.where(known[:, None], off + (1.0 - smoothing) * jax.nn.one_hot(labels, num_classes), 0.0)


def mix(
    key: Key[Array, ""],
    images: Num[Array, "b h w c"],
    labels: Int[Array, " b"],
    *,
    num_classes: int,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    switch: float = 0.5,
    smoothing: float = 0.1,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """Mix each image with its partner by mixup or by CutMix, and their targets in the same proportion.

    Args:
      key: of this batch; see the module's text for batches that are spread over devices.
      images: finite stored units or model values; mixing and normalizing may change places. Integers become float32, and nothing is
        rounded.
      labels: class ids.
      mixup, cutmix: parameters of the Beta distributions that the share is drawn from; 0 turns one of them off.
      switch: probability of CutMix where both are on.
      smoothing: of the targets before they are mixed.

    Returns: (images, targets).

    Raises ValueError for an odd number of samples (one would be mixed with itself), or settings as `check_mixing`.
    """
    check_mixing("mixing", mixup, cutmix, switch, smoothing)
    images = images if jnp.issubdtype(images.dtype, jnp.floating) else images.astype(jnp.float32)
    targets = soft_targets(labels, num_classes, smoothing)
    if not mixup and not cutmix:
        return images, targets
    b, height, width, _ = images.shape
    if b % 2:
        raise ValueError(
            f"mixing pairs the samples that a device works on at once, now {b}: make config.global_batch, or config.micro_batch, an even "
            "number per device"
        )
    key_choice, key_mixup, key_cutmix, key_box = jax.random.split(key, 4)
    share, inside = jnp.ones(()), jnp.zeros((height, width), bool)
    if cutmix:
        inside = _box(key_box, height, width, jax.random.beta(key_cutmix, cutmix, cutmix))
        share = 1.0 - inside.mean()
    if mixup:
        of_mixup = jax.random.beta(key_mixup, mixup, mixup)
        by_cutmix = jax.random.uniform(key_choice) < switch if cutmix else jnp.zeros((), bool)
        share, inside = jnp.where(by_cutmix, share, of_mixup), inside & by_cutmix
        blend = jnp.where(by_cutmix, 1.0, of_mixup).astype(images.dtype)
    else:
        blend = jnp.ones((), images.dtype)
    partners = images[::-1]
    mixed = jnp.where(inside[:, :, None], partners, blend * images + (1 - blend) * partners)
    return mixed, share * targets + (1.0 - share) * targets[::-1]


def _box(key: Key[Array, ""], height: int, width: int, share: Float[Array, ""]) -> Bool[Array, "h w"]:
    """CutMix's box, True inside: sides of sqrt(1 - share), rounded down, around a uniform pixel, cut off at the edges."""
    side = jnp.sqrt(1.0 - share)

    def along(key: Key[Array, ""], size: int) -> Bool[Array, " s"]:
        half = (size * side).astype(jnp.int32) // 2
        center = jax.random.randint(key, (), 0, size)
        places = jnp.arange(size)
        return (places >= center - half) & (places < center + half)

    rows, columns = jax.random.split(key)
    return along(rows, height)[:, None] & along(columns, width)[None, :]


def erase(keys: Key[Array, " b"], images: Float[Array, "b h w c"], probability: float) -> Float[Array, "b h w c"]:
    """Replace one box of some images by noise: random erasing in mode "pixel".

    Args:
      keys: one per sample.
      images: normalized (mean 0, deviation 1), as the noise N(0, 1) is.
      probability: of an image to lose a box.

    A box covers a share of 0.02 ... 1/3 of the image and has a ratio of height over width of 0.3 ... 1/0.3, log-uniformly; of ten
    draws the first that fits is taken, and where none does the image stays. Raises ValueError for what is no probability.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability of random erasing is {probability}; it must be between 0 and 1")

    def one(key: Key[Array, ""], image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        key_whether, key_box, key_noise = jax.random.split(key, 3)
        inside = erased_box(key_box, *image.shape[:2]) & (jax.random.uniform(key_whether) < probability)
        return jnp.where(inside[:, :, None], jax.random.normal(key_noise, image.shape, image.dtype), image)

    return jax.vmap(one)(keys, images) if probability else images


def erased_box(key: Key[Array, ""], height: int, width: int) -> Bool[Array, "h w"]:
    """One box of `erase`, True inside; nothing is where no draw fits."""
    key_area, key_ratio, key_top, key_left = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(key_area, (TRIES,), minval=ERASED_SHARE[0], maxval=ERASED_SHARE[1])
    limits = math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])
    ratio = jnp.exp(jax.random.uniform(key_ratio, (TRIES,), minval=limits[0], maxval=limits[1]))
    rows = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    columns = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (rows < height) & (columns < width)
    first = jnp.argmax(fits)
    rows, columns = rows[first], columns[first]
    # The highest place is one at which the box still ends at the edge.
    top = jax.random.randint(key_top, (), 0, jnp.maximum(height - rows + 1, 1))
    left = jax.random.randint(key_left, (), 0, jnp.maximum(width - columns + 1, 1))
    row, column = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    return (row >= top) & (row < top + rows) & (column >= left) & (column < left + columns) & fits.any()
