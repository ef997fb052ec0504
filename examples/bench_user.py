"""A kernel of your own in the benchmark: checked against float64 and timed, beside ours and the peers.

    python examples/bench_user.py

The contender here keeps one byte a code and multiplies dequantised rows: put your kernel in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case, Selection, suites
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_bench.contenders import Contender, contenders
from qsun_bench.measure import measure
from qsun_bench.peers import Prepared


def available(case: Case, device: torch.device) -> str | None:
    """None, or why this kernel cannot run a case."""
    return None


def prepare(operands: Wna16Operands) -> Prepared:
    """Lay the weight out once; what is returned is timed, and `streamed` is what it reads from memory."""
    weight = operands.copy().weight
    codes, scales, spec = weight.codes(), weight.scales, weight.spec
    columns = spec.columns_per_group(weight.K)

    def run(x: Tensor) -> Tensor:
        centred = codes.to(x.dtype) - spec.zero_point
        return torch.nn.functional.linear(x, centred * scales.repeat_interleave(columns, 1))

    return Prepared(run, (codes, scales))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    suite = suites()["wna16"]
    cases = suite.cases(Selection(device, shapes=("smollm2-135m",), batches=(1,)))[:2]
    mine = Contender("mine", suite.op, available, prepare)
    for outcome in measure(cases, [mine, *contenders(suite.op)], device, seconds=0.1):
        record = outcome.record
        if record is None:
            print(f"{outcome.case.name:<32} {outcome.contender:<14} not run: {outcome.note}")
        elif record.us is None:
            print(f"{record.case:<32} {record.backend:<14} WRONG: {outcome.note}")
        else:
            print(f"{record.case:<32} {record.backend:<14} {record.us:9.1f} us {record.gb_s:8.1f} GB/s")


if __name__ == "__main__":
    main()
