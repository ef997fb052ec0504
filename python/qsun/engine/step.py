"""One step: what the scheduler plans is computed, sampled and told; what fails ends alone.

A decode step is *launched*, *collected* (its tokens come to the host and to their sequences) and *told*
(text, stop strings, outputs).  With overlap, the host launches the next step before it collects the last, so
that the device never waits for the host:

    device    | step t      | step t+1    | step t+2    |
    host        launch t+1, collect t, tell t
                              launch t+2, collect t+1, tell t+1

That is possible where step t+1 is the sequences of step t once more, reading the tokens of step t where the
device has left them (`Runner.decode_next`).  Of a sequence that turns out to have ended at t, step t+1 has
computed a token too many: it is dropped and never told.  The blocks of such a sequence are free at once, for
whatever is written to them next comes later on the same stream.

While prompts are read, the batch of the next step is not known, but most of its chunks are: those are
launched before the last step is collected, and the decode batch after.  So the device reads prompts while the
host collects, plans and tells, and a chunk's many launches are made while the chunk before it is computed:

    device    | chunk t, decode t     | chunk t+1, decode t+1     |
    host        chunk t+1, collect t, decode t+1, tell t

Everything else is launched after the last step was collected: a batch that others join, preemptions, rows
that only the host can draw (`needs_host`) and first tokens by a prefill module.  Even then most of the
telling is done while the device works.  The tokens that scheduler and sequences know are those of collected
steps, so none of their rules changes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qsun.core import Chunk, FinishReason, Sequence, StepOutput, TokenLogprobs
from qsun.engine.sampler import needs_host, sample

if TYPE_CHECKING:
    from qsun.engine.answers import Answer
    from qsun.engine.decode_inputs import Members
    from qsun.engine.registry import Registry
    from qsun.engine.runner import DecodeStep
    from qsun.engine.statistics import Counters
    from qsun.engine.workspace import Workspace

__all__ = ["StepExecutor"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Launched:
    """What was launched and not collected.

    decode: the decode batch; None without one.  by_host: rows of it whose tokens the host has to draw.
    first: sequences whose first token the prefill module gives, and its logits, float32 (n, V).
    read: sequences whose chunks it computes.  chunks_done: the event behind those; None on a CPU.
    ahead: launched before the tokens that it reads were known.
    """

    decode: DecodeStep | None
    by_host: Members = ()
    first: tuple[Sequence, ...] = ()
    first_logits: Tensor | None = None
    read: tuple[Sequence, ...] = ()
    chunks_done: torch.cuda.Event | None = None
    ahead: bool = False

    def tokens(self) -> list[int]:
        """Of the decode batch, by row.  Waits for the step to end."""
        if self.decode is not None:
            return self.decode.tokens()
        if self.chunks_done is not None:
            # Else the host would launch a long prompt to its end, and whoever comes would wait behind it.
            self.chunks_done.synchronize()
        return []

    @property
    def can_be_followed(self) -> bool:
        """Whether the next step can be launched before this one is collected."""
        return self.decode is not None and not self.by_host and not self.first


@dataclass(slots=True)
class StepExecutor:
    """Executes steps on an engine's state, which stays the engine's.

    A request's KV counts as written only after the forward pass that wrote it has returned.  So when a module
    fails, its requests end in an error that names it, and no KV that is missing or half written is ever read.

    overlap: whether a step may be launched before the last one is collected; what it gains is then told by
    the next call.
    """

    workspace: Workspace
    registry: Registry
    answers: dict[str, Answer]
    counters: Counters
    overlap: bool
    outputs: list[StepOutput] = field(default_factory=list)
    _launched: _Launched | None = None
    _untold: list[tuple[Answer, int, TokenLogprobs | None]] = field(default_factory=list)

    def step(self) -> list[StepOutput]:
        """Run one step and return what there is to tell."""
        started, waited = time.perf_counter(), self.counters.wait_seconds
        # Scheduling copies KV between cache and host, so it belongs on the engine's stream like the rest.
        with self.workspace.runner.running():
            self._step()
        waited = self.counters.wait_seconds - waited
        self.counters.host_seconds += time.perf_counter() - started - waited
        return self.take_outputs()

    def take_outputs(self) -> list[StepOutput]:
        """Everything there is to tell."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def _step(self) -> None:
        last, self._launched = self._launched, None
        following, failure = None, None
        begun: list[Chunk] = []
        if last is not None:
            if last.can_be_followed:
                try:
                    following = self._follow()
                except Exception as error:
                    failure = error
            # Tokens that the host has to draw are drawn on the device too: not behind a chunk.
            if following is None and failure is None and not last.by_host and not last.first:
                begun = self._begin()
            self._collect(last)
            if failure is not None and last.decode is not None:
                self._fail((sequence for sequence, _ in last.decode.members), "decode module", failure)
        if following is None:
            following = self._launch(begun)
        self._tell_untold()
        if following is not None and not self.overlap:
            self._collect(following)
            self._tell_untold()
        else:
            self._launched = following

    def _follow(self) -> _Launched | None:
        """Launch the step after the last, of which no token is known yet; None where that cannot be."""
        scheduler, runner = self.workspace.scheduler, self.workspace.runner
        if not runner.num_decoding or scheduler.has_other_work(runner.num_decoding):
            return None
        step = runner.decode_next(scheduler.extend)
        return None if step is None else _Launched(step, ahead=True)

    def _begin(self) -> list[Chunk]:
        """Launch the chunks that the next step has in any case.  The last one may be under way."""
        chunks = self.workspace.scheduler.next_chunks()
        if chunks:
            first = self._compute(chunks)
            assert not first, "a first token is drawn with the step that is planned"
        return chunks

    def _launch(self, begun: list[Chunk]) -> _Launched | None:
        """Plan the rest of a step and launch it; None when there is nothing to compute.

        Nothing is under way but the chunks that were begun.
        """
        self._tell_untold(ends_only=True)
        batch = self.workspace.scheduler.schedule(begun=bool(begun))
        for lost in self.workspace.scheduler.ended():
            self._lose(lost)
        if batch.empty and not begun:
            return None
        self.counters.steps += 1
        chunks = [*batch.prefill, *batch.rebuild]
        first = self._compute(chunks)
        chunks += begun
        ready = [sequence for sequence in batch.decode if sequence.state == "decoding"]
        decode = self._decode(ready)
        first_logits = self._first_logits(first)
        by_host: Members = ()
        if decode is not None:
            by_host = tuple(m for m in decode.members if needs_host(m[0].request.params, m[0].num_output))
        # Whoever failed above has left the batch, and its part of the logits was never made.
        drawing = tuple(sequence for sequence, _ in first) if first_logits is not None else ()
        read = tuple(chunk.sequence for chunk in chunks)
        chunks_done = self.workspace.runner.mark() if decode is None else None
        return _Launched(decode, by_host, drawing, first_logits, read, chunks_done)

    def _compute(self, chunks: Items[Chunk]) -> list[tuple[Sequence, Tensor]]:
        """Compute chunks of one module.

        Returns the sequences whose first token the prefill module gives, with its last hidden state (H,).
        """
        if not chunks:
            return []
        if chunks[0].writer == "prefill":
            return self._prefill(chunks)
        self._rebuild(chunks)
        return []

    def _prefill(self, chunks: Items[Chunk]) -> list[tuple[Sequence, Tensor]]:
        """Compute prompt chunks of one prefill module; returns what `_compute` does."""
        model = self.registry.get(chunks[0].sequence.request.model)
        assert model.module is not None, "a model without a module has nothing to prefill"
        try:
            hidden = self.workspace.runner.prefill(model.module.stack, chunks)
        except Exception as failure:
            self._fail((c.sequence for c in chunks), f"prefill module of {model.name!r}", failure)
            return []
        first: list[tuple[Sequence, Tensor]] = []
        row = 0
        for chunk in chunks:
            row += chunk.length
            self.workspace.scheduler.chunk_done(chunk)
            sequence = chunk.sequence
            if hidden is not None and sequence.awaits_prefill_logits and sequence.state == "decoding":
                first.append((sequence, hidden[row - 1]))
        self.counters.prefill_tokens += row
        return first

    def _rebuild(self, chunks: Items[Chunk]) -> None:
        """Compute response positions that a preemption has lost, by the decode module's stack."""
        try:
            self.workspace.runner.rebuild(chunks)
        except Exception as failure:
            self._fail((chunk.sequence for chunk in chunks), "decode module", failure)
            return
        for chunk in chunks:
            self.workspace.scheduler.chunk_done(chunk)
            self.counters.rebuilt_tokens += chunk.length

    def _decode(self, sequences: list[Sequence]) -> DecodeStep | None:
        """Launch the decode module's step for all sequences of all models at once."""
        if not sequences:
            return None
        try:
            return self.workspace.runner.decode(sequences)
        except Exception as failure:
            self._fail(sequences, "decode module", failure)
            return None

    def _first_logits(self, first: list[tuple[Sequence, Tensor]]) -> Tensor | None:
        """Logits, float32 (n, V), of prefill modules' last hidden states through the shared lm_head."""
        if not first:
            return None
        try:
            return self.workspace.runner.logits(torch.stack([hidden for _, hidden in first]))
        except Exception as failure:
            self._fail((sequence for sequence, _ in first), "lm_head", failure)
            return None

    def _collect(self, launched: _Launched) -> None:
        """Wait for a step, and append its tokens to their sequences."""
        counters = self.counters
        members = () if launched.decode is None else launched.decode.members
        started = time.perf_counter()
        try:
            tokens = launched.tokens()
        except Exception as failure:
            sequences = [*(sequence for sequence, _ in members), *launched.first]
            if launched.decode is None:
                sequences += launched.read
            self._fail(sequences, "sampling, or the forward pass before it,", failure)
            return
        finally:
            counters.wait_seconds += time.perf_counter() - started
        # Whoever had ended, or was cancelled, when this was computed: nobody asked for it.
        alive = [member for member in members if member[0].state != "finished"]
        counters.dropped_tokens += len(members) - len(alive)
        if alive:
            plan = self.workspace.plan
            positions = sum(len(sequence.tokens) for sequence, _ in alive)
            counters.steps += launched.ahead
            counters.decode_steps += 1
            counters.decode_tokens += len(alive)
            counters.weight_bytes_read += self.workspace.runner.decode_module.bytes_per_step
            counters.kv_bytes_read += positions * plan.bytes_per_block // plan.block_size
        by_host = self._draw_by_host(launched)
        for sequence, row in alive:
            if sequence.state != "finished":
                self._append(sequence, *(by_host.get(sequence) or (tokens[row], None)))
        for sequence in launched.first:
            if sequence.state != "finished":
                self._append(sequence, *by_host[sequence])

    def _draw_by_host(self, launched: _Launched) -> dict[Sequence, tuple[int, TokenLogprobs | None]]:
        """Tokens, with log-probabilities, of the rows that only the host can draw; -1 is no valid token."""
        parts: list[tuple[Tensor, list[int]]] = []
        drawing = [(sequence, row) for sequence, row in launched.by_host if sequence.state != "finished"]
        if drawing:
            assert launched.decode is not None
            parts.append((launched.decode.logits, [row for _, row in drawing]))
        sequences = [sequence for sequence, _ in drawing]
        if launched.first_logits is not None:
            going_on = [i for i, sequence in enumerate(launched.first) if sequence.state != "finished"]
            sequences += [launched.first[i] for i in going_on]
            parts.append((launched.first_logits, going_on))
        if not sequences:
            return {}
        answers = [self.answers[sequence.request_id] for sequence in sequences]
        try:
            logits = torch.cat([_rows(part, rows) for part, rows in parts])
            drawn = sample(logits, [answer.sampler_row() for answer in answers])
        except Exception as failure:
            self._fail(sequences, "sampling, or the forward pass before it,", failure)
            return {}
        tokens = (token if valid else -1 for token, valid in zip(drawn.token_ids, drawn.valid, strict=True))
        return dict(zip(sequences, zip(tokens, drawn.logprobs, strict=True), strict=True))

    def _append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        answer = self.answers[sequence.request_id]
        if token < 0:
            self.outputs.append(self.end(answer, "error", "the logits are not finite"))
            return
        self.workspace.scheduler.token_done(sequence, token)
        self._untold.append((answer, token, logprobs))

    def _tell_untold(self, *, ends_only: bool = False) -> None:
        """Tell of the tokens appended to sequences, each once, whatever interrupts this.

        ends_only: only of those that may end their requests: one that has ended takes no blocks from others
        in the step that is planned next.
        """
        index = 0
        # The list may shrink meanwhile: before a failure is told, all else is (`_fail`).
        while index < len(self._untold):
            answer, token, logprobs = self._untold[index]
            if ends_only and not answer.may_end(token):
                index += 1
            else:
                del self._untold[index]
                self.tell(answer, token, logprobs)

    def tell(self, answer: Answer, token: int, logprobs: TokenLogprobs | None) -> None:
        """Tell of a token just appended to a sequence, which it may end."""
        if self.answers.get(answer.sequence.request_id) is not answer:
            return  # withdrawn after a step that was interrupted
        self.counters.output_tokens += 1
        try:
            output = answer.token(token, logprobs)
        except Exception as failure:
            # Some tokenizers cannot decode every id that the vocabulary has room for.
            answer.stream.give_up()
            self._fail([answer.sequence], f"decoding token {token} to text", failure)
            return
        self.outputs.append(output)
        if output.finish_reason is not None:
            self.end(answer, output.finish_reason)

    def _lose(self, sequence: Sequence) -> None:
        """Tell of a sequence that scheduling has ended."""
        self._tell_untold()
        # Its last token may have ended it before.
        if sequence.request_id in self.answers:
            self.outputs.append(self._close(sequence))

    def _fail(self, sequences: Iterable[Sequence], what: str, failure: Exception) -> None:
        logger.warning("%s failed", what, exc_info=failure)
        # What they gained before comes first.
        self._tell_untold()
        for sequence in sequences:
            if sequence.state != "finished":
                error = f"{what} failed: {type(failure).__name__}: {failure}"
                self.outputs.append(self.end(self.answers[sequence.request_id], "error", error))

    def end(self, answer: Answer, reason: FinishReason, error: str | None = None) -> StepOutput:
        """End a request and take back all it holds.  Returns an output that tells so and holds no token."""
        sequence = answer.sequence
        if error is not None:
            error = f"request {sequence.request_id!r}: {error}"
        self.workspace.scheduler.finish(sequence, reason, error)
        return self._close(sequence)

    def _close(self, sequence: Sequence) -> StepOutput:
        self.workspace.runner.leave(sequence)
        counters = self.counters
        counters.prefix_hit_tokens += sequence.num_prefix_hits
        if sequence.finish_reason == "error":
            counters.failed += 1
        elif sequence.finish_reason == "cancelled":
            counters.cancelled += 1
        else:
            counters.finished += 1
        return self.answers.pop(sequence.request_id).ended()


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """float32 (len(rows), V) of logits (n, V)."""
    return logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)].float()
