"""What an option's text may be: each function turns it into a value or says what is expected instead."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from qsun_bench.popularity import Mix
from qsun_bench.shapes import SHAPES, matrices

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
BITS = (2, 3, 4, 8)
DENSE_BITS = 16


def integers(text: str) -> tuple[int, ...]:
    """Integers of at least 1, comma-separated."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = (0,)
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers of at least 1, such as 1,8,64")
    return values


def integer(text: str) -> int:
    """One integer of at least 1."""
    values = integers(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one integer")
    return values[0]


def shape_names(text: str) -> tuple[str, ...]:
    """Models, sets and MODEL.MATRIX, comma-separated."""
    names = tuple(text.split(","))
    for name in names:
        try:
            matrices([name])
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).replace("shape is", "got", 1)) from None
    return names


def group_size(text: str) -> int | str:
    """Columns that share a scale, or channel."""
    if text not in ("32", "64", "128", "channel"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 32, 64, 128 or channel")
    return text if text == "channel" else int(text)


def group_sizes(text: str) -> tuple[int | str, ...]:
    """Several of them, comma-separated."""
    return tuple(group_size(part) for part in text.split(","))


def bits(text: str) -> tuple[int, ...]:
    """Widths of low-bit weights, comma-separated."""
    values = integers(text)
    if any(value not in BITS for value in values):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {', '.join(map(str, BITS))}")
    return values


def heads(text: str) -> tuple[tuple[int, int], ...]:
    """QUERYxKEY heads, comma-separated, the first a multiple of the second."""
    found = []
    for part in text.split(","):
        q, _, kv = part.partition("x")
        if not (q.isdecimal() and kv.isdecimal() and int(kv) >= 1 and int(q) and int(q) % int(kv) == 0):
            raise argparse.ArgumentTypeError(
                f"got {part!r}, expected query heads x key heads, the first a multiple of the second: 32x8"
            )
        found.append((int(q), int(kv)))
    return tuple(dict.fromkeys(found))


def names(text: str) -> tuple[str, ...]:
    """Names, comma-separated."""
    return tuple(text.split(","))


def limit(text: str) -> float:
    """Seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0")
    return value


def seconds(text: str) -> float:
    """Seconds above 0, up to a minute."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 60:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0 and up to 60")
    return value


def factor(text: str) -> float:
    """A factor of at least 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a factor of at least 1")
    return value


def device(text: str) -> torch.device:
    """A device that is there."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("got 'cuda', but torch sees no CUDA device")
    return torch.device("cuda", torch.cuda.current_device()) if text == "cuda" else torch.device("cpu")


def dtype(text: str) -> torch.dtype:
    """One dtype by its name."""
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[text]


def dtypes(text: str) -> tuple[torch.dtype, ...]:
    """Several of them, comma-separated."""
    return tuple(dtype(part) for part in text.split(","))


def bits_or_dense(text: str) -> tuple[int, ...]:
    """Widths of weights, 16 for dense ones, comma-separated."""
    values = integers(text)
    known = (DENSE_BITS, *sorted(BITS, reverse=True))
    if any(value not in known for value in values):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {', '.join(map(str, known))}")
    return tuple(dict.fromkeys(values))


def one_bits_or_dense(text: str) -> int:
    """One of them."""
    values = bits_or_dense(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one number of bits")
    return values[0]


def chosen_of(known: tuple[str, ...], text: str) -> tuple[str, ...]:
    """Some of `known`, comma-separated, each once."""
    values = tuple(dict.fromkeys(text.split(",")))
    if any(value not in known for value in values):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {', '.join(known)}")
    return values


def model(text: str) -> str | Path:
    """The name of a shape, or a checkpoint that is there."""
    if text in SHAPES:
        return text
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected one of {', '.join(SHAPES)}, a checkpoint folder or a GGUF file"
        )
    return Path(text)


def mix(text: str) -> Mix:
    """models=N,zipf=A."""
    expected = f"got {text!r}, expected models=N,zipf=A with N of at least 2 and A of at least 0"
    found = dict(part.partition("=")[::2] for part in text.split(","))
    if not set(found) <= {"models", "zipf"} or "models" not in found:
        raise argparse.ArgumentTypeError(expected)
    try:
        made = Mix(int(found["models"]), float(found.get("zipf", "1")))
    except ValueError:
        raise argparse.ArgumentTypeError(expected) from None
    if made.models < 2 or not 0 <= made.zipf < float("inf"):
        raise argparse.ArgumentTypeError(expected)
    return made


def exponent(text: str) -> float:
    """Of Zipf's law."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of at least 0")
    return value


def rates(text: str) -> tuple[float, ...]:
    """Requests a second, comma-separated."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (0.0,)
    if any(not 0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected requests a second above 0, such as 1,2,4")
    return values


def milliseconds(text: str) -> float:
    """A time above 0, in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected milliseconds above 0")
    return value / 1e3


def quantiles(text: str) -> tuple[int, int]:
    """MEDIAN,P95 of a number of tokens."""
    values = integers(text)
    if len(values) != 2 or values[0] > values[1]:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected MEDIAN,P95 of tokens, such as 1020,4083")
    return values[0], values[1]


def size(text: str) -> int:
    """Bytes, or a size such as 40GiB."""
    from qsun.engine.memory import parse_memory

    try:
        value = parse_memory(int(text) if text.isdigit() else text, "size")
    except ValueError:
        value = 0
    if not isinstance(value, int) or value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected bytes or a size such as 40GiB")
    return value


def record_name(text: str) -> str:
    """The name of a recorded run, as it stands in a file's name and in a document's block."""
    if not re.fullmatch(r"[a-z0-9]+(?:-[a-z0-9]+)*", text):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected lower-case letters and digits, with dashes between: decode-kv"
        )
    return text


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a share above 0 and at most 1, such as 0.9")
    return value
