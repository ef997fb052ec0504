"""The second part of the study: training and answering, a unit at a time, with torch and safetensors alone.

WORK holds what may be lost: weights, checkpoints of runs, answers so far.  RESULTS gets one file a unit,
FAMILY.UNIT.sSEED.json.gz, and a unit whose file is there is done.
"""

from __future__ import annotations

import gc
import gzip
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qsun.core import SamplingParams
from qsun.engine.engine import DecodeEngine
from qsun.engine.options import EngineOptions
from qsun.evaluation.perplexity import response_losses
from qsun.evaluation.runner import answer_items
from qsun.modules.decode import load_decode_module
from qsun.modules.export import export_quantized
from qsun.modules.prefill import load_prefill_module
from qsun.training.base import DecoderChoice, load_base, load_trained_stack
from qsun.training.batch import Example
from qsun.training.lora import LoraOptions
from qsun.training.options import TrainOptions
from qsun.training.output import write_whole_model
from qsun.training.run import train
from qsun.training.study.folder import StudyFolder
from qsun.training.study.units import UNITS, Rounding, Serving, Unit

CALIBRATION_TOKENS = 512
PREFILL_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Settings:
    """epochs, batch_size, pack_tokens: of training.  batch: of answering.  rate: factor on learning rates."""

    device: torch.device
    dtype: torch.dtype
    epochs: float = 3.0
    batch_size: int = 32
    pack_tokens: int = 16384
    batch: int = 256
    rate: float = 1.0
    memory: str | None = None
    compiled: bool = False


def result_name(family: str, unit: str, seed: int) -> str:
    """The file of a unit's results."""
    return f"{family}.{unit}.s{seed}.json.gz"


def _quantised_name(source: str, bits: int, rounding: Rounding) -> str:
    """The folder of a quantised decoder, a name for each way to make it."""
    group = "" if rounding.group_size is None else f"-g{rounding.group_size}"
    zeros = "" if rounding.symmetric else "-zeros"
    return f"{source}-w{bits}-{rounding.quantizer}{group}{zeros}-{rounding.sequences}"


class Study:
    """One machine's share of the study.

    finished: what this object has added to the results: a file a unit, and a folder for the pairs of seed 0.
    """

    def __init__(
        self,
        folder: StudyFolder,
        work: Path,
        results: Path,
        settings: Settings,
        *,
        tell: Callable[[str], None] = print,
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder = folder
        self.work = work
        self.results = results
        self.settings = settings
        self._tell = tell
        self._out_of_time = out_of_time
        self.finished: list[Path] = []
        results.mkdir(parents=True, exist_ok=True)

    def run(self, families: Sequence[str], units: Sequence[str], seeds: Sequence[int]) -> bool:
        """Do the units that have no result yet.  Returns False when time ran out before the last."""
        for seed in seeds:
            for family in families:
                for name in units:
                    if UNITS[name].method is None and seed != seeds[0]:
                        continue  # without training there is no seed
                    if (self.results / result_name(family, name, seed)).exists():
                        continue
                    if self._out_of_time() or not self._run_unit(family, UNITS[name], seed):
                        self._tell(f"out of time in {family} {name} seed {seed}")
                        return False
        return True

    def _run_unit(self, family: str, unit: Unit, seed: int) -> bool:
        place = self.work / f"{family}.{unit.name}.s{seed}"
        place.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {}
        if unit.method is not None:
            begin = time.perf_counter()
            if not self._train(family, unit, seed, place):
                return False
            facts = json.loads((place / "training.json").read_text())
            self._tell(
                f"{family} {unit.name} s{seed}: trained in {time.perf_counter() - begin:.0f} s, loss "
                f"{facts['losses'][0]:.3f} -> {facts['losses'][-1]:.3f}, {facts['tokens_per_s']:.0f} tokens/s"
            )
        servings = {}
        for serving in unit.servings:
            begin = time.perf_counter()
            found = self._serve(family, unit, serving, place)
            if found is None:
                return False
            servings[serving.arm] = found
            loss = sum(total for total, _ in found["losses"]) / sum(n for _, n in found["losses"])
            self._tell(
                f"{family} {serving.arm} s{seed}: {len(found['answers'])} answers in "
                f"{time.perf_counter() - begin:.0f} s, loss of held responses {loss:.4f}"
            )
        content = {
            "family": family, "unit": unit.name, "seed": seed, "device": self._device_name(),
            "dtype": str(self.settings.dtype).removeprefix("torch."), "torch": torch.__version__,
            "training": facts, "servings": servings,
        }  # fmt: skip
        target = self.results / result_name(family, unit.name, seed)
        partial = target.with_suffix(".partial")
        # Without the time of day, equal results are equal files.
        partial.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
        partial.rename(target)
        self.finished.append(target)
        if unit.rank is not None and unit.method == "sun" and seed == 0:
            kept = self.results / f"{family}.{unit.name}.s{seed}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(place / "module", kept)
            self.finished.append(kept)
        shutil.rmtree(place)
        return True

    def _train(self, family: str, unit: Unit, seed: int, place: Path) -> bool:
        assert unit.method is not None
        if (place / "training.json").exists():
            return True
        settings = self.settings
        decoder = DecoderChoice()
        if unit.method == "sun" and unit.bits < 16:
            decoder = DecoderChoice(path=self.quantised_base(unit.bits, unit.rounding))
        options = TrainOptions(
            method=unit.method,
            first_token=unit.first_token,
            decoder=decoder,
            lora=None if unit.rank is None else LoraOptions(unit.rank, 2.0 * unit.rank),
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            pack_tokens=settings.pack_tokens,
            learning_rate=unit.learning_rate * settings.rate,
            seed=seed,
            dtype=settings.dtype,
            compiled=settings.compiled,
        )
        examples = self.folder.train(family)
        shutil.rmtree(place / "module", ignore_errors=True)
        result = train(
            self.base(),
            examples,
            options,
            place / "module",
            device=settings.device,
            state=place / "state",
            resume=True,
            name=f"{family}-{unit.name}",
            data_facts={"family": family, "examples": len(examples), "study": self.folder.settings["base"]},
            with_tokenizer=False,
            should_stop=self._out_of_time,
        )
        self._free()
        if not result.finished:
            return False
        facts = {
            "steps": result.steps,
            "losses": [round(loss, 5) for loss in result.losses],
            "seconds": result.seconds,
            "tokens_per_s": result.positions / result.seconds,
            "learning_rate": options.learning_rate,
        }
        (place / "training.json").write_text(json.dumps(facts))
        return True

    def _serve(self, family: str, unit: Unit, serving: Serving, place: Path) -> dict[str, Any] | None:
        """Answers as token ids and losses of held responses; None when time ran out."""
        settings = self.settings
        module_path = place / "module" if serving.module else None
        path = self.base() if serving.decoder == "base" else place / "module"
        if serving.bits < 16:
            if serving.decoder == "base":
                path = self.quantised_base(serving.bits, serving.rounding)
            else:
                target = place / _quantised_name("tuned", serving.bits, serving.rounding)
                path = self._quantised(path, serving.bits, serving.rounding, [family], target)
        decode = load_decode_module(path, dtype=settings.dtype, device=settings.device)
        if module_path is None and decode.quantization is not None and serving.decoder == "tuned":
            # Both halves of the quantised model read the same low-bit weights, as an ordinary server's do.
            module_path = path
        base = self.base() if serving.decoder == "base" else place / "module"
        module = load_prefill_module(serving.arm, module_path, base_path=base, decode=decode)
        options = EngineOptions(
            max_batch_size=settings.batch, memory=settings.memory, prefill_chunk=PREFILL_CHUNK
        )
        engine = DecodeEngine(decode, None, options, base_path=base)
        losses = response_losses(decode, module, self.folder.held(family), module.first_token)
        engine.add_model(serving.arm, module)
        items = self.folder.test(family)
        params = SamplingParams(temperature=0.0, max_tokens=self.folder.settings["max_tokens"][family])
        given = answer_items(
            engine, [serving.arm], items, place / serving.arm, params, should_stop=self._out_of_time
        )
        del engine, module, decode
        self._free()
        if len(given) < len(items):
            return None
        failed = {a.item: a.error for a in given.values() if a.error is not None}
        return {
            "answers": {answer.item: list(answer.token_ids) for answer in given.values()},
            "failed": failed,
            "losses": [[loss.total, loss.tokens] for loss in losses],
        }

    def base(self) -> Path:
        """The base as a checkpoint of this study's dtype, made once."""
        target = self.work / "base"
        if not target.exists():
            joined = self.folder.join_weights(self.work / "joined")
            base = load_base(joined, dtype=self.settings.dtype, device=torch.device("cpu"))
            stack = load_trained_stack(base, weights_dtype=self.settings.dtype)
            write_whole_model(target, base, stack, name="base", facts={}, with_tokenizer=False)
        return target

    def quantised_base(self, bits: int, rounding: Rounding) -> Path:
        """The decoder that all families share, quantised once on texts of all of them."""
        target = self.work / _quantised_name("base", bits, rounding)
        return self._quantised(self.base(), bits, rounding, self.folder.families(), target)

    def _quantised(
        self, source: Path, bits: int, rounding: Rounding, families: Sequence[str], target: Path
    ) -> Path:
        if not target.exists():
            export_quantized(
                source,
                target,
                bits=bits,
                group_size=rounding.group_size,
                symmetric=rounding.symmetric,
                dtype=self.settings.dtype,
                device=self.settings.device,
                quantizer=rounding.quantizer,
                calibration=self._calibration(families, rounding.sequences),
            )
            self._free()
        return target

    def _calibration(self, families: Sequence[str], sequences: int) -> list[list[int]]:
        share = max(1, sequences // len(families))
        chosen: list[Example] = []
        for family in families:
            examples = self.folder.train(family)
            count = min(share, len(examples))
            chosen += [examples[i * len(examples) // count] for i in range(count)]
        return [[*e.prompt, *e.response][:CALIBRATION_TOKENS] for e in chosen]

    def _free(self) -> None:
        gc.collect()
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()

    def _device_name(self) -> str:
        device = self.settings.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
