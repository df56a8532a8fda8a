"""How unlike the others each prompt of a set is: the distance to its nearest neighbours, which a k-nearest-neighbour
estimate of the set's entropy sums (FiFA, arXiv 2410.10166, measures a set of pairs so)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

WIDTH = 2048  # of the hashed word counts
NEIGHBOURS = 5
BLOCK = 1024


def log_distances(prompts: Sequence[str], neighbours: int = NEIGHBOURS) -> np.ndarray:
    """float64 [N]: log of the distance to the `neighbours`-th nearest other prompt, by counts of words and of pairs of
    words, as unit vectors. Costs N^2; no model is needed."""
    vectors = np.stack([_vector(prompt) for prompt in prompts])
    place = min(neighbours, len(prompts) - 1)
    if place < 1:
        return np.zeros(len(prompts))
    result = np.zeros(len(prompts))
    for start in range(0, len(prompts), BLOCK):
        block = slice(start, start + BLOCK)
        cosine = vectors[block] @ vectors.T
        kth = -np.partition(-cosine, place, axis=1)[:, place]  # the largest one is the prompt itself
        result[block] = 0.5 * np.log(np.maximum(2 - 2 * kth.astype(np.float64), 1e-4))
    return result


def _vector(prompt: str) -> np.ndarray:
    words = prompt.lower().split()
    counts = np.zeros(WIDTH, np.float32)
    for term in [*words, *(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))]:
        counts[zlib.crc32(term.encode("utf-8", "replace")) % WIDTH] += 1
    return counts / max(float(np.linalg.norm(counts)), 1e-9)
