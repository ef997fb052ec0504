"""`qsun train` and `qsun eval`: from data to a module to a measured share."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from qsun.cli import exits, main


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(8)]
    return write(tmp_path / "sums.jsonl", *rows)


def arguments(checkpoints, data: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--steps", "3", "--batch-size", "4", "--device", "cpu"]
    return ["train", "--model", str(checkpoints.base), "--data", str(data), "--out", str(out), *fixed, *more]


@pytest.mark.parametrize("how", [[], ["--lora", "2", "--bits", "4", "--group-size", "32"]])
def test_train_then_generate_then_measure(
    how, checkpoints, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "task", tmp_path / "log.jsonl"
    assert main(arguments(checkpoints, data, out, "--json", "--log", str(log), *how)) == exits.OK
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["finished"] and summary["steps"] == 3 and summary["data"]["examples"] == 8
    assert "8 examples" in captured.err
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    ask = ["generate", "--model", str(checkpoints.base), "--prefill", f"task={out}", "--prompt", "task:1+1="]
    assert main([*ask, "--max-tokens", "2", "--bits", "16", "--device", "cpu", "--json"]) == exits.OK
    capsys.readouterr()

    items = write(
        tmp_path / "items.jsonl", {"prompt": "1+1=", "answer": ".*"}, {"prompt": "x", "answer": "^$"}
    )
    measure = ["eval", "--model", str(checkpoints.base), "--prefill", f"task={out}", "--device", "cpu"]
    folder = str(tmp_path / "measured")
    shared = ["--data", str(items), "--out", folder, "--max-tokens", "3"]
    assert main([*measure, "--task", "jsonl", "--metric", "regex", *shared]) == exits.OK
    text = capsys.readouterr().out
    assert text.startswith("items: 2 items") and "task" in text and "base" in text
    assert len((tmp_path / "measured" / "items.jsonl").read_text().splitlines()) == 4
    shared = ["--data", str(data), "--out", str(tmp_path / "perplexity"), "--json", "--no-base"]
    assert main([*measure, "--task", "perplexity", *shared]) == exits.OK
    found = json.loads(capsys.readouterr().out)["models"]
    assert list(found) == ["task"] and found["task"]["perplexity"] > 1


def test_stop_and_resume(checkpoints, data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "task"
    assert main(arguments(checkpoints, data, out, "--stop-after", "1e-9")) == exits.OK
    captured = capsys.readouterr()
    assert "step 1/3" in captured.out and "--resume continues" in captured.err and not out.exists()
    assert main(arguments(checkpoints, data, out)) == exits.USAGE
    assert "holds a run already" in capsys.readouterr().err
    assert main(arguments(checkpoints, data, out, "--resume", "--lr", "1")) == exits.BAD_INPUT
    assert "learning_rate is" in capsys.readouterr().err
    assert main(arguments(checkpoints, data, out, "--resume")) == exits.OK
    captured = capsys.readouterr()
    assert "step 1/3" not in captured.out and "step 3/3" in captured.out and out.is_dir()


def test_damaged_lines(checkpoints, data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(data, {"prompt": "a", "response": "b"}, "{", {"prompt": "a", "response": "b"})
    assert main(arguments(checkpoints, data, tmp_path / "a")) == exits.BAD_INPUT
    assert f"{data}:2: not JSON" in capsys.readouterr().err
    assert main(arguments(checkpoints, data, tmp_path / "b", "--on-bad-data", "skip")) == exits.OK
    error = capsys.readouterr().err
    assert f"left out {data}:2" in error and "1 damaged lines left out" in error


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--data", "nowhere.jsonl"], "--data: nowhere.jsonl is no file"),
        (["--lora-alpha", "3"], "got them without --lora"),
        (["--teacher-weight", "0.3"], "--teacher-weight: got it without --teacher"),
        (["--lora", "0"], "rank is 0"),
        (["--lora", "2", "--lora-targets", "embed"], "expected distinct names among"),
        (["--quantizer", "awq"], "expected a file for awq"),
        (["--lr", "-1"], "learning_rate is -1.0"),
        (["--method", "full", "--bits", "4"], "decoder is"),
        (["--max-length", "1"], "--max-length: got 1"),
        (["--stop-after", "-1"], "--stop-after: got -1.0"),
        (["--bits", "4", "--group-size", "48"], "expected auto, 32"),
        (["--device", "tpu"], "--device: got 'tpu'"),
    ],
)
def test_train_usage_errors(more, says, checkpoints, data, tmp_path: Path, capsys) -> None:
    try:
        code = main(arguments(checkpoints, data, tmp_path / "task", *more))
    except SystemExit as stopped:
        code = stopped.code
    assert code == exits.USAGE and says in capsys.readouterr().err
    assert not (tmp_path / "task").exists()


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--task", "gsm8k"], exits.USAGE, "--data: got none, expected the data of gsm8k"),
        (["--task", "humaneval", "--data", "x"], exits.BAD_INPUT, "--allow-code-execution"),
        (["--task", "jsonl", "--data", "nowhere.jsonl"], exits.BAD_INPUT, "nowhere.jsonl cannot be read"),
        (["--task", "bfcl", "--category", "parallel"], exits.BAD_INPUT, "categories is"),
        (["--task", "gsm8k", "--data", "x", "--limit", "0"], exits.USAGE, "--limit: got 0"),
        (["--task", "gsm8k", "--data", "x", "--no-base"], exits.USAGE, "--no-base"),
    ],
)
def test_eval_errors_before_anything_is_loaded(more, code, says, checkpoints, tmp_path, capsys) -> None:
    command = ["eval", "--model", str(tmp_path / "no-such-model"), "--out", str(tmp_path / "out"), *more]
    assert main(command) == code
    assert says in capsys.readouterr().err


def test_an_interrupt_lets_the_step_end_and_saves(
    checkpoints, data, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qsun.cli import train as command

    monkeypatch.setattr(command, "_show_step", lambda step: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "task"
    assert main(arguments(checkpoints, data, out)) == exits.INTERRUPTED
    assert "stopped after step 1; --resume continues" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "task.training").iterdir()] == ["step-00000001"]
    assert signal.getsignal(signal.SIGINT) is before and not out.exists()
