"""`DecodeEngine`: several fine-tuned models, decoded in one batch by one frozen decoder."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsun.core import Completion, FirstToken, SamplingParams, StepOutput
from qsun.engine.answers import CompletionBuilder
from qsun.engine.book import RequestBook
from qsun.engine.intake import Prompt, check_given_kv, split_prompts, tokenize
from qsun.engine.memory import refuse_fraction
from qsun.engine.options import EngineOptions, kv_format_of
from qsun.engine.output_stream import OutputStream
from qsun.engine.registry import Model, Registry, load_model
from qsun.engine.report import explain_engine
from qsun.engine.sources import find_tokenizer, local_checkpoint
from qsun.engine.statistics import EngineStats
from qsun.engine.swap import pack_kv
from qsun.engine.workspace import Workspace
from qsun.errors import RequestError
from qsun.modules.decode import DecodeModule, load_decode_module

if TYPE_CHECKING:
    from qsun.modules.prefill import PrefillModule
    from qsun.modules.quantize import Progress
    from qsun_kernels.quant import GroupSize

__all__ = ["DecodeEngine"]


class DecodeEngine:
    """One decode module, any number of models on it, and the requests they are answering.

    Usage: `from_pretrained`, `add_model` for each task, then `generate`, or `submit` and `step` from a loop
    of your own.  The cache is made when the first request comes (or by `prepare`), so that all modules are
    in memory before it takes what is left.

    An engine belongs to one thread.  On a GPU it works on a stream of its own, so several engines can share
    one.

    tokenizer: the checkpoint's; None when it has none, and prompts have to be token ids.
    """

    def __init__(
        self,
        decode: DecodeModule,
        tokenizer: Any | None,
        options: EngineOptions | None = None,
        *,
        base_path: Path | str | None = None,
    ) -> None:
        """Most callers want `from_pretrained`.

        decode: the shared decoder.  base_path: the checkpoint it comes from, into which adapters are merged;
        by default decode.path.  Raises ValueError for options that this decoder cannot serve.
        """
        options = EngineOptions() if options is None else options
        longest = decode.config.max_position_embeddings
        if options.max_model_len is not None and options.max_model_len > longest:
            raise ValueError(
                f"max_model_len is {options.max_model_len}, expected at most {longest}, the longest sequence"
                " that the model is meant for"
            )
        if decode.device.type != "cuda":
            if options.memory is not None:
                refuse_fraction(options.memory, decode.device)
            if options.cuda_graphs == "on":
                raise ValueError(f"cuda_graphs is 'on' on {decode.device}, expected 'auto' or 'off' there")
        kv_format_of(options.kv_cache_dtype, decode.dtype, decode.config.head_dim)
        self.decode_module = decode
        self.tokenizer = tokenizer
        self.options = options
        self._base_path = decode.path if base_path is None else Path(base_path)
        device = decode.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._registry = Registry()
        # Made with the first request: the cache takes what all modules have left.
        self._book: RequestBook | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: Path | str,
        *,
        bits: int | None = 4,
        group_size: GroupSize | None = None,
        symmetric: bool = True,
        quantizer: str = "rtn",
        calibration: Items[Items[int]] | None = None,
        lm_head_bits: int = 16,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> DecodeEngine:
        """Load the shared decode module and its tokenizer.

        model: a checkpoint directory, a GGUF file, or a hub id ("owner/name").
        bits: 2, 3, 4 or 8 quantises 16-bit weights on the way in; 16 keeps them; None takes the checkpoint as
            it is stored.  lm_head_bits: 16, 8 or 4, of the lm_head.  group_size, symmetric, quantizer,
            calibration, dtype, device, progress: as in `load_decode_module`.
        options: the fields of `EngineOptions`: kv_cache_dtype, max_batch_size, max_model_len, block_size,
            memory, swap_memory, prefill_chunk, first_token, backend, cuda_graphs, prefix_reuse, overlap.

        Raises CheckpointError for a checkpoint that is damaged or not there, ValueError or TypeError for a
        bad argument, BackendUnavailable for a backend that cannot run it.
        """
        checked = EngineOptions(**options)
        path = local_checkpoint(model)
        tokenizer = find_tokenizer(path)
        decode = load_decode_module(
            path,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            dtype=dtype,
            device=device,
            backend=checked.backend,
            quantizer=quantizer,  # type: ignore[arg-type]  # checked there, by name
            calibration=calibration,
            lm_head_bits=lm_head_bits,
            progress=progress,
        )
        return cls(decode, tokenizer, checked, base_path=path)

    def add_model(
        self,
        name: str,
        prefill_module: PrefillModule | Path | str | None = None,
        *,
        first_token: FirstToken | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Register a task.

        prefill_module: None is the base's own weights; a path is a full checkpoint or a LoRA adapter on the
            base; a loaded module is taken as it is.
        first_token: who predicts the first new token.  None is what the module's card states; a module
            without a card runs under the engine's own setting.
        progress: called with (layers done, layers in all, what is being done).

        Raises IncompatibleModule when the module does not fit the decode module or was trained for the other
        convention, CheckpointError when it is damaged, ValueError for a name that is taken.
        """
        self._registry.check_new(name)
        model = load_model(
            name,
            prefill_module,
            decode=self.decode_module,
            base_path=self._base_path,
            options=self.options,
            first_token=first_token,
            progress=progress,
        )
        if self._stream is not None:
            # Its weights were copied on the caller's stream, and are read on the engine's.
            torch.cuda.current_stream(self._stream.device).synchronize()
        self._registry.add(model)

    def add_remote_model(self, name: str, *, fingerprint: str, first_token: FirstToken | None = None) -> None:
        """Register a task whose prompts are prefilled elsewhere: it takes `submit_kv` only.

        fingerprint: the provenance of its KV, as the module's own `fingerprint` elsewhere.
        """
        if not isinstance(fingerprint, str) or not fingerprint:
            raise ValueError(f"fingerprint must be a non-empty string, got {fingerprint!r}")
        convention = self.options.first_token if first_token is None else first_token
        if convention not in ("decode", "prefill"):
            raise ValueError(f"first_token must be 'decode', 'prefill' or None, got {first_token!r}")
        self._registry.add(Model(name, fingerprint, convention, None))

    def remove_model(self, name: str) -> None:
        """Forget a task and release its module.

        Raises RequestError for an unknown name, ValueError while it has unfinished requests.
        """
        self._registry.get(name)
        answers = () if self._book is None else self._book.answers.values()
        unfinished = [answer for answer in answers if answer.sequence.request.model == name]
        if unfinished:
            raise ValueError(
                f"model {name!r} has {len(unfinished)} unfinished requests, expected none: cancel them first"
            )
        if self._stream is not None:
            # A cancelled request's prompt may still be on its way through the module.
            self._stream.synchronize()
        self._registry.remove(name)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the registered tasks."""
        return tuple(model.name for model in self._registry)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the users of the registered modules should know, such as shared parts that were ignored."""
        return self._registry.notices

    def prepare(self) -> None:
        """Make the cache and capture the decode step now, instead of with the first request.

        Raises ValueError when the memory does not hold what the options ask for.
        """
        self._open_book()

    def _open_book(self) -> RequestBook:
        if self._book is None:
            decode, tokenizer = self.decode_module, self.tokenizer
            own_end = getattr(tokenizer, "eos_token_id", None)
            end_ids = frozenset(decode.config.eos_token_ids)
            if own_end is not None and own_end < decode.config.vocab_size:
                end_ids |= {own_end}
            workspace = Workspace.create(decode, self.options, self._stream)
            self._book = RequestBook(workspace, self._registry, tokenizer, end_ids)
        return self._book

    def submit(
        self,
        prompt: Prompt,
        *,
        model: str,
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> str:
        """Take in a request, to be computed by the next steps.

        prompt: text, token ids, or chat messages (dicts with role and content).
        request_id: None picks one.  Returns the id.
        Raises RequestError, changing nothing, for a request that cannot be answered.
        """
        entry = self._registry.get(model)
        if entry.module is None:
            raise RequestError(f"model {model!r} has no prefill module here: its requests come by submit_kv")
        tokens = tokenize(prompt, self.tokenizer)
        book = self._open_book()
        request = book.request(tokens, model, params, request_id)
        book.enter(entry, request)
        return request.request_id

    def submit_kv(
        self,
        prompt: Items[int],
        k: Tensor,
        v: Tensor,
        next_token: int,
        *,
        model: str,
        fingerprint: str,
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> str:
        """Take in a request whose prompt was prefilled elsewhere.

        prompt: token ids of the whole prompt, N of them.
        k, v: (num_layers, T, num_kv_heads, head_dim) of the cache's dtype, or of the decode module's where
            the cache holds codes; keys after the rotary embedding.  T is N - 1 for a model with first_token
            "decode", N with "prefill".
        next_token: what the decode module reads next: the last prompt token ("decode"), or the first token of
            the answer ("prefill"), which is then the first of the outputs.
        fingerprint: of the module that computed the KV; it has to be the model's.

        Nothing here can compute this KV again.  When its blocks are needed by an older request and the swap
        space is full, the request ends in a MissingKV error.
        Raises RequestError, changing nothing, for a request that cannot be answered.
        """
        entry = self._registry.get(model)
        if fingerprint != entry.fingerprint:
            raise RequestError(
                f"fingerprint is {fingerprint!r}, expected {entry.fingerprint!r}, that of model {model!r}:"
                " KV of another module would give another model's answer"
            )
        tokens = tokenize(prompt, None)
        book = self._open_book()
        request = book.request(tokens, model, params, request_id)
        decode = self.decode_module
        kv_format = kv_format_of(self.options.kv_cache_dtype, decode.dtype, decode.config.head_dim)
        check_given_kv(
            k,
            v,
            next_token,
            tokens,
            entry.first_token,
            model=model,
            config=self.decode_module.config,
            dtype=kv_format.values,
        )
        saved = pack_kv(
            k, v, self.options.block_size, kv_format, device=decode.device, backend=self.options.backend
        )
        if self._stream is not None and saved.blocks.is_cuda:
            # Packed on the caller's stream, copied into the cache on the engine's.
            torch.cuda.current_stream(saved.blocks.device).synchronize()
            saved.blocks.record_stream(self._stream)
        answer = book.enter(entry, request, saved)
        if entry.first_token == "prefill":
            book.give_first_token(answer, next_token)
        return request.request_id

    @property
    def has_work(self) -> bool:
        """True while `step` has something to compute or to tell."""
        return self._book is not None and self._book.has_work

    def step(self) -> list[StepOutput]:
        """Compute one step for all requests.

        Returns what each gained: usually one token for every request in the batch, and the end of those that
        ended.  A request that fails ends with finish_reason "error"; the others go on.  With
        `EngineOptions.overlap` it is what the step before has computed: the first call returns nothing.
        """
        return [] if self._book is None else self._book.step()

    def cancel(self, request_id: str) -> bool:
        """End a request in whatever state it is; the next step tells so.  False when it is not running."""
        return self._book is not None and self._book.cancel(request_id)

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str,
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> OutputStream:
        """Submit one request and iterate over its outputs as they come, stepping the engine for all.

        Closing or dropping the iterator early cancels the request.  What other requests gain meanwhile is
        told by the next `step`, or to their own iterators; what a `step` has told is not told again.
        Raises RequestError at once, not at the first output.
        """
        request_id = self.submit(prompt, model=model, params=params, request_id=request_id)
        book = self._open_book()
        return OutputStream(book, book.answers[request_id])

    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        *,
        model: str | Items[str],
        params: SamplingParams | Items[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer one prompt or a list of them; returns the completions in the order of the prompts.

        prompts: text, token ids or chat messages, or a list of such.
        model, params: one for all, or a list with one for each prompt.
        A request that fails while it runs has finish_reason "error" and its `error`; one that is refused
        raises RequestError naming its place, and nothing is computed.
        """
        every = split_prompts(prompts)
        models = _one_each("model", model, len(every))
        all_params = _one_each("params", params, len(every))
        book = self._open_book()
        builders: dict[str, CompletionBuilder] = {}
        try:
            for index, prompt in enumerate(every):
                try:
                    request_id = self.submit(prompt, model=models[index], params=all_params[index])
                except RequestError as refused:
                    raise RequestError(f"prompts[{index}]: {refused}") from refused
                request = book.answers[request_id].sequence.request
                builders[request_id] = CompletionBuilder(request.prompt_token_ids)
            unfinished = set(builders)
            while unfinished:
                for output in book.next_of(unfinished):
                    builders[output.request_id].add(output)
                    if output.finish_reason is not None:
                        unfinished.discard(output.request_id)
        except BaseException:
            book.withdraw(builders)
            raise
        return [builder.build() for builder in builders.values()]

    def stats(self) -> EngineStats:
        """Totals since the engine was made, and the state of its cache now."""
        return EngineStats.snapshot(self._book, self.decode_module.bytes_per_step)

    def explain(self) -> str:
        """Which backend runs what and why not the others, the models, and where the memory goes."""
        return explain_engine(
            self.decode_module,
            self.options,
            None if self._book is None else self._book.workspace,
            self._registry,
            self.tokenizer is not None,
        )


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} is a list of {len(value)}, expected one for each of {count} prompts")
    return list(value)
