"""The README shows what the committed result says."""

from __future__ import annotations

import pytest

from bench.cases.save.report import read
from bench.harness.launch import ROOT
from bench.readme import BEGIN, END, README, RESULT, embed, section


def test_the_readme_has_the_committed_figures() -> None:
    page = README.read_text(encoding="utf-8")
    report = read(ROOT / RESULT)
    assert embed(page, section(report, RESULT)) == page, "run python -m bench.readme"
    assert (ROOT / RESULT).with_suffix(".png").exists()


def test_the_committed_result_is_that_of_a_clean_revision() -> None:
    provenance = read(ROOT / RESULT).provenance
    assert provenance["git"]["dirty"] is False
    revision = provenance["git"]["revision"]
    assert len(revision) == 40
    assert f"at revision {revision[:12]};" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("rank", [1, 2])
def test_results_are_of_the_state_that_the_page_names(rank: int) -> None:
    report = read(ROOT / f"bench/results/gpt2-{rank}-rank{'s' if rank > 1 else ''}.json")
    assert (report.state["name"], report.state["ranks"]) == ("gpt2", rank)


def test_only_what_is_between_the_marks_changes() -> None:
    page = f"a\n{BEGIN}\nold\n{END}\nb\n"
    assert embed(page, "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"


@pytest.mark.parametrize("page", ["nothing", f"{BEGIN} only"])
def test_a_page_without_marks_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="lacks"):
        embed(page, "new")
