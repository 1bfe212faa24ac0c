"""Facts of ImageNet's test sets that their figures need: ImageNet-C's reference errors, ImageNet-9's classes."""

from __future__ import annotations

# Top-1 errors of AlexNet, mean over the five severities: what ImageNet-C's errors are divided by. Source: Hendrycks and Dietterich,
# "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019, from their repository.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360,
    "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
    "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)

# The variants of ImageNet-9. Source: Xiao et al., "Noise or Signal: The Role of Image Backgrounds in Object Recognition", 2021.
BACKGROUNDS = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg", "only_bg_b", "only_bg_t")


def _numbers(text: str) -> tuple[int, ...]:
    """"0-2 5" to (0, 1, 2, 5)."""
    spans = [part.split("-") for part in text.split()]
    return tuple(number for span in spans for number in range(int(span[0]), int(span[-1]) + 1))


# Which of ImageNet's 1,000 classes are of each of ImageNet-9's: dog, bird, vehicle, reptile, carnivore, insect, instrument, primate, fish.
# The other 630 are of none. Source: the challenge's in_to_in9.json.
NINE_OF_THOUSAND = tuple(
    map(
        _numbers,
        (
            "151-170 173-268",
            "7-24 87-100 127-146",
            "407 408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 670 671 675 690 705 717 734 751 757 791 "
            "802 803 817 820 829 847 864 866 867 870 880",
            "33-68",
            "269-280 286-299 356-362 387 388",
            "300-326",
            "401 402 420 432 486 494 513 541 546 558 566 577 579 593 594 641 642 683 684 687 699 776 822 875 881 889",
            "365-384",
            "0-6 389-397",
        ),
    )
)
