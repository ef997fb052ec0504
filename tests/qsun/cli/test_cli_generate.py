"""`qsun generate`: answers, JSON, and an exit code for every way in which it can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qsun.cli import exits, main
from qsun.cli.main import build_parser


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def generate(checkpoints, *more: str) -> list[str]:
    return ["generate", "--model", str(checkpoints.base), "--device", "cpu", "--max-tokens", "8", *more]


def test_json_lines_of_two_models(checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = generate(checkpoints, "--prefill", f"task={checkpoints.task}", "--ignore-eos", "--json")
    prompts = ["--prompt", "base:hello", "--prompt", "task:hello", "--prompt", "base:how are: you"]
    assert main([*arguments, *prompts]) == exits.OK
    # Lines come in the order in which answers end: prompts of one model are read before the next one's.
    answers = lines(capsys.readouterr().out)
    asked = {(answer["model"], answer["prompt"]): answer for answer in answers}
    assert len(answers) == 3
    assert set(asked) == {("base", "hello"), ("task", "hello"), ("base", "how are: you")}
    assert all(answer["finish_reason"] == "length" and answer["error"] is None for answer in answers)
    assert all(len(answer["token_ids"]) == 8 for answer in answers)
    of_base, of_task = asked["base", "hello"], asked["task", "hello"]
    assert of_base["token_ids"] != of_task["token_ids"], "the task's own prefill module must be used"


def test_the_chat_template_is_applied_unless_raw(checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    chat = generate(checkpoints, "--ignore-eos", "--json", "--prompt", "base:hello")
    assert main(chat) == 0
    assert main([*generate(checkpoints, "--ignore-eos", "--json", "--raw"), "--prompt", "base:hello"]) == 0
    assert (
        main(
            [
                *generate(checkpoints, "--ignore-eos", "--json", "--raw"),
                "--prompt",
                "base:user: hello\nassistant: ",
            ]
        )
        == 0
    )
    by_chat, raw, by_hand = lines(capsys.readouterr().out)
    assert by_chat["token_ids"] == by_hand["token_ids"] != raw["token_ids"]


def test_text_output(checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(checkpoints, "--prompt", "base:one", "--prompt", "base:two")) == 0
    captured = capsys.readouterr()
    assert "[base] one\n" in captured.out and "[base] two\n" in captured.out
    assert "tokens/s" in captured.err and "tokens/s" not in captured.out


def test_a_seed_repeats(checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    sampled = generate(checkpoints, "--temperature", "1", "--ignore-eos", "--json", "--prompt", "base:hello")
    for seed in ("7", "7", "8"):
        assert main([*sampled, "--seed", seed]) == 0
    first, second, third = (answer["token_ids"] for answer in lines(capsys.readouterr().out))
    assert first == second != third


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--model"),
        (["--model", "x"], "--prompt"),
        (["--model", "x", "--prompt", "hello"], "got 'hello', expected NAME:TEXT"),
        (["--model", "x", "--prompt", "poet:hello"], "got the model 'poet', expected one of base"),
        (["--model", "x", "--prompt", "base:a", "--prefill", "poet"], "got 'poet', expected NAME=PATH"),
        (["--model", "x", "--prompt", "base:a", "--prefill", "base=y"], "expected distinct names, not base"),
        (["--model", "x", "--prompt", "base:a", "--top-p", "2"], "top_p must be a number in (0, 1], got 2.0"),
        (
            ["--model", "x", "--prompt", "base:a", "--max-tokens", "0"],
            "max_tokens must be an integer >= 1, got 0",
        ),
        (["--model", "x", "--prompt", "base:a", "--bits", "5"], "invalid choice: 5"),
        (["--model", "x", "--prompt", "base:a", "--group-size", "96"], "got '96', expected auto, 32"),
        (["--model", "x", "--prompt", "base:a", "--device", "tpu"], "got 'tpu', expected cpu, cuda"),
        (["--model", "x", "--prompt", "base:a", "--max-batch-size", "0"], "max_batch_size"),
        (["--model", "x", "--prompt", "base:a", "--kv-cache-dtype", "int5"], "invalid choice: 'int5'"),
    ],
)
def test_usage_errors(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["generate", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == exits.USAGE
    assert says in captured.err and "Traceback" not in captured.err and captured.out == ""


@pytest.mark.damaged
@pytest.mark.parametrize(
    "what", ["missing", "empty folder", "truncated", "pickle", "module of another shape"]
)
def test_bad_input(what: str, checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, more, says = tmp_path / "model", [], "expected"
    match what:
        case "missing":
            says = f"{model} does not exist, expected"
        case "empty folder":
            model.mkdir()
        case "truncated":
            model.mkdir()
            for path in checkpoints.base.iterdir():
                data = path.read_bytes()
                (model / path.name).write_bytes(data[:-100] if path.suffix == ".safetensors" else data)
            says = "model.safetensors"
        case "pickle":
            model.mkdir()
            (model / "pytorch_model.bin").write_bytes(b"\x80\x02.")
            says = "pickle"
        case "module of another shape":
            model, more = checkpoints.base, ["--prefill", f"task={checkpoints.other}", "--prompt", "task:a"]
            says = "hidden_size"
    code = main(["generate", "--model", str(model), "--device", "cpu", "--prompt", "base:a", *more, "--json"])
    captured = capsys.readouterr()
    assert code == exits.BAD_INPUT
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("qsun: ") and says in last and "Traceback" not in captured.err


def test_an_unavailable_device_or_backend(checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "base:a"]
    assert main([*generate(checkpoints, "--backend", "cuda"), *prompt]) == exits.UNAVAILABLE
    assert "cuda" in capsys.readouterr().err
    assert (
        main(["generate", "--model", str(checkpoints.base), "--device", "cuda:99", *prompt])
        == exits.UNAVAILABLE
    )
    assert "device 'cuda:99' was asked for, torch sees" in capsys.readouterr().err


@pytest.mark.damaged
def test_a_request_that_cannot_be_answered_fails_alone(
    checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "x" * 300
    arguments = generate(checkpoints, "--json", "--raw", "--ignore-eos")
    assert main([*arguments, "--prompt", f"base:{long}", "--prompt", "base:short"]) == exits.REQUEST_FAILED
    failed, answered = lines(capsys.readouterr().out)
    assert failed["finish_reason"] == "error"
    assert "prompt has 300 tokens, expected at most 255" in str(failed["error"])
    assert answered["prompt"] == "short" and answered["finish_reason"] == "length"


@pytest.mark.damaged
def test_an_empty_prompt_is_refused(checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*generate(checkpoints, "--raw"), "--prompt", "base:"]) == exits.REQUEST_FAILED
    assert "prompt is empty, expected at least one token" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from qsun.errors import CheckpointError

    with pytest.raises(CheckpointError):
        main(["generate", "--model", str(tmp_path / "no"), "--prompt", "base:a", "--debug"])


def test_an_internal_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import qsun.cli.generate

    def fail(arguments: object) -> int:
        raise ZeroDivisionError("division by\nzero")

    monkeypatch.setattr(qsun.cli.generate, "generate", fail)
    assert main(["generate", "--model", "x", "--prompt", "base:a"]) == exits.INTERNAL
    assert capsys.readouterr().err == (
        "qsun: internal error: ZeroDivisionError: division by zero (--debug shows where)\n"
    )


def test_the_exit_codes_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ("generate", "quantize", "train", "eval", "doctor")
    for arguments in (["--help"], *([command, "--help"] for command in commands)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        for code in (
            exits.USAGE,
            exits.BAD_INPUT,
            exits.UNAVAILABLE,
            exits.REQUEST_FAILED,
            exits.INTERRUPTED,
        ):
            assert f"\n  {code}  " in out
    assert all(f"\n    {command} " in build_parser().format_help() for command in commands)


@pytest.mark.parametrize("module", ["qsun.cli.main", "qsun.demo.__main__"])
def test_torch_is_not_loaded_before_it_is_needed(module: str) -> None:
    """A wrong option should not wait for it, and OpenMP's wait policy must be set before."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def process(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "qsun.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell lets what it runs in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_as_a_process_stdout_is_json_alone(checkpoints) -> None:
    running = process(*generate(checkpoints, "--json", "--prompt", "base:hello"))
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    (answer,) = lines(out)
    assert answer["model"] == "base"


def test_as_a_process_interrupted(checkpoints) -> None:
    """Ctrl-C while tokens stream: code 130, one line, no traceback."""
    arguments = generate(checkpoints, "--raw", "--ignore-eos", "--prompt", "base:a")
    arguments[arguments.index("--max-tokens") + 1] = "250"
    running = process(*arguments)
    assert running.stdout is not None
    running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, err = running.communicate(timeout=60)
    assert running.returncode == exits.INTERRUPTED, err
    assert "qsun: interrupted" in err and "Traceback" not in err
    assert time.monotonic() - begin < 30
