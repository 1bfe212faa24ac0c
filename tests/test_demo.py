"""The demo's page names everything that became worse, in its first sentences too."""

from __future__ import annotations

import html

import numpy as np
import pytest

from maskvit.commands.demo.page import Change, Story, build, counted, lines, summary
from maskvit.plots.pictures import png_bytes


@pytest.fixture
def story() -> Story:
    picture = png_bytes(np.zeros((8, 8, 3), np.uint8))
    rows = [dict(step=step, loss=3.0 - step / 10, learning_rate=1e-3, grad_norm=1.0, images_per_second=50.0) for step in (1, 2, 3)]
    return Story(
        losses=[Change("loss of rgb", 0.489, 0.396, False), Change("loss of semseg", 1.118, 1.12, False)],
        without_eyes={"rgb": 0.523, "semseg": 1.119},
        frozen=[Change("k-NN", 14.17, 16.17, True), Change("probe", 12.0, 11.5, True), Change("other", 12.0, 12.0, True)],
        references={"k-NN top-1 %": 19.17},
        tasks=[Change("depth, RMSE in m", 3.5, 3.1, False)],
        pictures=dict(imported=picture, continued=picture, answers=picture),
        rows=rows,
        settings=[("visible tokens", "32")],
        times=[("rendering", 60.0)],
    )


def test_verdicts_follow_what_is_better():
    assert Change("loss", 1.0, 0.5, False).verdict == Change("top-1", 1.0, 1.5, True).verdict == "better"
    assert Change("loss", 0.5, 1.0, False).verdict == Change("top-1", 1.5, 1.0, True).verdict == "worse"
    assert Change("loss", 0.50001, 0.50002, False).verdict == "same"  # the page shows the same digits


def test_the_first_sentences_name_what_became_worse(story):
    assert counted(story.losses, "losses") == "1 of 2 losses became better, 1 worse (loss of semseg 1.118 to 1.12)"
    assert counted(story.frozen, "figures").endswith("1 worse (probe 12 to 11.5), 1 stayed the same (other 12 to 12)")
    words = summary(story)
    assert "trained for 3 more steps" in words and "loss of semseg 1.118 to 1.12" in words
    assert words.endswith("1 of 1 figures became better: depth, RMSE in m 3.1 against 3.5.")


def test_every_figure_is_on_the_page_and_in_the_terminal(story):
    text = html.unescape(build(story))
    for change in (*story.losses, *story.frozen, *story.tasks):
        assert change.name in text and f"{change.before:.4g}" in text and f"{change.after:.4g}" in text
    assert text.index(summary(story)) < text.index("<h2>") and "19.17" in text
    assert lines(story)[1] == "worse   loss of semseg: 1.118 -> 1.12" and len(lines(story)) == 6
