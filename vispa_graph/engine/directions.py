"""Fitting the directions of values from contrastive pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import numpy.typing as npt

from vispa_graph.engine.contract import Contrast, Direction, Engine, Floats, Message, Method, Reading
from vispa_graph.prompts import load_prompt
from vispa_graph.taxonomy_index import Taxonomy

Array = npt.NDArray[np.float64]

# Fixed magnitudes where neither the value nor the caller says otherwise (ConVA for mean_difference, RepE for pca).
DEFAULT_ALPHA: dict[Method, float] = {"probe": 1.0, "mean_difference": 0.5, "pca": 1.0}


# How many sentences of one side a chat reading holds.
_READ_TOGETHER = 4


@dataclass(frozen=True)
class FitSettings:
    """How directions are fitted.

    Attributes:
        method: probe, mean_difference or pca.
        layers: Zero-based blocks, ascending.
        contrast: `opposed` sets the positive twins against the negative ones, as the paper does; `opposed+others` adds the positive
            twins of all other values to the negatives, each class weighing the same. `pca` always uses the opposed twins.
        reading: `raw` reads the bare sentence at its last token, as the paper does; `chat` puts it, with three others of its side,
            before a situation in a user's turn and reads at the assistant's header.
        regularisation: C of the logistic regression, on raw features; 1 is scikit-learn's default and the paper's.
    """

    method: Method
    layers: tuple[int, ...]
    contrast: Contrast = "opposed"
    reading: Reading = "raw"
    regularisation: float = 1.0


def fit_directions(
    engine: Engine, taxonomy: Taxonomy, settings: FitSettings, progress: Callable[[int, int], None] | None = None
) -> dict[str, Direction]:
    """Fit the direction of every value in one batched reading of all contrastive pairs.

    Args:
        progress: Called with (done, total) steps.

    Returns:
        A direction for each value id, in the order of the taxonomy.
    """
    sentences: list[str] = []
    spans: dict[str, slice] = {}
    for value in taxonomy:
        start = len(sentences)
        sentences += [pair.positive for pair in value.all_pairs] + [pair.negative for pair in value.all_pairs]
        spans[value.id] = slice(start, len(sentences))
    total, done = len(sentences) + len(taxonomy) * 8, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    prompts = _as_chat(sentences, spans) if settings.reading == "chat" else sentences
    states = engine.read(prompts, advance)[:, list(settings.layers)]  # [sentences, L, d]
    positives, negatives = {}, {}
    for value_id, span in spans.items():
        half = (span.stop - span.start) // 2
        positives[value_id] = states[span][:half]
        negatives[value_id] = states[span][half:]
    directions = {}
    for value in taxonomy:
        against = negatives[value.id]
        if settings.contrast == "opposed+others":
            against = np.concatenate([against, *(positives[other] for other in positives if other != value.id)])
        directions[value.id] = fit_direction(
            value.id,
            positives[value.id],
            negatives[value.id] if settings.method == "pca" else against,
            settings,
            alpha=value.alpha if settings.method == "mean_difference" else None,
        )
        advance(8)
    return directions


def fit_direction(value: str, positives: Floats, negatives: Floats, settings: FitSettings, alpha: float | None = None) -> Direction:
    """The direction that tells positive states from negative ones.

    Args:
        positives: [n, L, d], in the order of the pairs.
        negatives: [m, L, d]; for `pca` the twins of the positives, in the same order.
        alpha: Fixed magnitude; None for the method's own.
    """
    vectors = np.empty(positives.shape[1:], dtype=np.float32)
    bias = np.zeros(len(vectors), dtype=np.float32)
    accuracy = np.empty(len(vectors), dtype=np.float32)
    for layer in range(len(vectors)):
        p, n = positives[:, layer].astype(np.float64), negatives[:, layer].astype(np.float64)
        if settings.method == "probe":
            w, b = fit_probe(p, n, settings.regularisation)
            bias[layer] = b
        else:
            w = p.mean(0) - n.mean(0) if settings.method == "mean_difference" else first_component(p, n)
            b = -w @ (p.mean(0) + n.mean(0)) / 2
        vectors[layer] = w
        accuracy[layer] = ((p @ w + b > 0).mean() + (n @ w + b <= 0).mean()) / 2
    return Direction(value, settings.method, settings.layers, vectors, bias, DEFAULT_ALPHA[settings.method] if alpha is None else alpha, accuracy)


def fit_probe(positives: Array, negatives: Array, regularisation: float) -> tuple[Array, float]:
    """Weights and bias of a logistic regression, solved to convergence; both classes weigh the same.

    The paper's code uses scikit-learn's saga at its default tolerance, which stops well short of the optimum.
    """
    from sklearn.linear_model import LogisticRegression  # costs a second; only needed when fitting

    features = np.concatenate([positives, negatives])
    labels = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    # Newton's method is exact in a few steps where its Hessian [d, d] is small beside the data; lbfgs needs no Hessian.
    solver = "newton-cholesky" if features.shape[1] <= min(len(features), 1024) else "lbfgs"
    probe = LogisticRegression(C=regularisation, class_weight="balanced", solver=solver, max_iter=10_000, tol=1e-6).fit(features, labels)
    return probe.coef_[0], float(probe.intercept_[0])


def first_component(positives: Array, negatives: Array) -> Array:
    """Unit first principal component of the pair differences (RepE), its sign such that positives project higher.

    The differences are not centred: their common part is the direction sought. [n, d] twice in, [d] out.
    """
    differences = positives - negatives
    component: Array = np.linalg.svd(differences, full_matrices=False)[2][0]
    # A singular vector's sign is arbitrary.
    return component if differences.mean(0) @ component >= 0 else -component


def _as_chat(sentences: Sequence[str], spans: dict[str, slice]) -> list[str | Sequence[Message]]:
    """Each sentence, with three more of its side, before a situation, inside a user's turn; twins get the same situation.

    A small model does not tell a value from one sentence, but from several that have nothing else in common.
    """
    situations = (resources.files("vispa_graph.prompts") / "reading_situations.txt").read_text(encoding="utf-8").splitlines()
    conversations: list[str | Sequence[Message]] = []
    for span in spans.values():
        half = (span.stop - span.start) // 2
        for side in (sentences[span][:half], sentences[span][half:]):
            for pair in range(half):
                # A quarter of the pairs apart, so that the four differ, also in form.
                read = " ".join(side[(pair + place * max(1, half // _READ_TOGETHER)) % half] for place in range(_READ_TOGETHER))
                request = load_prompt("comment").render(text=situations[pair % len(situations)])
                conversations.append([{"role": "user", "content": f"{read} {request}"}])
    return conversations
