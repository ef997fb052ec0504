"""Digests: which weights a module has (provenance), and which base they descend from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

BASE_SAMPLE_ROWS = 1024
"""Rows of the embedding that identify a base: 8 MiB of an 8B model, hashed in milliseconds."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in host memory, row-major, without a copy where it is contiguous already."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


class WeightDigest:
    """SHA-256 over names, dtypes, shapes and every byte of the tensors added, in order.

    Each tensor is hashed on its own and the digest is taken over those hashes, so that the tensors of a layer
    are hashed side by side on several threads (hashing releases the interpreter lock): about 0.4 to 2 GB/s a
    core.  Two sets of weights that differ in any bit of any tensor have different digests.
    """

    def __init__(self, header: str) -> None:
        """header: what else belongs to the identity, such as the constants of the model."""
        self._digest = hashlib.sha256(header.encode())
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Add named tensors in host memory; returns when all are hashed."""
        named = list(tensors)
        hashes = self._pool.map(lambda item: hashlib.sha256(tensor_bytes(item[1])).hexdigest(), named)
        for (name, tensor), tensor_hash in zip(named, hashes, strict=True):
            entry = [name, str(tensor.dtype), list(tensor.shape), tensor_hash]
            self._digest.update(json.dumps(entry).encode())

    def value(self) -> str:
        """The digest of what was added so far: "sha256:" and 64 hexadecimal digits."""
        return "sha256:" + self._digest.hexdigest()

    def __enter__(self) -> WeightDigest:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def base_digest(embed_tokens: Tensor) -> str:
    """Identify the base model by its embedding (V, H): rows sampled evenly, rounded to bfloat16.

    The embedding is frozen in training and kept by quantisation, so a fine-tuned or quantised descendant has
    the digest of its base, in whatever 16- or 32-bit type it is stored - except float16 from a wider range,
    which rounds twice; a card records the digest of the origin for that case.
    """
    rows = embed_tokens.shape[0]
    count = min(rows, BASE_SAMPLE_ROWS)
    # Integer arithmetic: the same rows on every machine.
    picked = torch.tensor([i * rows // count for i in range(count)], device=embed_tokens.device)
    sample = embed_tokens[picked].to(torch.bfloat16).cpu()
    digest = hashlib.sha256(json.dumps(["embed_tokens", list(embed_tokens.shape)]).encode())
    digest.update(tensor_bytes(sample))
    return "sha256:" + digest.hexdigest()


def weight_digest(weight: Tensor) -> str:
    """SHA-256 over dtype, shape and every byte of one tensor in host memory."""
    digest = hashlib.sha256(json.dumps([str(weight.dtype), list(weight.shape)]).encode())
    digest.update(tensor_bytes(weight))
    return "sha256:" + digest.hexdigest()


def vocabulary_digest(tokens: Iterable[tuple[int, str]]) -> str:
    """SHA-256 over (id, token) pairs in order of id."""
    pairs = json.dumps([[token_id, token] for token_id, token in sorted(tokens)])
    return "sha256:" + hashlib.sha256(pairs.encode()).hexdigest()
