"""From examples to one pack: which module computes which position, and which row predicts which token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qsun.core import FirstToken
from qsun.training.attention import AttentionPlan

Method = Literal["sun", "full"]
"""sun: the prompt by the trained module, the answer by the frozen decoder.  full: all by the trained one."""

METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: token ids of a prompt (N >= 1) and of its answer (R >= 1, its end included)."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def num_positions(self) -> int:
        """Positions that are computed: the last token of the answer is predicted, never read."""
        return len(self.prompt) + len(self.response) - 1


def num_prefill_positions(example: Example, method: Method, first_token: FirstToken) -> int:
    """How many leading positions the trained module computes."""
    if method == "full":
        return example.num_positions
    return len(example.prompt) - (1 if first_token == "decode" else 0)


@dataclass(frozen=True, slots=True)
class Pack:
    """Several examples side by side; rows [0, split) belong to the trained module, the rest to the decoder.

    tokens, positions: int64 (T,).  split: rows of the trained module.  plan: who attends to whom.
    predicting: int64 (M,), the rows whose output predicts a token of an answer.  targets: int64 (M,), it.
    needs_prefill_output: whether some row of the trained module predicts, so that its last layer is needed.
    """

    tokens: Tensor
    positions: Tensor
    split: int
    plan: AttentionPlan
    predicting: Tensor
    targets: Tensor
    needs_prefill_output: bool

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        *,
        method: Method,
        first_token: FirstToken,
        device: torch.device | str = "cpu",
    ) -> Pack:
        """Lay out examples.  Raises ValueError when there is none, or one has no prompt or no answer."""
        if not examples:
            raise ValueError("examples is empty, expected at least one")
        for index, example in enumerate(examples):
            if not example.prompt or not example.response:
                raise ValueError(
                    f"examples[{index}] has {len(example.prompt)} prompt and {len(example.response)} "
                    "response tokens, expected at least one of each"
                )
        device = torch.device(device)
        cuts = [num_prefill_positions(e, method, first_token) for e in examples]
        split = sum(cuts)
        rows = []
        first_row, second_row = 0, split
        for example, cut in zip(examples, cuts, strict=True):
            rest = example.num_positions - cut
            rows.append(
                torch.cat(
                    (torch.arange(first_row, first_row + cut), torch.arange(second_row, second_row + rest))
                )
            )
            first_row += cut
            second_row += rest
        tokens = torch.empty(second_row, dtype=torch.int64)
        positions = torch.empty(second_row, dtype=torch.int64)
        predicting, targets = [], []
        for example, where in zip(examples, rows, strict=True):
            tokens[where] = torch.tensor((*example.prompt, *example.response[:-1]))
            positions[where] = torch.arange(len(where))
            predicting.append(where[len(example.prompt) - 1 :])
            targets.append(torch.tensor(example.response))
        rows_that_predict = torch.cat(predicting)
        return cls(
            tokens=tokens.to(device),
            positions=positions.to(device),
            split=split,
            plan=AttentionPlan.of(rows, device),
            predicting=rows_that_predict.to(device),
            targets=torch.cat(targets).to(device),
            needs_prefill_output=bool((rows_that_predict < split).any()),
        )

    @property
    def num_tokens(self) -> int:
        """Positions of all examples."""
        return self.tokens.shape[0]

    @property
    def num_targets(self) -> int:
        """Tokens of all answers."""
        return self.targets.shape[0]
