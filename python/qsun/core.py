"""The nouns of the engine: what a caller asks for, what the scheduler moves, what a forward pass is told.

Nothing here imports torch when it runs, so the scheduler and its tests need none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qsun.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qsun_kernels import AttentionPlan

__all__ = [
    "Batch",
    "Chunk",
    "Completion",
    "DecodeAttention",
    "FinishReason",
    "FirstToken",
    "ForwardContext",
    "PrefillAttention",
    "PrefillChunk",
    "PrefillPlan",
    "Request",
    "SamplingParams",
    "Sequence",
    "SequenceState",
    "StepOutput",
    "TokenLogprobs",
    "Writer",
]

# Who predicts the first new token: the decode module, which reads the last prompt token itself, or the
# prefill module.
FirstToken = Literal["decode", "prefill"]
# Which module writes the keys and values of a position.  "given": they came with the request.
Writer = Literal["prefill", "decode", "given"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
# "queued" holds no blocks; "prefilling" and "decoding" hold blocks; "swapped" has its KV in host memory.
SequenceState = Literal["queued", "prefilling", "decoding", "swapped", "finished"]


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """One new token a row: row b attends to the first `seq_lens[b]` positions of its blocks.

    block_table: int32 (B, max_blocks), block ids of each row; entries past the length are never read.
    seq_lens: int32 (B,), positions in the cache, the new token's included; 0 marks a padding row.
    shares_prefixes: whether rows may begin with the same blocks, which attention can then read once.
    plans: by the window of a layer, how its attention is shared out; the stack makes them, for all layers.
    """

    block_table: Tensor
    seq_lens: Tensor
    shares_prefixes: bool = False
    plans: Mapping[int | None, AttentionPlan] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive positions of one sequence: rows [start, start + length) of the forward's tokens.

    They are positions [context_len, context_len + length) of the sequence.
    block_ids: int64, the blocks that cover the first context_len + length positions.
    """

    start: int
    length: int
    context_len: int
    block_ids: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PrefillPlan:
    """What the attention of consecutive chunks reads and who sees whom, for all layers of one window.

    runs: int64 (num_kv_heads * n,), head by head, for the n blocks that the chunks see, chunk by chunk: the
        row of that head of that block in a cache taken as num_blocks * num_kv_heads rows.
    q_starts: where each chunk's tokens begin, counted from the first one's, and the end of the last one's.
    k_starts, k_lengths: which of the n * block_size slots are those that each chunk sees.
    window: None also where no chunk is longer than the layer's.
    starts: int32 (3, num_chunks + 1), the three above on the device, for FlashAttention; else None.
    masks: of each chunk where that cannot run, bool, rows being all query heads of a key head's group one
        after the other; None where all is seen.
    """

    runs: Tensor
    q_starts: tuple[int, ...]
    k_starts: tuple[int, ...]
    k_lengths: tuple[int, ...]
    window: int | None
    starts: Tensor | None
    masks: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class PrefillAttention:
    """Chunks of several sequences, side by side; each token attends to its own sequence up to itself.

    max_blocks: most blocks that are read at once, no fewer than any one chunk sees; None is no bound.
    plans: by the window of a layer, as in `DecodeAttention`; as many as `max_blocks` takes, in the order of
        the chunks.
    """

    chunks: tuple[PrefillChunk, ...]
    max_blocks: int | None = None
    plans: Mapping[int | None, tuple[PrefillPlan, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Everything a stack needs beside the hidden states of its T tokens.

    positions: int64 (T,), position of each token in its sequence.
    slot_mapping: int64 (T,), where its K and V go: block * block_size + offset; negative: nowhere (padding).
    settled: a layer of this pass has written its keys.  Whatever was launched before the pass had then ended
        when that write began, and so have all inputs of the pass: later layers read them early.
    """

    positions: Tensor
    slot_mapping: Tensor
    attention: DecodeAttention | PrefillAttention
    settled: bool = False


def _number(name: str, value: object, expected: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:  # an integer that no float holds
        number = math.inf
    if not math.isfinite(number):
        raise RequestError(f"{name} must be {expected}, got {value!r}")
    return number


def _integer(name: str, value: object, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be {expected}, got {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    The order is: min_tokens mask, penalties, temperature, top-k, top-p, min-p, draw.

    temperature: 0 takes the most likely token; else logits are divided by it.
    top_k: only the k most likely tokens; 0 is off.
    top_p: only the most likely tokens whose probabilities reach this sum, in (0, 1].
    min_p: only tokens at least this many times as likely as the most likely one, in [0, 1].
    repetition_penalty: logits of tokens in prompt or output are divided (if positive) or multiplied by it,
        in [0.01, 100].
    presence_penalty, frequency_penalty: taken from the logits of tokens of the output, once or times
        their count.
    seed: 0 <= seed < 2**64; the same seed gives the same draws whatever else is in the batch.  None: a
        random one.
    logprobs: also return this many most likely tokens a step, by log-probability of the unmodified logits;
        0 returns that of the chosen token only; None returns nothing.
    stop: the text ends before the first of these strings.  stop_token_ids: these end it like the model's own
        end-of-sequence ids, which ignore_eos switches off.
    max_tokens, min_tokens: bounds of the number of new tokens; before min_tokens no end id is drawn and no
        stop string is looked for.

    Raises RequestError (a ValueError) naming the field, what was got and what is expected.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int = 128
    min_tokens: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if _number("temperature", self.temperature, "a finite number >= 0") < 0:
            raise RequestError(f"temperature must be a finite number >= 0, got {self.temperature!r}")
        if _integer("top_k", self.top_k, "an integer >= 0 (0: off)") < 0:
            raise RequestError(f"top_k must be an integer >= 0 (0: off), got {self.top_k!r}")
        if not 0 < _number("top_p", self.top_p, "a number in (0, 1]") <= 1:
            raise RequestError(f"top_p must be a number in (0, 1], got {self.top_p!r}")
        if not 0 <= _number("min_p", self.min_p, "a number in [0, 1]") <= 1:
            raise RequestError(f"min_p must be a number in [0, 1], got {self.min_p!r}")
        expected = "a number in [0.01, 100]"
        if not 0.01 <= _number("repetition_penalty", self.repetition_penalty, expected) <= 100:
            raise RequestError(f"repetition_penalty must be {expected}, got {self.repetition_penalty!r}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -2 <= _number(name, value, "a number in [-2, 2]") <= 2:
                raise RequestError(f"{name} must be a number in [-2, 2], got {value!r}")
        expected = "an integer in [0, 2**64) or None"
        if self.seed is not None and not 0 <= _integer("seed", self.seed, expected) < 2**64:
            raise RequestError(f"seed must be {expected}, got {self.seed!r}")
        expected = "an integer in [0, 100] or None"
        if self.logprobs is not None and not 0 <= _integer("logprobs", self.logprobs, expected) <= 100:
            raise RequestError(f"logprobs must be {expected}, got {self.logprobs!r}")
        self._check_stops()
        if _integer("max_tokens", self.max_tokens, "an integer >= 1") < 1:
            raise RequestError(f"max_tokens must be an integer >= 1, got {self.max_tokens!r}")
        expected = f"an integer in [0, max_tokens = {self.max_tokens}]"
        if not 0 <= _integer("min_tokens", self.min_tokens, expected) <= self.max_tokens:
            raise RequestError(f"min_tokens must be {expected}, got {self.min_tokens!r}")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")

    def _check_stops(self) -> None:
        # Lists are what callers have at hand; the fields hold tuples so that the value stays hashable.
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif not isinstance(value, tuple):
                raise RequestError(f"{name} must be a tuple or list, got {value!r}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop must hold non-empty strings, got {text!r}")
        for token in self.stop_token_ids:
            if _integer("stop_token_ids", token, "token ids >= 0") < 0:
                raise RequestError(f"stop_token_ids must hold token ids >= 0, got {token!r}")

    @property
    def greedy(self) -> bool:
        """True when every token is the most likely one."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request: `max_tokens` is cut to what the context has room for, `seed` is never None."""

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival: int
    seed: int
    max_tokens: int


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: its tokens, and how much of their KV is in the cache.

    fingerprint: the prefill module whose KV this sequence holds: the provenance of all its blocks.
    prefill_length: the first that many positions are written by that module (or came with the request, when
        `given`); every later one is written by the decode module.
    tokens: prompt, then output.
    num_computed: positions whose KV is in the blocks (or, when swapped, in `saved`).
    saved: the KV in host memory, as the swap space returned it.
    """

    request: Request
    fingerprint: str
    prefill_length: int
    tokens: list[int]
    first_token: FirstToken = "decode"
    given: bool = False
    state: SequenceState = "queued"
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    saved: Any = None
    num_preemptions: int = 0
    num_prefix_hits: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    # How far this sequence's blocks are in the prefix index, and the index's last node of its chain.
    num_indexed: int = 0
    index_node: Any = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def arrival(self) -> int:
        return self.request.arrival

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def fill_target(self) -> int:
        """Positions that must be in the cache before the next token can be had.

        All but the last token, which the decode step itself reads; all of the prompt when the prefill
        module's own logits give the first token.
        """
        return max(len(self.tokens) - 1, self.prefill_length)

    @property
    def awaits_prefill_logits(self) -> bool:
        """True while the prefill module is the one to give the next (first) token."""
        return self.first_token == "prefill" and self.num_output == 0

    def writer(self, position: int) -> Writer:
        """Who writes the KV of a position: the rule that keeps every model itself, in one place."""
        if position < self.prefill_length:
            return "given" if self.given else "prefill"
        return "decode"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, start + length) of a sequence, all written by one module, to compute in this step."""

    sequence: Sequence
    start: int
    length: int
    writer: Literal["prefill", "decode"]

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def gives_first_token(self) -> bool:
        """Whether the logits behind it, the prefill module's own, are those of the first new token."""
        return self.sequence.awaits_prefill_logits and self.end == self.sequence.fill_target

    @property
    def module(self) -> str | None:
        """Whose forward pass computes it: a prefill module's fingerprint, None for the decode module."""
        return self.sequence.fingerprint if self.writer == "prefill" else None


@dataclass(frozen=True, slots=True)
class Batch:
    """The work of one step, in order of execution, each part in order of arrival.

    prefill: prompt positions, all by one prefill module.  rebuild: response positions lost to a preemption,
    by the decode module; one of the two is empty.  decode: the sequences that get one token from the decode
    module, of all models.
    """

    prefill: tuple[Chunk, ...]
    rebuild: tuple[Chunk, ...]
    decode: tuple[Sequence, ...]

    @property
    def empty(self) -> bool:
        return not (self.prefill or self.rebuild or self.decode)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities of one step, of the unmodified logits: the chosen and the top tokens."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one request gained in one step.

    token_ids: its new tokens, the one that ended it included.  text: the text that became certain, which
    may lag behind the tokens (half of a character, the start of a stop string).  finish_reason: None while
    it goes on.  error: why, when finish_reason is "error".
    """

    request_id: str
    model: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request: `text` ends before the stop string or end id, `token_ids` hold all tokens drawn."""

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    error: str | None = None
