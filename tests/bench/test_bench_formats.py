"""The suites of formats, steps and the variant for older GPUs: their cases, and the tables of their runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qsun_bench import format_tables, margins, report, results
from qsun_bench.cases import Selection, suites
from qsun_bench.cases.wna16_formats import FORMATS
from qsun_bench.cli import build_parser, main
from qsun_bench.contenders import contenders
from qsun_bench.results import Header, Record, Run
from qsun_bench.variants import SM80

CUDA = Selection(torch.device("cuda"))
HEADER = Header("NVIDIA H100", "0123456789ab", "2026-12-01", "2.11", "3.6", "13.0", "qsun-bench", 3.1)


def run_of(suite: str, us: dict[str, float], backend: str = "cuda", others: tuple[Record, ...] = ()) -> Run:
    """A run of the suite's cases, 10 us each but those whose name has a part in `us`."""
    records = []
    for case in suites()[suite].cases(CUDA):
        time = next((value for part, value in us.items() if part in case.name), 10.0)
        fields = case.fields()
        records.append(Record(case.op, case.name, backend, time, case.bytes, 0.5, True, fields))
    return Run(HEADER, (*records, *others))


def test_every_format_is_a_case_at_every_matrix_and_size() -> None:
    cases = suites()["wna16-formats"].cases(CUDA)
    assert len(cases) == len(FORMATS) * 2 * 5
    run = run_of("wna16-formats", {})
    kinds = [format_tables.format_of(record) for record in run.records]
    assert None not in kinds and len({kind.name for kind in kinds if kind is not None}) == len(FORMATS)
    assert FORMATS[0].spec.bits == 4 and FORMATS[0].spec.symmetric and not FORMATS[0].act_order


def test_formats_are_told_against_the_first_and_their_targets() -> None:
    run = run_of(
        "wna16-formats", {"w4g128z.M8": 10.4, "w4g32.M1": 11.0, "w2g128.M32": 9.0, "w3g128.M16": 9.0}
    )
    (table,) = format_tables.formats(run)
    rows = {(row[0].split(" ")[0], row[1]): row for row in table.rows}
    zeros = rows["llama-3.1-8b.o", "W4 g128 zeros"]
    assert zeros[2:] == ("1.00 (10.0)", "1.04* (10.4)", "1.00 (10.0)", "1.00 (10.0)", "1.00 (10.0)", "1.03")
    assert rows["llama-3.1-8b.o", "W4 g32"][2] == "1.10 (11.0)"
    # Held to its target up to 16 tokens only.
    assert rows["llama-3.1-8b.gate_up", "W2 g128"][5:] == ("0.90 (9.0)", "1.00 (10.0)", "0.62 to M = 16")
    assert rows["llama-3.1-8b.gate_up", "W3 g128"][4] == "0.90* (9.0)"
    assert rows["llama-3.1-8b.o", "W4 g128"][2:] == ("(10.0)",) * 5 + ("",)


def test_a_run_of_one_format_has_no_table_of_formats() -> None:
    assert not format_tables.formats(run_of("wna16", {}))


def test_a_wrong_result_is_no_time() -> None:
    run = run_of("wna16-formats", {})
    spoilt = [
        Record(r.op, r.case, r.backend, None, r.bytes, 9.0, False, r.fields) if "w8g128.M1" in r.case else r
        for r in run.records
    ]
    (table,) = format_tables.formats(Run(HEADER, tuple(spoilt)))
    assert [row[2] for row in table.rows if row[1] == "W8 g128"] == ["wrong", "wrong"]


def test_steps() -> None:
    run = run_of("wna16-steps", {"qkv.w4g128.M17": 12.0})
    (table,) = format_tables.steps(run)
    assert {row[0].split(" ")[0]: row[1:3] for row in table.rows}["llama-3.1-8b.qkv.w4g128"] == (
        "1.20",
        "1.00",
    )
    assert len(table.rows) == 7


def test_the_variant_is_ours_and_only_in_its_suite() -> None:
    names = [contender.name for contender in contenders("wna16_linear", suites()["wna16-sm80"].variants)]
    assert SM80 in names and SM80 not in [contender.name for contender in contenders("wna16_linear")]
    (variant,) = [c for c in contenders("wna16_linear", (SM80,)) if c.name == SM80]
    assert variant.is_ours
    with pytest.raises(ValueError, match="variants holds 'cuda-sm70'"):
        contenders("wna16_linear", ("cuda-sm70",))


def test_the_variant_against_a_peer() -> None:
    case = suites()["wna16-sm80"].cases(CUDA)[0]
    peer = Record(case.op, case.name, "marlin", 15.0, case.bytes, 0.5, True, case.fields())
    run = run_of("wna16-sm80", {}, SM80, (peer,))
    (table,) = format_tables.sm80(run)
    assert table.rows == [("llama-3.1-8b.o.w4g128", "1.50 (10.0)", *[""] * 6)]
    assert all(cell.peer is None or cell.peer.backend == "marlin" for cell in margins.cells(run))


def test_a_document_may_ask_for_each_view(tmp_path: Path) -> None:
    for suite in ("wna16-formats", "wna16-steps"):
        results.write(run_of(suite, {}), tmp_path / f"bench/results/h100/{suite}.json")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "x.md"
    page.write_text(
        "<!-- bench:wna16-formats-h100:formats -->\n<!-- /bench -->\n"
        "<!-- bench:wna16-steps-h100:steps -->\n<!-- /bench -->\n"
    )
    assert main(["report", "--root", str(tmp_path)]) == 0
    text = page.read_text()
    assert "W4 g128 act-order" in text and "t(17) / t(16)" in text and "share of the byte floor" not in text
    assert main(["report", "--root", str(tmp_path), "--check"]) == 0
    with pytest.raises(
        results.ResultsError, match=r"asks for 'form', expected nothing or one of margins, .*formats"
    ):
        report.render("wna16-formats-h100:form", tmp_path, page)


def test_formats_are_not_options_of_their_own_suite(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = build_parser().parse_args(["wna16-formats", "--m", "1"])
    assert parsed.bits == (4,) and parsed.group_size == (None,)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["wna16-formats", "--bits", "2"])
    assert "unrecognized arguments: --bits 2" in capsys.readouterr().err


def test_the_suite_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    arguments = [
        "--device",
        "cpu",
        "--backend",
        "torch",
        "--m",
        "1",
        "--seconds",
        "0.01",
        "--json",
        str(path),
    ]
    assert main(["wna16-formats", *arguments]) == 0
    (table,) = format_tables.formats(results.load(str(path)))
    assert [row[1] for row in table.rows] == [kind.name for kind in FORMATS]
    assert all("(" in row[2] for row in table.rows)
