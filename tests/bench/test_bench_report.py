"""The tables of the documents come from the recorded runs, and this checkout's still do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qsun_bench import plots, report, results, tables
from qsun_bench.cli import main
from qsun_bench.results import Header, Record, ResultsError, Run

ROOT = Path(__file__).resolve().parents[2]
HEADER = Header(
    "NVIDIA H100", "0123456789ab", "2026-01-31", "2.11.0", "3.6.0", "13.0", "qsun-bench wna16", 3.1
)


def matrix(M: int, backend: str, us: float | None, ok: bool = True) -> Record:
    fields = {
        "M": M,
        "N": 6144,
        "K": 4096,
        "bits": 4,
        "group_size": 128,
        "symmetric": True,
        "dtype": "bfloat16",
    }
    return Record("wna16_linear", f"llama.qkv.w4g128.M{M}", backend, us, 12_980_000, 0.5, ok, fields)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    records = (
        matrix(1, "cuda", 4.2),
        matrix(8, "cuda", 4.5),
        matrix(1, "dense", 21.4),
        matrix(8, "dense", None, False),
    )
    results.write(Run(HEADER, records), tmp_path / "bench/results/h100/wna16.json")
    attention = Record("paged_attention_decode", "8x1024", "cuda", 20.0, 31_000_000, 0.5, True, {"batch": 8})
    results.write(Run(HEADER, (attention,)), tmp_path / "bench/results/h100/attention.json")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "# Title\n\n<!-- bench:wna16-h100 -->\nold\n<!-- /bench -->\n\nafter\n"
    )
    (tmp_path / "docs" / "deep.md").write_text("<!-- bench:attention-h100 -->\n<!-- /bench -->\n")
    return tmp_path


def test_check_fails_until_the_report_is_written(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--check", "--root", str(tree)]) == 1
    assert "README.md differs" in capsys.readouterr().out
    assert "old" in (tree / "README.md").read_text(), "--check must write nothing"
    assert main(["report", "--root", str(tree)]) == 0
    assert main(["report", "--check", "--root", str(tree)]) == 0


def test_a_table_by_rows(tree: Path) -> None:
    main(["report", "--root", str(tree)])
    text = (tree / "README.md").read_text()
    assert text.startswith("# Title\n") and text.endswith("\nafter\n")
    assert (
        "NVIDIA H100, reads at 3.1 TB/s; torch 2.11.0, triton 3.6.0, CUDA 13.0; commit 0123456789ab" in text
    )
    assert "| llama.qkv.w4g128 (4096 x 6144) | cuda | 4.2 | 4.5 | 100% |" in text
    assert "| llama.qkv.w4g128 (4096 x 6144) | dense | 21.4 | wrong | 20% |" in text


def test_a_table_by_case(tree: Path) -> None:
    main(["report", "--root", str(tree)])
    assert "| 8x1024 | 20.0 (50%) |" in (tree / "docs" / "deep.md").read_text()


def test_a_plan_stands_behind_a_plus(tree: Path) -> None:
    fields = {"batch": 8}
    records = (
        Record("paged_attention_decode", "8x1024", "cuda", 20.0, 31_000_000, 0.5, True, fields, plan_us=2.26),
        Record("paged_attention_decode", "8x1024", "sdpa", 40.0, 31_000_000, 0.5, True, fields),
    )
    results.write(Run(HEADER, records), tree / "bench/results/h100/attention.json")
    main(["report", "--root", str(tree)])
    text = (tree / "docs" / "deep.md").read_text()
    assert "| us (share of read bandwidth) + plan, once a step | cuda | sdpa |" in text
    assert "| 8x1024 | 20.0 (50%) + 2.3 | 40.0 (25%) |" in text


def test_the_terminal_tells_a_plan_apart(capsys: pytest.CaptureFixture[str]) -> None:
    record = Record("paged_attention_decode", "a", "cuda", 20.0, 31_000_000, 0.5, True, {"batch": 8})
    tables.show_run(Run(HEADER, (record,)), "sdpa")
    assert "plan" not in capsys.readouterr().out
    tables.show_run(Run(HEADER, (replace(record, plan_us=2.26), replace(record, case="b"))), "sdpa")
    out = capsys.readouterr().out
    assert "plan us" in out and "us + plan" in out
    assert [line.split()[-2:] for line in out.splitlines() if line.startswith("a ")] == [["2.3", "22.3"]]


def skewed(lengths: list[int], backend: str, us: float, ok: bool = True) -> Record:
    fields = {"batch": len(lengths), "seq_lens": lengths}
    return Record("paged_attention_decode", f"h8.zipf1.{max(lengths)}", backend, us, 10**6, 0.5, ok, fields)


def test_plots_of_time_against_skew(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = Run(
        HEADER,
        (
            skewed([4, 4], "cuda", 2.0),
            skewed([7, 1], "cuda", 2.1),
            skewed([7, 1], "sdpa", 9.0),
            skewed([6, 2], "fa3", 3.0, ok=False),
            skewed([9], "cuda", 5.0),
        ),
    )
    (panel,) = plots._by_total(run.records).items()
    coded = [
        replace(
            record,
            case=f"{record.case}.int4.b32",
            fields={**record.fields, "kv_dtype": "int4", "block_size": 32},
        )
        for record in run.records[:2]
    ]
    both = plots._by_total([*run.records, *coded])
    assert list(both) == [panel[0], "h8 int4 blocks of 32: 2 requests, 8 tokens"]
    assert both[panel[0]] == panel[1]
    assert panel[0] == "h8: 2 requests, 8 tokens"
    assert [plots._skew(record) for record in panel[1]] == [1.0, 1.75, 1.75]
    plots.save_skew(run, tmp_path / "skew.svg")
    assert "<svg" in (tmp_path / "skew.svg").read_text()[:1000]
    alone = Run(HEADER, (skewed([4, 4], "cuda", 2.0), skewed([7, 2], "cuda", 2.1)))
    assert plots.has_skew(run) and not plots.has_skew(alone)
    with pytest.raises(ResultsError, match="no batch was timed at two skews"):
        plots.save_skew(alone, tmp_path / "none.svg")


def test_a_table_of_margins(tree: Path) -> None:
    (tree / "README.md").write_text("<!-- bench:wna16-h100:margins -->\n<!-- /bench -->\n")
    assert main(["report", "--root", str(tree)]) == 0
    text = (tree / "README.md").read_text()
    assert "| llama.qkv.w4g128 (4096 x 6144) | 5.10 dense |  | 5.10 |" in text
    assert "best peer / ours: geometric mean 5.095 over 1 cells" in text
    assert main(["report", "--check", "--root", str(tree)]) == 0


def test_plots_of_every_recorded_run(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "plots"
    assert main(["report", "--root", str(tree), "--plots", str(folder)]) == 0
    drawn = sorted(path.name for path in folder.iterdir())
    assert drawn == ["attention-h100.svg", "wna16-h100-roofline.svg", "wna16-h100.svg"]
    assert all("<svg" in path.read_text()[:1000] for path in folder.iterdir())
    assert f"drew {folder / 'wna16-h100-roofline.svg'}" in capsys.readouterr().out


def test_a_changed_run_is_noticed(tree: Path) -> None:
    main(["report", "--root", str(tree)])
    results.write(Run(HEADER, (matrix(1, "cuda", 3.9),)), tree / "bench/results/h100/wna16.json")
    assert main(["report", "--check", "--root", str(tree)]) == 1


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "<!-- bench:decode-h100 -->\n<!-- /bench -->\n",
            r"needs bench/results/h100/decode\.json, which is not",
        ),
        ("<!-- bench:wna16 -->\n<!-- /bench -->\n", "block bench:wna16 needs"),
        (
            "<!-- bench:wna16-h100:best -->\n<!-- /bench -->\n",
            "asks for 'best', expected nothing or one of margins, codes",
        ),
        ("<!-- bench:wna16-h100 -->\nno end\n", "1 marks make 0 blocks, expected an end for every start"),
        (
            "<!-- bench:wna16-h100 -->\n<!-- bench:wna16-h100 -->\n<!-- /bench -->\n",
            "3 marks make 1 blocks, expected an end for every start",
        ),
    ],
)
def test_blocks_that_cannot_be_filled_are_refused(tree: Path, text: str, says: str) -> None:
    (tree / "README.md").write_text(text)
    with pytest.raises(ResultsError, match=says):
        report.pages(tree)
    assert main(["report", "--check", "--root", str(tree)]) == 3


def test_the_documents_of_this_checkout_agree_with_the_recorded_runs() -> None:
    differing = [str(page.path.relative_to(ROOT)) for page in report.pages(ROOT) if page.differs]
    assert not differing, f"run `qsun-bench report`: {differing}"


def test_every_recorded_run_of_this_checkout_is_readable() -> None:
    for path in (ROOT / results.RESULTS).glob("*/*.json"):
        run = results.parse(path.read_text(), str(path))
        assert run.records, path
        assert not run.header.commit.endswith("-dirty"), path
