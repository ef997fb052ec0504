"""Digests of weights, bases and vocabularies."""

from __future__ import annotations

import pytest
import torch

from qsun.modules.digest import WeightDigest, base_digest, vocabulary_digest


def digest(named, header: str = "h") -> str:
    with WeightDigest(header) as weights:
        weights.add(named)
        return weights.value()


def test_weights_are_told_apart_by_everything_that_matters():
    ones = torch.ones(2, 3)
    reference = digest([("a", ones)])
    assert digest([("a", ones.clone())]) == reference
    assert reference.startswith("sha256:") and len(reference) == 71
    others = [
        [("b", ones)],
        [("a", ones.view(3, 2))],
        [("a", ones.view(6))],
        [("a", ones.bfloat16())],
        [("a", ones.view(torch.int32))],
        [("a", torch.nextafter(ones, torch.tensor(2.0)))],
        [("a", ones), ("b", ones)],
        [("a", ones), ("b", torch.empty(0))],
        [],
    ]
    assert len({reference, digest([("a", ones)], "other header"), *map(digest, others)}) == 2 + len(others)


def test_signed_zeros_and_order_matter():
    zero = torch.zeros(4)
    assert digest([("a", zero)]) != digest([("a", -zero)])
    one = torch.ones(4)
    assert digest([("a", zero), ("b", one)]) != digest([("b", one), ("a", zero)])


def test_strides_do_not_matter_and_portions_do_not():
    matrix = torch.arange(12.0).view(3, 4)
    assert digest([("a", matrix.t())]) == digest([("a", matrix.t().contiguous())])
    with WeightDigest("h") as weights:
        weights.add([("a", matrix)])
        weights.add([("b", matrix)])
        assert weights.value() == digest([("a", matrix), ("b", matrix)])


@pytest.mark.parametrize("rows", [5, 1024, 3000])
def test_base_survives_rounding_to_bfloat16(rows):
    embedding = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    expected = base_digest(embedding)
    assert base_digest(embedding.bfloat16()) == expected
    assert base_digest(embedding.bfloat16().float()) == expected
    assert base_digest(embedding.double()) == expected


def test_bases_differ():
    embedding = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    changed = embedding + 0.01
    assert len({base_digest(embedding), base_digest(changed), base_digest(embedding[:2999])}) == 3


def test_vocabulary_is_an_unordered_set_of_pairs():
    tokens = {0: "a", 1: "b", 7: "ü\x00"}
    expected = vocabulary_digest(tokens.items())
    assert vocabulary_digest(reversed(list(tokens.items()))) == expected
    assert vocabulary_digest({**tokens, 7: "u"}.items()) != expected
    assert vocabulary_digest({0: "a", 1: "b", 8: "ü\x00"}.items()) != expected
    assert vocabulary_digest([(0, "ab"), (1, "")]) != vocabulary_digest([(0, "a"), (1, "b")])
