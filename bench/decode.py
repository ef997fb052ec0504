"""Time per output token: the engine's own step with a full batch, from the scheduler to the sampled token.

No prompt is computed: every request brings random KV for its context (`DecodeEngine.submit_kv`), so a long
context costs its reading and nothing else. What is timed is the wall clock of `DecodeEngine.step`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from qsun.checkpoint.reader import open_checkpoint
from qsun.core import DecodeAttention, ForwardContext, SamplingParams
from qsun.engine.engine import DecodeEngine
from qsun.engine.options import EngineOptions
from qsun.kv_cache.tensors import KVCache
from qsun.layers.linear import QuantLinear
from qsun.models.build import Placement
from qsun.models.config import ModelConfig
from qsun.models.weights import PROJECTIONS, projection_shape
from qsun.modules.decode import DecodeModule, load_decode_module
from qsun.modules.quantize import DENSE_BITS, default_group_size
from qsun_bench.cases import generator
from qsun_bench.gate import Verdict, judge
from qsun_bench.random_model import model_config, random_decode_module
from qsun_bench.random_weights import weight_bytes
from qsun_bench.results import Record
from qsun_bench.shapes import ModelShape, shape
from qsun_kernels import use_backend
from qsun_kernels.backends.problems import BackendName
from qsun_kernels.quant import Bits, GroupSize, QuantSpec
from qsun_kernels.testing.timing import time_steps

NAME = "decode"
BASELINE = "dense"

_WARM_UP = 3
_GATE_LAYERS = 2
_GATE_CONTEXT = 40
_BLOCK_SIZE = 16
_MODEL = "random KV"


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for; empty and None mean the default for the device.

    shape: a model of random weights; model: a checkpoint instead. layers: only so many of the shape's.
    bits: 16 keeps dense weights. tokens: steps that are timed.
    """

    device: torch.device
    shape: str | None = None
    model: Path | None = None
    layers: int | None = None
    batches: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    tokens: int = 24
    bits: int = 4
    group_size: GroupSize | None = None
    symmetric: bool = True
    dtype: torch.dtype = torch.bfloat16
    backend: BackendName | None = None
    smoke: bool = False


def decode_records(request: Request) -> Iterator[tuple[Record | None, str]]:
    """(record, "") for every batch and context, of the quantised module and of a dense one of the same shape.

    (None, why) where memory does not hold one. A checkpoint is timed as it was asked for only.
    Raises ValueError for more layers than the shape has, BackendUnavailable for a backend that cannot, and
    whatever loading a checkpoint raises.
    """
    plan = _plan(request)
    kinds = (request.bits,) if request.model is not None else (request.bits, DENSE_BITS)
    for bits in dict.fromkeys(kinds):
        yield from _records_of(replace(request, bits=bits), plan)
        if request.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class _Plan:
    """batches, contexts, tokens: what is run. longest: positions that the longest request comes to."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: int

    @property
    def longest(self) -> int:
        return max(self.contexts) + self.max_tokens

    @property
    def max_tokens(self) -> int:
        """Tokens of a request: those that are timed, and enough to start all the others before."""
        return self.tokens + _WARM_UP + 32


def _plan(request: Request) -> _Plan:
    at_scale = request.device.type == "cuda" and not request.smoke
    return _Plan(
        batches=request.batches or ((1, 8, 32, 64, 128) if at_scale else (1, 8)),
        contexts=request.contexts or ((1024,) if at_scale else (256,)),
        tokens=4 if request.smoke else request.tokens,
    )


@dataclass(frozen=True, slots=True)
class _Contender:
    """name: of the records. label: of the model. of_layers: layers of the whole model."""

    name: str
    label: str
    of_layers: int
    module: DecodeModule


def _records_of(request: Request, plan: _Plan) -> Iterator[tuple[Record | None, str]]:
    label, of_layers, config, spec = _describe(request, plan)
    weights = step_weight_bytes(config, spec, request.dtype)
    room = _room(request.device)
    # Random weights and KV are drawn on the device, KV once beside the cache.
    if request.model is None and weights > room:
        yield None, f"{label} with {request.bits} bits takes {weights} bytes, {room} are free"
        return
    module = _module(request, config, spec)
    contender = _Contender(_backend_name(module, request), label, of_layers, module)
    verdict = _gate(request, module)
    for context in plan.contexts:
        for batch in plan.batches:
            kv = 2 * batch * kv_bytes(module, context + plan.max_tokens)
            if kv > _room(request.device):
                yield None, f"{label}: the KV of {batch} x {context} tokens does not fit beside the weights"
                continue
            us = None
            if verdict.ok:
                us = round(_time_per_token(request, plan, module, batch, context), 1)
            yield _record(request, plan, contender, verdict, batch, context, us), verdict.reason


def _describe(request: Request, plan: _Plan) -> tuple[str, int, ModelConfig, QuantSpec | None]:
    """(label, layers of the whole model, configuration, quantisation) of what is to be timed."""
    if request.model is not None:
        reader = open_checkpoint(request.model)
        try:
            config = reader.config
            stored = None if reader.quantization is None else reader.quantization.spec
        finally:
            reader.close()
        return request.model.stem, config.num_layers, config, stored or _spec(request, config)
    sizes, layers = sizes_and_layers(request)
    config = model_config(sizes, layers, plan.longest)
    return sizes.name, sizes.layers, config, _spec(request, config)


def sizes_and_layers(request: Request) -> tuple[ModelShape, int]:
    """The shape, and how many of its layers are made. Raises ValueError when it has fewer."""
    default = "llama-3.1-8b" if request.device.type == "cuda" and not request.smoke else "smollm2-135m"
    sizes = shape(request.shape or default)
    layers = request.layers or (2 if request.smoke else sizes.layers)
    if layers > sizes.layers:
        raise ValueError(f"layers is {layers}, expected at most {sizes.layers}, those of {sizes.name}")
    return sizes, layers


def _spec(request: Request, config: ModelConfig) -> QuantSpec | None:
    if request.bits == DENSE_BITS:
        return None
    group = request.group_size or default_group_size(config)
    return QuantSpec(cast(Bits, request.bits), group, request.symmetric)


def _module(request: Request, config: ModelConfig, spec: QuantSpec | None) -> DecodeModule:
    if request.model is None:
        return random_decode_module(
            config, spec, Placement(request.dtype, request.device, request.backend), request.dtype
        )
    return load_decode_module(
        request.model,
        bits=request.bits,
        group_size=request.group_size,
        symmetric=request.symmetric,
        dtype=request.dtype,
        device=request.device,
        backend=request.backend,
    )


def _room(device: torch.device) -> int:
    """Bytes that are free for weights and KV, with a tenth left for the step itself."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.9)


def _backend_name(module: DecodeModule, request: Request) -> str:
    """The backend of the matrix products, which are nearly all of a step; dense without quantisation."""
    linear = module.stack.layers[0].mlp.down
    return linear.weight.backend if isinstance(linear, QuantLinear) else BASELINE


def step_weight_bytes(config: ModelConfig, spec: QuantSpec | None, dtype: torch.dtype) -> int:
    """Algorithmic bytes of the weights that one step reads: every projection, the norms and the lm_head."""
    projections = [projection_shape(config, name) for name in PROJECTIONS]
    layer = sum(weight_bytes(N, K, spec, dtype) for N, K in projections)
    norms = (2 * config.num_layers + 1) * config.hidden_size * dtype.itemsize
    return config.num_layers * layer + norms + config.vocab_size * config.hidden_size * dtype.itemsize


def kv_bytes(module: DecodeModule, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, all layers, in the module's dtype."""
    return tokens * KVCache.block_bytes(module.config, 1, module.dtype)


def _gate(request: Request, module: DecodeModule) -> Verdict:
    """One step of the first layers of this shape, with random weights, against the same step in float32.

    The same operators on the same sizes, so a wrong kernel shows; torch's backend in the dtype of the run
    says what may be lost to that dtype.
    """
    full = module.config
    layers = min(_GATE_LAYERS, full.num_layers)
    config = replace(
        full,
        num_layers=layers,
        windows=full.windows[:layers],
        vocab_size=min(full.vocab_size, 1024),
        max_position_embeddings=_GATE_CONTEXT,
        bos_token_id=None,
        eos_token_ids=(),
    )
    spec = module.quantization

    def step(dtype: torch.dtype, backend: BackendName | None) -> Tensor:
        placement = Placement(dtype, request.device, backend)
        made = random_decode_module(config, spec, placement, request.dtype)
        with nullcontext() if backend is None else use_backend(backend):
            return _one_step(made, request.dtype)

    got = step(request.dtype, request.backend)
    exact, plain = step(torch.float32, "torch").double(), step(request.dtype, "torch")
    return judge("a decode step", got, exact=exact, plain=plain)


@torch.inference_mode()
def _one_step(module: DecodeModule, kv_precision: torch.dtype) -> Tensor:
    """Logits float32 (3, V) of three requests with 1, 17 and all positions of random KV."""
    lengths = (1, 17, _GATE_CONTEXT)
    blocks = -(-_GATE_CONTEXT // _BLOCK_SIZE)
    device = module.device
    cache = KVCache.allocate(module.config, blocks * len(lengths), _BLOCK_SIZE, module.dtype, device)
    source = generator(device, "gate")
    for keys, values in cache.layers:
        for part in (keys, values):
            part.copy_(torch.randn(part.shape, generator=source, device=device).to(kv_precision))
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    table = torch.arange(blocks * len(lengths), dtype=torch.int32, device=device).view(len(lengths), blocks)
    positions = seq_lens.long() - 1
    slots = table.gather(1, (positions // _BLOCK_SIZE)[:, None])[:, 0].long() * _BLOCK_SIZE
    ctx = ForwardContext(positions, slots + positions % _BLOCK_SIZE, DecodeAttention(table, seq_lens))
    tokens = torch.tensor([1, 2, 3], device=device)
    return module.logits(module.stack.forward(module.embed(tokens), ctx, cache))


def _time_per_token(request: Request, plan: _Plan, module: DecodeModule, batch: int, context: int) -> float:
    """Median microseconds of an engine step in which every one of `batch` requests gets a token."""
    blocks = batch * (-(-(context + plan.max_tokens) // _BLOCK_SIZE) + 1)
    options = EngineOptions(
        max_batch_size=batch,
        max_model_len=context + plan.max_tokens,
        block_size=_BLOCK_SIZE,
        memory=blocks * KVCache.block_bytes(module.config, _BLOCK_SIZE, module.dtype),
        swap_memory=0,
        backend=request.backend,
        prefix_reuse=False,
    )
    engine = DecodeEngine(module, None, options)
    engine.add_remote_model(_MODEL, fingerprint=_MODEL)
    _submit(engine, plan, batch, context)
    started = 0
    while started < batch:
        # Requests enter as the scheduler lets them; each gets its first tokens here, before the clock runs.
        started = len(engine.step())

    def step() -> None:
        outputs = engine.step()
        told = sum(len(output.token_ids) for output in outputs)
        if told != batch:
            raise RuntimeError(f"a step gave {told} tokens, expected one for each of {batch} requests")

    return time_steps(step, device=request.device, count=plan.tokens, warm_up=_WARM_UP).us


def _submit(engine: DecodeEngine, plan: _Plan, batch: int, context: int) -> None:
    """`batch` requests of `context` prompt tokens whose KV is random and given."""
    module = engine.decode_module
    config = module.config
    source = generator(module.device, "kv", context)
    shape_ = (config.num_layers, context - 1, config.num_kv_heads, config.head_dim)
    keys, values = (
        torch.empty(shape_, dtype=module.dtype, device=module.device).normal_(generator=source)
        for _ in range(2)
    )
    prompt = torch.randint(config.vocab_size, (context,), generator=source, device=module.device).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=plan.max_tokens, ignore_eos=True)
    for _ in range(batch):
        engine.submit_kv(prompt, keys, values, prompt[-1], model=_MODEL, fingerprint=_MODEL, params=params)


def _record(
    request: Request,
    plan: _Plan,
    contender: _Contender,
    verdict: Verdict,
    batch: int,
    context: int,
    us: float | None,
) -> Record:
    module = contender.module
    spec = module.quantization
    # Contexts grow while they are timed: the bytes are those of the middle step.
    positions = context + _WARM_UP + plan.tokens // 2
    size = step_weight_bytes(module.config, spec, request.dtype) + batch * kv_bytes(module, positions)
    name = str(request.dtype).removeprefix("torch.")
    layers = module.config.num_layers
    return Record(
        op=NAME,
        case=f"{contender.label}.L{layers}.b{batch}.c{context}",
        backend=contender.name,
        us=us,
        bytes=size,
        error=verdict.error,
        ok=verdict.ok,
        fields={
            "model": contender.label,
            "layers": layers,
            "of_layers": contender.of_layers,
            "batch": batch,
            "context": context,
            "bits": DENSE_BITS if spec is None else spec.bits,
            "group_size": None if spec is None else spec.group_size,
            "symmetric": None if spec is None else spec.symmetric,
            "dtype": name,
            "kv_dtype": name,
            "block_size": _BLOCK_SIZE,
        },
    )
