"""One step: what the scheduler plans is computed, sampled and told; what fails ends alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qsun.core import Chunk, FinishReason, Sequence, StepOutput, TokenLogprobs
from qsun.engine.sampler import sample

if TYPE_CHECKING:
    from qsun.engine.answers import Answer
    from qsun.engine.registry import Registry
    from qsun.engine.statistics import Counters
    from qsun.engine.workspace import Workspace

__all__ = ["StepExecutor"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepExecutor:
    """Executes steps on an engine's state, which stays the engine's.

    A request's KV counts as written only after the forward pass that wrote it has returned.  So when a module
    fails, its requests end in an error that names it, and no KV that is missing or half written is ever read.
    """

    workspace: Workspace
    registry: Registry
    answers: dict[str, Answer]
    counters: Counters
    outputs: list[StepOutput] = field(default_factory=list)

    def step(self) -> list[StepOutput]:
        """Run one step and return its outputs."""
        # Scheduling copies KV between cache and host, so it belongs on the engine's stream like the rest.
        with self.workspace.runner.running():
            self._step()
        return self.outputs

    def _step(self) -> None:
        batch = self.workspace.scheduler.schedule()
        for lost in self.workspace.scheduler.ended():
            self.outputs.append(self._close(lost))
        if batch.empty:
            return
        self.counters.steps += 1
        first = self._prefill(batch.prefill)
        self._rebuild(batch.rebuild)
        ready = [sequence for sequence in batch.decode if sequence.state == "decoding"]
        logits = [part for part in (self._decode(ready), self._first_logits(first)) if part is not None]
        # Whoever failed above has left the batch, and its part of the logits was never made.
        drawing = [s for s in (*ready, *(s for s, _ in first)) if s.state != "finished"]
        if drawing:
            self._draw(drawing, logits[0] if len(logits) == 1 else torch.cat(logits))

    def _prefill(self, chunks: Iterable[Chunk]) -> list[tuple[Sequence, Tensor]]:
        """Compute prompt chunks, one forward pass a module.

        Returns the sequences whose first token the prefill module gives, with its last hidden state (H,).
        """
        by_module: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            by_module.setdefault(chunk.sequence.fingerprint, []).append(chunk)
        first: list[tuple[Sequence, Tensor]] = []
        for together in by_module.values():
            model = self.registry.get(together[0].sequence.request.model)
            assert model.module is not None, "a model without a module has nothing to prefill"
            try:
                hidden = self.workspace.runner.prefill(model.module.stack, together)
            except Exception as failure:
                self._fail((c.sequence for c in together), f"prefill module of {model.name!r}", failure)
                continue
            row = 0
            for chunk in together:
                row += chunk.length
                self.workspace.scheduler.chunk_done(chunk)
                sequence = chunk.sequence
                if sequence.awaits_prefill_logits and sequence.state == "decoding":
                    first.append((sequence, hidden[row - 1]))
            self.counters.prefill_tokens += row
        return first

    def _rebuild(self, chunks: Iterable[Chunk]) -> None:
        """Compute response positions that a preemption has lost, by the decode module's stack."""
        chunks = [chunk for chunk in chunks if chunk.sequence.state != "finished"]
        if not chunks:
            return
        try:
            self.workspace.runner.rebuild(chunks)
        except Exception as failure:
            self._fail((chunk.sequence for chunk in chunks), "decode module", failure)
            return
        for chunk in chunks:
            self.workspace.scheduler.chunk_done(chunk)
            self.counters.rebuilt_tokens += chunk.length

    def _decode(self, sequences: list[Sequence]) -> Tensor | None:
        """The decode module's logits, float32 (n, V), for all sequences of all models at once."""
        if not sequences:
            return None
        try:
            logits = self.workspace.runner.decode(sequences)
        except Exception as failure:
            self._fail(sequences, "decode module", failure)
            return None
        counters, plan = self.counters, self.workspace.plan
        counters.decode_steps += 1
        counters.decode_tokens += len(sequences)
        counters.weight_bytes_read += self.workspace.runner.decode_module.bytes_per_step
        read = sum(len(sequence.tokens) for sequence in sequences)
        counters.kv_bytes_read += read * plan.bytes_per_block // plan.block_size
        return logits

    def _first_logits(self, first: list[tuple[Sequence, Tensor]]) -> Tensor | None:
        """Logits, float32 (n, V), of prefill modules' last hidden states through the shared lm_head."""
        if not first:
            return None
        try:
            return self.workspace.runner.logits(torch.stack([hidden for _, hidden in first]))
        except Exception as failure:
            self._fail((sequence for sequence, _ in first), "lm_head", failure)
            return None

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> None:
        answers = [self.answers[sequence.request_id] for sequence in sequences]
        try:
            drawn = sample(logits, [answer.sampler_row() for answer in answers])
        except Exception as failure:
            self._fail(sequences, "sampling, or the forward pass before it,", failure)
            return
        results = zip(answers, drawn.token_ids, drawn.valid, drawn.logprobs, strict=True)
        for answer, token, valid, logprobs in results:
            if not valid:
                self.outputs.append(self.end(answer, "error", "the logits are not finite"))
                continue
            self.workspace.scheduler.token_done(answer.sequence, token)
            self.tell(answer, token, logprobs)

    def tell(self, answer: Answer, token: int, logprobs: TokenLogprobs | None) -> None:
        """Tell of a token just appended to a sequence, which it may end."""
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

    def _fail(self, sequences: Iterable[Sequence], what: str, failure: Exception) -> None:
        logger.warning("%s failed", what, exc_info=failure)
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
        counters = self.counters
        counters.prefix_hit_tokens += sequence.num_prefix_hits
        if sequence.finish_reason == "error":
            counters.failed += 1
        elif sequence.finish_reason == "cancelled":
            counters.cancelled += 1
        else:
            counters.finished += 1
        return self.answers.pop(sequence.request_id).ended()
