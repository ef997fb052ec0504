"""torch.ops.qsun.*: schema, fake tensors, torch.compile, tracing, and that no gradient is dropped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.optests.generate_tests import ALL_TEST_UTILS

from qsun_kernels import (
    PackedWeight,
    PreparedWeight,
    QuantSpec,
    RopeParameters,
    apply_rope,
    dequantize,
    paged_attention_decode,
    prepare_gate_up,
    prepare_weight,
    rms_norm,
    rope_cache,
    sample_tokens,
    silu_and_mul,
    use_backend,
    wna16_gate_up_silu,
    wna16_linear,
    wna16_linear_rms_norm,
    write_kv_cache,
)
from qsun_kernels.ops.library import LIBRARY, is_traced
from qsun_kernels.testing import inputs
from qsun_kernels.testing.kv_codes import KV_KINDS, KvKind
from qsun_kernels.testing.kv_writes import KvWrite, kv_write


def weights(
    dtype: torch.dtype, device: torch.device, spec: QuantSpec | None = None
) -> tuple[PackedWeight, PreparedWeight]:
    spec = QuantSpec(4, 32, True) if spec is None else spec
    packed = inputs.packed_weight(inputs.generator(0), 16, 64, spec, scale_dtype=dtype, device=device)
    return packed, prepare_weight(packed, dtype=dtype, backend="torch")


def sampling_arguments(device: torch.device) -> tuple[Tensor, ...]:
    """What `sample_tokens` takes beside three rows of logits."""
    settings = ([0.0, 1.0, 0.7], [0, 5, 0], [1.0, 0.9, 0.5], [0.0, 0.0, 0.1])
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    columns = [
        torch.tensor(one, dtype=dtype, device=device) for one, dtype in zip(settings, dtypes, strict=True)
    ]
    return (*columns, torch.tensor([3, 4, 5], device=device))


def operator_arguments(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Arguments of the registered operator, in the order of its schema."""
    source = inputs.generator(1)
    x = inputs.normal(source, (3, 64), dtype, device)
    weight = inputs.normal(source, (64,), dtype, device)
    case = inputs.paged_attention_inputs(
        source,
        [0, 5, 33],
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=8,
        block_size=4,
        dtype=dtype,
        device=device,
    )
    # opcheck compares by value, so the caches hold no NaN here.
    k_cache, v_cache = case.k_cache.nan_to_num(), case.v_cache.nan_to_num()
    q, k, v = inputs.qkv_views(source, 3, 4, 2, 8, dtype, device)
    positions, slots = (torch.tensor(p, device=device) for p in ([1, 2, 3], [0, -1, 7]))
    cos_sin = rope_cache(RopeParameters(10000.0), 8, 50, device)
    packed, prepared = weights(dtype, device, QuantSpec(3, "channel", False))
    gate_up = prepare_gate_up(packed, dtype=dtype, backend="torch")
    arguments: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, weight, 1e-6),
        "rms_norm_residual": (x, x.clone(), weight, 1e-6),
        "silu_and_mul": (x,),
        "apply_rope": (q, k, positions, cos_sin),
        "write_kv_cache": (k, v, k_cache, v_cache, slots),
        "write_kv_cache_with_q": (k, v, k_cache, v_cache, slots, q, positions, cos_sin),
        "paged_attention_decode": (case.q, k_cache, v_cache, case.block_table, case.seq_lens, 0.3, 7),
        "dequantize": (packed.qweight, packed.scales, packed.qzeros, None, 3, -1, False, 64, dtype),
        "wna16_linear": (
            x,
            list(prepared.tensors),
            prepared.layout,
            3,
            -1,
            False,
            16,
            64,
            weight[:16],
            None,
            True,
        ),
        "wna16_linear_rms_norm": (
            *(x, list(prepared.tensors), prepared.layout, 3, -1, False, 16, 64),
            *(x[:, :16], weight[:16], 1e-5, weight[16:32], True),
        ),
        "wna16_gate_up_silu": (x, list(gate_up.tensors), gate_up.layout, 3, -1, False, 16, 64),
        "sample_tokens": (x, *sampling_arguments(device)),
    }
    return arguments[name]


NAMES = (
    "rms_norm",
    "rms_norm_residual",
    "silu_and_mul",
    "apply_rope",
    "write_kv_cache",
    "write_kv_cache_with_q",
    "paged_attention_decode",
    "dequantize",
    "wna16_linear",
    "wna16_linear_rms_norm",
    "wna16_gate_up_silu",
    "sample_tokens",
)


def test_every_registered_operator_is_checked_here() -> None:
    assert {name.partition("::")[2] for name in LIBRARY._op_defs} == set(NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """torch's own check of schema, aliasing, fake tensors and functionalisation."""
    torch.library.opcheck(getattr(torch.ops.qsun, name).default, operator_arguments(name, dtype, device))


@pytest.mark.parametrize("plan", [None, [], [torch.zeros(2)]], ids=["no plan", "empty", "planned"])
def test_opcheck_of_attention_with_all_of_it(plan: list[Tensor] | None) -> None:
    """Several tokens a request, a softcap, sinks, and a plan as a list of tensors."""
    q, *middle, _ = operator_arguments("paged_attention_decode", torch.float32, torch.device("cpu"))
    arguments = (torch.cat((q, q)), *middle, None, 2.0, torch.arange(4.0), plan)
    torch.library.opcheck(torch.ops.qsun.paged_attention_decode.default, arguments)


@pytest.mark.parametrize("kind", KV_KINDS)
def test_opcheck_of_caches_of_codes(kind: KvKind) -> None:
    call = kv_write(
        inputs.generator(1), 3, dtype=torch.float32, kv=kind, heads=(4, 2), head_dim=8, block_size=2
    )
    k_cache, v_cache, k_scale, v_scale = (
        # opcheck compares by value, so the caches hold no NaN here.
        torch.zeros_like(t)
        for t in (call.before.k_cache, call.before.v_cache, *scales_of(call))
    )
    if kind == "fp8-tensor":
        k_scale, v_scale = k_scale + 0.01, v_scale + 0.01
    head = (call.k, call.v, k_cache, v_cache, call.slot_mapping)
    steps = (call.positions, call.cos_sin, call.k_norm, 1e-6, False, k_scale, v_scale)
    # The check of the schema hashes its arguments with arithmetic that torch lacks for float8.
    checks = [name for name in ALL_TEST_UTILS if not kind.startswith("fp8") or name != "test_schema"]
    check = partial(torch.library.opcheck, test_utils=checks)
    check(torch.ops.qsun.write_kv_cache.default, (*head, *steps))
    steps = (call.positions, call.cos_sin, call.q_norm, call.k_norm, 1e-6, True, k_scale, v_scale)
    check(torch.ops.qsun.write_kv_cache_with_q.default, (*head, call.q, *steps))
    table, lengths = (
        torch.tensor([[0, 1], [1, 2]], dtype=torch.int32),
        torch.tensor([3, 2], dtype=torch.int32),
    )
    attention = (call.q[:2], k_cache, v_cache, table, lengths, 0.3, None, None, None, None, k_scale, v_scale)
    check(torch.ops.qsun.paged_attention_decode.default, attention)


def scales_of(call: KvWrite) -> tuple[Tensor, Tensor]:
    assert call.before.k_scale is not None and call.before.v_scale is not None
    return call.before.k_scale, call.before.v_scale


def test_a_compiled_write_is_the_write() -> None:
    call = kv_write(inputs.generator(2), 5, dtype=torch.bfloat16, kv="int4")

    def write(k: Tensor, v: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, *scales: Tensor) -> Tensor:
        return write_kv_cache(
            *(k, v, k_cache, v_cache, call.slot_mapping),
            **{"q": q, "positions": call.positions, "cos_sin": call.cos_sin, "q_norm": call.q_norm},
            **{"k_norm": call.k_norm, "rotate": True, "k_scale": scales[0], "v_scale": scales[1]},
        )

    expected = call.run()
    stored = [t.clone() for t in (call.before.k_cache, call.before.v_cache, *scales_of(call))]
    got = torch.compile(write, backend="aot_eager", fullgraph=True)(call.k, call.v, call.q, *stored)
    assert expected.q is not None and torch.equal(got, expected.q)
    after = (expected.k_cache, expected.v_cache, expected.k_scale, expected.v_scale)
    assert all(torch.equal(a, b) for a, b in zip(stored, after, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_give_shapes_without_running(name: str) -> None:
    arguments = operator_arguments(name, torch.float16, torch.device("cpu"))
    # The operator changes its caches, so the real run comes after the fake one has seen them.
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        got = getattr(torch.ops.qsun, name)(*fake)
    real = getattr(torch.ops.qsun, name)(*arguments)
    got_tensors, real_tensors = (torch.utils._pytree.tree_leaves(t) for t in (got, real))
    for fake_one, real_one in zip(got_tensors, real_tensors, strict=True):
        if real_one is None:
            assert fake_one is None
            continue
        assert (fake_one.shape, fake_one.dtype) == (real_one.shape, real_one.dtype)
        assert fake_one.stride() == real_one.stride()


def decode_layer(x: Tensor, residual: Tensor, cache: tuple[Tensor, Tensor], layer: dict[str, Any]) -> Tensor:
    """Every operator once, as a model would chain them."""
    normed, residual = rms_norm(x, layer["norm"], eps=1e-6, residual=residual)
    q, k = apply_rope(normed.view(3, 8, 8), residual.view(3, 8, 8), layer["positions"], layer["cos_sin"])
    write_kv_cache(k, k, *cache, layer["slots"])
    attended, lse = paged_attention_decode(
        q, *cache, layer["block_table"], layer["seq_lens"], softmax_scale=0.3, lse=True
    )
    hidden = wna16_linear(attended.view(3, 64), layer["prepared"], layer["bias"], residual[:, :16])
    normed, hidden = wna16_linear_rms_norm(
        attended.view(3, 64), layer["prepared"], hidden, layer["norm"][:16], eps=1e-6, bias=layer["bias"]
    )
    gated = silu_and_mul(normed + rms_norm(hidden, layer["norm"][:16], eps=1e-6, backend="torch"))
    gated = gated + wna16_gate_up_silu(attended.view(3, 64), layer["gate_up"])
    tokens, valid = sample_tokens(gated, *layer["sampling"])
    gated = gated + (tokens * valid)[:, None]
    dense = dequantize(layer["packed"], gated.dtype)
    return gated @ dense[:8, :5] + lse.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_to_one_graph(dtype: torch.dtype, device: torch.device) -> None:
    source = inputs.generator(2)
    packed, prepared = weights(dtype, device)
    layer = {
        "norm": inputs.normal(source, (64,), dtype, device),
        "bias": inputs.normal(source, (16,), dtype, device),
        "positions": torch.tensor([1, 2, 3], device=device),
        "cos_sin": rope_cache(RopeParameters(10000.0), 8, 50, device),
        "slots": torch.tensor([0, 5, 9], device=device),
        "block_table": torch.tensor([[0], [1], [2]], dtype=torch.int32, device=device),
        "seq_lens": torch.tensor([1, 2, 2], dtype=torch.int32, device=device),
        "packed": packed,
        "prepared": prepared,
        "gate_up": prepare_gate_up(packed, dtype=dtype, backend="torch"),
        "sampling": sampling_arguments(device),
    }
    x, residual = (inputs.normal(source, (3, 64), dtype, device) for _ in range(2))
    caches = [torch.ones(3, 8, 4, 8, dtype=dtype, device=device) for _ in range(4)]
    expected = decode_layer(x, residual, (caches[0], caches[1]), layer)
    compiled = torch.compile(decode_layer, backend="aot_eager", fullgraph=True)
    got = compiled(x, residual, (caches[2], caches[3]), layer)
    assert torch.equal(got, expected)
    assert torch.equal(caches[2], caches[0])
    assert not (caches[2] == 1).all()


def test_a_compiled_graph_obeys_the_context_when_it_runs() -> None:
    from qsun_kernels import BackendUnavailable

    compiled = torch.compile(lambda x: silu_and_mul(x), backend="aot_eager", fullgraph=True)
    x = torch.ones(3, 8)
    assert torch.equal(compiled(x), silu_and_mul(x))
    if not torch.cuda.is_available():
        with use_backend("cuda"), pytest.raises(BackendUnavailable, match="silu_and_mul"):
            compiled(x)
    literal = torch.compile(lambda x: silu_and_mul(x, backend="torch"), backend="aot_eager", fullgraph=True)
    with use_backend("cuda"):
        assert torch.equal(literal(x), silu_and_mul(x, backend="torch"))


@pytest.mark.damaged
def test_use_backend_inside_a_compiled_function_is_an_error() -> None:
    def inside(x: Tensor) -> Tensor:
        with use_backend("torch"):
            return silu_and_mul(x)

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"use_backend|Observed exception"):
        torch.compile(inside, backend="aot_eager", fullgraph=True)(torch.ones(3, 8))


def test_tracing_sees_one_operator() -> None:
    x = torch.ones(3, 8)
    for traced in (lambda x: silu_and_mul(x), torch.func.functionalize(lambda x: silu_and_mul(x))):
        graph = make_fx(traced)(x)
        assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
            torch.ops.qsun.silu_and_mul.default
        ]


def test_tracing_keeps_what_the_caller_asked_for() -> None:
    _, prepared = weights(torch.float32, torch.device("cpu"))
    for asked in (False, True):
        graph = make_fx(partial(wna16_linear, weight=prepared, batch_invariant=asked))(torch.ones(3, 64))
        (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
        assert node.target is torch.ops.qsun.wna16_linear.default
        # torch leaves out an argument that is the default.
        assert (node.args[-1] is True) is asked


def test_a_compiled_graph_writes_where_it_was_told() -> None:
    packed, prepared = weights(torch.float32, torch.device("cpu"))
    gate_up = prepare_gate_up(packed, dtype=torch.float32, backend="torch")
    x = inputs.normal(inputs.generator(3), (3, 64), torch.float32)

    def both(x: Tensor, linear_out: Tensor, gated_out: Tensor) -> tuple[Tensor, Tensor]:
        return (
            wna16_linear(x, prepared, out=linear_out, batch_invariant=True),
            wna16_gate_up_silu(x, gate_up, out=gated_out),
        )

    out = torch.full((3, 16), torch.nan), torch.full((3, 8), torch.nan)
    torch.compile(both, backend="aot_eager", fullgraph=True)(x, *out)
    assert torch.equal(out[0], wna16_linear(x, prepared, batch_invariant=True))
    assert torch.equal(out[1], wna16_gate_up_silu(x, gate_up))


def test_compiled_attention_writes_where_it_was_told() -> None:
    q, k_cache, v_cache, table, lengths, _, _ = operator_arguments(
        "paged_attention_decode", torch.float32, torch.device("cpu")
    )

    def attend(q: Tensor, out: Tensor | None) -> Tensor:
        return paged_attention_decode(
            q, k_cache, v_cache, table, lengths, softmax_scale=0.3, softcap=4.0, out=out
        )

    out = torch.full(q.shape, torch.nan)
    got = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, out)
    assert torch.equal(out, attend(q, None)) and torch.equal(got, out)


def test_public_functions_take_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(3, 8))
        y = rms_norm(fake, mode.from_tensor(torch.ones(8)), eps=1e-6)
    assert isinstance(y, torch._subclasses.FakeTensor)
    assert is_traced(fake)
    assert not is_traced(torch.ones(1), None, torch.nn.Parameter(torch.ones(1)))


GRADIENT_CASES: dict[str, Callable[[Tensor], Any]] = {
    "rms_norm x": lambda t: rms_norm(t, torch.ones(8), eps=1e-6),
    "rms_norm weight": lambda t: rms_norm(torch.ones(1, 8), t[0], eps=1e-6),
    "rms_norm residual": lambda t: rms_norm(torch.ones(1, 8), torch.ones(8), eps=1e-6, residual=t),
    "silu_and_mul x": silu_and_mul,
    "sample_tokens logits": lambda t: sample_tokens(t.expand(3, 8), *sampling_arguments(torch.device("cpu"))),
    "sample_tokens temperature": lambda t: sample_tokens(
        torch.ones(3, 8), t[0, :3], *sampling_arguments(torch.device("cpu"))[1:]
    ),
    "apply_rope q": lambda t: apply_rope(
        t.view(1, 1, 8), torch.ones(1, 1, 8), torch.zeros(1, dtype=torch.int64), torch.ones(2, 8)
    ),
    "write_kv_cache k": lambda t: write_kv_cache(
        t.view(1, 1, 8),
        torch.ones(1, 1, 8),
        torch.ones(1, 1, 1, 8),
        torch.ones(1, 1, 1, 8),
        torch.tensor([0]),
    ),
    "paged_attention_decode v_cache": lambda t: paged_attention_decode(
        torch.ones(1, 1, 8),
        torch.ones(1, 1, 1, 8),
        t.view(1, 1, 1, 8),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
        softmax_scale=1.0,
    ),
    "paged_attention_decode sinks": lambda t: paged_attention_decode(
        torch.ones(1, 8, 1),
        *(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
        softmax_scale=1.0,
        sinks=t[0],
    ),
    "wna16_gate_up_silu x": lambda t: wna16_gate_up_silu(
        t.repeat(1, 8),
        prepare_gate_up(weights(torch.float32, torch.device("cpu"))[0], dtype=torch.float32),
    ),
    "wna16_linear_rms_norm norm_weight": lambda t: wna16_linear_rms_norm(
        torch.ones(1, 64),
        weights(torch.float32, torch.device("cpu"))[1],
        torch.ones(1, 16),
        torch.cat((t[0], t[0])),
        eps=1e-6,
    ),
    "wna16_linear residual": lambda t: wna16_linear(
        torch.ones(1, 64), weights(torch.float32, torch.device("cpu"))[1], None, torch.cat((t, t), dim=-1)
    ),
}


@pytest.mark.damaged
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_a_wanted_gradient_is_an_error(case: str) -> None:
    operator, argument = case.split()
    wants = torch.ones(1, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{operator} has no gradient and {argument} requires one"):
        GRADIENT_CASES[case](wants)
    with torch.no_grad():
        GRADIENT_CASES[case](wants)
    with torch.inference_mode():
        GRADIENT_CASES[case](wants)


@pytest.mark.damaged
@pytest.mark.parametrize("name", NAMES)
def test_direct_calls_of_the_operators_refuse_gradients(name: str) -> None:
    arguments = list(operator_arguments(name, torch.float32, torch.device("cpu")))
    position = 1 if name == "dequantize" else 0
    arguments[position] = arguments[position].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} has no gradient and .* requires one"):
        getattr(torch.ops.qsun, name)(*arguments)
    with torch.no_grad():
        getattr(torch.ops.qsun, name)(*arguments)


@pytest.mark.damaged
@pytest.mark.parametrize("name", ["wna16_linear", "wna16_linear_rms_norm", "wna16_gate_up_silu"])
def test_a_layout_of_no_backend_is_named(name: str) -> None:
    arguments = list(operator_arguments(name, torch.float32, torch.device("cpu")))
    arguments[2] = "rocm.rows"
    with pytest.raises(ValueError, match=r"layout is 'rocm.rows', expected one that starts with cuda"):
        getattr(torch.ops.qsun, name)(*arguments)
