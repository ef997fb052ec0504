"""What a run of attention or of writes says beside its times, and where documents show it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsun_bench import attention_tables, report, results, write_tables
from qsun_bench.cli import main
from qsun_bench.results import Header, Record, Run

HEADER = Header(
    "NVIDIA H100", "0123456789ab", "2026-01-31", "2.11.0", "3.6.0", "13.0", "qsun-bench attention", 2.0
)


def attention(
    us: float | None,
    backend: str = "cuda",
    *,
    kv: str = "bfloat16",
    q_heads: int = 32,
    block_size: int = 16,
    ok: bool = True,
    megabytes: int = 200,
) -> Record:
    name = f"h{q_heads}.{megabytes}" + ("" if kv == "bfloat16" else f".{kv}")
    name += "" if block_size == 16 else f".b{block_size}"
    fields = {
        "batch": 2,
        "seq_lens": [megabytes, 7],
        "q_heads": q_heads,
        "kv_heads": 8,
        "block_size": block_size,
        "dtype": "bfloat16",
        "kv_dtype": kv,
    }
    size = megabytes * 10**6 // {"bfloat16": 1, "fp8": 2, "int4": 4}[kv]
    return Record("paged_attention_decode", name, backend, us, size, 0.5, ok, fields)


RUN = Run(
    HEADER,
    (
        attention(100.0),
        attention(130.0, "triton"),
        attention(90.0, "fa3"),
        attention(50.0, kv="fp8"),
        attention(80.0, "triton", kv="fp8"),
        attention(25.0, kv="int4"),
        attention(None, "triton", kv="int4", ok=False),
        attention(105.0, q_heads=40),
        attention(98.0, block_size=64),
        attention(10.0, megabytes=20),
        attention(90.0, "triton", megabytes=20),
    ),
)


def test_codes_stand_against_values_of_the_same_contender() -> None:
    table = attention_tables.codes(RUN)
    assert table is not None
    assert table.columns == ("", "by", "bfloat16", "fp8", "int4")
    assert table.rows == [
        ("h32.200", "cuda", "100.0 (100%)", "50.0 (2.00x, 100%)", "25.0 (4.00x, 100%)"),
        ("h32.200", "triton", "130.0 (77%)", "80.0 (1.62x, 62%)", "wrong"),
    ]


def test_codes_without_their_values_have_no_ratio() -> None:
    table = attention_tables.codes(Run(HEADER, (attention(50.0, kv="fp8"),)))
    assert table is not None and table.rows == [("h32.200", "cuda", "", "50.0 (100%)")]
    assert attention_tables.codes(Run(HEADER, (attention(50.0),))) is None


def test_groups_and_blocks_stand_against_the_smallest() -> None:
    groups, blocks = attention_tables.groups(RUN), attention_tables.blocks(RUN)
    assert groups is not None and blocks is not None
    assert groups.columns == ("q heads", "", "cuda", "triton", "fa3")
    assert groups.rows == [
        ("32", "h32.200", "100.0 (1.00)", "130.0 (1.00)", "90.0 (1.00)"),
        ("40", "h40.200", "105.0 (1.05)", "", ""),
    ]
    assert [row[2] for row in blocks.rows] == ["100.0 (1.00)", "98.0 (0.98)"]
    small = Run(HEADER, (attention(10.0),))
    assert attention_tables.groups(small) is None and attention_tables.blocks(small) is None


def test_triton_stands_against_cuda_where_much_is_read() -> None:
    table = attention_tables.triton(RUN)
    assert table is not None
    assert table.rows == [
        ("h32.200", "200", "100.0", "130.0", "1.30"),
        ("h32.200.fp8", "100", "50.0", "80.0", "1.60"),
        ("geometric mean", "", "", "", "1.44"),
        ("largest", "", "", "", "1.60"),
    ]


def write(us: float | None, backend: str, ok: bool = True) -> Record:
    fields = {"tokens": 8, "steps": "rope", "dtype": "bfloat16", "kv_dtype": "bfloat16"}
    return Record("write_kv_cache", "h32.rope.T8", backend, us, 4_000_000, 0.5, ok, fields)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- bench:attention-h100 -->\n<!-- /bench -->\n")
    results.write(RUN, tmp_path / "bench/results/h100/attention.json")
    writes = Run(HEADER, (write(5.0, "cuda"), write(None, "triton", ok=False), write(12.0, "separate")))
    results.write(writes, tmp_path / "bench/results/h100/write.json")
    return tmp_path


def test_the_table_of_cases_leaves_codes_to_their_own(tree: Path) -> None:
    assert main(["report", "--root", str(tree)]) == 0
    text = (tree / "README.md").read_text()
    assert "| h32.200 | 100.0 (100%) | 130.0 (77%) | 90.0 (111%) |" in text
    assert "h40.200" in text and "h32.200.b64" in text
    assert ".fp8" not in text and "int4" not in text


@pytest.mark.parametrize(
    ("block", "line"),
    [
        (
            "attention-h100:codes",
            "| h32.200 | cuda | 100.0 (100%) | 50.0 (2.00x, 100%) | 25.0 (4.00x, 100%) |",
        ),
        ("attention-h100:sweeps", "| 40 | h40.200 | 105.0 (1.05) |  |  |"),
        ("attention-h100:sweeps", "| 64 | h32.200.b64 | 98.0 (0.98) |  |  |"),
        ("attention-h100:triton", "| largest |  |  |  | 1.60 |"),
        ("write-h100", "| h32.rope.T8 | cuda | 5.00 | 2.40 | 4000.0 | 2.00 | 3.00 |"),
    ],
)
def test_a_document_shows_each(block: str, line: str, tree: Path) -> None:
    text = report.render(block, tree, tree / "README.md")
    assert text.startswith("NVIDIA H100, reads at 2 TB/s")
    assert line in text


def test_a_record_without_the_new_cases_still_reads(tree: Path) -> None:
    old = Run(HEADER, (attention(10.0, megabytes=20),))
    results.write(old, tree / "bench/results/h100/attention.json")
    for view in ("codes", "sweeps", "triton"):
        text = report.render(f"attention-h100:{view}", tree, tree / "README.md")
        assert text.endswith("The recorded run has no such case.")
    assert "| h32.20 | 10.0 (100%) |" in report.render("attention-h100", tree, tree / "README.md")


def test_writes_are_told_above_their_floor() -> None:
    assert not write_tables.belongs(RUN) and attention_tables.belongs(RUN)
    table = write_tables.build(Run(HEADER, (write(5.0, "cuda"), write(None, "triton", ok=False))))
    assert table.rows == [
        ("h32.rope.T8", "cuda", "5.00", "", "4000.0", "2.00", "3.00"),
        ("h32.rope.T8", "triton", "wrong", "", "4000.0", "2.00", ""),
    ]
