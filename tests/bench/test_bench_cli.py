"""The command line of qsun-bench: what it prints, writes and returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qsun_bench import commands, results, views
from qsun_bench.cli import main
from qsun_bench.results import Header, Record, Run
from qsun_kernels.backends import cuda
from qsun_kernels.testing import timing

HEADER = Header("cpu (test)", "0123456789ab", "2026-01-31", "2.13.0", None, None, "qsun-bench wna16", 0.02)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real path with a small cache: what is tested is not the figure."""
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 256 << 10)
    monkeypatch.setattr(timing, "_WARM_UP_S", 0.002)
    probe = timing.read_bandwidth
    monkeypatch.setattr(commands, "read_bandwidth", lambda device: probe(device, probe_bytes=8 << 20))


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "wna16: " in out and "attention: " in out and "decode: " in out and "serve: " in out
    assert "smollm2-135m.qkv.w4g64.M1" in out and "int4pack_cpu" in out


@pytest.mark.parametrize("suite", ["wna16", "attention", "write"])
def test_a_suite_runs_on_the_cpu_and_says_so(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "run.json", tmp_path / "run.png"
    options = ["--smoke", "--device", "cpu", "--seconds", "0.005", "--json", str(out), "--plot", str(plot)]
    assert main([suite, *options]) == 0
    run = results.load(str(out))
    assert run.header.device.startswith("cpu (") and run.header.cuda is None
    assert run.header.command.startswith(f"qsun-bench {suite} --smoke --device cpu")
    assert {record.backend for record in run.records} >= {"torch"}
    assert all(record.ok and record.us and record.error is not None for record in run.records)
    assert plot.read_bytes()[:4] == b"\x89PNG"
    captured = capsys.readouterr()
    assert "not run: triton: " in captured.err and run.records[0].case in captured.out


def test_attention_of_codes_is_told_against_values(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--device",
        "cpu",
        "--batch",
        "2",
        "--context",
        "40",
        "--seconds",
        "0.005",
        "--backend",
        "torch",
    ]
    lists = ["--kv-dtype", "auto,fp8,fp8-tensor,int8,int4", "--block-size", "16,32", "--heads", "4x2,6x2"]
    assert main(["attention", *options, *lists]) == 0
    out = capsys.readouterr().out
    assert "h6kv2d64.2x40.int4.b32" in out and "codes against values" in out
    assert "query heads over the same" in out and "blocks of the cache in us" in out
    assert "Triton against CUDA" not in out


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--kv-dtype", "fp4", "got 'fp4', expected some of auto, fp8, fp8-tensor, int8, int4"),
        ("--heads", "9x2", "got '9x2', expected query heads x key heads"),
        ("--heads", "8x0", "got '8x0', expected query heads x key heads"),
        ("--heads", "8", "got '8', expected query heads x key heads"),
        ("--block-size", "0", "got '0', expected integers of at least 1"),
    ],
)
def test_lists_of_attention_are_checked(
    option: str, value: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["attention", option, value])
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_json_to_stdout_is_alone_there(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--smoke", "--batch", "1", "--device", "cpu", "--seconds", "0.005", "--json", "-"]
    assert main(["wna16", *options, "--backend", "torch"]) == 0
    captured = capsys.readouterr()
    assert results.parse(captured.out, "stdout").records
    assert "of read" in captured.err


def test_decode_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    options = ["--smoke", "--device", "cpu", "--batch", "1,3", "--context", "20", "--json", str(out)]
    assert main(["decode", *options]) == 0
    run = results.load(str(out))
    assert [(r.backend, r.fields["batch"], r.fields["bits"]) for r in run.records] == [
        ("torch", 1, 4),
        ("torch", 3, 4),
        ("dense", 1, 16),
        ("dense", 3, 16),
    ]
    for record in run.records:
        assert record.ok and record.us and record.error is not None
        # A shortened model says so.
        assert (record.fields["layers"], record.fields["of_layers"]) == (2, 30)
    quantised, _, dense, _ = run.records
    assert quantised.bytes < dense.bytes
    assert quantised.case == "smollm2-135m.L2.w4g64.b1.c20"


def test_decode_takes_lists_and_tells_what_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "run.json", tmp_path / "run.png"
    options = [
        "--smoke",
        "--layers",
        "1",
        "--device",
        "cpu",
        "--batch",
        "2",
        "--context",
        "16",
        "--tokens",
        "3",
    ]
    lists = ["--bits", "8,3,8", "--mix", "models=2,zipf=0", "--generate", "--prefill-chunk", "16"]
    assert main(["decode", *options, *lists, "--json", str(out), "--plot", str(plot)]) == 0
    run = results.load(str(out))
    assert [record.case.removeprefix("smollm2-135m.L1.") for record in run.records] == [
        f"w{bits}g64.b2.c16{rest}"
        for bits in (8, 3)
        for rest in ("", ".mix2z0", ".generate", ".generate.mix2z0")
    ]
    assert plot.read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert "of floor" in shown and "whole answers" in shown and "memory, GB" in shown
    # What was recorded can be put into a document.
    assert "| smollm2-135m.L1.w3g64.b2.c16.generate |" in str(views.markdown(run))


def test_a_refused_setting_is_a_failed_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    options = [
        "--smoke",
        "--layers",
        "1",
        "--device",
        "cpu",
        "--batch",
        "1",
        "--bits",
        "4",
        "--json",
        str(out),
    ]
    assert main(["decode", *options, "--kv-dtype", "int8", "--group-size", "64"]) in (0, 1)
    (record,) = results.load(str(out)).records
    captured = capsys.readouterr()
    # One or the other, by what the installed engine takes; never a time of another cache.
    assert record.fields["kv_dtype"] == "int8" and record.ok == (record.us is not None)
    assert record.ok or ("kv_cache_dtype='int8'" in record.note and "FAILED: " in captured.err)


def test_a_run_of_decode_ends_at_its_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    options = ["--smoke", "--layers", "1", "--device", "cpu", "--batch", "1,2", "--json", str(out)]
    assert main(["decode", *options, "--limit", "0.001"]) == 0
    assert len(results.load(str(out)).records) == 1 and "(--limit)" in capsys.readouterr().err


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "wna16", "1", "256", "512", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "wna16_linear M=1 N=256 K=512 W4 g128 symmetric" in out and "chosen" in out
    assert "reads and writes 69,120 bytes" in out


def test_explain_knows_act_order_and_the_launch(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bits", "3", "--group", "32", "--zeros", "--act-order", "--device", "cpu"]
    assert main(["explain", "wna16", "1", "256", "512", *options]) == 0
    out = capsys.readouterr().out
    assert "W3 g32 asymmetric act-order" in out
    assert ("cuda launches" in out) == bool(cuda.build_info())


def run_of(arguments: list[str], out: Path) -> Run:
    options = ["--device", "cpu", "--seconds", "0.005", "--json", str(out)]
    assert main(["wna16", *arguments, *options]) == 0
    return results.load(str(out))


def test_lists_make_every_combination_once(tmp_path: Path) -> None:
    options = ["--shapes", "smollm2-135m.o,smollm2-135m.o", "--m", "1,17", "--bits", "4,3", "--group", "64"]
    run = run_of([*options, "--dtype", "bf16,fp16", "--peers", "none"], tmp_path / "run.json")
    assert {record.backend for record in run.records} == {"torch"}
    assert [record.case.removeprefix("smollm2-135m.o.") for record in run.records] == [
        f"w{bits}g64{dtype}.M{M}" for bits in (4, 3) for dtype in ("", ".float16") for M in (1, 17)
    ]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ("torch", "dense", "int4pack_cpu")),
        (["--peers", "all"], ("torch", "dense", "int4pack_cpu")),
        (["--peers", "none"], ("torch",)),
        (["--peers", "dense,marlin"], ("torch", "dense")),
        (["--backend", "torch"], ("torch",)),
        (["--backend", "int4pack_cpu"], ("int4pack_cpu",)),
        (["--backend", "torch", "--peers", "dense"], ("torch", "dense")),
    ],
    ids=" ".join,
)
def test_who_is_run(options: list[str], names: tuple[str, ...], tmp_path: Path) -> None:
    run = run_of(["--shape", "smollm2-135m.o", "--m", "1", *options], tmp_path / "run.json")
    assert {record.backend for record in run.records} == set(names)


def test_margins_follow_the_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_of(["--shape", "smollm2-135m.o", "--m", "1,2"], tmp_path / "run.json")
    out = capsys.readouterr().out
    assert "best peer / ours" in out and "geometric mean" in out and "share of the byte floor" in out


def test_a_run_is_compared_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "smollm2-135m.o", "--m", "1", "--peers", "none"]
    run_of(options, tmp_path / "a.json")
    run_of([*options, "--compare", str(tmp_path / "a.json")], tmp_path / "b.json")
    assert "geometric mean of A / B" in capsys.readouterr().out
    assert main(["wna16", *options, "--device", "cpu", "--compare", "no-such-revision"]) == 3
    assert "no-such-revision:bench/results/cpu/wna16.json" in capsys.readouterr().err


def test_a_run_ends_at_its_limit_and_keeps_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(["--shape", "smollm2-135m", "--m", "1,2", "--limit", "0.001"], tmp_path / "run.json")
    assert len(run.records) < 8 and "(--limit)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["wna16", "--batch", "0"], "got '0', expected integers of at least 1"),
        (["wna16", "--shape", "gpt-5"], "got 'gpt-5', expected one of smollm2-135m"),
        (["wna16", "--group-size", "100"], "got '100', expected 32, 64, 128 or channel"),
        (["wna16", "--device", "tpu"], "got 'tpu', expected cpu or cuda"),
        (["wna16", "--seconds", "-1"], "got '-1', expected seconds above 0"),
        (["wna16", "--device", "cpu", "--backend", "awq"], "got 'awq', expected some of cuda, "),
        (["wna16", "--device", "cpu", "--peers", "cuda"], "got 'cuda', expected all, none or some of bits"),
        (["wna16", "--shapes", "llama-3.1-8b.x"], "got 'llama-3.1-8b.x', expected one of smollm2-135m"),
        (["wna16", "--bits", "4,5"], "got '4,5', expected some of 2, 3, 4, 8"),
        (["wna16", "--dtype", "bf16,fp8"], "got 'fp8', expected one of bfloat16, bf16"),
        (["wna16", "--limit", "0"], "got '0', expected seconds above 0"),
        (["wna16", "--device", "cpu", "--act-order", "--group", "channel"], "leaves no order"),
        (["attention", "--device", "cpu", "--dtype", "bf16,fp16"], "expected one dtype at a time"),
        (["wna16", "--device", "cpu", "--commit", "0123456"], "--commit: expected only with --record"),
        (["decode", "--device", "cpu", "--model", ".", "--layers", "2"], "--layers: a checkpoint has"),
        (["decode", "--device", "cpu", "--model", "gpt-5"], "got 'gpt-5', expected one of smollm2-135m"),
        (
            ["decode", "--device", "cpu", "--bits", "4,5"],
            "--bits: got '4,5', expected some of 16, 8, 4, 3, 2",
        ),
        (
            ["decode", "--device", "cpu", "--kv-dtype", "int8,int2"],
            "--kv-dtype: got 'int8,int2', expected some",
        ),
        (
            ["decode", "--device", "cpu", "--lm-head-bits", "1"],
            "--lm-head-bits: got '1', expected some of 16",
        ),
        (
            ["decode", "--device", "cpu", "--context", "64,1"],
            "--context: got '64,1', expected integers of at",
        ),
        (
            ["decode", "--device", "cpu", "--tokens", "1"],
            "--tokens: got '1', expected integers of at least 2",
        ),
        (["decode", "--device", "cpu", "--mix", "zipf=1"], "--mix: got 'zipf=1', expected models=N,zipf=A"),
        (
            ["decode", "--device", "cpu", "--mix", "models=1"],
            "--mix: got 'models=1', expected models=N,zipf=A",
        ),
        (["decode", "--device", "cpu", "--mix", "models=8,skew=1"], "expected models=N,zipf=A"),
        (["decode", "--device", "cpu", "--host"], "--host: on a CPU the host computes the step itself"),
        (
            ["decode", "--device", "cpu", "--prefill-chunk", "8"],
            "--prefill-chunk: expected only with --generate",
        ),
        (["decode", "--device", "cpu", "--dtype", "float32"], "--dtype: the step is judged against float32"),
        (["decode", "--device", "cpu", "--layers", "31", "--shape", "smollm2-135m"], "expected at most 30"),
        (["compare", "a", "b", "--fail-above", "0.5"], "got '0.5', expected a factor of at least 1"),
    ],
)
def test_usage_errors(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_no_silent_fallback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wna16", "--smoke", "--device", "cpu", "--backend", "triton"]) == 4
    assert "interpreter" in capsys.readouterr().err


@pytest.mark.damaged
@pytest.mark.parametrize("text", ["", "[]", '{"header": {}, "records": []}'], ids=repr)
def test_compare_of_a_damaged_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(text)
    assert main(["compare", str(path), str(path)]) == 3
    assert f"qsun-bench: {path}" in capsys.readouterr().err


def test_compare_prints_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, us in (("a", 10.0), ("b", 8.0)):
        record = Record("wna16_linear", "m.M1", "cuda", us, 4096, 0.5, True, {"M": 1})
        results.write(Run(HEADER, (record,)), tmp_path / f"{name}.json")
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "1.250x" in out and "geometric mean of A / B: 1.250" in out
    assert main(["compare", a, b, "--fail-above", "1.1"]) == 0
    assert main(["compare", b, a, "--fail-above", "1.1"]) == 1


def test_it_is_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "qsun_bench", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "exit codes:" in done.stdout


def test_without_rich_tables_are_plain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert main(["list", "--device", "cpu"]) == 0
    assert "smollm2-135m.qkv.w4g64.M1" in capsys.readouterr().out
