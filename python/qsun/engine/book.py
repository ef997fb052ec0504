"""The requests of an engine from acceptance to their last output."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qsun.core import Request, SamplingParams, Sequence, StepOutput
from qsun.engine.answers import Answer
from qsun.engine.detokenizer import TextStream
from qsun.engine.intake import make_request
from qsun.engine.outbox import Outbox
from qsun.engine.registry import Model, Registry
from qsun.engine.statistics import Counters
from qsun.engine.step import StepExecutor
from qsun.engine.swap import SavedKV
from qsun.engine.workspace import Workspace
from qsun.errors import RequestError

__all__ = ["RequestBook"]


class RequestBook:
    """Who is being answered, and what was computed and not told yet.

    end_ids: the model's own end-of-sequence ids.
    """

    def __init__(
        self, workspace: Workspace, registry: Registry, tokenizer: Any | None, end_ids: frozenset[int]
    ) -> None:
        self.workspace = workspace
        self.counters = Counters()
        self.answers: dict[str, Answer] = {}
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._outbox = Outbox()
        self._executor = StepExecutor(
            workspace, registry, self.answers, self.counters, overlap=workspace.overlap
        )
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """True while there is something to compute or to tell."""
        return bool(self.answers or self._outbox)

    def request(
        self, tokens: tuple[int, ...], model: str, params: SamplingParams | None, request_id: str | None
    ) -> Request:
        """A checked request that has not entered.  Raises RequestError."""
        if request_id is None:
            request_id = f"request-{self._arrivals}"
            while self._in_use(request_id):
                request_id += "+"
        elif not isinstance(request_id, str) or not request_id:
            raise RequestError(f"request_id must be a non-empty string or None, got {request_id!r}")
        elif self._in_use(request_id):
            raise RequestError(f"request_id {request_id!r} is in use, expected a new one")
        limits = self.workspace.limits
        return make_request(request_id, model, tokens, params, self._arrivals, limits, self._tokenizer)

    def is_untold(self, request_id: str) -> bool:
        """Whether outputs of a request wait to be told."""
        return request_id in self._outbox

    def _in_use(self, request_id: str) -> bool:
        return request_id in self.answers or self.is_untold(request_id)

    def enter(self, model: Model, request: Request, saved: SavedKV | None = None) -> Answer:
        """Take in a checked request.  saved: its prompt's KV, when that came with it.

        Raises RequestError, changing nothing, when the tokenizer cannot decode the end of the prompt.
        """
        prompt = request.prompt_token_ids
        prefill_length = len(prompt) - (model.first_token == "decode")
        sequence = Sequence(
            request, model.fingerprint, prefill_length, list(prompt), first_token=model.first_token
        )
        if saved is not None:
            sequence.given = True
            sequence.state = "swapped"
            sequence.saved = saved
            sequence.num_computed = prefill_length
        params = request.params
        end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._end_ids)
        try:
            stream = TextStream(self._tokenizer, prompt, params.stop)
        except Exception as failure:  # whatever the tokenizer raises
            raise RequestError(
                f"prompt ends in tokens that the tokenizer cannot decode ({failure}),"
                " expected ids that it has"
            ) from failure
        answer = Answer(sequence, stream, end_ids)
        self.workspace.scheduler.add(sequence)
        self.answers[request.request_id] = answer
        self._arrivals += 1
        self.counters.prompt_tokens += len(prompt)
        return answer

    def give_first_token(self, answer: Answer, token: int) -> None:
        """Append a first token that came with the request, which it may already end."""
        answer.sequence.tokens.append(token)
        self._executor.tell(answer, token, None)
        self._outbox.put(self._executor.take_outputs())

    def cancel(self, request_id: str) -> bool:
        """End a request and keep the output that tells so.  False when it is not running."""
        answer = self.answers.get(request_id)
        if answer is None:
            return False
        self._outbox.put([self._executor.end(answer, "cancelled")])
        return True

    def withdraw(self, request_ids: Collection[str]) -> None:
        """Cancel requests of which nobody will ask."""
        for request_id in request_ids:
            self.cancel(request_id)
        self._outbox.take(request_ids)

    def step(self) -> list[StepOutput]:
        """What was not told yet, and what one step computes."""
        computed = self._compute()
        return self._outbox.take_all() + computed

    def next_of(self, request_ids: Collection[str]) -> list[StepOutput]:
        """The next outputs of some requests, possibly none; those of others are kept for whoever asks."""
        outputs = self._outbox.take(request_ids)
        if not outputs:
            self._outbox.put(self._compute())
            outputs = self._outbox.take(request_ids)
        return outputs

    def _compute(self) -> list[StepOutput]:
        if not self.answers:
            return []
        try:
            return self._executor.step()
        except BaseException:
            # The call returns nothing: what it had to tell waits like all else that was not told.
            self._outbox.put(self._executor.take_outputs())
            raise
