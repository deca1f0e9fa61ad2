"""Fit the probabilities that selectors give, on the tuning half of the labelled situations and plain questions alone.

python -m benchmarks.calibrate                                  # the default selector
python -m benchmarks.calibrate --selector nli:<model>           # or cross-encoder:<model>
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from benchmarks.selection import grades, labelled_situations, plain_questions
from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.taxonomy_index import calibration
from vispa_graph.taxonomy_index.selection import CANDIDATES, shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--selector", default="default")
    name = parser.parse_args().selector
    resources = Resources(Settings(reranker=name))
    features, at_stake, query = [], [], []
    calibration.coefficients().pop(name if name != "default" else "", None)  # the model's own scores are fitted
    texts = [(s["text"], grades(s)) for s in labelled_situations("tune")] + [(text, {}) for text in plain_questions("tune")]
    for number, (text, grade) in enumerate(texts):
        hits = resources.index.search(text, CANDIDATES)
        if name == "default":
            evidence = shares(hits, resources.index.pull).sum(axis=0)
            rows = {v: [float(e)] for v, e in zip(resources.taxonomy.ids, calibration.log_evidence(evidence), strict=True)}
        else:
            rows = {s.value: [calibration.logit(s.score)] for s in resources.selector.rank(text, hits)}
        for value, row in rows.items():
            features.append(row)
            at_stake.append(grade.get(value, 0) > 0)
            query.append(number)
    x, y = np.array(features), np.array(at_stake)
    model = LogisticRegression(C=1e3, max_iter=1000)
    held_out = cross_val_predict(model, x, y, groups=query, cv=GroupKFold(8), method="predict_proba")[:, 1]
    model.fit(x, y)
    fitted = {"intercept": float(model.intercept_[0]), "log_evidence" if name == "default" else "logit": float(model.coef_[0, 0])}
    stored = json.loads(calibration.FILE.read_text(encoding="utf-8")) | {name: {key: round(c, 4) for key, c in fitted.items()}}
    calibration.FILE.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {stored[name]}")
    base = log_loss(y, np.full(len(y), y.mean()))
    print(f"Held-out log loss {log_loss(y, held_out):.3f} (always the base rate: {base:.3f}), AUC {roc_auc_score(y, held_out):.3f}")
    for low, high in [(0, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 1.01)]:
        inside = (held_out >= low) & (held_out < high)
        if inside.any():
            print(f"  predicted {low:.2f} to {min(high, 1):.2f}: {inside.sum():5d} values, {y[inside].mean():.3f} at stake")


if __name__ == "__main__":
    main()
