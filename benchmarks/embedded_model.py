"""What the embedded language model says when it is steered, judged without it.

python -m benchmarks.embedded_model                 # 16 questions, all values
python -m benchmarks.embedded_model --questions 80 --examples 20
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.judge import Judge
from training.grammar import Grammar
from vispa_graph.engine.contract import Generation, GenerationRequest, ScoreRequest, Steering
from vispa_graph.prompts import load_prompt
from vispa_graph.resources import Resources
from vispa_graph.settings import Settings
from vispa_graph.state import LETTERS

QUESTIONS = Path(__file__).parent / "data" / "questions.yaml"


def broken(text: str, words: set[str]) -> bool:
    """Empty, looping, or with a word that neither the question nor any text of the project knows."""
    tokens = re.findall(r"[a-z']+", text.lower())
    if len(tokens) < 5 or any(a == b for a, b in pairwise(tokens)):
        return True
    grams = Counter(tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3))
    return max(grams.values(), default=0) > 2 or any(token not in words for token in tokens)


def vocabulary(grammar: Grammar) -> set[str]:
    """Every word of the project's texts, invented ones apart."""
    texts = [s for parts in grammar.comments.values() for sentences in parts.values() for s in sentences]
    texts += [sentence for sentences in grammar.positives.values() for sentence in sentences]
    texts += [part for s in grammar.free for part in (s.text, s.topic, s.act, s.who)] + [part for act in grammar.acts for part in act]
    return {word for text in texts for word in re.findall(r"[a-z']+", text.lower())} | {"he", "she", "him", "his", "hers", "theirs", "yours"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--examples", type=int, default=6)
    args = parser.parse_args()
    console = Console()
    entries = yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))
    entries = entries[:: max(1, len(entries) // args.questions)][: args.questions]
    resources = Resources(Settings())
    engine, taxonomy, encoder = resources.engine, resources.taxonomy, resources.encoder
    judge = Judge(encoder, taxonomy.ids)
    grammar = Grammar(taxonomy, seed=99)
    known = vocabulary(grammar)

    def ask(question: str, steering: Steering | None) -> GenerationRequest:
        prompt = load_prompt("comment").render(text=question)
        return GenerationRequest([{"role": "user", "content": prompt}], steering, resources.profile.max_new_tokens)

    started = time.perf_counter()
    plain = [engine.generate(ask(e["text"], None)) for e in entries]
    pending = [(e, v, engine.generate(ask(e["text"], resources.steering(v)))) for e in entries for v in taxonomy.ids]
    unsteered = [future.result().text for future in plain]
    steered: list[tuple[dict[str, str], str, Generation]] = [(e, v, future.result()) for e, v, future in pending]
    seconds = (time.perf_counter() - started) / (len(steered) + len(unsteered))

    base = dict(zip([e["id"] for e in entries], judge.scores(unsteered), strict=True))
    scores = judge.scores([g.text or "-" for _, _, g in steered])
    column = {value: number for number, value in enumerate(taxonomy.ids)}
    top1 = np.array([row.argmax() == column[v] for row, (_, v, _) in zip(scores, steered, strict=True)])
    top3 = np.array([column[v] in np.argsort(-row)[:3] for row, (_, v, _) in zip(scores, steered, strict=True)])
    closer = np.array([row[column[v]] > base[e["id"]][column[v]] for row, (e, v, _) in zip(scores, steered, strict=True)])
    corpus = [(v, grammar.comment(v, grammar.situation())) for v in taxonomy.ids for _ in range(10)]
    ceiling = np.mean([row.argmax() == column[v] for row, (v, _) in zip(judge.scores([t for _, t in corpus]), corpus, strict=True)])
    damaged = np.mean([broken(g.text, known | set(re.findall(r"[a-z']+", e["text"].lower()))) for e, _, g in steered])
    noun = np.mean([e["noun"].lower() in g.text.lower() for e, _, g in steered])
    similar = []
    for entry in entries:
        vectors = encoder.encode([g.text for e, _, g in steered if e is entry])
        similar += [float(a @ b) for a, b in combinations(vectors, 2)]

    table = Table(title=f"{len(entries)} questions x {len(taxonomy)} values, greedy, default settings")
    table.add_column("measure")
    table.add_column("figure", justify="right")
    for name, figure in {
        "judge's ceiling: the corpus's own comments, top 1": ceiling,
        "steered comment attributed to its value, top 1 (chance .03)": top1.mean(),
        "... top 3 (chance .10)": top3.mean(),
        "steered comment closer to its value than the unsteered one": closer.mean(),
        "broken text": damaged,
        "broken text, unsteered": np.mean(
            [broken(t, known | set(re.findall(r"[a-z']+", e["text"].lower()))) for t, e in zip(unsteered, entries, strict=True)]
        ),
        "the question's noun in the comment": noun,
        "median cosine between comments on one question": np.median(similar),
        "mean displacement, share of the residual norm": np.mean([g.steering.displacement for _, _, g in steered if g.steering]),
        "multiple choice, answer follows from the passage": multiple_choice(resources, grammar, 150),
        "seconds a comment, batched": seconds,
    }.items():
        table.add_row(name, f"{figure:.3f}")
    console.print(table)
    families = Table(title="by family")
    for name in ("family", "top 1", "closer"):
        families.add_column(name)
    for family in dict.fromkeys(value.family for value in taxonomy):
        mask = np.array([taxonomy[v].family == family for _, v, _ in steered])
        families.add_row(family, f"{top1[mask].mean():.3f}", f"{closer[mask].mean():.3f}")
    console.print(families)
    for entry, value, generation in random.Random(0).sample(steered, min(args.examples, len(steered))):
        console.print(f'[bold]{value}[/] on "{entry["text"]}"\n  {generation.text}', highlight=False)
    resources.close()


def multiple_choice(resources: Resources, grammar: Grammar, count: int) -> float:
    """Share of multiple-choice questions of the grammar answered rightly; its mean chance is about .4."""
    right = []
    for _ in range(count):
        prompt, answer = grammar.choice_by_stance()
        options = len(re.findall(r"^[A-Z]\. ", prompt.text, re.MULTILINE))
        request = ScoreRequest([{"role": "user", "content": prompt.text}], tuple(LETTERS[:options]))
        right.append((resources.engine.score(request), answer.text))
    return float(np.mean([LETTERS[int(np.argmax(future.result().probabilities))] == answer for future, answer in right]))


if __name__ == "__main__":
    main()
