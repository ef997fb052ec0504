"""What `qsun-bench decode`, `serve` and `soak` do: options to a request, records to a run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qsun_bench import commands
from qsun_bench.commands import UsageError
from qsun_bench.engine_suites import DECODE, PER_MODEL, SERVE, SOAK
from qsun_bench.results import Header, Record, Run
from qsun_bench.termination import Terminated, termination_raises

if TYPE_CHECKING:
    from qsun_bench.engine_models import Source
    from qsun_bench.serve import Load
    from qsun_bench.workload import Lengths

_SMOKE_PROMPTS = (12, 24)
_SMOKE_OUTPUTS = (4, 8)
# How far beyond its 95th percentile a length may go, and the least that a prompt and an answer have.
_CLIP = 2
_LEAST = 2
# Layers of a soak's shape: each of its models has weights of its own.
_SOAK_LAYERS = 4


def run_decode(arguments: argparse.Namespace) -> int:
    """Time decode steps, and whole answers."""
    from qsun_bench.decode import Request, decode_records

    source = _source(arguments)
    if arguments.host and source.device.type != "cuda":
        raise UsageError("--host: on a CPU the host computes the step itself, expected --device cuda")
    if arguments.prefill_chunk is not None and arguments.generate == "no":
        raise UsageError("--prefill-chunk: expected only with --generate")
    recording = commands.recording_of(arguments)
    header = commands.header_of(arguments, recording)
    request = Request(
        source=source,
        bits=arguments.bits,
        kv=arguments.kv_dtype,
        lm_head_bits=arguments.lm_head_bits,
        batches=arguments.batch,
        contexts=arguments.context,
        tokens=arguments.tokens,
        prefill_chunk=arguments.prefill_chunk,
        mix=arguments.mix,
        host=arguments.host,
        breakdown=arguments.breakdown,
        generate=arguments.generate,
    )
    found = decode_records(request, header.read_tb_s * 1e12)
    run = _collect(found, header, arguments, seconds=arguments.limit)
    return commands.finish(run, DECODE, "", arguments, recording)


def run_serve(arguments: argparse.Namespace) -> int:
    """Play arrivals to both arms."""
    from qsun_bench.engine_models import Setting
    from qsun_bench.serve import DoesNotFit, Request, serve_records
    from qsun_bench.serve_metrics import Objective

    source = _source(arguments)
    loads = _loads(arguments)
    recording = commands.recording_of(arguments)
    header = commands.header_of(arguments, recording)
    request = Request(
        source=source,
        setting=Setting(_serve_bits(arguments, source), arguments.kv_dtype, arguments.lm_head_bits),
        loads=loads,
        objective=Objective(arguments.slo_ttft, arguments.slo_tpot),
        arms=arguments.arms,
        order=arguments.order,
        max_batch=arguments.max_batch or (128 if source.at_scale else 8),
        prefill_chunk=arguments.prefill_chunk,
        overlap=arguments.overlap,
        kv_memory=arguments.kv_memory,
        limit_s=arguments.limit,
        bisect=arguments.bisect,
    )
    try:
        run = _collect(serve_records(request), header, arguments, seconds=None)
    except DoesNotFit as error:
        raise UsageError(str(error)) from None
    return commands.finish(run, SERVE, PER_MODEL, arguments, recording)


def run_soak(arguments: argparse.Namespace) -> int:
    """Keep an engine under random requests, and tell what did not hold."""
    from qsun_bench.engine_models import Setting
    from qsun_bench.soak import Request, soak_record
    from qsun_bench.termination import termination_is_noted

    if isinstance(arguments.model, Path):
        raise UsageError("--model: a soak gives each model random weights, expected the name of a shape")
    at_scale = arguments.device.type == "cuda" and not arguments.smoke
    arguments.model = arguments.model or ("llama-3.1-8b" if at_scale else "tiny")
    arguments.layers = arguments.layers or (_SOAK_LAYERS if arguments.model != "tiny" else None)
    source = _source(arguments)
    recording = commands.recording_of(arguments)
    header = commands.header_of(arguments, recording)
    request = Request(
        source=source,
        setting=Setting(arguments.bits or 4, arguments.kv_dtype, arguments.lm_head_bits),
        seconds=60 * (arguments.minutes or (0.2 if arguments.smoke else 8.0 if at_scale else 30.0)),
        models=arguments.models,
        zipf=1.0 if arguments.zipf is None else arguments.zipf,
        max_batch=arguments.max_batch or (32 if at_scale else 8),
        context=arguments.context or (1024 if at_scale else 256),
        prefill_chunk=arguments.prefill_chunk or (512 if at_scale else 96),
        check_share=arguments.check or (0.2 if arguments.smoke else 0.01),
        rest_s=arguments.rest or (3.0 if arguments.smoke else 30.0),
        seed=arguments.seed,
    )
    with termination_is_noted() as is_over:
        run = _collect([soak_record(request, is_over)], header, arguments, seconds=None)
    return commands.finish(run, SOAK, "", arguments, recording)


def _source(arguments: argparse.Namespace) -> Source:
    from qsun_bench.engine_models import Source, sizes_and_layers

    if arguments.layers is not None and isinstance(arguments.model, Path):
        raise UsageError("--layers: a checkpoint has the layers it has, expected the name of a shape with it")
    if arguments.dtype == torch.float32:
        raise UsageError("--dtype: the step is judged against float32, expected bfloat16 or float16")
    source = Source(
        device=arguments.device,
        model=arguments.model,
        layers=arguments.layers,
        group_size=arguments.group_size,
        symmetric=not arguments.asymmetric,
        dtype=arguments.dtype,
        backend=arguments.backend,
        smoke=arguments.smoke,
    )
    if source.checkpoint is None:
        try:
            sizes_and_layers(source)
        except ValueError as error:
            raise UsageError(f"--layers: {error}") from None
    return source


def _serve_bits(arguments: argparse.Namespace, source: Source) -> int:
    from qsun_bench.engine_models import describe

    if arguments.bits is not None:
        return int(arguments.bits)
    stored = None if source.checkpoint is None else describe(source, 0).stored
    return 4 if stored is None else stored.bits


def _loads(arguments: argparse.Namespace) -> Sequence[Load]:
    from qsun_bench.serve import Load
    from qsun_bench.workload import OUTPUTS, PROMPTS, poisson, read_trace

    if arguments.trace is not None:
        drawn = ("duration", "models", "zipf", "prompt_tokens", "output_tokens", "bisect")
        for name in drawn:
            if getattr(arguments, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')}: a trace states it, expected no --trace with it"
                )
        arrivals = read_trace(arguments.trace)
        fields = {"trace": arguments.trace.name, "models": len({arrival.model for arrival in arrivals})}
        return [Load(f"trace-{arguments.trace.stem}", arrivals, fields, arrivals[-1].at_s or None)]
    smoke = arguments.smoke
    models = arguments.models or (3 if smoke else 8)
    zipf = 1.0 if arguments.zipf is None else arguments.zipf
    duration = arguments.duration or (1.0 if smoke else 60.0)
    prompts = _lengths(arguments.prompt_tokens or (_SMOKE_PROMPTS if smoke else None), PROMPTS)
    outputs = _lengths(arguments.output_tokens or (_SMOKE_OUTPUTS if smoke else None), OUTPUTS)
    loads = []
    if arguments.bisect is not None and list(arguments.rate or ()) != sorted(arguments.rate or ()):
        raise UsageError("--bisect: looks for the last rate that is served, expected a --rate that rises")
    for rate in arguments.rate or ((8.0,) if smoke else (2.0,)):
        arrivals = poisson(
            rate, duration, models=models, zipf=zipf, prompts=prompts, outputs=outputs, seed=arguments.seed
        )
        fields = {
            "models": models,
            "zipf": zipf,
            "rate": rate,
            "duration_s": duration,
            "seed": arguments.seed,
            "prompt_lengths": [prompts.median, prompts.p95, prompts.least, prompts.most],
            "output_lengths": [outputs.median, outputs.p95, outputs.least, outputs.most],
        }
        loads.append(Load(f"m{models}z{zipf:g}.r{rate:g}", arrivals, fields, duration))
    return loads


def _lengths(asked: tuple[int, int] | None, default: Lengths) -> Lengths:
    from qsun_bench.workload import Lengths

    if asked is None:
        return default
    median, p95 = asked
    return Lengths(median, p95, min(_LEAST, median), _CLIP * p95)


def _collect(
    outcomes: Iterable[tuple[Record | None, str]],
    header: Header,
    arguments: argparse.Namespace,
    *,
    seconds: float | None,
) -> Run:
    """The run, kept as it grows; after `seconds`, or when told to end, it is what there is."""
    end = time.monotonic() + (seconds or float("inf"))
    records: list[Record] = []
    try:
        with termination_raises():
            for record, reason in outcomes:
                if record is None:
                    print(f"not run: {reason}", file=sys.stderr)
                else:
                    records.append(record)
                    commands.keep(Run(header, tuple(records)), arguments)
                    if not record.ok:
                        verdict = "FAILED" if record.failed else "WRONG"
                        print(f"{verdict}: {record.case} {record.backend}: {reason}", file=sys.stderr)
                if time.monotonic() > end:
                    print("not run: the rest (--limit)", file=sys.stderr)
                    break
    except Terminated:
        print("not run: the rest (terminated)", file=sys.stderr)
    return Run(header, tuple(records))
