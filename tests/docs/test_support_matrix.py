"""The support matrix is what the tests show."""

import pytest

from tests.docs.support_matrix import COLUMNS, FAMILIES, FILES, PAGE, collect, family_of, render, shown_by


def test_the_page_is_up_to_date(request):
    collected = [item.nodeid for item in request.session.items]
    if not {node.partition("::")[0] for node in collected} >= set(FILES):  # a run of a few files
        collected = collect()
    assert PAGE.read_text(encoding="utf-8") == render(collected), "run: python -m tests.docs.support_matrix"


def test_a_test_that_is_gone_takes_its_mark_with_it():
    nodes = [f"{test}[{family}]" for tests in COLUMNS.values() for test in tests for family in FAMILIES]
    with pytest.raises(ValueError, match="no test"):
        shown_by(nodes[1:] if len(FAMILIES) == 1 else [node for node in nodes if "test_prefill" not in node])
    assert family_of("mixtral top-2") == family_of("fused, up") == "mixtral" and family_of("patterns") == ""
