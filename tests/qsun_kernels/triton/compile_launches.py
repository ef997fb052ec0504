"""Compile, for a GPU that need not be here, what the launchers would launch.

A script, run by test_triton_compiles.py in a process of its own without TRITON_INTERPRET: interpreted kernels
cannot be compiled. Every launcher is called with CPU tensors while the launch itself is replaced by a
recorder, so that the argument types, the compile-time constants, the number of warps and the specialisation
on alignment are those of a real call and cannot drift away from it. Prints one JSON object a line: what was
compiled, and what ptxas, the PTX and the machine code say about it.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from qsun_kernels.backends.problems import KV_SCALES, PreparedWeight
from qsun_kernels.backends.triton import paged_attention_decode as attention
from qsun_kernels.backends.triton import paged_attention_plan as plan
from qsun_kernels.backends.triton import wna16_linear as linear
from qsun_kernels.backends.triton import wna16_rows as rows
from qsun_kernels.backends.triton import wna16_tiles as tiles
from qsun_kernels.backends.triton.apply_rope import apply_rope
from qsun_kernels.backends.triton.dequantize import dequantize
from qsun_kernels.backends.triton.rms_norm import rms_norm
from qsun_kernels.backends.triton.sample_tokens import sample_tokens
from qsun_kernels.backends.triton.silu_and_mul import silu_and_mul
from qsun_kernels.backends.triton.wna16_configs import choose_tiles, tuned
from qsun_kernels.backends.triton.write_kv_cache import write_kv_cache
from qsun_kernels.quant import PackedWeight, QuantSpec

H100_MULTIPROCESSORS = 132
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}

Launch = tuple[JITFunction, dict[str, Any], dict[str, Any]]


def recorded(call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` makes: (kernel, arguments by name, options)."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in self.params]
        arguments = dict(zip(names, args, strict=False))
        options = {}
        for name, value in kwargs.items():
            (arguments if name in names else options)[name] = value
        if set(arguments) != set(names):
            raise AssertionError(f"{self.__name__} got {sorted(arguments)}, expected {names}")
        launches.append((self, arguments, options))

    launch, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = launch
    return launches


def source_of(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """The source with the types and the specialisation that a launch with these arguments gets."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            aligned = False
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = specialised and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def staged_weights(arguments: dict[str, Any], ttgir: str) -> bool:
    """Whether tiles of weights pass through shared memory on their way to the tensor cores."""
    if "SLICES" not in arguments:
        return False
    shape = f"{arguments['BLOCK_N']}x{arguments['STEP_K']}"
    if arguments["SLICES"] > 1:
        shape = f"{arguments['SLICES']}x{shape}"
    return re.search(rf"memdesc<(?:\d+x)?{shape}x(?:bf16|f16),", ttgir) is not None


def unfinished_products(ptx: str) -> list[str]:
    """What goes on in PTX although a wgmma may still read its operands.

    Registers: a block of instructions ends while a wgmma whose left operand is in registers is in flight.
    What comes next, in a loop the same block again, may write them, and ptxas does not see to it. Shared
    memory: it is written while a wgmma is in flight, or with no barrier since the wait (warps wait for their
    own), whatever the addresses: kernels here need no more.
    """
    found = []
    in_flight: list[bool] = []  # of each group: whether it reads registers
    group: list[bool] = []
    passed_barrier = True
    for number, line in enumerate(ptx.splitlines(), 1):
        if product := re.search(r"\bwgmma\.mma_async\S*\s+\{[^}]*\}\s*,\s*(\{?)", line):
            group.append(product.group(1) == "{")
            passed_barrier = False
        elif "wgmma.commit_group" in line:
            in_flight.append(any(group))
            group = []
        elif wait := re.search(r"\bwgmma\.wait_group\S*\s+(\d+)", line):
            in_flight = in_flight[max(0, len(in_flight) - int(wait.group(1))) :]
        elif re.search(r"\bbar(rier)?\.(cta\.)?sync\b", line):
            passed_barrier = passed_barrier or not (in_flight or group)
        elif re.search(r"\b(bra|ret)\b|^\$L__BB", line):
            if any(in_flight + group):
                found.append(f"line {number}: {sum(in_flight)} groups with registers at {line.strip()!r}")
        elif re.search(r"\b(cp\.async\S*\.shared|st\.shared|stmatrix)", line) and not passed_barrier:
            found.append(f"line {number}: {len(in_flight)} groups in flight at {line.strip()!r}")
    return found


def written_too_early(sass: str) -> list[str]:
    """Instructions that write a register which an HGMMA in flight reads, each loop run through twice."""
    found = []
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    code = [(int(at, 16), name, rest.strip()) for at, name, rest in re.findall(pattern, sass)]
    index = {at: i for i, (at, _, _) in enumerate(code)}
    in_flight: list[set[int]] = []
    group: set[int] = set()
    jumped: set[int] = set()
    i = 0
    while i < len(code):
        at, name, rest = code[i]
        i += 1
        base = name.split(".")[0]
        if name.startswith("HGMMA"):
            if left := re.match(r"[^,]*, R(\d+)", rest):
                group |= set(range(int(left.group(1)), int(left.group(1)) + 4))
            if "gsb0" in rest:
                in_flight.append(group)
                group = set()
        elif name.startswith("WARPGROUP.DEPBAR"):
            pending = int(re.search(r"gsb0, (0x[0-9a-f]+)", rest).group(1), 16)
            in_flight = in_flight[max(0, len(in_flight) - pending) :]
        elif base == "BRA":
            target = int(rest.split("0x")[-1], 16)
            if target < at and at not in jumped:
                jumped.add(at)
                i = index[target]
        elif base not in ("ST", "STG", "STS", "STL", "LDGSTS"):
            wide = 4 if ".128" in name else 2 if re.search(r"\.(64|WIDE)\b", name) or base == "CS2R" else 1
            first = re.match(r"R(\d+)\b", rest)
            written = set(range(int(first.group(1)), int(first.group(1)) + wide)) if first else set()
            if written & group.union(*in_flight):
                found.append(f"{at:#x}: {name} {rest}")
    return found


def compiled(case: str, launch: Launch, arch: int) -> dict[str, object]:
    """Compile one launch for sm_`arch` down to machine code, and report on it."""
    kernel, arguments, options = launch
    begin = time.perf_counter()
    binary = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - begin
    # Disassembling takes as long as compiling a small kernel, and is for wgmma alone (HGMMA in machine code).
    has_warpgroup_products = "wgmma.mma_async" in binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            if wanted
            else ""
            for what, wanted in (("-res-usage", True), ("-sass", has_warpgroup_products))
        )
    if has_warpgroup_products and "HGMMA" not in sass:
        raise AssertionError(f"{kernel.__name__} ({case}): wgmma in its PTX, no HGMMA in its machine code")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return {
        "kernel": kernel.__name__,
        "case": case,
        "arch": arch,
        "seconds": round(seconds, 2),
        "shared": binary.metadata.shared,
        "registers": registers,
        "stack": stack,
        "atomics": sorted(set(re.findall(r"\b(?:atom|red)\.[\w.:]+", binary.asm["ptx"]))),
        "staged_weights": staged_weights(arguments, binary.asm["ttgir"]),
        "unfinished_products": unfinished_products(binary.asm["ptx"]),
        "written_too_early": written_too_early(sass),
        "tensor_cores": sorted(set(re.findall(r"\bw?g?mma\.[\w.:]+", binary.asm["ptx"]))),
    }


def weight(
    bits: int, group_size: int | str, *, symmetric: bool, act_order: bool, dtype: torch.dtype
) -> PackedWeight:
    N, K = 256, 4096
    spec = QuantSpec(bits, group_size, symmetric)
    G = spec.num_groups(K)
    return PackedWeight(
        spec,
        N,
        K,
        torch.zeros(N, spec.num_words(K), dtype=torch.int32),
        torch.ones(N, G, dtype=dtype),
        None if symmetric else torch.zeros(N, G, dtype=torch.uint8),
        torch.zeros(K, dtype=torch.int32) if act_order else None,
    )


def linear_case(
    bits: int,
    group_size: int | str,
    dtype: torch.dtype,
    *,
    M: int = 1,
    symmetric: bool = True,
    act_order: bool = False,
    added: bool = False,
) -> Callable[[], object]:
    """added: with a bias and a residual. The configuration is the one for K = 4096, N = 4096 on an H100."""
    packed = weight(bits, group_size, symmetric=symmetric, act_order=act_order, dtype=dtype)
    x = torch.zeros(M, packed.K, dtype=dtype)
    bias = torch.zeros(packed.N, dtype=dtype) if added else None
    residual = torch.zeros(M, packed.N, dtype=dtype) if added else None
    prepared = linear.prepare(packed, dtype)
    if prepared.layout == "triton.tiles":
        config = choose_tiles(M, 4096, 4096, bits)
    else:
        config = rows.choose(M, 4096, 4096, group_size, act_order, dtype, H100_MULTIPROCESSORS)
    return lambda: linear.wna16_linear(x, prepared, bias, residual, config=config)


def attention_case(
    dtype: torch.dtype,
    *,
    kv_dtype: torch.dtype | None = None,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    window: int | None = None,
    q_len: int = 1,
    extras: bool = False,
    one_scale: bool = False,
) -> Callable[[], object]:
    """Planned, run and merged. extras: with a softcap and sinks. one_scale: for a cache of codes."""
    q = torch.zeros(2 * q_len, heads[0], head_dim, dtype=dtype)
    cache, scale = kv_cache_of(kv_dtype or dtype, heads[1], head_dim, one_scale=one_scale)
    table = torch.zeros(2, 16, dtype=torch.int32)
    lengths = torch.zeros(2, dtype=torch.int32)
    sinks = torch.zeros(heads[0]) if extras else None
    softcap = 30.0 if extras else None
    arguments = (q, cache, cache, table, lengths, 0.1, window, softcap, sinks, None, None, scale, scale)
    return lambda: attention.paged_attention_decode(*arguments)


def kv_cache_of(
    kv_dtype: torch.dtype, heads: int, head_dim: int, *, one_scale: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A cache and its scales, if it has any."""
    width = head_dim // 2 if kv_dtype == torch.uint8 else head_dim
    cache = torch.zeros(4, heads, 16, width, dtype=kv_dtype)
    if KV_SCALES[kv_dtype] == ("none",):
        return cache, None
    return cache, torch.ones(1) if one_scale else torch.ones(4, heads, 16)


def write_case(
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    *,
    head_dim: int = 128,
    norm: bool = True,
    rotate: bool = True,
    one_scale: bool = False,
) -> Callable[[], object]:
    """Queries, keys and values of one matrix through the steps and into the cache."""
    q, k, v = torch.zeros(3, 48, head_dim, dtype=dtype).split((32, 8, 8), dim=1)
    cache, scale = kv_cache_of(kv_dtype, 8, head_dim, one_scale=one_scale)
    index = torch.zeros(3, dtype=torch.int64)
    weight = torch.ones(head_dim, dtype=dtype) if norm else None
    steps = (q, index, torch.zeros(8, head_dim), weight, weight, 1e-6, rotate, scale, scale)
    return lambda: write_kv_cache(k, v, cache, cache, index, *steps)


def code_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Caches of codes, written and read."""
    for kv_dtype in (torch.float8_e4m3fn, torch.int8, torch.uint8):
        yield f"write {kv_dtype} from {dtype}", write_case(dtype, kv_dtype)
        yield f"32/8 x 128 {dtype} on {kv_dtype}", attention_case(dtype, kv_dtype=kv_dtype)


def sampling_case(rows: int, vocabulary: int, dtype: torch.dtype) -> Callable[[], object]:
    settings = torch.zeros(rows)
    keys = torch.zeros(rows, dtype=torch.int64)
    logits = torch.zeros(rows, vocabulary, dtype=dtype)
    return lambda: sample_tokens(logits, settings, settings.int(), settings, settings, keys)


def small_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """The operators beside the two large ones."""
    x = torch.zeros(2, 4096, dtype=dtype)
    long = torch.zeros(2, 12288, dtype=dtype)
    yield "rms_norm", lambda: rms_norm(x, x[0], 1e-6)
    yield "rms_norm residual", lambda: rms_norm(x, x[0], 1e-6, x)
    yield "rms_norm two passes", lambda: rms_norm(long, long[0], 1e-6, long)
    yield "silu_and_mul", lambda: silu_and_mul(long)
    yield "sample_tokens", sampling_case(2, 128256, dtype)
    q, k = torch.zeros(3, 32, 128, dtype=dtype), torch.zeros(3, 8, 128, dtype=dtype)
    positions = torch.zeros(3, dtype=torch.int64)
    yield "apply_rope", lambda: apply_rope(q, k, positions, torch.zeros(8, 128))
    cache = torch.zeros(4, 8, 16, 128, dtype=dtype)
    yield "write_kv_cache", lambda: write_kv_cache(k, k, cache, cache, positions)
    yield "write_kv_cache to float32", lambda: write_kv_cache(k, k, cache.float(), cache.float(), positions)
    for bits, act_order in ((3, True), (4, False)):
        packed = weight(bits, 64, symmetric=act_order, act_order=act_order, dtype=dtype)
        yield f"dequantize {bits}", lambda packed=packed: dequantize(packed, dtype)


def quick_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel at least once, on the paths that differ most."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield from small_cases(bf16)
    yield "W4 g128 bf16", linear_case(4, 128, bf16)
    yield "W4 g32 bf16 asymmetric, M=64", linear_case(4, 32, bf16, symmetric=False, M=64, added=True)
    yield "W3 g64 fp16 asymmetric", linear_case(3, 64, fp16, symmetric=False, M=64, added=True)
    yield "W4 g128 bf16 act-order", linear_case(4, 128, bf16, act_order=True, added=True)
    yield "W8 channel fp32", linear_case(8, "channel", fp32, M=3, added=True)
    yield "32/8 x 128 bf16", attention_case(bf16)
    yield "32/8 x 128 bf16, 5 tokens", attention_case(bf16, window=100, q_len=5, extras=True)
    yield "32/8 x 128 bf16 on 4 bits", attention_case(bf16, kv_dtype=torch.uint8)
    yield "write 4 bits", write_case(bf16, torch.uint8)
    yield "9/3 x 64 fp32 on bf16", attention_case(fp32, kv_dtype=bf16, heads=(9, 3), head_dim=64)


def more_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every width of codes with every kind of group; dtypes, tiles and heads that launchers pick."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype in (fp16, fp32):
        for name, case in small_cases(dtype):
            yield f"{name} {dtype}", case
    token_counts, symmetric = itertools.cycle((1, 17, 100)), itertools.cycle((False, True, False, True, True))
    for bits, group_size in itertools.product((2, 3, 4, 8), (32, 128, "channel")):
        M, is_symmetric = next(token_counts), next(symmetric)
        case = linear_case(bits, group_size, bf16, M=M, symmetric=is_symmetric)
        yield f"W{bits} {group_size} symmetric={is_symmetric} M={M}", case
    for bits, dtype, act_order in ((3, fp16, True), (4, bf16, True), (3, fp32, False), (4, fp32, True)):
        case = linear_case(bits, 64, dtype, M=33, symmetric=False, act_order=act_order, added=True)
        yield f"W{bits} g64 {dtype} act-order={act_order} M=33", case
    yield from code_cases(bf16)
    for case in (write_case, attention_case):
        yield f"{case.__name__}, one scale", case(bf16, kv_dtype=torch.float8_e4m3fn, one_scale=True)
    yield "write to bfloat16", write_case(bf16, bf16)
    for dtype, head_dim, heads, q_len in (
        (bf16, 64, (9, 3), 1),
        (fp16, 80, (32, 32), 2),
        (bf16, 96, (71, 1), 1),
        (bf16, 128, (32, 2), 8),
        (fp16, 128, (28, 4), 1),
        (bf16, 256, (8, 4), 8),
        (fp32, 128, (32, 8), 8),
    ):
        case = attention_case(dtype, heads=heads, head_dim=head_dim, q_len=q_len, extras=q_len > 1)
        yield f"{heads} x {head_dim} {dtype}, {q_len} tokens", case
    yield "fp16 on bf16", attention_case(fp16, kv_dtype=bf16)
    one = torch.zeros(2, 1, dtype=bf16)
    yield "rms_norm of one value", lambda: rms_norm(one, one[0], 1e-6, one)
    yield "silu_and_mul of one value", lambda: silu_and_mul(torch.zeros(1, 2, dtype=bf16))
    pair, position = torch.zeros(1, 1, 2, dtype=bf16), torch.zeros(1, dtype=torch.int64)
    yield "apply_rope of one pair", lambda: apply_rope(pair, pair, position, torch.zeros(1, 2))
    cache = torch.zeros(1, 1, 1, 2, dtype=bf16)
    yield "write_kv_cache of one head", lambda: write_kv_cache(pair, pair, cache, cache, position)
    yield "sample_tokens of one token", sampling_case(1, 1, bf16)
    yield "1/1 x 1 bf16", attention_case(bf16, heads=(1, 1), head_dim=1)


def every_code_case() -> Iterator[tuple[str, Callable[[], object]]]:
    """Caches of codes: the other dtypes of activations, and other widths of heads."""
    bf16 = torch.bfloat16
    for dtype in (torch.float16, torch.float32):
        yield from code_cases(dtype)
    for kv_dtype, head_dim in itertools.product(
        (torch.float8_e4m3fn, torch.int8, torch.uint8), (64, 96, 256)
    ):
        case = write_case(bf16, kv_dtype, head_dim=head_dim, norm=head_dim != 64, rotate=head_dim != 96)
        yield f"write {head_dim} to {kv_dtype}", case
        case = attention_case(bf16, kv_dtype=kv_dtype, heads=(28, 4), head_dim=head_dim, q_len=4, extras=True)
        yield f"28/4 x {head_dim} bf16 on {kv_dtype}, 4 tokens", case


def tuned_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel of the table of configurations once."""
    seen = set()
    for bits, N, K, M, config in tuned():
        spec = QuantSpec(bits, 128, True)
        # One word stands for all: only shapes and types count.
        word = torch.zeros(128, dtype=torch.int32)
        tensors = (word.expand(-(-N // 16), K * bits // 256, 128), word[:8].expand(-(-N // 16), K // 128, 8))
        prepared = PreparedWeight(spec, N, K, torch.bfloat16, "triton", "triton.tiles", tensors)
        x = torch.empty(M, K, dtype=torch.bfloat16)
        call = partial(linear.wna16_linear, x, prepared, config=config)
        constants = {
            name: value for name, value in recorded(call)[0][1].items() if name.isupper() and len(name) > 1
        }
        key = (tuple(constants.items()), config.num_warps, config.num_stages)
        if key not in seen:
            seen.add(key)
            yield f"W{bits} {N}x{K} M={M} {config}", call


def main() -> None:
    which, *arches = sys.argv[1:]
    cases = {
        "quick": quick_cases,
        "more": more_cases,
        "codes": every_code_case,
        "tuned": tuned_cases,
        "unwaited": lambda: [("W4 g128 bf16, M=64", linear_case(4, 128, torch.bfloat16, M=64))],
    }[which]
    for arch in map(int, arches):
        # The tensors are on the CPU, and the launchers decide by the device.
        for module in (tiles, attention, plan):
            module.can_launch_early = lambda device, arch=arch: arch >= 90
        attention.converts_float8 = lambda device, arch=arch: arch >= 89
        plan.multiprocessors = lambda device: H100_MULTIPROCESSORS
        for module in (tiles, rows):
            module.multiplies_by_warpgroups = lambda device, arch=arch: arch == 90
        for name, call in cases():
            launches = recorded(call)
            if which in ("tuned", "unwaited"):
                # Without the one that adds the splits.
                del launches[1:]
            for launch in launches:
                if which == "unwaited":
                    launch[1]["WARPGROUPS"] = False
                print(json.dumps(compiled(name, launch, arch)), flush=True)


if __name__ == "__main__":
    main()
