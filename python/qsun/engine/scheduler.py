"""What is computed next, and whose KV gives way when blocks run out.

One step is one batch: prompt positions (by the requests' own prefill module, chunked within a token budget)
or response positions lost to a preemption (by the decode module), then one token for every sequence that is
ready, of all models, by the decode module.

Only one module computes chunks in a step: that of the oldest sequence which lacks some, and its other
sequences fill the budget.  A module's weights are read whole for a chunk of any length, so with a few tokens
of each of several models a step would last several times as long as its budget says, and everybody who is
decoding would wait for it.  The next module's turn is the next step, when they all have a token more.

Order of arrival is the only priority.  A step walks the sequences from oldest to latest and gives each what
it needs.  Who lacks a block takes it from the latest arrival that holds some; who finds no later one waits,
keeping what it has.  The oldest alone never waits: for it even KV that nobody could restore is given up.
Submission refuses what could not fit an empty pool, so the oldest always ends, then the next is the oldest.

A preempted sequence's KV goes to host memory whole, or, when that is full, is dropped and rebuilt: the prompt
by its own prefill module, the response by the decode module.  KV that came with the request cannot be rebuilt
by anything here: such a sequence enters when no older one can ever need its blocks, or when there is room to
save them.  It then keeps its blocks, or, if that room was taken in the meantime, ends in the error that names
what is missing.

While the device computes a step, the host may begin the next one before it knows the tokens of the first
(`engine/step.py`).  Nothing here runs ahead: a sequence's tokens are those of steps whose tokens are known.
What is asked in between is only whether the next step can be the same sequences once more (`has_other_work`)
and for the blocks that this takes (`extend`), or else which chunks it has in any case (`next_chunks`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from qsun.core import Batch, Chunk, FinishReason, Sequence
from qsun.kv_cache.block_tables import BlockTables

__all__ = ["NoSwap", "Scheduler", "Swap"]


class Swap(Protocol):
    """Host memory for the KV of preempted sequences."""

    def has_room(self, count: int) -> bool:
        """Whether `save` would take this many blocks now."""

    def save(self, blocks: list[int]) -> Any | None:
        """Copy blocks out and return what `restore` takes; None when there is no room."""

    def restore(self, saved: Any, blocks: list[int]) -> None:
        """Copy the saved content into the first of these blocks and free its room."""

    def drop(self, saved: Any) -> None:
        """Free the room of saved content that nobody will ask for."""


class NoSwap:
    """No host memory at all: every preemption is a rebuild."""

    def has_room(self, count: int) -> bool:
        return False

    def save(self, blocks: list[int]) -> None:
        return None

    def restore(self, saved: Any, blocks: list[int]) -> None:
        raise AssertionError("nothing was saved")

    def drop(self, saved: Any) -> None:
        raise AssertionError("nothing was saved")


class Scheduler:
    """Moves sequences through queued, prefilling, decoding, swapped and finished.

    max_batch_size: sequences that hold blocks at one time.
    token_budget: prompt and rebuilt positions computed in one step.
    """

    def __init__(
        self, tables: BlockTables, *, max_batch_size: int, token_budget: int, swap: Swap | None = None
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("token_budget", token_budget)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.tables = tables
        self.max_batch_size = max_batch_size
        self.token_budget = token_budget
        self.swap: Swap = NoSwap() if swap is None else swap
        # In order of arrival; a finished sequence leaves.
        self.live: dict[str, Sequence] = {}
        self._holding: set[Sequence] = set()
        self._ended: list[Sequence] = []
        # Preempted in the step being scheduled.
        self._gave_way: set[Sequence] = set()
        # The first sequence that waits, and the blocks it lacks, while the prefix index stays as it is.
        self._next_in: tuple[Sequence, int] | None = None
        self.num_swaps = 0
        self.num_rebuilds = 0
        self.num_lost = 0

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence: "queued", or "swapped" with its KV in `saved`."""
        assert sequence.request_id not in self.live
        assert not self.live or next(reversed(self.live.values())).arrival < sequence.arrival
        assert sequence.state in ("queued", "swapped")
        self.live[sequence.request_id] = sequence

    def finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End a sequence in whatever state it is and take back all it holds."""
        if sequence.state == "finished":
            return
        self.tables.release(sequence)
        self._holding.discard(sequence)
        if sequence.saved is not None:
            self.swap.drop(sequence.saved)
            sequence.saved = None
        sequence.state = "finished"
        sequence.finish_reason = reason
        sequence.error = error
        del self.live[sequence.request_id]

    @property
    def num_holding(self) -> int:
        """Sequences that hold blocks."""
        return len(self._holding)

    def ended(self) -> list[Sequence]:
        """The sequences that scheduling itself ended with an error since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def next_chunks(self) -> list[Chunk]:
        """Chunks of the next step that no token of this one can change, to be computed before `schedule`.

        They are of sequences that have their blocks already, in order of arrival, up to one that `schedule`
        has to decide about, or whose first token comes with its last chunk.
        """
        chunks: list[Chunk] = []
        for sequence in self.live.values():
            if sequence.state not in ("prefilling", "decoding"):
                break
            chunk = self._chunk(sequence, chunks) if sequence.state == "prefilling" else None
            if chunk is None:
                continue
            if chunk.gives_first_token:
                break
            chunks.append(chunk)
        return chunks

    def schedule(self, *, begun: bool = False) -> Batch:
        """The next step's work, with all blocks it writes to allocated.

        begun: chunks of this step were computed already (`next_chunks`), so it has no others.
        Sequences in `Batch.decode` may have chunks in the same batch: they are ready once those are computed.
        """
        chunks: list[Chunk] = []
        decode: list[Sequence] = []
        admitting = True
        self._gave_way.clear()
        self._next_in = None
        for sequence in tuple(self.live.values()):
            if sequence.state == "finished":
                continue
            oldest = sequence is next(iter(self.live.values()))
            if sequence.state == "decoding" and sequence.awaits_prefill_logits:
                self._restart(sequence)
            if sequence.state in ("queued", "swapped"):
                # When one cannot enter, later ones wait as well: letting them by would starve it.
                admitting = admitting and self._admit(sequence, oldest)
                if not admitting:
                    continue
            elif not self._grow(sequence, oldest):
                admitting = False
                continue
            filled = sequence.num_computed
            if not begun and filled < sequence.fill_target:
                if sequence.writer(filled) == "given":
                    self._lose(sequence)
                    continue
                chunk = self._chunk(sequence, chunks)
                if chunk is not None:
                    chunks.append(chunk)
                    filled = chunk.end
            if filled == sequence.fill_target and not sequence.awaits_prefill_logits:
                decode.append(sequence)
        return Batch(
            prefill=tuple(chunk for chunk in chunks if chunk.writer == "prefill"),
            rebuild=tuple(chunk for chunk in chunks if chunk.writer == "decode"),
            decode=tuple(decode),
        )

    def has_other_work(self, num_decoding: int) -> bool:
        """Whether the next step may be more than one more token for the sequences that are decoding now.

        num_decoding: how many those are.  True also where only `schedule` can tell.
        """
        holders = len(self._holding)
        if holders != num_decoding or self._ended:
            return True
        if len(self.live) == holders:
            return False
        if next(iter(self.live.values())).state in ("queued", "swapped"):
            return True  # the oldest enters whatever it takes
        if holders >= self.max_batch_size:
            return False
        if self._next_in is None or self._next_in[0].state not in ("queued", "swapped"):
            waiting = next(s for s in self.live.values() if s.state in ("queued", "swapped"))
            self._next_in = waiting, self._missing(waiting)
        waiting, missing = self._next_in
        if missing + holders > self.tables.pool.num_available:
            return False
        return not waiting.given or self._is_safe(waiting)

    def extend(self, sequences: Collection[Sequence]) -> bool:
        """One block more for each of these, taken from nobody.  False: too few, and none is given."""
        if len(sequences) > self.tables.pool.num_available:
            return False
        for sequence in sequences:
            self.tables.extend(sequence)
        return True

    def chunk_done(self, chunk: Chunk) -> None:
        """Note that a chunk's KV is in the cache; what its prefill module wrote becomes findable."""
        sequence = chunk.sequence
        assert sequence.num_computed == chunk.start and sequence.state == "prefilling"
        sequence.num_computed = chunk.end
        if chunk.writer == "prefill":
            self.tables.register(sequence)
        if sequence.num_computed == sequence.fill_target:
            sequence.state = "decoding"

    def token_done(self, sequence: Sequence, token: int) -> None:
        """Append a new token: the decode module's, which wrote the KV of the one before, or the first one."""
        assert sequence.state == "decoding" and sequence.num_computed == sequence.fill_target
        sequence.num_computed = len(sequence.tokens)
        sequence.tokens.append(token)

    def _chunk(self, sequence: Sequence, chunks: list[Chunk]) -> Chunk | None:
        """What a sequence adds to the chunks of a step; None where budget or module are others'."""
        start = sequence.num_computed
        writer = sequence.writer(start)
        budget = self.token_budget - sum(chunk.length for chunk in chunks)
        if writer == "given" or budget == 0:
            return None
        end = sequence.prefill_length if writer == "prefill" else sequence.fill_target
        chunk = Chunk(sequence, start, min(budget, end - start), writer)
        return chunk if not chunks or chunk.module == chunks[0].module else None

    def _admit(self, sequence: Sequence, oldest: bool) -> bool:
        """Give a sequence without blocks its blocks, and its saved KV back.  False: it has to wait."""
        if sequence in self._gave_way or (sequence.given and not self._is_safe(sequence)):
            return False
        while True:
            holders = len(self._holding)
            missing = self._missing(sequence)
            # Whoever enters leaves each of the others room for one more block, or it would soon be thrown
            # out again.
            spare = 0 if oldest else holders
            if holders < self.max_batch_size and missing + spare <= self.tables.pool.num_available:
                break
            if not oldest:
                return False
            self._preempt_latest(sequence, give_up=True)
        self._holding.add(sequence)
        if sequence.state == "swapped":
            self.tables.reserve(sequence)
            saved, sequence.saved = sequence.saved, None
            try:
                self.swap.restore(saved, sequence.block_ids)
            except Exception as failure:
                self._lose(sequence, f"restoring it from host memory failed: {failure}")
                return False
        else:
            self.tables.admit(sequence)
        sequence.state = "decoding" if sequence.num_computed == sequence.fill_target else "prefilling"
        return True

    def _missing(self, sequence: Sequence) -> int:
        """Available blocks that a sequence without blocks would take."""
        if sequence.state == "swapped":
            return self.tables.blocks_for(len(sequence.tokens))
        return self.tables.missing_for_admission(sequence)

    def _is_safe(self, sequence: Sequence) -> bool:
        """Whether KV that cannot be rebuilt may take blocks: it can be saved, or nobody will ask for them."""
        needed = self._most_blocks(sequence)
        if self.swap.has_room(needed):
            return True
        older = (self._most_blocks(s) for s in self.live.values() if s.arrival < sequence.arrival)
        return sum(older, needed) <= self.tables.pool.num_blocks

    def _most_blocks(self, sequence: Sequence) -> int:
        """Blocks of a sequence that runs to its last token, whose own KV is never written."""
        return self.tables.blocks_for(sequence.num_prompt + sequence.request.max_tokens - 1)

    def _grow(self, sequence: Sequence, oldest: bool) -> bool:
        """Give a sequence the block its last token needs.  False: it has to wait, keeping its blocks."""
        while self.tables.missing_for_next(sequence) > self.tables.pool.num_available:
            if not self._preempt_latest(sequence, give_up=oldest):
                return False
        self.tables.grow(sequence)
        return True

    def _preempt_latest(self, sequence: Sequence, *, give_up: bool) -> bool:
        """Take the blocks of the latest arrival after `sequence` whose KV can come back.

        give_up: if there is none, end the latest one although its KV is lost with that.
        """
        later = sorted((s for s in self._holding if s.arrival > sequence.arrival), key=lambda s: -s.arrival)
        for victim in later:
            if self._preempt(victim):
                return True
        if not give_up:
            return False
        assert later, "the oldest sequence does not fit an otherwise empty pool: submission let it in"
        self._lose(later[0])
        return True

    def _preempt(self, victim: Sequence) -> bool:
        """Move a sequence's KV to host memory, or drop what can be rebuilt.  False: neither is possible."""
        saved = None
        if victim.num_computed:
            saved = self.swap.save(victim.block_ids[: self.tables.blocks_for(victim.num_computed)])
        if saved is not None:
            victim.saved = saved
            victim.state = "swapped"
            self.num_swaps += 1
        elif victim.given:
            return False
        else:
            victim.num_computed = 0
            victim.state = "queued"
            self.num_rebuilds += 1
        self.tables.release(victim)
        self._holding.remove(victim)
        victim.num_preemptions += 1
        self._gave_way.add(victim)
        return True

    def _restart(self, sequence: Sequence) -> None:
        """Begin a prompt again whose logits, and with them the first token, an interruption has lost."""
        self.tables.release(sequence)
        self._holding.remove(sequence)
        sequence.num_computed = 0
        sequence.state = "queued"

    def _lose(self, sequence: Sequence, why: str | None = None) -> None:
        if why is None:
            why = (
                f"its {sequence.prefill_length} prompt positions came with the request, its cache blocks were"
                " needed by an older request and the swap space is full; no module here may recompute them"
            )
        self.num_lost += 1
        self.finish(sequence, "error", f"MissingKV: the KV of request {sequence.request_id!r} is gone: {why}")
        self._ended.append(sequence)
