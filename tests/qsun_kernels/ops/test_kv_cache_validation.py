"""Wrong arguments about caches of codes and the steps before a write: errors that name the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsun_kernels import paged_attention_decode, plan_paged_attention, write_kv_cache
from qsun_kernels.ops.cache_checks import cache_head_dim

F8, I8, U8, F16 = torch.float8_e4m3fn, torch.int8, torch.uint8, torch.float16
TOKEN = (3, 2, 4)


def cache(dtype: torch.dtype = torch.float32, width: int = 8) -> dict[str, torch.Tensor]:
    return {
        "k_cache": torch.zeros(3, 2, 4, width, dtype=dtype),
        "v_cache": torch.zeros(3, 2, 4, width, dtype=dtype),
    }


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"k_scale": torch.ones(shape, dtype=dtype), "v_scale": torch.ones(shape, dtype=dtype)}


def q(head_dim: int = 8, tokens: int = 5, **options: Any) -> dict[str, torch.Tensor]:
    return {"q": torch.zeros(tokens, 4, head_dim, **options)}


ROPE = {"positions": torch.zeros(5, dtype=torch.int64), "cos_sin": torch.zeros(9, 8)}
NORMS = {"q_norm": torch.ones(8), "k_norm": torch.ones(8)}

# What both operators say about a cache and its scales.
CACHES: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    (
        {**cache(I8)},
        ValueError,
        ["k_scale is None", "(num_blocks, Hkv, block_size) = (3, 2, 4)", "torch.int8"],
    ),
    ({**cache(I8), "k_scale": torch.ones(TOKEN)}, ValueError, ["v_scale is None"]),
    ({**cache(U8, 4)}, ValueError, ["k_scale is None", "torch.uint8"]),
    ({**cache(F8)}, ValueError, ["k_scale is None", "(1,) or (num_blocks, Hkv, block_size)"]),
    ({**scales(*TOKEN)}, ValueError, ["k_scale is given", "torch.float32 has no scales"]),
    ({"v_scale": torch.ones(1)}, ValueError, ["v_scale is given", "expected None"]),
    ({**cache(I8), **scales(1)}, ValueError, ["k_scale has shape (1,)", "= (3, 2, 4)"]),
    ({**cache(I8), **scales(3, 2)}, ValueError, ["k_scale has shape (3, 2)"]),
    ({**cache(F8), **scales(2)}, ValueError, ["k_scale has shape (2,)", "(1,) or"]),
    (
        {**cache(F8), **scales(1), "v_scale": torch.ones(TOKEN)},
        ValueError,
        ["v_scale has shape (3, 2, 4)", "(1,)"],
    ),
    ({**cache(I8), **scales(*TOKEN, dtype=F16)}, TypeError, ["k_scale has dtype torch.float16", "float32"]),
    ({**cache(I8), **scales(*TOKEN), "v_scale": torch.ones(3, 4, 2).mT}, ValueError, ["v_scale has strides"]),
    ({**cache(I8), **scales(*TOKEN), "k_scale": 1.0}, TypeError, ["k_scale is a float"]),
    ({**cache(I8), **scales(*TOKEN), "v_cache": cache(U8)["v_cache"]}, TypeError, ["v_cache has dtype"]),
    ({**cache(U8, 8), **scales(*TOKEN)}, ValueError, ["k_cache has shape (3, 2, 4, 8)", "torch.uint8"]),
    ({**cache(torch.int16), **scales(*TOKEN)}, TypeError, ["k_cache has dtype torch.int16", "torch.uint8"]),
    ({"k_cache": [1.0]}, TypeError, ["k_cache is a list"]),
]

WRITES: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({**q()}, ValueError, ["nothing to do to q", "cos_sin, q_norm or rotate"]),
    ({**q(), "k_norm": torch.ones(8)}, ValueError, ["q_norm is None", "beside k_norm"]),
    ({**q(), "q_norm": torch.ones(8)}, ValueError, ["k_norm is None", "beside q_norm"]),
    ({"q_norm": torch.ones(8)}, ValueError, ["q_norm is given and q is None"]),
    ({"rotate": True}, ValueError, ["rotate is True and q is None"]),
    ({**q(), "positions": ROPE["positions"]}, ValueError, ["cos_sin is None", "beside positions"]),
    ({"cos_sin": ROPE["cos_sin"]}, ValueError, ["positions is None", "beside cos_sin"]),
    (
        {**q(), **ROPE, "positions": torch.zeros(4, dtype=torch.int64)},
        ValueError,
        ["positions has shape (4,)"],
    ),
    ({**q(), **ROPE, "positions": torch.zeros(5, dtype=torch.int32)}, TypeError, ["positions has dtype"]),
    ({**q(), **ROPE, "cos_sin": torch.zeros(9, 6)}, ValueError, ["cos_sin has shape (9, 6)", "(9, 8)"]),
    ({**q(), **ROPE, "cos_sin": torch.zeros(9, 8, dtype=F16)}, TypeError, ["cos_sin has dtype"]),
    ({**q(head_dim=16), **ROPE}, ValueError, ["q has shape (5, 4, 16)", "(T, Hq, D) = (5, 4, 8)"]),
    ({**q(tokens=4), **ROPE}, ValueError, ["q has shape (4, 4, 8)"]),
    ({**q(dtype=F16), **ROPE}, TypeError, ["q has dtype torch.float16", "like k"]),
    ({"settled": 1}, TypeError, ["settled is 1", "True or False"]),
    ({"q": torch.zeros(5, 4, 16)[..., ::2], **ROPE}, ValueError, ["q has strides"]),
    ({**q(), **NORMS, "q_norm": torch.ones(4)}, ValueError, ["q_norm has shape (4,)", "(D,) = (8,)"]),
    ({**q(), **NORMS, "k_norm": torch.ones(8, dtype=F16)}, TypeError, ["k_norm has dtype torch.float16"]),
    ({**q(), **NORMS, "eps": -1.0}, ValueError, ["eps is -1.0", "at least 0"]),
]


def write_arguments() -> dict[str, Any]:
    rows = torch.zeros(5, 2, 8)
    return {"k": rows, "v": rows.clone(), **cache(), "slot_mapping": torch.arange(5)}


def attention_arguments() -> dict[str, Any]:
    return {
        "q": torch.zeros(2, 4, 8),
        **cache(),
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
        "softmax_scale": 0.1,
    }


def check(error: type[Exception], fragments: list[str], call: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(error) as caught:
        call(**arguments)
    assert type(caught.value) is error
    for fragment in (*fragments, "expected"):
        assert fragment in str(caught.value)


@pytest.mark.damaged
@pytest.mark.parametrize(("wrong", "error", "fragments"), CACHES)
def test_wrong_caches_are_named(wrong: dict[str, Any], error: type[Exception], fragments: list[str]) -> None:
    check(error, fragments, write_kv_cache, write_arguments() | wrong)
    check(error, fragments, paged_attention_decode, attention_arguments() | wrong)


@pytest.mark.damaged
@pytest.mark.parametrize(("wrong", "error", "fragments"), WRITES)
def test_wrong_steps_are_named(wrong: dict[str, Any], error: type[Exception], fragments: list[str]) -> None:
    check(error, fragments, write_kv_cache, write_arguments() | wrong)


@pytest.mark.damaged
@pytest.mark.parametrize("head_dim", [12, 96])
def test_a_rotation_needs_a_power_of_two(head_dim: int) -> None:
    rows = torch.zeros(5, 2, head_dim)
    arguments = (
        write_arguments() | cache(width=head_dim) | q(head_dim) | {"k": rows, "v": rows, "rotate": True}
    )
    check(ValueError, [f"head_dim of {head_dim}", "a power of two"], write_kv_cache, arguments)


@pytest.mark.damaged
def test_an_embedding_needs_an_even_width() -> None:
    rows = torch.zeros(5, 2, 7)
    arguments = write_arguments() | cache(width=7) | {"k": rows, "v": rows} | ROPE
    check(ValueError, ["k has shape (5, 2, 7)", "even D"], write_kv_cache, arguments)


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"kv_dtype": torch.int16}, TypeError, "kv_dtype is torch.int16, expected one of"),
        ({"kv_dtype": I8, "kv_scales": "tensor"}, ValueError, "kv_scales is 'tensor', expected 'token'"),
        (
            {"kv_scales": "token"},
            ValueError,
            "kv_scales is 'token', expected 'none' for a cache of torch.float32",
        ),
        (
            {"kv_dtype": F8, "kv_scales": "none"},
            ValueError,
            "kv_scales is 'none', expected 'token' or 'tensor'",
        ),
    ],
)
def test_wrong_plans_are_named(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    sizes = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 4, "dtype": torch.float32}
    with pytest.raises(error, match=says):
        plan_paged_attention(torch.ones(2, dtype=torch.int32), **(sizes | changes))


def test_the_good_arguments_are_good() -> None:
    for kind, width, shape in (
        (torch.float32, 8, None),
        (F8, 8, (1,)),
        (F8, 8, TOKEN),
        (I8, 8, TOKEN),
        (U8, 4, TOKEN),
    ):
        stored = cache(kind, width) | ({} if shape is None else scales(*shape))
        assert cache_head_dim(stored["k_cache"]) == 8
        assert write_kv_cache(**(write_arguments() | stored)) is None
        assert write_kv_cache(**(write_arguments() | stored | q() | ROPE | NORMS)).shape == (5, 4, 8)
        assert write_kv_cache(**(write_arguments() | stored | q() | {"rotate": True})).shape == (5, 4, 8)
        assert paged_attention_decode(**(attention_arguments() | stored)).shape == (2, 4, 8)


@pytest.mark.damaged
@pytest.mark.parametrize("name", ["q", "q_norm", "cos_sin", "k_scale"])
def test_a_wanted_gradient_is_an_error(name: str) -> None:
    arguments = write_arguments() | cache(I8) | scales(*TOKEN) | q() | ROPE | NORMS
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"write_kv_cache has no gradient and {name} requires one"):
        write_kv_cache(**arguments)
