"""The registry: cases are distinct, their bytes are what the tensors hold, their operands repeat."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qsun_bench import kv_choice, peers
from qsun_bench.cases import Case, Selection, suites
from qsun_bench.cases.attention import AttentionCase
from qsun_bench.cases.wna16 import Wna16Case
from qsun_bench.cases.write import WriteCase
from qsun_bench.contenders import contenders
from qsun_bench.shapes import SHAPES, matrices, models, shape
from qsun_kernels.backends.problems import BACKENDS
from qsun_kernels.quant import QuantSpec
from qsun_kernels.testing.kv_codes import KV_KINDS

CPU = torch.device("cpu")
WRITES = (
    WriteCase(5, 4, 2, 32, torch.bfloat16, ("rope",)),
    WriteCase(5, 4, 2, 32, torch.bfloat16, ("norm", "rope"), "fp8-tensor"),
    WriteCase(5, 4, 2, 32, torch.float16, ("rope", "rotate"), "int4", 32),
)


def test_the_shapes_are_those_of_the_published_models_and_a_tiny_one() -> None:
    assert set(SHAPES) == {"llama-3.1-8b", "qwen3-8b", "llama-3.1-70b", "smollm2-135m", "tiny"}
    assert dict(shape("llama-3.1-8b").linears) == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    assert shape("llama-3.1-70b").linears["gate_up"] == (57344, 8192)
    assert shape("smollm2-135m").linears["qkv"] == (960, 576)
    with pytest.raises(ValueError, match=r"shape is 'gpt-5', expected one of smollm2-135m"):
        shape("gpt-5")


def test_a_set_of_matrices_and_a_single_one() -> None:
    sizes = [model.linears[matrix] for model, matrix in matrices(["decode7"])]
    assert [(K, N) for N, K in sizes] == [
        (4096, 4096),
        (4096, 6144),
        (4096, 28672),
        (14336, 4096),
        (8192, 10240),
        (8192, 57344),
        (28672, 8192),
    ]
    selection = Selection(torch.device("cuda"), shapes=("decode7", "llama-3.1-8b.o", "llama-3.1-8b"))
    cases = suites()["wna16"].cases(selection)
    assert len(cases) == 63 and len({case.name for case in cases}) == 63
    assert [model.name for model in models(["decode7"])] == ["llama-3.1-8b", "llama-3.1-70b"]
    assert suites()["attention"].cases(Selection(CPU, shapes=("decode7",)))
    with pytest.raises(ValueError, match=r"shape is 'llama-3.1-8b.x', expected one of"):
        matrices(["llama-3.1-8b.x"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("smoke", [False, True])
def test_every_suite_has_distinct_cases_for_every_device(device: str, smoke: bool) -> None:
    for suite in suites().values():
        cases = suite.cases(Selection(torch.device(device), smoke=smoke))
        names = [case.name for case in cases]
        assert names and len(set(names)) == len(names)
        assert all(case.op == suite.op for case in cases)
        assert suite.baseline in {contender.name for contender in contenders(suite.op)}


def test_cases_follow_the_command_line() -> None:
    selection = Selection(CPU, shapes=("llama-3.1-8b",), batches=(3,), bits=2, group_size=32, symmetric=False)
    cases = suites()["wna16"].cases(selection)
    assert [case.name for case in cases] == [
        f"llama-3.1-8b.{matrix}.w2g32z.M3" for matrix in ("qkv", "o", "gate_up", "down")
    ]
    cases = suites()["attention"].cases(Selection(CPU, batches=(2, 4), contexts=(96,)))
    assert [case.fields()["seq_lens"] for case in cases] == [[96] * 2, [96] * 4]


def test_the_group_size_is_one_the_whole_model_can_use() -> None:
    for case in suites()["wna16"].cases(Selection(CPU)):
        assert isinstance(case, Wna16Case) and case.spec.group_size == 64  # 576 is no multiple of 128
    for case in suites()["wna16"].cases(Selection(torch.device("cuda"))):
        assert isinstance(case, Wna16Case) and case.spec.group_size == 128


def test_bytes_of_a_matrix_product() -> None:
    spec = QuantSpec(4, 128, True)
    case = Wna16Case("m", 1, 4096, 4096, spec, torch.bfloat16)
    weight = case.operands(CPU).weight
    assert case.bytes == weight.nbytes + 2 * (4096 + 4096)
    assert weight.nbytes == 8_650_752  # 0.516 bytes a weight
    zeros = Wna16Case("m", 1, 64, 128, QuantSpec(4, 32, False), torch.float16)
    # Zero points count half a byte each: they are stored as a byte, and hold four bits.
    assert zeros.bytes == 64 * 128 // 2 + 64 * 4 * 2 + 64 * 4 // 2 + 2 * (64 + 128)


def test_act_order_and_dtype_are_in_the_name_and_the_bytes() -> None:
    spec = QuantSpec(4, 32, False)
    plain = Wna16Case("m", 1, 48, 96, spec, torch.float16)
    ordered = Wna16Case("m", 1, 48, 96, spec, torch.float16, act_order=True)
    assert (plain.name, ordered.name) == ("m.w4g32z.float16.M1", "m.w4g32za.float16.M1")
    assert ordered.bytes == plain.bytes + 4 * 96
    assert "act_order" not in plain.fields() and ordered.fields()["act_order"] is True
    assert ordered.operands_key != plain.operands_key and ordered.problem(CPU).has_g_idx
    g_idx = ordered.operands(CPU).weight.g_idx
    assert g_idx is not None and g_idx.bincount().tolist() == [32, 32, 32]
    assert not torch.equal(g_idx, g_idx.sort().values)


def test_batches_of_equal_tokens_and_unequal_skew() -> None:
    by_name = {
        case.name.partition(".")[2]: case.fields()["seq_lens"]
        for case in suites()["attention"].cases(Selection(torch.device("cuda")))
    }
    skewed = ("64x2048", "64-zipf1-131072", "64-zipf1.2-131072", "64-zipf1.5-131072", "64-onelong-131072")
    assert [(len(by_name[name]), sum(by_name[name])) for name in skewed] == [(64, 131072)] * 5  # type: ignore[arg-type]
    assert sorted(by_name["64-onelong-131072"])[-2:] == [1040, 65552]  # type: ignore[arg-type]


def test_bytes_of_attention() -> None:
    case = AttentionCase("a", (100, 7), 8, 2, 64, torch.bfloat16)
    assert case.bytes == 2 * 107 * 2 * 64 * 2 + (7 + 1) * 4 + 2 * 4 + 2 * 2 * 8 * 64 * 2
    windowed = AttentionCase("a", (100, 7), 8, 2, 64, torch.bfloat16, window=16)
    assert case.bytes - windowed.bytes == 2 * (100 - 16) * 2 * 64 * 2


def test_bytes_of_codes_are_those_of_their_tensors() -> None:
    """Whole blocks, so that every slot is counted; block table, lengths, q and the result beside them."""
    others = (2 + 1) * 4 + 2 * 4 + 2 * 2 * 8 * 64 * 2
    for kind in (*KV_KINDS, "auto"):
        case = AttentionCase("a", (32, 16), 8, 2, 64, torch.bfloat16, kv=kind)
        assert case.bytes - others == sum(t.nbytes for t in case.operands(CPU).tensors), kind
    heads = {kv: kv_choice.head_bytes(kv, torch.bfloat16, 128) for kv in kv_choice.KV_CHOICES}
    assert heads == {"auto": 256, "fp8": 132, "fp8-tensor": 128, "int8": 132, "int4": 68}


def test_codes_hold_the_values_of_the_other_case() -> None:
    values = AttentionCase("a", (40, 7), 4, 2, 64, torch.bfloat16)
    # Half a step of the largest codes; with one scale for all a vector may lie at the foot of its binade.
    limits = {"fp8": 16 / 448, "fp8-tensor": 1 / 16, "int8": 0.5 / 127, "int4": 0.5 / 7}
    for kind in KV_KINDS:
        coded = replace(values, kv=kind)
        assert (coded.name, coded.fields()["kv_dtype"]) == (f"a.{kind}", kind)
        pairs = zip(values.operands(CPU).gathered(0), coded.operands(CPU).gathered(0), strict=True)
        for exact, rounded in pairs:
            assert rounded.dtype == torch.float64 and rounded.shape == exact.shape == (2, 40, 64)
            largest = exact.double().abs().amax(-1, keepdim=True)
            error = (rounded - exact.double()).abs() / largest
            assert 0 < error.max() <= 1.001 * limits[kind]


def test_attention_on_a_gpu_covers_codes_groups_and_blocks() -> None:
    cases = suites()["attention"].cases(Selection(torch.device("cuda")))
    by_kind: dict[object, set[str]] = {}
    for case in cases:
        assert isinstance(case, AttentionCase)
        by_kind.setdefault(case.fields()["kv_dtype"], set()).add(case.label)
    assert set(by_kind) == {"bfloat16", "fp8", "int8", "int4"}
    for kind in ("fp8", "int8", "int4"):
        assert "h32kv8d128.64x8192" in by_kind[kind] <= by_kind["bfloat16"]
    swept = [
        c for c in cases if isinstance(c, AttentionCase) and c.seq_lens == (2048,) * 64 and c.kv == "auto"
    ]
    assert {c.q_heads // c.kv_heads for c in swept} == {4, 5, 6, 7, 8}
    assert {c.block_size for c in swept} == {16, 32, 64, 128}
    # FlashAttention 3 may end what comes behind these.
    assert [case.name.partition(".")[2] for case in cases[-2:]] == ["64x8192", "128x4096"]


def test_heads_codes_and_blocks_are_combined() -> None:
    selection = Selection(
        torch.device("cuda"),
        batches=(2,),
        contexts=(96,),
        kv=("auto", "int4"),
        block_sizes=(16, 32),
        heads=((32, 8), (40, 8)),
    )
    assert [case.name for case in suites()["attention"].cases(selection)] == [
        f"h{q}kv8d128.2x96{kv}{block}" for q in (32, 40) for kv in ("", ".int4") for block in ("", ".b32")
    ]
    assert [case.name for case in suites()["write"].cases(selection)] == [
        f"h{q}kv8d128.{steps}{kv}{block}.T2"
        for q in (32, 40)
        for steps, kv in (
            ("rope", ""),
            ("norm+rope", ""),
            ("rope+rotate", ".int4"),
            ("norm+rope+rotate", ".int4"),
        )
        for block in ("", ".b32")
    ]


def test_bytes_of_a_write() -> None:
    case = WriteCase(3, 4, 2, 32, torch.bfloat16, ("norm", "rope"))
    heads = 3 * 32 * 2 * ((4 + 2 * 2) + (4 + 2 * 2))  # read, written
    assert case.bytes == heads + 3 * (8 + 8 + 32 * 4) + 2 * 32 * 2
    codes = WriteCase(3, 4, 2, 32, torch.bfloat16, ("rope",), "int4")
    assert case.bytes - codes.bytes == 3 * 2 * 2 * (64 - (16 + 4)) + 2 * 32 * 2


@pytest.mark.parametrize("who", ["torch", "separate"])
@pytest.mark.parametrize("case", WRITES, ids=lambda case: case.name)
def test_a_write_is_judged_with_all_that_it_changes(case: WriteCase, who: str) -> None:
    (contender,) = [c for c in contenders(case.op) if c.name == who]
    assert contender.available(case, CPU) is None
    operands, x = case.operands(CPU), case.activation(CPU)
    prepared = contender.prepare(operands)
    q = prepared.run(x)
    assert prepared.judge is not None and prepared.judge(x, q).ok
    assert not prepared.judge(x, q * 1.1).ok
    # One byte of a slot that no token has, and one of a value that one has.
    kv = prepared.streamed
    written = operands.call.slot_mapping.tolist()
    for slot in (min(set(range(48)) - set(written)), written[0]):
        place = kv[1].view(torch.uint8)[slot // case.block_size, 0, slot % case.block_size]
        place[0] ^= 1
        assert not prepared.judge(x, q).ok
        place[0] ^= 1
    assert prepared.judge(x, q).ok


SMALL: tuple[Case, ...] = (
    Wna16Case("m", 3, 48, 96, QuantSpec(4, 32, True), torch.bfloat16),
    Wna16Case("m", 3, 48, 100, QuantSpec(3, 32, False), torch.float16),
    Wna16Case("m", 3, 48, 96, QuantSpec(4, 32, True), torch.bfloat16, act_order=True),
    AttentionCase("a", (33, 1, 16), 4, 2, 32, torch.bfloat16),
    AttentionCase("a", (33, 5), 4, 2, 32, torch.float32, window=8),
    *(AttentionCase("a", (33, 5), 4, 2, 32, torch.float16, window=8, kv=kind) for kind in KV_KINDS),
)


@pytest.mark.parametrize(
    "case", (*SMALL, *WRITES), ids=lambda case: f"{case.op}-{case.name}-{case.fields()['dtype']}"
)
def test_operands_repeat_and_copies_are_their_own(case: Case) -> None:
    first, second = case.operands(CPU), case.operands(CPU)
    copied = first.copy()
    for a, b, c in zip(first.tensors, second.tensors, copied.tensors, strict=True):
        assert same_bits(a, b) and same_bits(a, c)
        assert len({t.untyped_storage().data_ptr() for t in (a, b, c)}) == 3
    assert torch.equal(case.activation(CPU), case.activation(CPU))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}-{case.name}-{case.fields()['dtype']}")
def test_the_oracle_agrees_with_torch_and_our_reference(case: Case) -> None:
    operands, x = case.operands(CPU), case.activation(CPU)
    exact, plain = operands.exact(x), operands.plain(x)
    assert exact.dtype == torch.float64 and plain.dtype == x.dtype and exact.shape == plain.shape
    torch.testing.assert_close(plain.double(), exact, rtol=0.05, atol=0.05)
    (ours,) = [c for c in contenders(case.op) if c.name == "torch"]
    assert ours.available(case, CPU) is None
    torch.testing.assert_close(ours.prepare(operands).run(x).double(), exact, rtol=0.05, atol=0.05)


def test_ours_and_the_peers_are_known() -> None:
    by_op = {suite.op: [c.name for c in contenders(suite.op)] for suite in suites().values()}
    assert by_op == {
        "wna16_linear": [
            *BACKENDS,
            "bitsandbytes",
            "dense",
            "gemlite",
            "humming",
            "int4pack_cpu",
            "machete",
            "marlin",
            "tinygemm",
        ],
        "paged_attention_decode": [*BACKENDS, "fa3", "flashinfer-cuda", "flashinfer-tensor", "sdpa"],
        "write_kv_cache": [*BACKENDS, "separate"],
    }
    assert {peer.OPERATOR for peer in peers.modules()} <= set(by_op)
    with pytest.raises(ValueError, match="op is 'softmax', expected one of wna16_linear"):
        contenders("softmax")


@pytest.mark.parametrize(
    ("case", "peer", "says"),
    [
        (
            Wna16Case("m", 1, 48, 96, QuantSpec(3, 32, True), torch.bfloat16),
            "int4pack_cpu",
            "bits only, got 3",
        ),
        (Wna16Case("m", 1, 48, 96, QuantSpec(4, 32, True), torch.float16), "int4pack_cpu", "bfloat16 only"),
        (Wna16Case("m", 1, 40, 96, QuantSpec(4, 32, True), torch.bfloat16), "int4pack_cpu", "got 40"),
        (Wna16Case("m", 1, 48, 100, QuantSpec(4, 32, True), torch.bfloat16), "int4pack_cpu", "got 100"),
        (
            Wna16Case("m", 1, 48, 96, QuantSpec(4, "channel", True), torch.bfloat16),
            "int4pack_cpu",
            "channel",
        ),
        (Wna16Case("m", 1, 48, 96, QuantSpec(4, 32, True), torch.bfloat16), "tinygemm", "device is cpu"),
        (
            Wna16Case("m", 1, 48, 96, QuantSpec(4, 32, True), torch.bfloat16, True),
            "int4pack_cpu",
            "no act-order",
        ),
        (Wna16Case("m", 1, 48, 96, QuantSpec(4, 32, True), torch.bfloat16), "triton", "interpreter"),
    ],
)
def test_who_cannot_run_a_case_says_why(case: Case, peer: str, says: str) -> None:
    (contender,) = [c for c in contenders(case.op) if c.name == peer]
    assert says in (contender.available(case, CPU) or "")
