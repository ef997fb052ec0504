"""A GGUF file under the tensor names of Hugging Face, dequantised to float32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from qsun.errors import CheckpointError
from qsun.models.gguf_config import model_config_from_gguf
from qsun_kernels.quant.formats import CheckpointFormat
from qsun_kernels.quant.formats.gguf import PERMUTED_ARCHITECTURES, GGUFFile, undo_rotary_permutation

FREQUENCY_FACTORS = "rope_freqs.weight"

_TOP: Mapping[str, str] = MappingProxyType(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
_IN_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROTARY = re.compile(r"\.self_attn\.([qk])_proj\.(weight|bias)$")


class GGUFReader:
    """Reads a GGUF file; see `CheckpointReader` for the meaning of its attributes.

    Rows of q and k are put back in the order of transformers where llama.cpp reordered them.
    Raises CheckpointError when the file is damaged or holds a tensor of an unknown name, UnsupportedModel for
    models that are not implemented.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.quantization: CheckpointFormat | None = None
        try:
            self._file = GGUFFile(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}), expected a GGUF file"
            ) from error
        except ValueError as error:
            raise CheckpointError(_named(path, error)) from error
        try:
            self._stored_names = {
                _hf_name(name, path): name for name in self._file.tensors if name != FREQUENCY_FACTORS
            }
            self.config = model_config_from_gguf(
                self._file.metadata,
                self._file.tensors.keys(),
                self._read(FREQUENCY_FACTORS) if FREQUENCY_FACTORS in self._file.tensors else None,
                str(path),
            )
        except BaseException:
            self.close()
            raise

    def names(self) -> frozenset[str]:
        """Every tensor there is."""
        return frozenset(self._stored_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._file.tensors[self._stored_name(name)].shape

    def get(self, name: str) -> Tensor:
        """Read a tensor into host memory as float32."""
        tensor = self._read(self._stored_name(name))
        rotary = _ROTARY.search(name)
        if rotary is None or self._file.architecture not in PERMUTED_ARCHITECTURES:
            return tensor
        heads = self.config.num_q_heads if rotary.group(1) == "q" else self.config.num_kv_heads
        try:
            return undo_rotary_permutation(tensor, heads)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r}: {error}") from error

    def vocabulary(self) -> dict[int, str] | None:
        """Token by id; None when the file has no tokenizer."""
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            return None
        return {token_id: str(token) for token_id, token in enumerate(tokens)}

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()

    def _read(self, stored: str) -> Tensor:
        try:
            return self._file.read(stored)
        except ValueError as error:
            raise CheckpointError(_named(self.path, error)) from error

    def _stored_name(self, name: str) -> str:
        try:
            return self._stored_names[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}, "
                f"expected it among the {len(self._stored_names)} that it has"
            ) from None


def _hf_name(name: str, path: Path) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match.group(2) not in _IN_LAYER:
        raise CheckpointError(
            f"{path} holds tensor {name!r}, expected only tensors of a Llama, Mistral, Qwen2 or Qwen3 decoder"
        )
    return f"model.layers.{match.group(1)}.{_IN_LAYER[match.group(2)]}.{match.group(3)}"


def _named(path: Path, error: Exception) -> str:
    """The error's own words, with the file in front when they do not have it."""
    words = str(error)
    return words if str(path) in words else f"{path}: {words}"
