"""The rows of a decode step: what they hold after every change, against what the sequences say."""

from __future__ import annotations

import random

import pytest
import torch

from qsun.core import Chunk, DecodeAttention, Request, SamplingParams, Sequence
from qsun.engine.decode_inputs import DecodeInputs
from qsun.engine.noise import row_key
from qsun.engine.runner import Runner, running
from qsun.kv_cache.tensors import KVCache

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0)


def sequence_of(
    tokens: list[int], blocks: list[int], name: str = "r", max_tokens: int = 50, params=GREEDY
) -> Sequence:
    request = Request(name, "m", tuple(tokens), params, 0, 77, max_tokens)
    sequence = Sequence(request, "m", len(tokens) - 1, list(tokens))
    sequence.block_ids = blocks
    return sequence


def state(inputs: DecodeInputs, rows: int):
    """(tokens, positions, slots, lengths, blocks up to the length), as the device has them."""
    inputs.write_blocks(rows)
    ctx = inputs.context(rows)
    assert isinstance(ctx.attention, DecodeAttention)
    assert ctx.attention.block_table.dtype == ctx.attention.seq_lens.dtype == torch.int32
    lengths = ctx.attention.seq_lens.tolist()
    tables = [
        row[: -(-length // inputs.block_size)]
        for row, length in zip(ctx.attention.block_table.tolist(), lengths, strict=True)
    ]
    return inputs.token_ids(rows).tolist(), ctx.positions.tolist(), ctx.slot_mapping.tolist(), lengths, tables


def exact(rows: int) -> int:
    return rows


def never(sequences) -> bool:
    raise AssertionError("no block is needed")


def place(inputs: DecodeInputs, sequences: list[Sequence], rows: int) -> None:
    inputs.place(sequences, rows)
    inputs.stage(from_host=True)


def test_rows_follow_the_batch_through_its_changes() -> None:
    inputs = DecodeInputs(4, 3, 4, CPU)
    a, b = sequence_of([1, 2, 3], [9]), sequence_of([4, 5, 6, 7, 8], [3, 6], "s")
    place(inputs, [a, b], 4)
    assert state(inputs, 4) == (
        [3, 8, 0, 0],
        [2, 4, 0, 0],
        [38, 24, -1, -1],
        [3, 5, 0, 0],
        [[9], [3, 6], [], []],
    )
    address = inputs.context(4).attention.block_table.data_ptr()
    a.tokens += [11, 12]
    a.block_ids += [4]
    place(inputs, [a, b], 2)
    assert state(inputs, 2) == ([12, 8], [4, 4], [16, 24], [5, 5], [[9, 4], [3, 6]])
    # b lost its blocks and got others; then the batch is another one altogether.
    b.block_ids = [7, 8]
    place(inputs, [b, a], 3)
    assert inputs.members == ((b, 1), (a, 0)) and inputs.span == 2
    assert state(inputs, 3)[3:] == ([5, 5, 0], [[9, 4], [7, 8], []])
    # Fewer rows than the one that is left was in.
    inputs.vacate(a)
    assert inputs.members == ((b, 1),) and inputs.span == 2
    place(inputs, [b], 1)
    assert state(inputs, 1) == ([8], [4], [32], [5], [[7, 8]])
    assert inputs.context(4).attention.block_table.data_ptr() == address


def test_a_step_ahead_reads_the_tokens_that_the_device_drew() -> None:
    inputs = DecodeInputs(4, 3, 4, CPU)
    a, b = sequence_of([1, 2, 3], [9]), sequence_of([4, 5, 6, 7], [3], "s")
    place(inputs, [a, b], 2)
    inputs.take(torch.tensor([70, 71]), torch.tensor([True, False]))
    first = inputs.fetch()
    assert first[:2].tolist() == [70, -1]

    def extend(sequences) -> bool:
        assert list(sequences) == [b]
        b.block_ids.append(5)
        return True

    assert inputs.advance(extend, exact)
    inputs.stage(from_host=False)
    # A row without a valid token reads some row of the embedding until it is known to have failed.
    assert state(inputs, 2) == ([70, 0], [3, 4], [39, 20], [4, 5], [[9], [3, 5]])
    inputs.take(torch.tensor([80, 81]), torch.tensor([True, True]))
    inputs.fetch()
    assert first[:2].tolist() == [70, -1], "the result of the step before is still to be read"


def test_nothing_changes_when_blocks_are_short() -> None:
    inputs = DecodeInputs(4, 3, 4, CPU)
    a = sequence_of([4, 5, 6, 7], [3])
    b = sequence_of([1], [2], "s", max_tokens=1)
    place(inputs, [a, b], 2)
    before = state(inputs, 2)
    assert not inputs.advance(lambda sequences: False, lambda rows: 2)
    inputs.stage(from_host=True)
    assert state(inputs, 2) == before and inputs.num_sequences == 2


def test_a_row_whose_sequence_ends_by_length_becomes_padding() -> None:
    inputs = DecodeInputs(4, 3, 4, CPU)
    a = sequence_of([1], [9], max_tokens=3)
    b = sequence_of([2], [8], "s", max_tokens=2)
    place(inputs, [b, a], 2)
    four = dict.fromkeys(range(5), 4).__getitem__
    assert inputs.advance(never, four) and inputs.num_sequences == 2
    assert inputs.advance(never, four)
    inputs.stage(from_host=False)
    assert inputs.members == ((a, 1),) and state(inputs, 2)[1:4] == ([0, 2], [-1, 38], [0, 3])
    # With a row for each, a would have to move; after a there is nobody.
    assert not inputs.advance(never, exact)
    assert not inputs.advance(never, four)


def test_parameters_and_keys_go_with_their_rows() -> None:
    inputs = DecodeInputs(3, 3, 16, CPU)
    hot = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    extreme = SamplingParams(temperature=1e-60, top_k=2**40)
    a = sequence_of([1, 2], [9], params=hot)
    b = sequence_of([3], [8], "s", params=extreme)
    place(inputs, [a, b, c := sequence_of([1], [7], "t")], 3)
    for step in range(4):
        temperature, top_k, top_p, min_p, keys = inputs.sampling(3)
        assert temperature.tolist() == pytest.approx([0.7, 0, 0], abs=1e-6) and temperature[1] > 0
        assert top_k.tolist() == [5, 2**31 - 1, 0] and top_k.dtype == torch.int32
        assert top_p.tolist() == pytest.approx([0.9, 1, 1]) and min_p.tolist() == pytest.approx([0.1, 0, 0])
        assert keys[:2].tolist() == [row_key(77, step)] * 2
        inputs.prepare()
        if step == 2:
            # Placed again, from what is known by then.
            for sequence in (a, b, c):
                sequence.tokens += [5, 5, 5]
            place(inputs, [a, b, c], 3)
        else:
            assert inputs.advance(never, exact)
            inputs.stage(from_host=False)


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_changes(seed: int) -> None:
    """Random batches, ahead and from the host, padded or not, against a fresh set of rows."""
    draw = random.Random(seed)
    size, most = draw.choice((1, 3, 16)), 9
    inputs = DecodeInputs(most, 40, size, CPU)
    buckets = draw.choice(((1, 2, 4, 9), tuple(range(1, 10))))
    rows_for = [0, *(next(b for b in buckets if b >= n) for n in range(1, most + 1))]
    blocks = iter(range(1, 10**6))
    live: list[Sequence] = []
    ahead: list[int] | None = None  # tokens under way, by row

    def grow(sequence: Sequence, length: int) -> None:
        while len(sequence.block_ids) * size < length:
            sequence.block_ids.append(next(blocks))

    def extend(sequences) -> bool:
        for sequence in sequences:
            sequence.block_ids.append(next(blocks))
        return True

    for _ in range(60):
        if ahead is not None and draw.random() < 0.7 and inputs.advance(extend, rows_for.__getitem__):
            members = inputs.members
            inputs.stage(from_host=False)
            known = {sequence: ahead[row] for sequence, row in members}
        else:
            for sequence in [s for s in live if draw.random() < 0.1 or s.num_output >= s.request.max_tokens]:
                live.remove(sequence)
            while not live or (len(live) < most and draw.random() < 0.4):
                tokens = [draw.randrange(99) for _ in range(draw.randrange(1, 8))]
                live.append(sequence_of(tokens, [], str(draw.random()), max_tokens=draw.randrange(1, 15)))
            for sequence in live:
                grow(sequence, len(sequence.tokens))
            place(inputs, live, rows_for[len(live)])
            members = inputs.members
            assert [sequence for sequence, _ in members] == live
            known = {}
        rows = rows_for[inputs.span]
        got = state(inputs, rows)
        by_row = {row: sequence for sequence, row in members}
        for row in range(rows):
            values = tuple(part[row] for part in got[1:])
            if row not in by_row:
                assert values == (0, -1, 0, [])
                continue
            sequence = by_row[row]
            if sequence in known:
                sequence.tokens.append(known[sequence])
            position = len(sequence.tokens) - 1
            slot = sequence.block_ids[position // size] * size + position % size
            needed = sequence.block_ids[: position // size + 1]
            assert (got[0][row], *values) == (sequence.tokens[-1], position, slot, position + 1, needed)
        drawn = [draw.randrange(99) for _ in range(rows)]
        inputs.take(torch.tensor(drawn), torch.ones(rows, dtype=torch.bool))
        assert inputs.fetch()[:rows].tolist() == drawn
        ahead = drawn
        if draw.random() < 0.2 and len(live) > 1:
            inputs.vacate(live[draw.randrange(len(live))])
        # A row that advance has left is as good as told: its sequence has all its tokens.
        live = [sequence for sequence, _ in inputs.members]
        if not live:
            ahead = None
        elif draw.random() < 0.3:
            # Collected, and nothing was launched meanwhile.
            for sequence, row in inputs.members:
                sequence.tokens.append(drawn[row])
            live = [sequence for sequence in live if sequence.num_output < sequence.request.max_tokens]
            ahead = None


def test_padding_rows_change_nothing(decode_module) -> None:
    """What a graph replays: a batch in a larger bucket, beside rows that must read and write nothing."""
    kv_cache = KVCache.allocate(decode_module.config, 12, 4, torch.float32, CPU)
    for k, v in kv_cache.layers:
        k.fill_(float("nan"))
        v.fill_(float("nan"))
    runner = Runner(
        decode_module,
        kv_cache,
        max_batch_size=8,
        max_blocks=3,
        stream=None,
        backend=None,
        cuda_graphs="auto",
    )
    sequences = [sequence_of([5, 6, 7], [9]), sequence_of([4] * 6, [3, 6], "s"), sequence_of([1], [0], "t")]
    chunks = [Chunk(s, 0, len(s.tokens) - 1, "prefill") for s in sequences[:2]]
    with running(None, None):
        runner.prefill(decode_module.stack, chunks)
        step = runner.decode(sequences)
        expected, tokens = step.logits, step.tokens()
        assert expected.shape[0] == 3 and tokens[:3] == expected.argmax(dim=1).tolist()
        before = torch.cat([k.flatten() for k, _ in kv_cache.layers]).clone()
        runner.use_buckets((8,))
        step = runner.decode(sequences)
        assert step.logits.shape[0] == 8 and step.tokens()[:3] == tokens[:3]
        for sequence in sequences:
            runner.leave(sequence)
        runner._inputs.stage(from_host=False)
        assert runner._decode_forward(8).isfinite().all()
    after = torch.cat([k.flatten() for k, _ in kv_cache.layers])
    torch.testing.assert_close(step.logits[:3], expected, rtol=1e-5, atol=1e-5)
    # Blocks nobody holds are as they were; the rest was written again with the same values.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert after.isnan().sum() == before.isnan().sum()


def test_a_row_whose_entering_was_interrupted_is_filled_again(monkeypatch) -> None:
    """Else it would keep the parameters of whoever had it before."""
    inputs = DecodeInputs(4, 3, 4, CPU)
    params = SamplingParams(temperature=0.5, top_k=3)
    sampled = sequence_of([1, 2], [4], params=params)

    class Interrupting(SamplingParams):
        @property
        def greedy(self) -> bool:
            raise KeyboardInterrupt

    object.__setattr__(sampled.request, "params", Interrupting(temperature=0.5, top_k=3))
    with pytest.raises(KeyboardInterrupt):
        place(inputs, [sampled], 1)
    object.__setattr__(sampled.request, "params", params)
    place(inputs, [sampled], 1)
    temperature, top_k, *_ = inputs.sampling(1)
    assert (temperature.tolist(), top_k.tolist()) == ([0.5], [3])


def test_a_row_whose_leaving_was_interrupted_is_emptied_again() -> None:
    """Else it would go on to write into blocks that are another's by then."""
    inputs = DecodeInputs(4, 3, 4, CPU)
    a, b = sequence_of([1, 2, 3], [9]), sequence_of([4, 5, 6], [3], "s")
    place(inputs, [a, b], 2)
    right = inputs._filled

    class Interrupting(list):
        def __setitem__(self, *_) -> None:
            raise KeyboardInterrupt

    inputs._filled = Interrupting(right)
    with pytest.raises(KeyboardInterrupt):
        inputs.vacate(b)
    inputs._filled = right
    place(inputs, [a], 2)
    assert state(inputs, 2)[1:4] == ([2, 0], [38, -1], [3, 0])
