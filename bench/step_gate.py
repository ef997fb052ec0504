"""Is a decode step right? Asked of the engine itself, before any step is timed.

The first layers of the model's shape, with random weights and random KV given to the requests, take one step
in the dtype, on the backend and with the KV cache that are to be timed. The same step in float32 is what is
right, and torch's in the dtype of the run says what may be lost to that dtype: the rule of the tests. The
vocabulary is cut to as many tokens as a request is told the log-probabilities of, so that all are seen.

All three quantise the same KV in the same way, so a cache of few bits costs the gate no sharpness: what is
judged is how the engine computes with the codes, not what the codes have lost.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qsun.core import SamplingParams
from qsun.engine.engine import DecodeEngine
from qsun.engine.options import EngineOptions
from qsun.engine.runner import GraphMode
from qsun.kv_cache.block_tables import blocks_for
from qsun.models.build import Placement
from qsun.models.config import ModelConfig
from qsun.modules.decode import DecodeModule
from qsun_bench.cases import generator
from qsun_bench.engine_models import BLOCK_SIZE, Setting, Source, head_spec_of, kv_token_bytes, spec_of
from qsun_bench.gate import Verdict, judge
from qsun_bench.random_model import random_decode_module
from qsun_kernels.backends.problems import BackendName
from qsun_kernels.errors import BackendUnavailable

_LAYERS = 2
_VOCABULARY = 100
# None is short: some codes of the newest token round the other way in another precision, and where it is one
# of two tokens that would weigh more than what is looked for.
_LENGTHS = (9, 15, 16, 17, 31, 33, 40, 48)
_POSITIONS = 64
_MODEL = "random KV"


def judge_setting(source: Source, setting: Setting, config: ModelConfig) -> Verdict:
    """As `judge_step`, for settings that not every engine takes: what it raises is the verdict's reason.

    There is no error to tell then, for nothing came out. In the default setting it is raised.
    """
    try:
        return judge_step(source, setting, config)
    except (TypeError, ValueError, BackendUnavailable) as error:
        if setting.is_default:
            raise
        return Verdict(False, None, f"this engine fails with {setting}: {type(error).__name__}: {error}")


def judge_step(source: Source, setting: Setting, config: ModelConfig) -> Verdict:
    """One step of every row against float32, by the rule of the tests."""
    layers = min(_LAYERS, config.num_layers)
    cut = replace(
        config,
        num_layers=layers,
        windows=config.windows[:layers],
        vocab_size=_VOCABULARY,
        max_position_embeddings=_POSITIONS,
        bos_token_id=None,
        eos_token_ids=(),
    )
    spec, head = spec_of(setting.bits, source, config), head_spec_of(setting.lm_head_bits, config)

    def step(dtype: torch.dtype, backend: BackendName | None, graphs: GraphMode) -> Tensor:
        placement = Placement(dtype, source.device, backend)
        module = random_decode_module(cut, spec, placement, source.dtype, head_spec=head)
        return _logprobs(module, setting, source.dtype, backend, graphs)

    got = step(source.dtype, source.backend, "auto")
    exact, plain = step(torch.float32, "torch", "off").double(), step(source.dtype, "torch", "off")
    return judge(f"a decode step of {setting}", got, exact=exact, plain=plain)


def _logprobs(
    module: DecodeModule,
    setting: Setting,
    precision: torch.dtype,
    backend: BackendName | None,
    graphs: GraphMode,
) -> Tensor:
    """Log-probabilities float32 (rows, V) of the first token of every request; NaN where none came."""
    config, device = module.config, module.device
    blocks = sum(blocks_for(length + 1, BLOCK_SIZE) + 1 for length in _LENGTHS)
    options = EngineOptions(
        kv_cache_dtype=setting.kv,
        max_batch_size=len(_LENGTHS),
        max_model_len=_POSITIONS,
        block_size=BLOCK_SIZE,
        memory=blocks * BLOCK_SIZE * kv_token_bytes(config, setting.kv, module.dtype),
        swap_memory=0,
        backend=backend,
        cuda_graphs=graphs,
        prefix_reuse=False,
    )
    engine = DecodeEngine(module, None, options)
    engine.add_remote_model(_MODEL, fingerprint=_MODEL)
    source = generator(device, "gate")
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=_VOCABULARY)
    for row, length in enumerate(_LENGTHS):
        shape = (config.num_layers, length - 1, config.num_kv_heads, config.head_dim)
        # Rounded alike for all three: their KV is the same KV.
        k, v = (
            torch.randn(shape, generator=source, device=device).to(precision).to(module.dtype)
            for _ in range(2)
        )
        prompt = [(row + position) % _VOCABULARY for position in range(length)]
        engine.submit_kv(
            prompt,
            k,
            v,
            prompt[-1],
            model=_MODEL,
            fingerprint=_MODEL,
            params=params,
            request_id=str(row),
        )
    told = torch.full((len(_LENGTHS), _VOCABULARY), math.nan)
    while engine.has_work:
        for output in engine.step():
            for token in output.logprobs or ():
                ids, values = zip(*token.top, strict=True)
                told[int(output.request_id), list(ids)] = torch.tensor(values)
    return told
