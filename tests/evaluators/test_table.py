"""Every evaluator and protocol is in docs/evaluation.md, and the rows of protocols are arguments of their evaluators."""

from __future__ import annotations

import pytest

from maskvit.evaluators import CONTEXT, EVALUATORS, check_evaluator
from maskvit.evaluators.protocols import PROTOCOLS
from tests.runs import ROOT

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*EVALUATORS, *PROTOCOLS])
def test_the_page_names_it(name):
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_arguments_of_its_evaluator(name):
    row = PROTOCOLS[name]
    constructor, arguments = check_evaluator("e", dict(type=row.type, protocol=name), row.image_size)
    assert constructor is EVALUATORS[row.type] and not set(arguments) & set(CONTEXT)
    if "options" in arguments:
        assert set(arguments["options"]) <= set(constructor.read_options(**arguments["options"]))
