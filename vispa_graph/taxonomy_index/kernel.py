"""How much every phrase pulls toward every value: kernel ridge regression on the phrases, which are labelled with values.

The kernel is Gaussian; on unit vectors with cosine c it is exp((c - 1) / temperature). What speaks for a value in a query is the sum over
phrases of kernel times pull: a phrase speaks for the values it points at, and against those that phrases like it do not point at.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vispa_graph.taxonomy_index.encoder import Floats

# Chosen on the tuning half of benchmarks/data/labelled_situations.yaml (python -m benchmarks.selection --half tune).
TEMPERATURE = 0.1
# Wider, since what a phrase leaves open is filled in from afar.
FILLING_TEMPERATURE = 0.35
FILLING_RIDGE = 0.3
RIDGE = 0.3
# Solving takes time with the third power of the phrases: more of them are represented by every so-manieth.
EXACT_UP_TO = 16384
LANDMARKS = 4096
_BLOCK = 4096


def kernel(cosines: Floats, temperature: float = TEMPERATURE) -> Floats:
    """The kernel of cosines in -1..1; 1 for equal texts."""
    return np.asarray(np.exp((cosines - 1) / temperature), dtype=np.float32)


def solve(vectors: Floats, labels: Floats, complete: npt.NDArray[np.bool_]) -> Floats:
    """The pull of each phrase on each value, [phrases, values].

    A phrase of one value's own says nothing about the others. They are filled in with what the complete labels predict for it. A phrase
    that is labelled with all values speaks for none that it does not point at: the regression would let it make up for its neighbours, and a
    plain question near other plain questions would put values at stake.

    Args:
        vectors: Unit vectors of the phrases, [phrases, dimensions].
        labels: How much each phrase points at each value, 0..1, [phrases, values].
        complete: Which phrases are labelled with all values, [phrases].
    """
    if not complete.any():
        return _fit(vectors, labels, TEMPERATURE, RIDGE)
    known = vectors[complete]
    pull = _fit(known, labels[complete], FILLING_TEMPERATURE, FILLING_RIDGE)
    filled = labels.copy()
    for row in np.flatnonzero(~complete):
        predicted = kernel(known @ vectors[row], FILLING_TEMPERATURE) @ pull
        filled[row] = np.maximum(labels[row], predicted.clip(0, 1))
    pull = _fit(vectors, filled, TEMPERATURE, RIDGE)
    return np.where(complete[:, None] & (labels == 0), np.minimum(pull, 0), pull)


def _fit(vectors: Floats, target: Floats, temperature: float, ridge: float) -> Floats:
    """The dual coefficients, [phrases, values]."""
    if len(vectors) > EXACT_UP_TO:
        return _by_landmarks(vectors, target, temperature, ridge)
    from scipy.linalg import cho_factor, cho_solve  # costs tenths of a second; only here

    kernels = _kernels(vectors, temperature)
    kernels[np.diag_indices_from(kernels)] += ridge
    factor = cho_factor(kernels.T, overwrite_a=True)  # transposed, so that it is factored where it lies
    return np.asarray(cho_solve(factor, target), dtype=np.float32)


def _kernels(vectors: Floats, temperature: float) -> Floats:
    """The kernel of every vector with every other, made in place: of fifteen thousand it takes a gigabyte."""
    made = vectors @ vectors.T
    made -= 1
    made /= temperature
    np.exp(made, out=made)
    return made


def _by_landmarks(vectors: Floats, target: Floats, temperature: float, ridge: float) -> Floats:
    """Least squares over all phrases with pull on the landmarks alone (subset of regressors)."""
    rows = np.linspace(0, len(vectors) - 1, LANDMARKS).astype(int)
    landmarks = vectors[rows]
    left = ridge * kernel(landmarks @ landmarks.T, temperature).astype(np.float64)
    right = np.zeros((len(rows), target.shape[1]))
    for start in range(0, len(vectors), _BLOCK):
        block = kernel(vectors[start : start + _BLOCK] @ landmarks.T, temperature)
        left += block.T @ block
        right += block.T @ target[start : start + _BLOCK]
    left[np.diag_indices_from(left)] += 1e-6 * np.trace(left) / len(left)  # equal phrases would make it singular
    pull = np.zeros_like(target)
    pull[rows] = np.linalg.solve(left, right)
    return pull
