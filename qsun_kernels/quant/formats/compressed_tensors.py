"""compressed-tensors checkpoints, format "pack-quantized": read and written.

    weight_packed      int32 (N, ceil(K/P))    P = 32 // bits codes a word, the first in the lowest bits
    weight_scale       float (N, G)
    weight_zero_point  int32 (ceil(N/P), G)    packed down the rows; absent when symmetric
    weight_shape       int64 (2,)              N, K
    weight_g_idx       int32 (K,)              only with activation order "group"

Codes and zero points are signed there, -2**(bits-1)..2**(bits-1)-1, and stored plus 2**(bits-1): what is
in the words are the unsigned codes and zero points of this project. For 2, 4 and 8 bits a row of
weight_packed is the canonical bit stream; for 3 bits P is 10 and the top two bits of each word are unused.

Older versions of the format stored zero points unpacked, int8 (N, G), for symmetric weights too; both are
read. The layout and the names of the configuration follow the package compressed-tensors, version 0.17.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qsun_kernels.quant.formats.module_tensors import ModuleTensors, implied_groups
from qsun_kernels.quant.packed import SCALE_DTYPES, PackedWeight
from qsun_kernels.quant.packing import pack_codes, unpack_codes
from qsun_kernels.quant.spec import QuantSpec

FORMAT_VERSION = "0.17.0"
TENSOR_NAMES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def _codes_per_word(bits: int) -> int:
    return 32 // bits


def _unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 (R, ceil(count/P)) to uint8 (R, count): whole codes in each word."""
    if 32 % bits == 0:
        return unpack_codes(words.contiguous(), bits, count)
    per_word = _codes_per_word(bits)
    shifts = torch.arange(per_word, dtype=torch.int32, device=words.device) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1)[:, :count].to(torch.uint8)


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 (R, count) to int32 (R, ceil(count/P)), the inverse of `_unpack_words`; unused bits are zero."""
    if 32 % bits == 0:
        return pack_codes(codes, bits)
    per_word = _codes_per_word(bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    shifts = torch.arange(per_word, dtype=torch.int32, device=codes.device) * bits
    fields = codes.view(codes.shape[0], -1, per_word).int() << shifts
    return fields.sum(dim=-1, dtype=torch.int32)


def from_compressed_tensors(
    tensors: Mapping[str, Tensor], spec: QuantSpec, module: str = "linear", *, act_order: bool = False
) -> PackedWeight:
    """Read one linear layer of a pack-quantized checkpoint.

    tensors: the tensors above by name (and bias, ignored); spec: from the checkpoint's configuration;
    module: the layer's name, for messages; act_order: the configuration's actorder is "group", which makes
    weight_g_idx obligatory.

    Raises ValueError or TypeError naming the tensor for missing, mis-shaped or mistyped tensors and bad
    values.
    """
    source = ModuleTensors(tensors, module, "compressed-tensors", TENSOR_NAMES)
    shape = source.take("weight_shape", (torch.int64, torch.int32), (2,), "= [N, K]")
    N, K = (int(size) for size in shape)
    if N < 1 or K < 1:
        raise ValueError(f"{module}.weight_shape is [{N}, {K}], expected two sizes of at least 1")
    per_word = _codes_per_word(spec.bits)
    groups = spec.num_groups(K)
    why = f"for weight_shape [{N}, {K}] and {spec}"
    weight = source.take("weight_packed", (torch.int32,), (N, -(-K // per_word)), why)
    scales = source.take("weight_scale", SCALE_DTYPES, (N, groups), why)
    if 32 % spec.bits == 0:
        qweight = weight.contiguous()
    else:
        qweight = pack_codes(_unpack_words(weight, spec.bits, K), spec.bits)
    packed = PackedWeight(
        spec,
        N,
        K,
        qweight,
        scales.contiguous(),
        _read_zero_points(source, spec, N, groups, why),
        _read_groups(source, spec, K, act_order),
    )
    return source.validated(packed)


def _read_zero_points(source: ModuleTensors, spec: QuantSpec, N: int, groups: int, why: str) -> Tensor | None:
    """Zero points uint8 (N, G) from either storage; None for a symmetric spec, whose own must be zero."""
    name = "weight_zero_point"
    middle = 1 << (spec.bits - 1)
    if spec.symmetric:
        if name in source and bool(source.tensors[name].any()):
            raise ValueError(f"{source.module}.{name} has values other than 0, expected none for {spec}")
        return None
    if name in source and source.tensors[name].dtype == torch.int8:
        signed = source.take(name, (torch.int8,), (N, groups), why).short()
        if bool(((signed < -middle) | (signed >= middle)).any()):
            raise ValueError(
                f"{source.module}.{name} spans {int(signed.min())} to {int(signed.max())}, "
                f"expected {-middle} to {middle - 1} for {spec.bits} bits"
            )
        return (signed + middle).to(torch.uint8).contiguous()
    rows = -(-N // _codes_per_word(spec.bits))
    words = source.take(name, (torch.int32,), (rows, groups), why)
    return _unpack_words(words.t().contiguous(), spec.bits, N).t().contiguous()


def _read_groups(source: ModuleTensors, spec: QuantSpec, K: int, act_order: bool) -> Tensor | None:
    """g_idx int32 (K,), or None where columns are grouped in order."""
    name = "weight_g_idx"
    if name not in source:
        if act_order:
            raise ValueError(f"{source.module} has no {name}, expected one: the configuration says actorder")
        return None
    g_idx = source.take(name, (torch.int32,), (K,), f"for K = {K}")
    # A g_idx of all -1 is how the package marks one that was never set.
    if bool((g_idx == -1).all()) or implied_groups(g_idx, spec.columns_per_group(K)):
        return None
    _check_full_groups(g_idx, spec, K, f"{source.module}.{name}")
    return g_idx.contiguous()


def _check_full_groups(g_idx: Tensor, spec: QuantSpec, K: int, name: str) -> None:
    """ValueError unless every group has its full number of columns: the package sorts columns by group and
    cuts the result into equal parts, so anything else would mean another weight there."""
    groups = spec.num_groups(K)
    if bool(((g_idx < 0) | (g_idx >= groups)).any()):
        raise ValueError(
            f"{name} spans {int(g_idx.min())} to {int(g_idx.max())}, expected groups 0 to {groups - 1}"
        )
    sizes = torch.bincount(g_idx.long(), minlength=groups)
    columns = spec.columns_per_group(K)
    if bool((sizes != columns).any()):
        group = int((sizes != columns).nonzero()[0])
        raise ValueError(f"{name} puts {int(sizes[group])} columns in group {group}, expected {columns}")


def to_compressed_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """The tensors of one linear layer in the pack-quantized format, by their names within the module.

    Tensors may share memory with `weight`. The configuration to go with them is `quantization_config`.
    Raises ValueError for what the format cannot say: a short last group, a g_idx with groups of unequal size.
    """
    spec, K = weight.spec, weight.K
    if K % spec.columns_per_group(K):
        fitting = [str(size) for size in (128, 64, 32) if K % size == 0]
        raise ValueError(
            f"weight has K = {K} and groups of {spec.group_size}, expected a group size that divides K "
            f"in a compressed-tensors checkpoint: {' or '.join([*fitting, 'channel'])}"
        )
    words = weight.qweight if 32 % spec.bits == 0 else _pack_words(weight.codes(), spec.bits)
    tensors = {
        "weight_packed": words,
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor([weight.N, K], dtype=torch.int64),
    }
    if weight.qzeros is not None:
        zeros = _pack_words(weight.qzeros.t().contiguous(), spec.bits)
        tensors["weight_zero_point"] = zeros.t().contiguous()
    if weight.g_idx is not None:
        _check_full_groups(weight.g_idx, spec, K, "g_idx")
        tensors["weight_g_idx"] = weight.g_idx
    return tensors


def quantization_config(
    spec: QuantSpec, *, ignore: Sequence[str] = ("lm_head",), act_order: bool = False
) -> dict[str, Any]:
    """The "quantization_config" entry of config.json for a checkpoint of `to_compressed_tensors` layers.

    ignore: modules that are not quantised, by full name or as "re:" and a regular expression; act_order: the
    layers have a weight_g_idx. Transformers (with compressed-tensors) and vLLM read this form.
    """
    if act_order and spec.group_size == "channel":
        raise ValueError(
            "act_order is True with group_size 'channel', expected groups: there is one group only"
        )
    channel = spec.group_size == "channel"
    return {
        "quant_method": "compressed-tensors",
        "version": FORMAT_VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": spec.bits,
                    "type": "int",
                    "symmetric": spec.symmetric,
                    "strategy": "channel" if channel else "group",
                    "group_size": None if channel else spec.group_size,
                    "dynamic": False,
                    "actorder": "group" if act_order else None,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
