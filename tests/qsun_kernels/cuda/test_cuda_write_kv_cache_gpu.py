"""write_kv_cache: the CUDA kernels, on a GPU and through the emulator, against the reference.

Where nothing but quantisation happens, codes and scales are those of the reference bit for bit. After a norm,
an embedding or a rotation sums of another order may round to the neighbouring value or code, and then the
rule of `tolerances` decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from qsun_kernels.backends import cuda
from qsun_kernels.backends.reference import IMPLEMENTATIONS as REFERENCE
from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_write_kv_cache
from qsun_kernels.testing.kv_writes import KvWrite, Written, judge_kv_write
from qsun_kernels.testing.tolerances import all_of, compare_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn
CODES = (("token", FLOAT8), ("tensor", FLOAT8), ("token", torch.int8), ("token", torch.uint8))
MAX_POSITIONS = 40


@dataclass
class Problem:
    """Arguments of a call, on the CPU. norms: (q_norm, k_norm); cos_sin comes with positions."""

    k: torch.Tensor
    v: torch.Tensor
    caches: list[torch.Tensor]  # k_cache, v_cache, and k_scale, v_scale where there are any
    slots: torch.Tensor
    q: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    cos_sin: torch.Tensor | None = None
    norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    eps: float = 1e-6
    rotate: bool = False

    def arguments(self, caches, move) -> list[object]:
        """In the order of the launcher."""
        moved = [move(one) for one in (self.q, self.positions, self.cos_sin, *self.norms)]
        tokens = [move(one) for one in (self.k, self.v)]
        scales = caches[2:] or [None, None]
        return [*tokens, *caches[:2], move(self.slots), *moved, self.eps, self.rotate, *scales]


def draw_problem(
    seed: int,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    *,
    scales: str = "none",
    block_size: int = 16,
    q: bool = False,
    norm: bool = False,
    rope: bool = False,
    rotate: bool = False,
    skip: float = 0.3,
    std: float = 1.0,
) -> Problem:
    source = inputs.generator(seed)
    num_blocks = tokens // block_size + 2
    queries, k, v = inputs.qkv_views(source, tokens, *heads, head_dim, dtype)
    for one in (queries, k, v):
        one.mul_(std)
    width = head_dim // 2 if kv_dtype == torch.uint8 else head_dim
    shape = (num_blocks, heads[1], block_size, width)
    caches = [torch.randint(256, (*shape, kv_dtype.itemsize), generator=source).to(torch.uint8)] * 2
    caches = [one.view(kv_dtype).reshape(shape).clone() for one in caches]
    if scales == "token":
        caches += [inputs.normal(source, shape[:3], torch.float32) for _ in range(2)]
    elif scales == "tensor":
        caches += [torch.tensor([0.01]), torch.tensor([0.02])]
    problem = Problem(k, v, caches, inputs.slot_mapping(source, tokens, num_blocks * block_size, skip=skip))
    if q:
        problem.q = queries
    if norm:
        weights = [inputs.normal(source, (head_dim,), dtype) for _ in range(2)]
        problem.norms = (weights[0] if q else None, weights[1])
    if rope:
        problem.positions = torch.randint(MAX_POSITIONS, (tokens,), generator=source)
        angles = torch.rand(MAX_POSITIONS, head_dim // 2, generator=source) * 6.3
        problem.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    problem.rotate = rotate
    return problem


def run(kernels, problem: Problem) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """q and the caches after the call, on the CPU."""

    def move(tensor):
        return None if tensor is None else moved_with_strides(tensor, kernels.device)

    caches = [move(cache.clone()) for cache in problem.caches]
    with inputs.poisoned_outputs():
        q = kernels.run("write_kv_cache", *problem.arguments(caches, move))
    assert q is None or q.is_contiguous()
    return (None if q is None else q.cpu()), [cache.cpu() for cache in caches]


def moved_with_strides(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same view of the same memory elsewhere: what lies between rows is NaN there, too."""
    if tensor.is_contiguous():
        return tensor.to(device)
    base = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return base.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def reference(problem: Problem) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    caches = [cache.clone() for cache in problem.caches]
    q = REFERENCE["write_kv_cache"].run(*problem.arguments(caches, lambda tensor: tensor))
    return q, caches


def judged(queries, caches, problem: Problem) -> None:
    """By the rule that all backends are held to."""
    kind = None
    if len(caches) == 4:
        kind = "fp8" if caches[2].dim() > 1 else "fp8-tensor"
        kind = {torch.int8: "int8", torch.uint8: "int4"}.get(caches[0].dtype, kind)
    judge_kv_write(
        Written(queries, *caches, *[None] * (4 - len(caches))),
        KvWrite(
            k=problem.k,
            v=problem.v,
            before=Written(None, *problem.caches, *[None] * (4 - len(caches))),
            slot_mapping=problem.slots,
            q=problem.q,
            positions=problem.positions,
            cos_sin=problem.cos_sin,
            q_norm=problem.norms[0],
            k_norm=problem.norms[1],
            eps=problem.eps,
            rotate=problem.rotate,
            kind=kind,
        ),
    ).require()


def slot_rows(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return cache.transpose(1, 2).flatten(0, 1)[slots[slots >= 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"), [(1, 1, 1), (3, 5, 7), (2, 64, 16), (8, 128, 256)]
)
def test_a_copy_touches_its_slots_alone(kernels, dtype, heads, head_dim, block_size) -> None:
    for tokens in inputs.ODD_ROWS:
        problem = draw_problem(tokens, tokens, (1, heads), head_dim, dtype, dtype, block_size=block_size)
        _, caches = run(kernels, problem)
        before = (problem.caches[0], problem.caches[1])
        judge_write_kv_cache((caches[0], caches[1]), before, problem.k, problem.v, problem.slots).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (4, 12, 64, 80, 96, 100, 128, 256))
def test_codes_without_steps_are_the_references(kernels, dtype, head_dim) -> None:
    for seed, (scales, kv_dtype) in enumerate(CODES):
        for std in (1.0, 2.0**-10, 300.0):
            problem = draw_problem(
                seed,
                9,
                (1, 3),
                head_dim,
                dtype,
                kv_dtype,
                scales=scales,
                block_size=(16, 7)[seed % 2],
                std=std,
            )
            _, got = run(kernels, problem)
            _, want = reference(problem)
            names = ("k_cache", "v_cache", "k_scale", "v_scale")
            all_of(
                compare_bits(f"{kv_dtype} {name}", *pair)
                for name, *pair in zip(names, got, want, strict=True)
            ).require()


@pytest.mark.parametrize(("scales", "kv_dtype"), CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_every_kind(kernels, dtype, scales, kv_dtype) -> None:
    """Heads of zeros, of one value, of the smallest and the largest ones, with infinity, with NaN."""
    finfo = torch.finfo(dtype)
    tiny = finfo.smallest_normal * finfo.eps
    problem = draw_problem(1, 12, (1, 2), 64, dtype, kv_dtype, scales=scales, skip=0.0)
    for heads in (problem.k, problem.v):
        heads[0] = 0.0
        heads[1] = -0.0
        heads[2] = 3.0
        heads[3, :, ::2] = tiny
        heads[4, 0] *= finfo.smallest_normal
        heads[5, 0] = finfo.max
        heads[6, 0, 5] = torch.inf
        heads[7, 0, 63] = -torch.inf
        heads[8, 1, 31] = torch.nan
        heads[9, 1, 33] = -torch.nan
        heads[10, :, 1:] = 0.0
    _, got = run(kernels, problem)
    _, want = reference(problem)
    for name, mine, theirs in zip(("k_cache", "v_cache", "k_scale", "v_scale"), got, want, strict=True):
        if theirs.dtype == torch.float32:
            assert torch.equal(mine.isnan(), theirs.isnan())
            mine, theirs = mine.nan_to_num(7.0), theirs.nan_to_num(7.0)
        compare_bits(name, mine, theirs).require()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("scale", (1.0, 0.037))
def test_every_16_bit_value_as_float8(kernels, dtype, scale) -> None:
    """The conversion of newer GPUs, and on the emulator that of older ones."""
    k = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(256, 1, 256)
    shape = (16, 1, 16, 256)
    caches = [torch.zeros(shape, dtype=FLOAT8) for _ in range(2)]
    caches += [torch.tensor([scale]), torch.tensor([scale])]
    problem = Problem(k, k, caches, torch.arange(256))
    _, got = run(kernels, problem)
    _, want = reference(problem)
    all_of(compare_bits(name, *pair) for name, *pair in zip("kv", got[:2], want[:2], strict=True)).require()


@pytest.mark.parametrize("part", range(8))
def test_random_problems(kernels, part) -> None:
    for seed in range(kernels.pick(40, 14)):
        source = inputs.generator(1000 * part + seed)

        def draw(*choices, source=source):
            return choices[int(torch.randint(len(choices), (1,), generator=source))]

        dtype = draw(*DTYPES)
        scales, kv_dtype = draw(("none", dtype), ("none", draw(*DTYPES)), *CODES, *CODES)
        head_dim = draw(16, 64, 128, 256, draw(8, 24, 36, 80, 96, 100))
        rotate = head_dim in (16, 64, 128, 256) and draw(False, True)
        norm, rope = draw(False, True), draw(False, True, True)
        q = rotate or draw(False, True)
        rope = rope or (q and not norm and not rotate)
        num_kv_heads = draw(1, 2, 3, 8)
        problem = draw_problem(
            1000 * part + seed,
            draw(0, 1, 3, kernels.pick(130, 9)),
            (num_kv_heads * draw(1, 3, 5), num_kv_heads),
            head_dim,
            dtype,
            kv_dtype,
            scales=scales,
            block_size=draw(1, 7, 16, 64),
            q=q,
            norm=norm,
            rope=rope,
            rotate=rotate,
            std=draw(1.0, 20.0),
        )
        if draw(False, False, True):  # views at odd places
            problem = unaligned(problem)
        queries, caches = run(kernels, problem)
        judged(queries, caches, problem)


def unaligned(problem: Problem) -> Problem:
    """q, k and v one element further in their memory."""

    def moved(tensor):
        if tensor is None:
            return None
        T, heads, head_dim = tensor.shape
        space = torch.full((T * (heads + 1) * head_dim + 1,), torch.nan, dtype=tensor.dtype)
        view = space[1:].view(T, heads + 1, head_dim)[:, :heads]
        view.copy_(tensor)
        return view

    return replace(problem, q=moved(problem.q), k=moved(problem.k), v=moved(problem.v))


@pytest.mark.parametrize("kv_dtype", (None, torch.int8, torch.uint8), ids=str)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_fused_steps_are_those_of_the_kernels_of_their_own(kernels, dtype, kv_dtype) -> None:
    """rms_norm, apply_rope and then the append: the same but for the order of the norm's sum."""
    scales = "token" if kv_dtype else "none"
    problem = draw_problem(
        5, 21, (8, 2), 128, dtype, kv_dtype or dtype, scales=scales, q=True, norm=True, rope=True
    )
    q, k = (
        kernels.run("rms_norm", one.contiguous().to(kernels.device), norm.to(kernels.device), 1e-6, None)
        for one, norm in zip((problem.q, problem.k), problem.norms, strict=True)
    )
    positions, cos_sin = problem.positions.to(kernels.device), problem.cos_sin.to(kernels.device)
    q, k = (one.cpu() for one in kernels.run("apply_rope", q, k, positions, cos_sin))
    separate = Problem(k, problem.v, problem.caches, problem.slots)
    got_q, got = run(kernels, problem)
    _, want = run(kernels, separate)
    for mine, theirs in ((got_q, q), *zip(got, want, strict=True)):
        # A unit in the last place of bfloat16 may differ here and there, nothing else.
        same = (mine.view(torch.uint8) == theirs.view(torch.uint8)).double().mean()
        assert float(same) > 0.99


def test_an_embedding_alone_has_the_bits_of_apply_rope(kernels) -> None:
    for dtype in DTYPES:
        problem = draw_problem(2, 9, (6, 2), 64, dtype, dtype, q=True, rope=True, skip=0.0)
        got_q, got = run(kernels, problem)
        on_device = [
            one.to(kernels.device) for one in (problem.q, problem.k, problem.positions, problem.cos_sin)
        ]
        q, k = (one.cpu() for one in kernels.run("apply_rope", *on_device))
        compare_bits("q", got_q, q).require()
        compare_bits("k", slot_rows(got[0], problem.slots), k).require()


def test_scores_are_the_same_after_the_rotation(kernels) -> None:
    """q . k of the rotated ones, from the cache."""
    problem = draw_problem(4, 7, (4, 2), 128, torch.float32, torch.float32, q=True, rotate=True, skip=0.0)
    q, caches = run(kernels, problem)
    keys = slot_rows(caches[0], problem.slots).repeat_interleave(2, dim=1)
    before = problem.k.repeat_interleave(2, dim=1)
    scores = torch.einsum("thd,shd->hts", q.double(), keys.double())
    expected = torch.einsum("thd,shd->hts", problem.q.double(), before.double())
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


def test_skipped_tokens_have_their_queries(kernels) -> None:
    problem = draw_problem(3, 5, (4, 2), 64, torch.bfloat16, torch.int8, scales="token", q=True, rope=True)
    problem.slots.fill_(-1)
    q, caches = run(kernels, problem)
    judged(q, caches, problem)
    for got, before in zip(caches, problem.caches, strict=True):
        compare_bits("cache", got, before).require()


@pytest.fixture
def kernels_on_gpu(device) -> SimpleNamespace:
    return SimpleNamespace(
        device=device, run=lambda operator, *arguments: cuda.IMPLEMENTATIONS[operator].run(*arguments)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", (1000, 4097))
@pytest.mark.parametrize(("scales", "kv_dtype"), (("none", torch.bfloat16), *CODES))
def test_chunks_of_a_prompt(kernels_on_gpu, tokens, scales, kv_dtype) -> None:
    for heads, head_dim in (((32, 8), 128), ((9, 3), 64), ((8, 2), 256)):
        problem = draw_problem(
            tokens, tokens, heads, head_dim, torch.bfloat16, kv_dtype, scales=scales, q=True, norm=True,
            rope=True, rotate=kv_dtype == torch.uint8, skip=0.01,
        )  # fmt: skip
        judged(*run(kernels_on_gpu, problem), problem)


@pytest.mark.slow
@pytest.mark.damaged
@pytest.mark.parametrize("codes", (False, True))
@pytest.mark.parametrize("change", ("slot", "position", "negative position"))
def test_an_index_outside_its_tensor_writes_nothing(emulated_kernels, codes, change) -> None:
    """On a GPU: test_cuda_traps_gpu.py."""
    kv_dtype, scales = (torch.int8, "token") if codes else (torch.float16, "none")
    problem = draw_problem(
        0, 1, (2, 2), 16, torch.float16, kv_dtype, scales=scales, q=True, rope=True, skip=0.0
    )
    if change == "slot":
        problem.slots[:] = problem.caches[0].shape[0] * 16
    else:
        problem.positions[:] = MAX_POSITIONS if change == "position" else -1
    caches = [cache.clone() for cache in problem.caches]
    with pytest.raises(KernelLaunchError, match=r"write_kv_cache.*trap"):
        emulated_kernels.run("write_kv_cache", *problem.arguments(caches, lambda tensor: tensor))
    compare_bits("k_cache", caches[0], problem.caches[0]).require()


@pytest.mark.slow
@pytest.mark.damaged
def test_a_slot_past_the_cache_copies_nothing(emulated_kernels) -> None:
    """On a GPU: test_cuda_traps_gpu.py."""
    k = torch.ones(1, 2, 8)
    caches = [torch.zeros(3, 2, 4, 8) for _ in range(2)]
    with pytest.raises(KernelLaunchError, match=r"write_kv_cache.*trap"):
        emulated_kernels.run("write_kv_cache", k, k, *caches, torch.tensor([12]))
    assert not any(cache.any() for cache in caches)


@pytest.mark.slow
@pytest.mark.parametrize("emulated_kernels", (0, 1), indirect=True, ids=("sm_90", "sm_80"))
@pytest.mark.parametrize("order", ("reverse", "1"))
def test_the_order_of_threads_does_not_matter(emulated_kernels, monkeypatch, order) -> None:
    """Launched to overlap the kernel in front (sm_90), or after it."""
    problem = draw_problem(
        6,
        5,
        (6, 2),
        64,
        torch.bfloat16,
        torch.uint8,
        scales="token",
        q=True,
        norm=True,
        rope=True,
        rotate=True,
    )
    q, caches = run(emulated_kernels, problem)
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    for got, expected in zip(run(emulated_kernels, problem)[1], caches, strict=True):
        compare_bits("cache", got, expected).require()
    compare_bits("q", run(emulated_kernels, problem)[0], q).require()
