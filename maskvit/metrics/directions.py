"""Whether more or less of a figure is better, by its name."""

from __future__ import annotations

import re
from collections.abc import Collection

HIGHER = frozenset(
    "top1 top5 mean_class real mean_iou mean_accuracy pixel_accuracy macro_jaccard delta_1 delta_2 delta_3 corloc iou accuracy max_f "
    "held_out_top1 held_out_macro_jaccard".split()
)
LOWER = frozenset(
    "loss abs_rel sq_rel rmse rmse_log log10 silog l1 mean median mean_error mce background_gap held_out_rmse".split()  # mean: of angles
)


def better(name: str, names: Collection[str] = ()) -> str | None:
    """ "higher", "lower", or None where the name does not say. `name`: as metrics.jsonl has it, "evaluator/.../figure" or "loss/output".

    `names`: all figures of the run. An evaluator with a "total" takes losses, one for each output.
    """
    first, *middle, last = ["", *name.split("/")][-max(2, name.count("/") + 1) :]
    figure = re.sub(r"_k\d+$", "", last)
    if first == "loss" or figure in LOWER or f"{first}/total" in names or (middle and middle[-1] in ("error", "ce")):
        return "lower"
    return "higher" if figure in HIGHER or figure.startswith("under_") else None
