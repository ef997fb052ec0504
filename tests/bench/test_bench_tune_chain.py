"""qsun-bench tune wna16 --backend cuda --chain: what it tries, keeps and writes. Timing is faked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qsun_bench import panel_ways, tune_chain, tune_layer_device
from qsun_bench.cli import main
from qsun_bench.panel_ways import Machine


@pytest.fixture
def extension() -> Any:
    """The binding, where it is built."""
    return pytest.importorskip("qsun_kernels._C")


class FakeChain:
    """A layer's time: of each product its own, and more where two neighbours run the same way."""

    def __init__(self, own: Callable[[str, tune_chain.Launch], float]) -> None:
        self.own = own
        self.timed = 0

    def time(self, M: int, chain: tune_chain.Chain) -> float:
        self.timed += 1
        launches = list(chain.values())
        clash = sum(one[1][-1] == two[1][-1] for one, two in itertools.pairwise(launches))
        return sum(self.own(*item) for item in chain.items()) + 5.0 * clash


START: tune_chain.Chain = {product: ("stream", (0,)) for product in tune_chain.PRODUCTS}
TRIED: dict[str, list[tune_chain.Launch]] = {
    product: [("stream", (0,)), ("stream", (1,)), ("gemm_sm90", (7,))] for product in tune_chain.PRODUCTS
}


def test_the_chain_counts_not_the_product_alone() -> None:
    """Alone every product is fastest with (0,); one after another they are not."""
    trials = FakeChain(lambda product, launch: 1.0 + launch[1][0])
    found = tune_chain.descend(1, START, TRIED, trials)
    assert found.before == 4.0 + 15.0 and found.after < found.before
    launches = [found.chain[product] for product in tune_chain.PRODUCTS]
    assert all(one != two for one, two in itertools.pairwise(launches))
    assert found.after == trials.time(1, found.chain)


def test_launches_that_are_only_faster_together_are_found_from_another_start() -> None:
    """One product with (1,) is slower than none; all four are faster. Nothing else leads there."""

    class Together(FakeChain):
        def time(self, M: int, chain: tune_chain.Chain) -> float:
            taken = sum(way == (1,) for _, way in chain.values())
            return 10.0 if taken == len(chain) == 4 else 20.0 + taken

    trials = Together(lambda product, launch: 0.0)
    assert tune_chain.descend(1, START, TRIED, trials).after == 20.0
    other: tune_chain.Chain = {product: ("stream", (1,)) for product in tune_chain.PRODUCTS}
    found = tune_chain.descend(1, START, TRIED, trials, others=[other])
    assert (found.before, found.after, found.chain) == (20.0, 10.0, other)


def test_a_start_that_is_refused_or_slower_is_left() -> None:
    class Refusing(FakeChain):
        def time(self, M: int, chain: tune_chain.Chain) -> float:
            if chain.get("o") == ("stream", (9,)):
                raise ValueError("no such launch")
            return super().time(M, chain)

    trials = Refusing(lambda product, launch: 1.0 + launch[1][0])
    refused = {**START, "o": ("stream", (9,))}
    slower: tune_chain.Chain = {product: ("gemm_sm90", (7,)) for product in tune_chain.PRODUCTS}
    expected = tune_chain.descend(1, START, TRIED, trials)
    found = tune_chain.descend(1, START, TRIED, trials, others=[refused, slower])
    assert found.chain == expected.chain
    assert found.refusals == ["refused: M=1, another place to begin at: ValueError: no such launch"]


def test_what_a_product_adds_and_the_kernel_that_is_taken() -> None:
    trials = FakeChain(lambda product, launch: 2.0 if launch[0] == "gemm_sm90" else 3.0)
    found = tune_chain.descend(16, START, {**TRIED, "o": TRIED["o"][:2]}, trials)
    for product in tune_chain.PRODUCTS:
        kernel, way = found.chain[product]
        assert found.best[product, kernel][0] == way
        others = [us for (name, by), (_, us) in found.best.items() if name == product and by != kernel]
        assert all(us > found.best[product, kernel][1] for us in others)
    assert ("o", "gemm_sm90") not in found.best


def test_what_is_near_the_best_is_tried_as_well() -> None:
    """From (0,) on, each step finds a better neighbour, up to (4,), which no list holds."""
    trials = FakeChain(lambda product, launch: 10.0 - min(launch[1][0], 4))
    tried: dict[str, list[tune_chain.Launch]] = {product: [("stream", (0,))] for product in TRIED}

    def around(product: str, launch: tune_chain.Launch) -> list[tune_chain.Launch]:
        return [("stream", (launch[1][0] + step,)) for step in (-1, 1)]

    found = tune_chain.descend(1, START, tried, trials, around)
    assert max(way[0] for _, way in found.chain.values()) == 4
    assert found.after < found.before


def test_near_is_one_number_away_whatever_the_stages() -> None:
    way = (1, 2, 16, 2, 1, 1)
    listed = [way, (1, 2, 16, 3, 1, 1), (1, 2, 12, 4, 1, 1), (1, 4, 8, 2, 1, 1), (1, 2, 16, 2, 0, 0)]
    assert tune_chain.near(("stream", way), listed) == [("stream", other) for other in listed[:3]]


def test_lucky_timings_do_not_win() -> None:
    """Each first timing of a launch looks fast; timed again in turn, none is faster than the start."""
    seen: set[object] = set()

    class Lucky:
        def time(self, M: int, chain: tune_chain.Chain) -> float:
            key = tuple(chain.items())
            lucky = key not in seen and dict(chain) != dict(START)
            seen.add(key)
            return 10.0 if dict(chain) == dict(START) else (5.0 if lucky else 11.0)

    found = tune_chain.descend(1, START, TRIED, Lucky())
    assert found.chain == START and found.after == found.before == 10.0


def test_a_launch_that_is_refused_is_said_and_left_out() -> None:
    def own(product: str, launch: tune_chain.Launch) -> float:
        if launch[0] == "gemm_sm90":
            raise RuntimeError("perm is given")
        return 1.0

    # The words of a way are those of its kernel's fields.
    tried = {
        product: [*TRIED[product][:2], ("gemm_sm90", (16, 1, 2, 4, 0))] for product in tune_chain.PRODUCTS
    }
    found = tune_chain.descend(4, START, tried, FakeChain(own))  # type: ignore[arg-type]
    assert len(found.refusals) == 4
    assert found.refusals[0] == (
        "refused: qkv M=4 gemm_sm90 token_tile=16 warp_groups=1 split_k=2 stages=4 in_cluster=0: "
        "RuntimeError: perm is given"
    )


def test_the_start_is_what_the_library_launches(extension: Any) -> None:
    if "90a" not in extension.build_info()["archs"]:
        pytest.skip("built without sm_90a")
    props = extension.DeviceProps(
        compute_major=9, compute_minor=0, sm_count=132, shared_memory_per_block=232448, l2_bytes=50 << 20
    )
    for M in tune_chain.TOKENS:
        for product, (kernel, way) in tune_chain.start(M, panel_ways.SOURCE).items():
            cell = tune_chain.cell(product, M)
            said = extension.describe_wna16_panels(M, cell.N, cell.K, 4, 1, False, False, props, True)
            settings = panel_ways.settings(kernel, cell, way, 132)
            want = {
                name: {True: "yes", False: "no"}.get(value, str(value))
                if isinstance(value, bool)
                else str(value)
                for name, value in settings.items()
            }
            assert said.split()[0] == kernel
            assert dict(re.findall(r"(\w+)=(\w+)", said)) == want


def test_other_places_to_begin_at() -> None:
    """The neighbours' launches; up to 16 tokens both kernels were measured, beyond only that for many."""
    found = {M: tune_chain.other_starts(M, panel_ways.SOURCE) for M in (1, 16, 32)}
    for M, chains in found.items():
        at = tune_chain.TOKENS.index(M)
        near = tune_chain.TOKENS[max(at - 1, 0) : at] + tune_chain.TOKENS[at + 1 : at + 2]
        assert chains[: len(near)] == [tune_chain.start(tokens, panel_ways.SOURCE) for tokens in near]
        by_one = [{kernel for kernel, _ in chain.values()} for chain in chains[len(near) :]]
        assert by_one == ([{"stream"}, {"gemm_sm90"}] if M <= 16 else [{"gemm_sm90"}])
        assert all(set(chain) == set(tune_chain.PRODUCTS) for chain in chains)


def test_the_table_takes_the_chain_and_other_tokens_stay(tmp_path: Path) -> None:
    table = panel_ways.table()
    for kernel in panel_ways.SM90_KERNELS:
        text = (panel_ways.SOURCE / f"{kernel}_sweep.txt").read_text()
        (tmp_path / f"{kernel}_sweep.txt").write_text(text)
    assert table.in_chain("stream", tmp_path) == {}
    assert table.chosen("stream", tmp_path) == table.fastest_of("stream", tmp_path)
    way, late = (1, 2, 16, 2, 1, 1), (16, 1, 2, 4, 0)

    def found(M: int, us: float) -> tune_chain.ChainFound:
        best = {("qkv", "stream"): (way, us), ("o", "gemm_sm90"): (late, us)}
        return tune_chain.ChainFound(M, 50.0, 45.0, START, best, ())  # type: ignore[arg-type]

    first = tune_chain.text([found(1, 6.5), found(16, 7.5)], "H100, 2026-12-01")
    (tmp_path / table.CHAIN).write_text(tune_chain.text([found(1, 6.25)], "H100, 2026-12-02", first))
    text = (tmp_path / table.CHAIN).read_text()
    assert "stream 4096 6144 1 1 2 16 2 1 1 6.250\n" in text and "6.500" not in text and "7.500" in text
    assert "# M = 16: 50.00 us" in text and max(map(len, text.splitlines())) <= 110
    assert table.chosen("stream", tmp_path)[(4096, 6144), 1] == (way, 6.25)
    assert table.chosen("gemm_sm90", tmp_path)[(4096, 4096), 16] == (late, 7.5)
    untouched = table.fastest_of("gemm_sm90", tmp_path)[(4096, 4096), 32]
    assert table.chosen("gemm_sm90", tmp_path)[(4096, 4096), 32] == untouched
    assert table.chosen("stream", tmp_path, 2) == {}, "a chain of W4 says nothing of W2"
    assert "    {4, 4096, 6144, 1, 6.25f, 1, 2, 16, 2, 1, 1},\n" in table.header(tmp_path)


def test_the_chain_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("qsun_kernels._C")
    from qsun_bench import tune_panels_device

    machine = Machine(132, 227 << 10, ((16, 1), (32, 1)), lambda *launch: 30_000, lambda cell: ())
    chain = FakeChain(lambda product, launch: float(sum(launch[1])))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune_panels_device, "why_not", lambda: None)
    monkeypatch.setattr(tune_panels_device, "machine", lambda device: machine)
    monkeypatch.setattr(tune_panels_device, "where", lambda device: "Fake 9000, 2026-12-01")
    monkeypatch.setattr(tune_layer_device, "LayerTrials", lambda device: chain)
    arguments = ["tune", "wna16", "--backend", "cuda", "--chain", "--m", "1,16", "--out", str(tmp_path)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "gate_up" in said and "us before" in said
    text = (tmp_path / panel_ways.table().CHAIN).read_text()
    assert "# M = 1: " in text and "# M = 16: " in text and "Fake 9000, 2026-12-01" in text
    assert (tmp_path / "choices_table.h").read_text() == panel_ways.table().header(tmp_path)
