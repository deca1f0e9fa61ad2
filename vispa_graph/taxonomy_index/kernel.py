"""How much every phrase pulls toward every value: kernel ridge regression on the phrases that are labelled with values.

The kernel is Gaussian; on unit vectors with cosine c it is exp((c - 1) / T). A query's prediction for a value is the sum over phrases of
kernel times pull, so that a phrase speaks for the values it points at, and against those that phrases like it do not point at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vispa_graph.taxonomy_index.encoder import Floats

# Chosen on the tuning half of benchmarks/data/labelled_situations.yaml (python -m benchmarks.selection --half tune).
TEMPERATURE = 0.12
RIDGE = 0.3
# Solving takes time with the third power of the phrases: more of them are represented by every so-manieth.
EXACT_UP_TO = 8192
LANDMARKS = 4096
_BLOCK = 4096


def kernel(cosines: Floats) -> Floats:
    """The kernel of cosines in -1..1; 1 for equal texts."""
    return np.asarray(np.exp((cosines - 1) / TEMPERATURE), dtype=np.float32)


def solve(vectors: Floats, labels: Sequence[Mapping[str, float]], values: Sequence[str]) -> Floats:
    """The pull of each phrase on each value, [phrases, values].

    Args:
        vectors: Unit vectors of the phrases, [phrases, dimensions].
        labels: What each phrase points at, 0..1 by value; 0 for the values left out.
        values: The values of the columns.
    """
    column = {value: number for number, value in enumerate(values)}
    target = np.zeros((len(vectors), len(values)), dtype=np.float32)
    for row, weights in enumerate(labels):
        for value, weight in weights.items():
            target[row, column[value]] = weight
    if len(vectors) <= EXACT_UP_TO:
        return _exact(vectors, target)
    return _by_landmarks(vectors, target, np.linspace(0, len(vectors) - 1, LANDMARKS).astype(int))


def _exact(vectors: Floats, target: Floats) -> Floats:
    from sklearn.kernel_ridge import KernelRidge  # costs half a second; only here

    fitted = KernelRidge(alpha=RIDGE, kernel="precomputed").fit(kernel(vectors @ vectors.T), target)
    return np.asarray(fitted.dual_coef_, dtype=np.float32)


def _by_landmarks(vectors: Floats, target: Floats, rows: np.ndarray) -> Floats:
    """Least squares over all phrases with pull on the landmarks alone (subset of regressors)."""
    landmarks = vectors[rows]
    left = RIDGE * kernel(landmarks @ landmarks.T).astype(np.float64)
    right = np.zeros((len(rows), target.shape[1]))
    for start in range(0, len(vectors), _BLOCK):
        block = kernel(vectors[start : start + _BLOCK] @ landmarks.T)
        left += block.T @ block
        right += block.T @ target[start : start + _BLOCK]
    left[np.diag_indices_from(left)] += 1e-6 * np.trace(left) / len(left)  # equal phrases would make it singular
    pull = np.zeros_like(target)
    pull[rows] = np.linalg.solve(left, right)
    return pull
