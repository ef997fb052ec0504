"""What an engine would say of itself: which backend runs each operator, and where the memory goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qsun.engine.options import EngineOptions, kv_format_of
from qsun.kv_cache.format import KVFormat
from qsun.layers.linear import DenseLinear, Linear, QuantLinear, SplitLinear
from qsun.layers.mlp import GateUpSilu
from qsun_kernels import explain
from qsun_kernels.backends.dispatch import requested_backend, select
from qsun_kernels.backends.problems import (
    BackendName,
    PagedAttentionDecodeProblem,
    Problem,
    RmsNormProblem,
    SampleTokensProblem,
    SiluAndMulProblem,
    WriteKvCacheProblem,
)

if TYPE_CHECKING:
    from qsun.engine.registry import Registry
    from qsun.engine.workspace import Workspace
    from qsun.models.decoder import DecoderStack
    from qsun.modules.decode import DecodeModule

__all__ = ["explain_engine", "operator_problems", "require_operators"]


def operator_problems(decode: DecodeModule, block_size: int, kv_format: KVFormat) -> tuple[Problem, ...]:
    """What a decode step asks of the operators, beside the linear layers, each problem once."""
    config, dtype, device = decode.config, decode.dtype, decode.device
    q_heads, kv_heads, head_dim = config.num_q_heads, config.num_kv_heads, config.head_dim
    windows = sorted(set(config.windows), key=lambda window: (window is not None, window or 0))
    problems: list[Problem] = [
        PagedAttentionDecodeProblem(
            *(q_heads, kv_heads, head_dim, block_size, window, dtype, kv_format.dtype, device),
            kv_scales=kv_format.scales,
        )
        for window in windows
    ]
    problems += [
        WriteKvCacheProblem(
            *(kv_heads, head_dim, block_size, dtype, kv_format.dtype, device),
            kv_scales=kv_format.scales,
            num_q_heads=q_heads,
            norm=config.qk_norm,
            rope=True,
            rotate=kv_format.rotates,
        ),
        RmsNormProblem(config.hidden_size, False, dtype, device),
        RmsNormProblem(config.hidden_size, True, dtype, device),
        SiluAndMulProblem(config.intermediate_size, dtype, device),
        SampleTokensProblem(config.vocab_size, dtype, device),
    ]
    return tuple(problems)


def require_operators(
    decode: DecodeModule, block_size: int, kv_format: KVFormat, backend: BackendName | None
) -> None:
    """Raise BackendUnavailable, with the reason, for an operator that no allowed backend can run.

    Asked when the cache is made, so that it is never found out in the middle of an answer.
    """
    for problem in operator_problems(decode, block_size, kv_format):
        select(problem, requested_backend(backend))


def explain_engine(
    decode: DecodeModule,
    options: EngineOptions,
    workspace: Workspace | None,
    registry: Registry,
    has_tokenizer: bool,
) -> str:
    """Backends, models, memory plan and how the decode step is run.

    workspace: None before the first request.
    """
    kv_format = kv_format_of(options.kv_cache_dtype, decode.dtype, decode.config.head_dim)
    lines = [_describe_decode(decode, options.block_size, kv_format, options.backend)]
    lines += [f"model {model}" for model in registry] or ["no model yet: add_model"]
    lines += [f"notice: {notice}" for notice in registry.notices]
    if not has_tokenizer:
        lines.append("no tokenizer: prompts have to be token ids")
    if workspace is None:
        lines.append("memory: the cache is made with the first request")
    else:
        lines.append(
            f"memory: {workspace.plan}; KV as {kv_format}; max_model_len {workspace.limits.max_model_len}"
        )
        ahead = (
            "launched ahead of the host" if workspace.overlap else "collected by the call that launched it"
        )
        lines.append(f"decode step: {workspace.runner.graph_status}; {ahead}")
    return "\n".join(lines)


def _describe_decode(
    decode: DecodeModule, block_size: int, kv_format: KVFormat, backend: BackendName | None
) -> str:
    """Model, linear layers and operators, a line or more each."""
    config = decode.config
    spec = decode.quantization
    weights = "16- or 32-bit weights"
    if spec is not None:
        symmetry = "symmetric" if spec.symmetric else "with zero points"
        weights = f"{spec.bits}-bit weights, group {spec.group_size}, {symmetry}"
    lines = [
        f"decode module: {config.architecture}, {config.num_layers} layers, hidden {config.hidden_size},"
        f" {config.num_q_heads}/{config.num_kv_heads} heads of {config.head_dim}, {decode.dtype},"
        f" {decode.device}; {weights}",
        *sorted(set(_linear_lines(decode.stack))),
        *_describe_linear(
            f"lm_head, {decode.lm_head_bits} bits" if isinstance(decode.head, QuantLinear) else "lm_head",
            decode.head,
        ),
        explain(operator_problems(decode, block_size, kv_format), backend=backend),
    ]
    return "\n".join(lines)


def _linear_lines(stack: DecoderStack) -> Iterator[str]:
    for layer in stack.layers:
        attention, mlp = layer.attention, layer.mlp
        for name, linear in (
            ("qkv", attention.qkv),
            ("o", attention.o),
            ("down", mlp.down),
        ):
            yield from _describe_linear(name, linear)
        if isinstance(mlp.gate_up, GateUpSilu):
            weight = mlp.gate_up.weight
            yield f"gate_up_silu  (N={weight.N} K={weight.K})  {weight.backend}, layout {weight.layout}"
        else:
            yield from _describe_linear("gate_up", mlp.gate_up)


def _describe_linear(name: str, linear: Linear) -> Iterator[str]:
    shape = f"{name}  (N={linear.N} K={linear.K})"
    if isinstance(linear, SplitLinear):
        for part in linear.parts:
            yield from _describe_linear(f"{name}, a part of it,", part)
    elif isinstance(linear, QuantLinear):
        yield f"{shape}  {linear.weight.backend}, layout {linear.weight.layout}"
    else:
        assert isinstance(linear, DenseLinear)
        yield f"{shape}  torch, dense {linear.weight.dtype}"
