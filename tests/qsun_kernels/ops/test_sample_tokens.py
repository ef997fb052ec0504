"""sample_tokens: the reference against plain Python, and every backend here against distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qsun_kernels import sample_tokens
from qsun_kernels.backends.reference.gumbel_noise import gumbel_noise, uniform_bits
from qsun_kernels.backends.reference.sample_tokens import filtered, relative_mass
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_sample_tokens

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROBABILITIES = [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]


def settings(batch: int, temperature: float, top_k: int, top_p: float, min_p: float) -> list[Tensor]:
    return [
        torch.full((batch,), temperature),
        torch.full((batch,), top_k, dtype=torch.int32),
        torch.full((batch,), top_p),
        torch.full((batch,), min_p),
    ]


def kept_by_hand(scaled: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """What the filters leave of scaled logits, in Python's floats."""
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    order = order[: top_k or None]
    weights = [math.exp(scaled[i]) for i in order]
    total, reached, nucleus = math.fsum(weights), 0.0, []
    for i, weight in zip(order, weights, strict=True):
        if nucleus and top_p < 1 and reached >= top_p * total:
            break
        nucleus.append(i)
        reached += weight
    return {i for i in nucleus if not min_p or scaled[i] >= math.log(min_p)}


@pytest.mark.parametrize("seed", range(40))
def test_the_filters_against_plain_python(seed: int) -> None:
    source = inputs.generator(seed)
    size = int(torch.randint(1, 200, (1,), generator=source))
    dtype = (torch.float32, torch.bfloat16)[seed % 2]  # the second has many equals
    x = inputs.normal(source, (1, size), dtype, std=2.0).float()
    scaled = x - x.amax()
    top_k = int(torch.randint(0, size + 2, (1,), generator=source))
    top_p, min_p = torch.rand(2, generator=source).tolist()
    min_p = 0.0 if seed % 3 else min_p / 4
    got = filtered(scaled, *settings(1, 1.0, top_k, top_p, min_p)[1:])[0]
    kept = kept_by_hand(scaled[0].tolist(), top_k, torch.tensor(top_p).item(), min_p)
    assert {i for i in range(size) if got[i].isfinite()} == kept
    assert all(got[i] == scaled[0, i] for i in kept)


def test_masses_are_exponentials() -> None:
    distance = torch.linspace(0, 27, 100_001)
    exact = (-distance.double()).exp() * 2.0**40
    error = (relative_mass(-distance).double() - exact).abs()
    assert (error <= exact * 2.0**-23 + 1).all()
    assert (relative_mass(torch.tensor([-31.0, -32.0, -1e30, -torch.inf])) == 0).all()
    # Better than the bound on the whole: sums are what counts.
    assert abs((error.sum() / exact.sum()).item()) < 2.0**-23


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 33, 576])
def test_the_draw_is_the_largest_with_its_noise(dtype: torch.dtype, size: int) -> None:
    logits, temperature, *filters, keys = inputs.sampling_inputs(inputs.generator(size), 32, size, dtype)
    tokens, valid = sample_tokens(logits, temperature, *filters, keys, backend="torch")
    assert tokens.dtype == torch.int64 and valid.dtype == torch.bool
    noise = gumbel_noise(keys, size)
    for row in range(32):
        x = logits[row].float()
        assert valid[row] == x.max().isfinite()
        if not valid[row]:
            assert tokens[row] == 0
        elif temperature[row] == 0:
            assert tokens[row] == x.argmax()
        else:
            scaled = ((x - x.max()) / temperature[row])[None]
            (scaled,) = filtered(scaled, *(one[row : row + 1] for one in filters))
            assert tokens[row] == (scaled + noise[row]).argmax()


@pytest.mark.parametrize(
    "chosen",
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.0, 3, 1.0, 0.0),
        (1.0, 0, 0.7, 0.0),
        (1.0, 0, 1.0, 0.3),
        (1.5, 5, 0.9, 0.2),
    ],
    ids=str,
)
def test_a_million_draws_follow_the_distribution(device: torch.device, chosen: tuple) -> None:
    check_distribution(device, chosen)


def check_distribution(device: torch.device, chosen: tuple, *, times: float = 1.0) -> None:
    draws, part = 10**6, 10**5
    temperature, top_k, top_p, min_p = chosen
    weights = [p ** (1 / temperature) for p in PROBABILITIES]
    scaled = [math.log(weight / weights[0]) for weight in weights]
    kept = kept_by_hand(scaled, top_k, top_p, min_p)
    total = math.fsum(weights[i] for i in kept)
    expected = [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]
    logits = torch.tensor([PROBABILITIES]).log().to(device).expand(part, -1)
    counts = torch.zeros(len(weights), dtype=torch.int64)
    for first in range(0, draws, part):
        # Keys as the engine makes them: well mixed, of one seed and successive steps.
        keys = uniform_bits(torch.tensor([first]), part)[0].to(device)
        columns = (one.to(device) for one in settings(part, temperature * times, top_k, top_p, min_p))
        tokens, valid = sample_tokens(logits, *columns, keys)
        assert valid.all()
        counts += tokens.bincount(minlength=len(weights)).cpu()
    assert all(count == 0 for count, e in zip(counts.tolist(), expected, strict=True) if e == 0)
    statistic = sum(
        (c - draws * e) ** 2 / (draws * e) for c, e in zip(counts.tolist(), expected, strict=True) if e > 0
    )
    # 99.9 % points of chi square for 0..5 degrees of freedom.
    assert statistic <= [1e-9, 10.83, 13.82, 16.27, 18.47, 20.52][sum(e > 0 for e in expected) - 1]


def test_the_distribution_check_can_fail(device: torch.device) -> None:
    with pytest.raises(AssertionError):
        check_distribution(device, (1.0, 0, 1.0, 0.0), times=1.02)


def test_a_row_does_not_depend_on_the_batch(device: torch.device) -> None:
    arguments = inputs.sampling_inputs(inputs.generator(3), 64, 777, torch.bfloat16, device)
    together = sample_tokens(*arguments)
    judge_sample_tokens(together, *arguments).require()
    for row in range(0, 64, 7):
        alone = sample_tokens(*(one[row : row + 1] for one in arguments))
        assert [alone[0].item(), alone[1].item()] == [together[0][row].item(), together[1][row].item()]
    backwards = sample_tokens(*(one.flip(0) for one in arguments))
    assert torch.equal(backwards[0].flip(0), together[0])


def test_settings_beyond_their_range_mean_off_or_the_likeliest(device: torch.device) -> None:
    """Values on the device cannot be refused; they still mean something."""
    logits = inputs.normal(inputs.generator(5), (1, 50), torch.float32, device).expand(8, -1)
    keys = torch.arange(8, device=device)
    nan = math.nan

    def draw(temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
        columns = (one.to(device) for one in settings(8, temperature, top_k, top_p, min_p))
        return sample_tokens(logits, *columns, keys)[0].tolist()

    greedy, free = draw(0.0, 0, 1.0, 0.0), draw(1.0, 0, 1.0, 0.0)
    assert len(set(free)) > 1 and len(set(greedy)) == 1
    assert draw(-1.0, 0, 1.0, 0.0) == draw(nan, 0, 1.0, 0.0) == greedy
    assert draw(1.0, -3, 1.0, 0.0) == draw(1.0, 2**31 - 1, 1.0, 0.0) == free
    assert draw(1.0, 0, 5.0, 0.0) == draw(1.0, 0, nan, 0.0) == free
    assert draw(1.0, 0, 1.0, -1.0) == draw(1.0, 0, 1.0, nan) == free
    assert draw(1.0, 0, 0.0, 0.0) == draw(1.0, 0, -2.0, 0.0) == draw(1.0, 0, 1.0, 7.0) == greedy
    # The hottest there is: as good as uniform, and nothing overflows.
    assert len(set(draw(math.inf, 0, 1.0, 0.0))) > 1


def test_no_rows() -> None:
    arguments = inputs.sampling_inputs(inputs.generator(0), 0, 9, torch.float16)
    tokens, valid = sample_tokens(*arguments)
    assert tokens.shape == valid.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_a_graph_draws_what_its_tensors_hold(backend: str) -> None:
    arguments = inputs.sampling_inputs(inputs.generator(7), 16, 5001, torch.float32, "cuda")
    others = inputs.sampling_inputs(inputs.generator(7), 16, 5001, torch.float32, "cuda", std=5.0)
    sample_tokens(*arguments, backend=backend)  # compiled, its attributes set
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sample_tokens(*arguments, backend=backend)
    for held in (arguments, others):
        for target, source in zip(arguments, held, strict=True):
            target.copy_(source.clone())
        for _ in range(3):
            graph.replay()
            judge_sample_tokens(got, *held).require()
