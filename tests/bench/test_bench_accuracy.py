"""The accuracy study in the documents."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from qsun_bench import accuracy, report
from qsun_bench.cli import main
from qsun_bench.results import ResultsError


def arm(family: str, name: str, share: float) -> dict[str, Any]:
    return {
        "family": family,
        "arm": name,
        "seeds": [0],
        "items": 200,
        "share": share,
        "share_by_seed": [share],
        "interval_95": [share - 0.02, share + 0.02],
        "failed": 0,
        "loss": 1.25,
        "perplexity": 3.5,
    }


STUDY: dict[str, Any] = {
    "header": {
        "note": "A note.",
        "devices": ["NVIDIA H200"],
        "torch": ["2.11.0"],
        "dtype": ["bfloat16"],
        "commit": "0123456789ab",
        "date": "2026-01-31",
        "command": "run",
    },
    "arms": [arm("tools", "base", 0.05), arm("tools", "sun", 0.5), arm("maths", "sun", 0.045)],
    "comparisons": [
        {
            "family": "tools",
            "a": "sun",
            "b": "base",
            "difference": 0.45,
            "interval_95": [0.4, 0.5],
            "p": 0.00005,
            "loss_difference": -0.5,
            "loss_p": 0.123,
        }
    ],
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / accuracy.FILE).parent.mkdir(parents=True)
    (tmp_path / accuracy.FILE).write_text(json.dumps(STUDY))
    text = "<!-- bench:accuracy -->\n<!-- /bench -->\n\n<!-- bench:accuracy:paired -->\n<!-- /bench -->\n"
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def test_arms_and_comparisons_are_filled_in(tree: Path) -> None:
    assert main(["report", "--root", str(tree)]) == 0
    text = (tree / "README.md").read_text()
    assert "NVIDIA H200; torch 2.11.0; bfloat16; commit 0123456789ab; 2026-01-31; `run`. A note." in text
    assert "function calling (200) | GSM8K (200) |" in text
    assert "| base, untrained | 5.0 (3.0-7.0) |  | 1.250 |  |" in text
    assert "| SUN | 50.0 (48.0-52.0) | 4.5 (2.5-6.5) | 1.250 | 1.250 |" in text
    assert "| sun - base | +45.0 (+40.0 to +50.0), 5e-05 | -0.500, 0.12 |" in text
    assert main(["report", "--check", "--root", str(tree)]) == 0


def test_every_arm_of_the_study_has_a_name() -> None:
    from qsun.training.study.units import UNITS

    arms = {serving.arm for unit in UNITS.values() for serving in unit.servings}
    study = copy.deepcopy(STUDY)
    study["arms"] = [arm("tools", name, 0.1) for name in sorted(arms)]
    assert accuracy.markdown(study, "").count("10.0 (8.0-12.0)") == len(arms)


@pytest.mark.parametrize("content", ["{", "[]", '{"header": {}, "arms": []}'])
def test_a_damaged_study_is_named(tree: Path, content: str) -> None:
    (tree / accuracy.FILE).write_text(content)
    with pytest.raises(ResultsError, match=r"accuracy\.json cannot be read"):
        report.pages(tree)


def test_an_unknown_view_is_refused(tree: Path) -> None:
    (tree / "README.md").write_text("<!-- bench:accuracy:best -->\n<!-- /bench -->\n")
    with pytest.raises(ResultsError, match="asks for 'best', expected nothing or paired"):
        report.pages(tree)


def test_a_plot_is_drawn(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["report", "--root", str(tree), "--plots", str(tmp_path / "plots")]) == 0
    drawn = (tmp_path / "plots" / "accuracy.svg").read_text()
    assert drawn.count("function calling") + drawn.count("PathCollection") > 3
