"""What a request has been answered so far: its text, when it ends, and what is told of each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from qsun.core import Completion, FinishReason, Sequence, StepOutput, TokenLogprobs
from qsun.engine.detokenizer import TextStream
from qsun.engine.sampler import SamplerRow

__all__ = ["Answer", "CompletionBuilder"]


@dataclass(slots=True, eq=False)
class Answer:
    """A sequence on its way, with what the scheduler has no use for.

    end_ids: token ids that end it: its stop_token_ids, and the model's own unless ignore_eos.
    """

    sequence: Sequence
    stream: TextStream
    end_ids: frozenset[int]

    def sampler_row(self) -> SamplerRow:
        """What the sampler has to know for the next token."""
        request = self.sequence.request
        return SamplerRow(
            request.params, request.seed, self.sequence.tokens, self.sequence.num_prompt, self.end_ids
        )

    def may_end(self, token: int) -> bool:
        """Whether the token just appended to the sequence may end the request.

        Where there are stop strings only its text can tell, which is not looked at.
        """
        request, count = self.sequence.request, self.sequence.num_output
        ends = token in self.end_ids and count > request.params.min_tokens
        return ends or count >= request.max_tokens or bool(request.params.stop)

    def token(self, token: int, logprobs: TokenLogprobs | None) -> StepOutput:
        """Take in the token just appended to the sequence.  The output says whether it ends the request."""
        reason = self._reason(token)
        text = self.stream.take() if reason is None else self.stream.finish()
        return self._output((token,), text, logprobs, reason, None)

    def _reason(self, token: int) -> FinishReason | None:
        request, count = self.sequence.request, self.sequence.num_output
        if token in self.end_ids and count > request.params.min_tokens:
            return "stop"  # its own text, if it has any, is not part of the answer
        if self.stream.add(token, may_stop=count >= request.params.min_tokens):
            return "stop"
        return "length" if count >= request.max_tokens else None

    def ended(self) -> StepOutput:
        """The last output of a sequence that ended without a token: cancelled or failed."""
        sequence = self.sequence
        assert sequence.finish_reason is not None
        return self._output((), self.stream.finish(), None, sequence.finish_reason, sequence.error)

    def _output(
        self,
        tokens: tuple[int, ...],
        text: str,
        logprobs: TokenLogprobs | None,
        reason: FinishReason | None,
        error: str | None,
    ) -> StepOutput:
        request = self.sequence.request
        wanted = request.params.logprobs is not None
        told = () if logprobs is None else (logprobs,)
        return StepOutput(
            request.request_id, request.model, tokens, text, told if wanted else None, reason, error
        )


@dataclass(slots=True)
class CompletionBuilder:
    """Joins the outputs of one request."""

    prompt_token_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: StepOutput | None = None

    def add(self, output: StepOutput) -> None:
        """Take in the next output."""
        self.token_ids += output.token_ids
        self.text.append(output.text)
        self.logprobs += output.logprobs or ()
        self.last = output

    def build(self) -> Completion:
        """The completion, once the last output is in."""
        last = self.last
        assert last is not None and last.finish_reason is not None
        return Completion(
            request_id=last.request_id,
            model=last.model,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=tuple(self.token_ids),
            text="".join(self.text),
            logprobs=None if last.logprobs is None else tuple(self.logprobs),
            finish_reason=last.finish_reason,
            error=last.error,
        )
