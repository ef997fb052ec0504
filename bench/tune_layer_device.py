"""What `qsun-bench tune wna16 --backend cuda --chain` times: layers as the decode step launches them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qsun_bench import tune_chain
from qsun_bench.cases import generator
from qsun_bench.shapes import SHAPES
from qsun_bench.tune_chain import CONTEXT, MODEL, PRODUCTS, Chain
from qsun_bench.tune_panels import LOAD_MS
from qsun_bench.tune_panels_device import DTYPE, Row, config, weight_copies
from qsun_kernels import AttentionPlan, paged_attention_decode, plan_paged_attention, write_kv_cache
from qsun_kernels.backends.cuda import library, linear
from qsun_kernels.backends.problems import (
    MAX_PENDING_ROWS,
    LinearOperator,
    PendingNorm,
    PendingSums,
    PreparedWeight,
)
from qsun_kernels.testing.timing import copies_to_overflow

_BLOCK_SIZE = 16
_EPS = 1e-5
_READERS = {"o": "gate_up", "down": "qkv"}  # of the norms behind products
_ROW_US, _WARM_MS, _TIMED_MS = 2000.0, 5.0, 20.0

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step's batch: M rows of CONTEXT tokens, the last of which is written."""

    block_table: Tensor
    seq_lens: Tensor
    positions: Tensor
    slots: Tensor
    plan: AttentionPlan
    caches: Sequence[tuple[Tensor, Tensor]]  # keys and values, a pair for each layer


class LayerTrials:
    """As many layers as overflow the cache: attention, norms and the write to the KV lie between products."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._shape = device, SHAPES[MODEL]
        cells = {product: tune_chain.cell(product, 1) for product in PRODUCTS}
        self._layers = copies_to_overflow(sum(cell.K * cell.N // 2 for cell in cells.values()), device)
        self._sm_count = library.device_props(device.index or 0).sm_count
        self._weights: dict[str, Sequence[PreparedWeight]] = {}
        for product, cell in cells.items():
            operator: LinearOperator = "wna16_gate_up_silu" if product == "gate_up" else "wna16_linear"
            self._weights[product] = weight_copies(cell, operator, self._layers, device)
        source = generator(device, "layer")
        hidden, head_dim = self._shape.hidden, self._shape.head_dim
        self._norms = [torch.ones(hidden, dtype=DTYPE, device=device) for _ in range(self._layers)]
        self._angles = torch.randn(CONTEXT, head_dim, device=device, generator=source)
        self._stream = torch.randn(
            max(tune_chain.TOKENS), hidden, device=device, generator=source, dtype=torch.float32
        ).to(DTYPE)
        self._steps: dict[int, _Step] = {}
        self._is_loaded = False
        torch.cuda.synchronize(device)

    def time(self, M: int, chain: Chain) -> float:
        """Microseconds a layer. A product that `chain` leaves out is not launched."""
        row = Row(self._calls(M, chain), _ROW_US)
        if not self._is_loaded:
            row.run(LOAD_MS)
            self._is_loaded = True
        row.run(_WARM_MS)
        return row.run(_TIMED_MS) * row.calls / self._layers

    def _step(self, M: int) -> _Step:
        if M not in self._steps:
            self._steps.clear()  # of another M: caches are large
            blocks = CONTEXT // _BLOCK_SIZE
            table = torch.arange(M * blocks, dtype=torch.int32, device=self._device).view(M, blocks)
            lengths = torch.full((M,), CONTEXT, dtype=torch.int32, device=self._device)
            shape = M * blocks, self._shape.kv_heads, _BLOCK_SIZE, self._shape.head_dim
            plan = plan_paged_attention(
                lengths,
                num_q_heads=self._shape.q_heads,
                num_kv_heads=self._shape.kv_heads,
                head_dim=self._shape.head_dim,
                block_size=_BLOCK_SIZE,
                dtype=DTYPE,
                kv_dtype=DTYPE,
                backend="cuda",
            )
            self._steps[M] = _Step(
                table,
                lengths,
                (lengths - 1).long(),
                table[:, -1].long() * _BLOCK_SIZE + _BLOCK_SIZE - 1,
                plan,
                [
                    (
                        torch.randn(shape, dtype=DTYPE, device=self._device),
                        torch.randn(shape, dtype=DTYPE, device=self._device),
                    )
                    for _ in range(self._layers)
                ],
            )
            torch.cuda.synchronize(self._device)
        return self._steps[M]

    def _calls(self, M: int, chain: Chain) -> Sequence[Call]:
        shape, cells = self._shape, {product: tune_chain.cell(product, M) for product in PRODUCTS}
        told = {
            product: config(kernel, cells[product], way, self._sm_count)
            for product, (kernel, way) in chain.items()
        }

        def rows(width: int) -> Tensor:
            return torch.zeros(M, width, dtype=DTYPE, device=self._device)

        stream, middle, end = self._stream[:M], rows(shape.hidden), rows(shape.hidden)
        normed, qkv, attended = stream.clone(), rows(cells["qkv"].N), rows(cells["o"].K)
        activated = rows(cells["down"].K)
        # As the engine has it: a norm is left to its reader where both are streamed, and sums to the write.
        pending = PendingNorm(normed, torch.ones(M, shape.hidden // 16, device=self._device), _EPS)
        streamed = {product for product, how in told.items() if isinstance(how, library.binding.StreamConfig)}
        leaves = {
            product: M <= MAX_PENDING_ROWS and {product, reader} <= streamed
            for product, reader in _READERS.items()
        }
        sums = None if "qkv" not in told else self._sums(M, cells["qkv"].N, told["qkv"])
        projected = qkv if sums is None else PendingSums(sums, DTYPE)
        products: Mapping[str, tuple[Tensor | PendingNorm, Tensor | None, Tensor | None]] = {
            "qkv": (pending if leaves["down"] else normed, None, qkv if sums is None else None),
            "o": (attended, stream, middle),
            "gate_up": (pending if leaves["o"] else normed, None, activated),
            "down": (activated, middle, end),
        }

        def call_of(product: str, layer: int) -> Call:
            x, residual, out = products[product]
            weight, how = self._weights[product][layer], told[product]
            norm = None
            if residual is not None:
                squares = pending.squares if leaves[product] else None
                norm = linear.Norm(self._norms[layer], _EPS, normed, squares)
            left = sums if product == "qkv" else None
            return lambda: linear.launch_panels(x, weight, None, residual, out, False, how, norm, left)

        calls: list[Call] = []
        for layer in range(self._layers):
            for product in PRODUCTS:
                if product in told:
                    calls.append(call_of(product, layer))
                if product == "qkv":
                    calls.append(partial(self._attend, self._step(M), layer, projected, attended))
        return calls

    def _sums(self, M: int, N: int, how: object) -> Tensor | None:
        """Memory for what a split product leaves; its N needs no padding."""
        if not isinstance(how, library.binding.GemmConfig) or how.adds_in_cluster or how.split_k == 1:
            return None
        return torch.zeros(how.split_k, M, N, device=self._device)

    def _heads(self, qkv: Tensor | PendingSums) -> Sequence[Tensor | PendingSums]:
        """Queries, keys and values."""
        heads = [self._shape.q_heads, self._shape.kv_heads, self._shape.kv_heads]
        if isinstance(qkv, PendingSums):
            return qkv.heads(heads, self._shape.head_dim)
        rows: Sequence[Tensor] = qkv.view(len(qkv), sum(heads), self._shape.head_dim).split(heads, dim=1)
        return rows

    def _attend(self, step: _Step, layer: int, qkv: Tensor | PendingSums, attended: Tensor) -> None:
        shape, (keys, values) = self._shape, step.caches[layer]
        q, k, v = self._heads(qkv)
        q = write_kv_cache(
            k,
            v,
            keys,
            values,
            step.slots,
            q=q,
            positions=step.positions,
            cos_sin=self._angles,
            settled=True,
            backend="cuda",
        )
        paged_attention_decode(
            q,
            keys,
            values,
            step.block_table,
            step.seq_lens,
            softmax_scale=shape.head_dim**-0.5,
            plan=step.plan,
            out=attended.view(len(attended), shape.q_heads, shape.head_dim),
            follows_write=True,
            backend="cuda",
        )
