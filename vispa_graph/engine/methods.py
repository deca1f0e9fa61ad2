"""The ways of finding a direction, behind one interface: states of two classes in, a vector and a plane out."""

from __future__ import annotations

import threading
import warnings
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vispa_graph.engine.contract import Method, Solver
from vispa_graph.engine.dictionary import SparseDictionary
from vispa_graph.errors import SettingsError

Array = npt.NDArray[np.float64]

# Up to this many coordinates Newton's method is faster than lbfgs: its Hessian is small.
_NEWTON_WIDTH = 512
# Filters of warnings belong to the whole process: two fits at a time could leave one behind.
_FILTERING = threading.Lock()


class Fitter(Protocol):
    """Finds the direction of a value at one block."""

    def __call__(self, layer: int, positives: Array, negatives: Array) -> tuple[Array, float]:
        """The vector w and the offset b of the plane w.h + b = 0 between the classes.

        Args:
            layer: The block.
            positives: [n, d].
            negatives: [m, d]; for `pca` the twins of the positives, in the same order.
        """


def fitter(method: Method, *, solver: Solver = "exact", regularisation: float = 1.0, dictionary: SparseDictionary | None = None) -> Fitter:
    """The way of fitting that a method names.

    Args:
        solver, regularisation: Of `probe`; see `fit_probe`.
        dictionary: Of `sae`.
    """

    def probe(layer: int, positives: Array, negatives: Array) -> tuple[Array, float]:
        return fit_probe(positives, negatives, regularisation, solver)

    def mean_difference(layer: int, positives: Array, negatives: Array) -> tuple[Array, float]:
        return _between(positives.mean(0) - negatives.mean(0), positives, negatives)

    def pca(layer: int, positives: Array, negatives: Array) -> tuple[Array, float]:
        return _between(first_component(positives, negatives), positives, negatives)

    def sae(layer: int, positives: Array, negatives: Array) -> tuple[Array, float]:
        if dictionary is None:
            raise SettingsError("The method sae needs a dictionary. Give one, or choose another method.")
        difference = dictionary.encode(layer, positives).mean(0) - dictionary.encode(layer, negatives).mean(0)
        return _between(dictionary.decode(layer, difference), positives, negatives)

    fitters: dict[Method, Fitter] = {"probe": probe, "mean_difference": mean_difference, "pca": pca, "sae": sae}
    return fitters[method]


def fit_probe(positives: Array, negatives: Array, regularisation: float, solver: Solver = "exact") -> tuple[Array, float]:
    """Weights and bias of a logistic regression.

    Args:
        positives: [n, d].
        negatives: [m, d].
        regularisation: C, the weight of the data against w.w/2.
        solver: `exact` solves to convergence, both classes weighing the same. `saga` is scikit-learn's saga at its default tolerance and
            without class weights, as the paper's code has it; it stops well short of the optimum.
    """
    # Slow to import and only needed when fitting.
    from scipy.linalg import LinAlgWarning
    from sklearn.linear_model import LogisticRegression

    features = np.concatenate([positives, negatives])
    labels = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    if solver == "saga":
        plain = LogisticRegression(C=regularisation, solver="saga", max_iter=10_000, random_state=0).fit(features, labels)
        return plain.coef_[0], float(plain.intercept_[0])
    # The optimum lies in the span of the sentences, which has far fewer dimensions than a wide model's states.
    rows, width = features.shape
    basis = np.linalg.qr(features.T)[0] if rows < width else None
    reduced = features if basis is None else features @ basis
    way = "newton-cholesky" if reduced.shape[1] <= _NEWTON_WIDTH else "lbfgs"
    exact = LogisticRegression(C=regularisation, class_weight="balanced", solver=way, max_iter=10_000, tol=1e-6)
    with _FILTERING, warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)  # of an ill-conditioned Hessian, after which scikit-learn goes on with lbfgs
        exact.fit(reduced, labels)
    weights = exact.coef_[0]
    return weights if basis is None else basis @ weights, float(exact.intercept_[0])


def first_component(positives: Array, negatives: Array) -> Array:
    """Unit first principal component of the pair differences (RepE), its sign such that positives project higher.

    The differences are not centred: their common part is the direction sought. [n, d] twice in, [d] out.
    """
    differences = positives - negatives
    component: Array = np.linalg.svd(differences, full_matrices=False)[2][0]
    # A singular vector's sign is arbitrary.
    return component if differences.mean(0) @ component >= 0 else -component


def _between(vector: Array, positives: Array, negatives: Array) -> tuple[Array, float]:
    """The vector with the plane across it through the midpoint of the class means."""
    return vector, float(-vector @ (positives.mean(0) + negatives.mean(0)) / 2)
