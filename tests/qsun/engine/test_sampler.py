"""The sampler: distributions against counting, penalties against arithmetic, draws against neighbours."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from qsun.core import SamplingParams
from qsun.engine.noise import gumbel_noise, row_key, uniform_bits
from qsun.engine.sampler import SamplerRow, modify_logits, sample

PROBABILITIES = [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]
LOGITS = torch.tensor([PROBABILITIES]).log()


def row(seed: int = 0, prompt=(), output=(), end_ids=(), **params) -> SamplerRow:
    return SamplerRow(SamplingParams(**params), seed, [*prompt, *output], len(prompt), tuple(end_ids))


def drawn(logits: torch.Tensor, **params) -> set[int]:
    """The tokens that come up in 400 draws from one row."""
    return set(sample(logits.expand(400, -1), [row(seed=i, **params) for i in range(400)]).token_ids)


def expected_after(**params) -> list[float]:
    """The distribution the parameters ask for, in plain arithmetic."""
    p = SamplingParams(**params)
    weights = [q ** (1 / p.temperature) for q in PROBABILITIES]
    weights = [w / sum(weights) for w in weights]
    kept = list(range(len(weights)))[: p.top_k or None]
    total = sum(weights[i] for i in kept)
    reached, nucleus = 0.0, []
    for i in kept:
        if reached >= p.top_p - 1e-12:
            break
        nucleus.append(i)
        reached += weights[i] / total
    kept = [i for i in nucleus if weights[i] >= p.min_p * weights[0]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 1},
        {"top_p": 0.6},
        {"top_p": 0.01},
        {"min_p": 0.3},
        {"top_k": 4, "top_p": 0.85},
        {"temperature": 1.7, "top_k": 5, "top_p": 0.9, "min_p": 0.2},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params) -> None:
    draws = 10_000
    rows = [row(seed=1000 + i, **params) for i in range(draws)]
    tokens = sample(LOGITS.expand(draws, -1), rows).token_ids
    expected = expected_after(**params)
    counts = [tokens.count(token) for token in range(len(expected))]
    assert all(count == 0 for count, e in zip(counts, expected, strict=True) if e == 0)
    statistic = sum(
        (c - draws * e) ** 2 / (draws * e) for c, e in zip(counts, expected, strict=True) if e > 0
    )
    degrees = sum(e > 0 for e in expected) - 1
    # 99.9 % points of chi square for 0..5 degrees of freedom.
    assert statistic <= [1e-9, 10.83, 13.82, 16.27, 18.47, 20.52][degrees]


def test_the_distribution_check_can_fail() -> None:
    draws = 10_000
    rows = [row(seed=1000 + i, temperature=1.15) for i in range(draws)]
    tokens = sample(LOGITS.expand(draws, -1), rows).token_ids
    counts = [tokens.count(token) for token in range(6)]
    statistic = sum((c - draws * e) ** 2 / (draws * e) for c, e in zip(counts, PROBABILITIES, strict=True))
    assert statistic > 20.52


def test_steps_of_one_seed_are_independent_draws() -> None:
    draws = 4000
    rows = [row(seed=7, output=[0] * step) for step in range(draws)]
    tokens = sample(LOGITS.expand(draws, -1), rows).token_ids
    expected = [p * draws for p in PROBABILITIES]
    assert sum((tokens.count(t) - e) ** 2 / e for t, e in enumerate(expected)) < 20.52
    # Neighbours in time are no likelier to agree than chance: sum of squared probabilities.
    agree = sum(a == b for a, b in pairwise(tokens)) / (draws - 1)
    chance = sum(p * p for p in PROBABILITIES)
    assert abs(agree - chance) < 4 * math.sqrt(chance * (1 - chance) / draws)


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, 5.0, 5.0]])
    assert sample(logits, [row(temperature=0), row(temperature=0)]).token_ids == [1, 2]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(1)) * 1e3
    rows = [row(seed=i, temperature=temperature) for i in range(16)]
    assert sample(logits, rows).token_ids == logits.argmax(-1).tolist()


def test_equal_logits_under_top_k_keep_the_lowest_ids() -> None:
    logits = torch.zeros(200, 10)
    tokens = sample(logits, [row(seed=i, top_k=3) for i in range(200)]).token_ids
    assert set(tokens) == {0, 1, 2}


MIXED = [
    row(seed=3, temperature=0.8),
    row(seed=4, temperature=0),
    row(seed=5, top_k=5),
    row(seed=6, top_p=0.7, output=[1, 2, 3]),
    row(seed=7, min_p=0.1, repetition_penalty=1.3, prompt=[4, 5], output=[4]),
    row(seed=8, presence_penalty=0.5, frequency_penalty=0.25, output=[9, 9]),
    row(seed=9, min_tokens=3, end_ids=[0, 1]),
    row(seed=10, top_k=4, top_p=0.9, min_p=0.05, temperature=1.5),
]


def test_a_draw_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(len(MIXED), 1000, generator=torch.Generator().manual_seed(2)) * 3
    together = sample(logits, MIXED).token_ids
    alone = [sample(logits[i : i + 1], [r]).token_ids[0] for i, r in enumerate(MIXED)]
    backwards = sample(logits.flip(0), MIXED[::-1]).token_ids[::-1]
    crowded = sample(logits.repeat(5, 1), MIXED * 5).token_ids
    assert together == alone == backwards and crowded == together * 5


def test_seed_and_step_change_the_draw() -> None:
    logits = torch.zeros(1, 1000)
    draws = {sample(logits, [row(seed=seed)]).token_ids[0] for seed in range(50)}
    assert len(draws) > 40
    draws = {sample(logits, [row(seed=1, output=[0] * step)]).token_ids[0] for step in range(50)}
    assert len(draws) > 40


def test_the_logits_are_left_as_they_were() -> None:
    logits = torch.randn(len(MIXED), 100, generator=torch.Generator().manual_seed(3))
    before = logits.clone()
    sample(logits, MIXED)
    assert torch.equal(logits, before)


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 0.5, 3.0]] * 3)
    rows = [
        row(repetition_penalty=2.0, prompt=[0, 1], output=[3, 3]),
        row(presence_penalty=0.5, frequency_penalty=0.25, prompt=[0], output=[2, 2, 2, 4]),
        row(repetition_penalty=0.5, presence_penalty=1.0, prompt=[1], output=[5]),
    ]
    expected = torch.tensor(
        [
            # In prompt or output: positive halved, negative doubled, once however often they occur.
            [1.0, -4.0, 1.0, -2.0, 0.5, 3.0],
            # Output only: 0.5 once, 0.25 for each occurrence; the prompt's token 0 is untouched.
            [2.0, -2.0, 1.0 - 0.5 - 0.75, -1.0, 0.5 - 0.5 - 0.25, 3.0],
            # A repetition penalty below 1 encourages; presence is taken off after it.
            [2.0, -1.0, 1.0, -1.0, 0.5, 6.0 - 1.0],
        ]
    )
    assert torch.equal(modify_logits(logits, rows), expected)


def test_min_tokens_masks_every_end_id_until_then() -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0, 0.0]]).repeat(3, 1)
    rows = [
        row(temperature=0, min_tokens=2, end_ids=[0, 1], output=[2]),
        row(temperature=0, min_tokens=2, end_ids=[0, 1], output=[2, 2]),
        row(temperature=0, min_tokens=2, end_ids=[0], output=[]),
    ]
    assert sample(logits, rows).token_ids == [2, 0, 1]


def test_a_negative_penalty_cannot_undo_the_min_tokens_mask() -> None:
    logits = torch.tensor([[1.0, 0.0]])
    rows = [row(temperature=0, min_tokens=9, end_ids=[0], output=[0], presence_penalty=-2.0)]
    assert sample(logits, rows).token_ids == [1]


def test_min_p_at_its_bounds() -> None:
    assert drawn(LOGITS, min_p=1.0) == {0}
    assert drawn(LOGITS, min_p=0.0) == set(range(6))


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    rows = [
        row(temperature=0, logprobs=3, repetition_penalty=2.0, output=[0]),
        row(temperature=0),
        row(temperature=0, logprobs=0),
        row(temperature=0, logprobs=100),
    ]
    result = sample(LOGITS.expand(4, -1), rows).logprobs
    # The penalty takes log 0.4 < 0 to twice that, so token 1 is drawn; it is reported as the model sees it.
    assert result[0].token_id == 1 and result[0].logprob == pytest.approx(math.log(0.25), abs=1e-6)
    assert [token for token, _ in result[0].top] == [0, 1, 2]
    assert [value for _, value in result[0].top] == pytest.approx([math.log(p) for p in (0.4, 0.25, 0.15)])
    assert result[1] is None and result[2].top == () and result[2].token_id == 0
    assert [token for token, _ in result[3].top] == [0, 1, 2, 3, 4, 5]


@pytest.mark.damaged
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_logits_that_are_not_finite_are_reported(value: float, params) -> None:
    logits = torch.zeros(3, 5)
    logits[1] = value
    result = sample(logits, [row(seed=i, **params) for i in range(3)])
    assert result.valid == [True, False, True]


def test_a_single_masked_token_is_fine() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 2] = float("-inf")
    assert sample(logits, [row()]).valid == [True]


@pytest.mark.damaged
def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 5\), expected \(1, vocabulary\)"):
        sample(torch.zeros(2, 5), [row()])


def test_an_empty_batch() -> None:
    assert sample(torch.zeros(0, 5), []).token_ids == []


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, word by word, in Python integers."""
    words, mask = [], (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        words.append(z ^ (z >> 31))
    return words


def test_bits_are_splitmix64() -> None:
    # First outputs for seed 1234567, as the algorithm's reference implementations give them.
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    keys = torch.tensor([1234567, -5, row_key(2**64 - 1, 3)])
    bits = uniform_bits(keys, 100).tolist()
    for key, words in zip(keys.tolist(), bits, strict=True):
        assert [word % 2**64 for word in words] == splitmix64(key % 2**64, 100)


def test_noise_is_gumbel_and_never_infinite() -> None:
    keys = torch.tensor([row_key(seed, 0) for seed in range(20)])
    noise = gumbel_noise(keys, 20_000).double().flatten()
    assert noise.isfinite().all()
    # Mean: Euler's constant; variance: pi^2 / 6; at 4 standard errors.
    deviation = math.pi / math.sqrt(6)
    assert abs(noise.mean().item() - 0.5772156649) < 4 * deviation / math.sqrt(noise.numel())
    assert abs(noise.var().item() / (math.pi**2 / 6) - 1) < 0.02


@pytest.mark.gpu
def test_noise_and_draws_agree_between_devices() -> None:
    keys = torch.tensor([row_key(seed, 5) for seed in range(8)])
    assert torch.equal(uniform_bits(keys, 5000), uniform_bits(keys.cuda(), 5000).cpu())
    logits = torch.randn(len(MIXED), 5000, generator=torch.Generator().manual_seed(2)) * 3
    assert sample(logits, MIXED).token_ids == sample(logits.cuda(), MIXED).token_ids


@pytest.mark.parametrize("top_k", [6, 7, 2**63, 2**80])
def test_a_top_k_past_the_vocabulary_keeps_all(top_k: int) -> None:
    tokens, free = (
        sample(LOGITS.expand(400, -1), [row(seed=i, top_k=k) for i in range(400)]) for k in (top_k, 0)
    )
    assert set(tokens.token_ids) == set(range(6)) and tokens == free


def test_equals_are_told_lowest_index_first() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0, 0.0]])
    entry = sample(logits, [row(temperature=0, logprobs=4)]).logprobs[0]
    assert entry.token_id == 1 and [token for token, _ in entry.top] == [1, 2, 4, 3]


def test_min_p_keeps_what_is_exactly_that_likely() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for min_p, count in ((1.0, 1), (0.5, 2), (0.25, 4)):
        assert drawn(logits, min_p=min_p) == set(range(count))


def test_penalties_of_a_long_prompt_beside_other_rows() -> None:
    """Within one row and beside others: each token once by repetition, by its count of the output only."""
    prompt, output = [3] * 5000 + [0, 1], [1, 2, 2]
    rows = [
        row(prompt=prompt, output=output, repetition_penalty=2.0, frequency_penalty=0.5),
        row(prompt=prompt, output=output),
        row(prompt=prompt, output=output, presence_penalty=1.0),
    ]
    logits = torch.tensor([[1.0, -1.0, 2.0, -4.0, 5.0]]).repeat(3, 1)
    expected = [[0.5, -2.5, 0.0, -8.0, 5.0], [1.0, -1.0, 2.0, -4.0, 5.0], [1.0, -2.0, 1.0, -4.0, 5.0]]
    assert modify_logits(logits, rows).tolist() == expected
