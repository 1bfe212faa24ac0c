"""The page itself: HTML, style and script in one text that asks for nothing outside; with answers in it, or a server behind it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskvit.plots.page import document

HERE = Path(__file__).parent

_BODY = """
<form class="controls" id="controls">
  <div class="field"><label for="sample">Picture</label>
    <div class="row"><button type="button" id="previous" aria-label="previous picture">&#8249;</button>
    <select id="sample"></select><button type="button" id="next" aria-label="next picture">&#8250;</button></div></div>
  <div class="field"><label for="strategy">Hide by</label><select id="strategy"></select></div>
  <div class="field" id="budget-field"><label for="budget">Shared out</label><select id="budget"></select></div>
  <div class="field grow"><label for="visible">Shown: <output id="count"></output></label><input type="range" id="visible"></div>
  <div class="row" id="buttons"><button type="button" id="again">Draw again</button>
    <button type="button" id="all">Show all</button><button type="button" id="none">Hide all</button></div>
</form>
<p class="problem" id="problem" role="alert" hidden></p>
<section><h2>Tokens</h2><p class="hint" id="tokens-hint"></p><div class="boards large" id="tokens"></div></section>
<section><h2>Rebuilt</h2><p class="hint" id="rebuilt-hint" aria-live="polite"></p><div class="boards" id="rebuilt"></div></section>
<section><h2>Attention</h2>
  <p class="hint" id="attention-hint"></p>
  <div class="row" id="block-field"><label for="block">Block</label><select id="block"></select></div>
  <div class="boards" id="attention"></div><div class="legend" id="attention-legend"></div></section>
<section><h2>Features</h2><p class="hint" id="features-hint"></p>
  <div class="boards" id="similarity"></div><div class="legend" id="similarity-legend"></div>
  <h3>Three main components as colors</h3><div class="boards" id="components"></div>
  <h3>The same without what a patch owes to its place</h3><div class="boards" id="content"></div></section>
"""


def explore_page(about: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> str:
    """The page of a checkpoint. `stored`: the answers it can choose from; None where it asks its server."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("explore.css", "explore.js"))
    count = len(about["samples"])
    summary = (
        f"What {about['checkpoint']} ({about['model']}) sees of {count} picture{'s' if count > 1 else ''}, "
        f"{'' if about['cannot_rebuild'] else 'rebuilds of what it is shown, '}attends to, and finds alike."
    )
    if stored is not None:
        summary = f"{result(about, stored)} {summary}".strip()
    connect = "; connect-src 'self'" if stored is None else ""
    body = f"""<header><h1>Explore</h1><p>{html.escape(summary)}</p></header>
<main>{_BODY}</main>
<footer></footer>
<script type="application/json" id="about">{_as_script(about)}</script>
<script type="application/json" id="stored">{_as_script(stored)}</script>
<script>{script}</script>"""
    return document("Explore", body, style, f"; script-src 'unsafe-inline'{connect}")


def result(about: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """How well each strategy's masks are rebuilt, in a sentence, or why nothing is; "" where no sample could be read.

    Of the shares of tokens shown, that which is nearest to the checkpoint's own.
    """
    if about["cannot_rebuild"]:
        return str(about["cannot_rebuild"])
    read = [sample for sample in stored["samples"] if "drawn" in sample]
    if not read:
        return ""
    place = min(range(len(stored["visible"])), key=lambda i: abs(stored["visible"][i] - about["start"]["visible"]))
    losses: dict[str, float] = {}
    for strategy in stored["strategies"]:
        outputs = [sample["drawn"][strategy][place]["outputs"] for sample in read]
        sums = [sum(one["loss"] for one in some.values() if one.get("loss") is not None) for some in outputs]
        losses[strategy] = sum(sums) / len(sums)
    told = ", ".join(f"{loss:.3g} ({strategy})" for strategy, loss in sorted(losses.items(), key=lambda pair: pair[1]))
    least = "" if len(losses) < 2 else f": {min(losses, key=lambda name: losses[name])} leaves what is easiest to rebuild"
    return (
        f"With {stored['visible'][place]} of {about['tokens']} tokens shown, the loss on the hidden ones, summed over outputs and averaged "
        f"over pictures, is {told}{least}."
    )


def _as_script(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
