"""`qsun quantize`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qsun.checkpoint.reader import open_checkpoint
from qsun.checkpoint.tokenizer import load_tokenizer
from qsun.cli import exits, main, values
from qsun.cli.quantize import calibration_tokens
from qsun.errors import CheckpointError
from qsun.modules.quantize import QUANTIZERS


def quantize(source: Path, out: Path, *more: str) -> list[str]:
    return ["quantize", str(source), str(out), "--device", "cpu", *more]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_copy_is_what_was_asked_for_and_answers(
    bits: int, checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy"
    options = ["--bits", str(bits), "--group-size", "32", "--json"]
    assert main(quantize(checkpoints.base, out, *options)) == exits.OK
    summary = json.loads(capsys.readouterr().out)
    assert summary["target"] == str(out) and summary["method"] == "rtn"
    assert summary["target_bytes"] < summary["source_bytes"]
    reader = open_checkpoint(out)
    try:
        assert reader.quantization is not None
        assert (reader.quantization.spec.bits, reader.quantization.spec.group_size) == (bits, 32)
    finally:
        reader.close()
    # The bits of a quantised checkpoint are its own, whatever generate's default is.
    answer = ["--prompt", "base:hello", "--max-tokens", "4", "--ignore-eos", "--json", "--device", "cpu"]
    assert main(["generate", "--model", str(out), *answer]) == exits.OK
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 4


def test_a_text_summary(checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(quantize(checkpoints.base, tmp_path / "copy", "--asymmetric")) == exits.OK
    out = capsys.readouterr().out
    assert "method   rtn\n" in out and "4 bits, group 64, with zero points" in out


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_calibration_file(
    method: str, checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.jsonl"
    rows = ["a plain string", {"text": "a text"}, {"messages": [{"role": "user", "content": "a chat"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--method", method, "--calibration", str(file), "--group-size", "32", "--json"]
    assert main(quantize(checkpoints.base, tmp_path / "copy", *options)) == exits.OK
    summary = json.loads(capsys.readouterr().out)
    assert summary["method"] == method
    # One token a byte: 14 and 6 of the texts, and the chat as the template writes it.
    assert summary["calibration_tokens"] == 14 + 6 + len("user: a chat\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "awq"], "--method awq: got --calibration None, expected a file"),
        (["--method", "gptq"], "--method gptq: got --calibration None, expected a file"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (
            ["--calibration", "x.txt"],
            "--method rtn: got --calibration x.txt, expected a file for awq and gptq and none",
        ),
        (["--bits", "16"], "invalid choice: 16"),
        (["--group-size", "48"], "got '48', expected auto, 32"),
    ],
)
def test_usage_errors(
    options: list[str], says: str, checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(quantize(checkpoints.base, tmp_path / "copy", *options))
    except SystemExit as stopped:
        code = stopped.code
    assert code == exits.USAGE
    assert says in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_the_command_line_knows_every_quantiser() -> None:
    """It names them without torch, so that --help is quick."""
    assert values.QUANTIZERS == QUANTIZERS


def test_nothing_is_overwritten(checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "precious").write_text("mine")
    assert main(quantize(checkpoints.base, tmp_path / "copy")) == exits.USAGE
    assert "exists already, expected a new or empty folder" in capsys.readouterr().err
    assert (tmp_path / "copy" / "precious").read_text() == "mine"


@pytest.mark.damaged
def test_a_damaged_checkpoint_leaves_nothing_behind(
    checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    for path in checkpoints.base.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert main(quantize(source, tmp_path / "copy")) == exits.BAD_INPUT
    assert "down_proj" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_paragraphs_of_a_text_file(checkpoints, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("one\nline\n\ntwo\n\n\n" + "x" * 600 + "\n")
    tokens = calibration_tokens(file, load_tokenizer(checkpoints.base))
    assert [len(sequence) for sequence in tokens] == [len("one\nline"), 3, 512]


def test_many_texts_are_taken_from_all_over_the_file(checkpoints, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(str(i) for i in range(1000)))
    tokenizer = load_tokenizer(checkpoints.base)
    tokens = calibration_tokens(file, tokenizer)
    numbers = [int(tokenizer.decode(sequence)) for sequence in tokens]
    assert len(numbers) == 128 and numbers[0] == 0 and numbers[-1] > 980


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl:1 is '\[1, 2\]', expected a string, or an object"),
        ("a.jsonl", b'{"prompt": "x"}\n', r'a\.jsonl:1 .* expected a string, or an object with "text"'),
        ("a.jsonl", b"\xff\xfe", r"a\.jsonl is not UTF-8 text"),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8 text"),
        ("a.txt", b" \n\n ", r"a\.txt holds no text, expected at least one"),
    ],
)
def test_damaged_calibration(name: str, content: bytes, says: str, checkpoints, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        calibration_tokens(tmp_path / name, load_tokenizer(checkpoints.base))


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no system message') }}", "chat template refuses it: no system message"),
        (None, "the model has no chat template"),
    ],
)
def test_chats_that_the_tokenizer_cannot_write(
    template: str | None, says: str, checkpoints, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(checkpoints.base)
    tokenizer.chat_template = template
    file = tmp_path / "a.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(CheckpointError, match=rf"a\.jsonl:1.*{says}"):
        calibration_tokens(file, tokenizer)
