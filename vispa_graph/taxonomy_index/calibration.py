"""Scores as probabilities that a value is at stake, by logistic regression (Platt 1999) on the tuning half of the labelled situations.

The coefficients lie in calibration.json; `python -m benchmarks.calibrate` makes them again.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from vispa_graph.taxonomy_index.encoder import Floats

_SMALLEST = 0.01
FILE = Path(__file__).parent / "calibration.json"


@cache
def coefficients() -> dict[str, dict[str, float]]:
    """By selector: intercept and weights."""
    found: dict[str, dict[str, float]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def calibrated(evidence: Floats) -> Floats:
    """Probabilities of the default selector from the values' evidence, [values]."""
    c = coefficients()["default"]
    return sigmoid(c["intercept"] + c["log_evidence"] * log_evidence(evidence))


def log_evidence(evidence: Floats) -> Floats:
    """The logarithm of the evidence, which counts from 0 up and is kept off it."""
    return np.asarray(np.log(evidence.clip(0) + _SMALLEST), dtype=np.float32)


def calibrated_score(selector: str, score: float) -> float:
    """The probability that belongs to a model's score, 0..1; the score itself where that model was not calibrated."""
    c = coefficients().get(selector)
    return score if c is None else float(sigmoid(np.array(c["intercept"] + c["logit"] * logit(score), dtype=np.float32)))


def logit(score: float) -> float:
    """The log-odds of a score, which is kept off 0 and 1."""
    kept = min(max(score, 1e-4), 1 - 1e-4)
    return float(np.log(kept / (1 - kept)))


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    return np.asarray(1 / (1 + np.exp(-x)), dtype=np.float32)
