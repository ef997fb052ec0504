"""Whole answers: prompts of random tokens by a prefill module, then N tokens of each by the decode module.

`DecodeEngine.generate` is timed as a whole. It does not tell when a token came, so the same prompts are then
submitted and stepped, as it does inside, with a clock beside each token.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qsun.core import SamplingParams
from qsun.engine.engine import DecodeEngine


@dataclass(frozen=True, slots=True)
class GenerateTimes:
    """wall_s: of `generate`. stamps_s: for each request, when its tokens were told, from submission on."""

    wall_s: float
    stamps_s: tuple[tuple[float, ...], ...]

    @property
    def ttft_s(self) -> list[float]:
        """Seconds to each request's first token."""
        return [stamps[0] for stamps in self.stamps_s]

    @property
    def tpot_s(self) -> list[float]:
        """Seconds a token of each request, the first excluded: (last - first) / (tokens - 1), as vLLM's."""
        return [(stamps[-1] - stamps[0]) / (len(stamps) - 1) for stamps in self.stamps_s]

    @property
    def settled_s(self) -> list[float]:
        """The intervals between tokens while every request decodes: after the last first token and before
        the first last one. Empty where prompts take so long that there is no such time.
        """
        begin = max(stamps[0] for stamps in self.stamps_s)
        end = min(stamps[-1] for stamps in self.stamps_s)
        return [
            after - before
            for stamps in self.stamps_s
            for before, after in itertools.pairwise(stamps)
            if begin <= before and after <= end
        ]


def time_generate(
    engine: DecodeEngine,
    prompts: Sequence[Sequence[int]],
    models: Sequence[str],
    tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> GenerateTimes:
    """Answer all prompts with `tokens` tokens each, twice. tokens: at least 2.

    Raises RuntimeError for a request that fails or ends early.
    """
    if tokens < 2:
        raise ValueError(f"tokens is {tokens}, expected at least 2: the first is not counted")
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    asked = [list(prompt) for prompt in prompts]
    # What a first use compiles or allocates is no part of an answer's time.
    engine.generate(asked[0], model=models[0], params=SamplingParams(max_tokens=2, ignore_eos=True))
    begin = clock()
    completions = engine.generate(asked, model=list(models), params=params)
    wall = clock() - begin
    for completion in completions:
        if completion.error is not None or len(completion.token_ids) != tokens:
            raise RuntimeError(f"a request gave {len(completion.token_ids)} tokens: {completion.error}")
    begin = clock()
    stamps: dict[str, list[float]] = {
        engine.submit(prompt, model=model, params=params): []
        for prompt, model in zip(asked, models, strict=True)
    }
    while engine.has_work:
        outputs = engine.step()
        now = clock() - begin
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(f"a request failed: {output.error}")
            stamps[output.request_id] += [now] * len(output.token_ids)
    return GenerateTimes(wall, tuple(tuple(times) for times in stamps.values()))
