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
# Slips of agreement that simple rules can tell; a modal before a pronoun ("should she have") makes the bare verb right.
SLIPS = re.compile(
    r"\b(?:you|they|we|people) (?:is|was|has|does)\b"
    r"|(?<!should )(?<!would )(?<!could )(?<!can )(?<!may )(?<!might )(?<!must )(?<!will )(?<!let )(?<!make )\b(?:he|she|it) (?:are|were|have|do)\b"
    r"|\b(?:a|an|the) (?:a|an|the|he|she|they|is|are|and|of|to)\b"
    r"|\b(?:should|must|may|might|can|could|would) (?:has|is|was|been|having|being|does)\b",
)


def broken(text: str, words: set[str]) -> bool:
    """Too short, looping, with a slip of agreement, or with a word that neither the question nor any text of the project knows."""
    tokens = re.findall(r"[a-z']+", text.lower())
    if len(tokens) < 5 or any(a == b for a, b in pairwise(tokens)) or SLIPS.search(text.lower()):
        return True
    grams = Counter(tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3))
    return max(grams.values(), default=0) > 2 or any(token not in words for token in tokens)


def names(text: str, noun: str) -> bool:
    """Whether the text names the noun, by its last word, singular or plural."""
    head = noun.lower().split()[-1].rstrip("s")
    return re.search(rf"\b{re.escape(head)}(?:s|es)?\b", text.lower()) is not None


def held_out_accuracy(resources: Resources, grammar: Grammar) -> float:
    """Share of pairs never trained on whose positive twin the direction scores higher than the negative, read as bare sentences,
    mean over the steered blocks.
    """
    right: list[float] = []
    for value in grammar.values:
        direction = resources.directions[value.id]
        twins = [pair for form in value.pairs.values() for pair in form[-grammar.held_out_pairs :]]
        texts = [pair.positive for pair in twins] + [pair.negative for pair in twins]
        states = resources.engine.read(texts, lambda _: None)
        for row, layer in enumerate(direction.layers):
            scores = states[:, layer] @ direction.vectors[row]
            right.append(float(np.mean(scores[: len(twins)] > scores[len(twins) :])))
    return float(np.mean(right))


def vocabulary(grammar: Grammar) -> set[str]:
    """Every word of the project's texts, invented ones apart."""
    texts = [s for parts in grammar.comments.values() for sentences in parts.values() for s in sentences]
    texts += [sentence for sentences in grammar.positives.values() for sentence in sentences]
    texts += [part for s in (*grammar.free, *grammar.graded) for part in (s.text, s.topic, s.matter, s.act, s.who)] + [
        part for act in grammar.acts for part in act
    ]
    return {word for text in texts for word in re.findall(r"[a-z']+", text.lower())} | {"he", "she", "him", "his", "hers", "theirs", "yours"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--examples", type=int, default=6, help="steered comments to print, drawn at random")
    parser.add_argument("--comments", type=Path, help="write those comments to a YAML file instead, for a reader to mark")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings to try, such as target_probability=0.99")
    args = parser.parse_args()
    console = Console()
    entries = yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))
    entries = entries[:: max(1, len(entries) // args.questions)][: args.questions]
    chosen = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in args.set)}
    resources = Resources(Settings(**{"bioethics": True, "queue_size": 10_000} | chosen))  # all questions are asked at once
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

    def is_broken(entry: dict[str, str], text: str) -> bool:
        return broken(text, known | set(re.findall(r"[a-z']+", entry["text"].lower())))

    column = {value: number for number, value in enumerate(taxonomy.ids)}
    plain_scores = judge.scores([text or "-" for text in unsteered])
    base = dict(zip([e["id"] for e in entries], plain_scores, strict=True))
    scores = judge.scores([g.text or "-" for _, _, g in steered])
    top1 = np.array([row.argmax() == column[v] for row, (_, v, _) in zip(scores, steered, strict=True)])
    top3 = np.array([column[v] in np.argsort(-row)[:3] for row, (_, v, _) in zip(scores, steered, strict=True)])
    closer = np.array([row[column[v]] > base[e["id"]][column[v]] for row, (e, v, _) in zip(scores, steered, strict=True)])
    corpus = [(v, grammar.comment(v, grammar.situation())) for v in taxonomy.ids for _ in range(20)]
    recognised = np.array([row.argmax() == column[v] for row, (v, _) in zip(judge.scores([t for _, t in corpus]), corpus, strict=True)])
    ceiling = recognised.mean()
    heard = Counter(int(row.argmax()) for row in plain_scores)
    similar, same = [], 0
    for entry in entries:
        texts = [g.text for e, _, g in steered if e is entry]
        same += len(texts) - len(set(texts))
        similar += [float(a @ b) for a, b in combinations(encoder.encode(texts), 2)]

    chosen_rightly, chance = multiple_choice(resources, grammar, 200)
    gained = majority(resources, grammar, 60)
    moved = gained > 0
    table = Table(title=f"{len(entries)} questions x {len(taxonomy)} values, greedy, default settings {chosen or ''}")
    table.add_column("measure")
    table.add_column("figure", justify="right")
    for name, figure in {
        "judge's ceiling: the corpus's own comments, top 1": ceiling,
        f"steered comment attributed to its value, top 1 (chance {1 / len(taxonomy):.3f})": top1.mean(),
        "... as a share of the ceiling": top1.mean() / ceiling,
        f"... top 3 (chance {3 / len(taxonomy):.3f})": top3.mean(),
        "steered comment closer to its value than the unsteered one": closer.mean(),
        "broken text": np.mean([is_broken(e, g.text) for e, _, g in steered]),
        "broken text, unsteered": np.mean([is_broken(e, text) for text, e in zip(unsteered, entries, strict=True)]),
        "broken by the same rules: the corpus's own comments": np.mean(
            [broken(t, known | set(re.findall(r"[a-z']+", t.lower()))) for _, t in corpus]
        ),
        "the question's main noun in the comment": np.mean([names(g.text, e["noun"]) for e, _, g in steered]),
        "... unsteered": np.mean([names(text, e["noun"]) for text, e in zip(unsteered, entries, strict=True)]),
        "values that unsteered comments are nearest to, share of all": len(heard) / len(taxonomy),
        "... share of the most frequent": max(heard.values()) / len(entries),
        "comments on one question that are the same": same / len(steered),
        "median cosine between comments on one question": np.median(similar),
        "mean displacement, share of the residual norm": np.mean([g.steering.displacement for _, _, g in steered if g.steering]),
        f"multiple choice, answer follows from the passage (chance {chance:.3f})": chosen_rightly,
        "four passages of five for it instead of one: the first option gains, share of questions": moved.mean(),
        "... and by how much, mean": gained.mean(),
        "twins never trained on that the directions tell apart": held_out_accuracy(resources, grammar),
        "seconds a comment, batched": seconds,
    }.items():
        table.add_row(name, f"{figure:.3f}")
    console.print(table)
    families = Table(title="by family")
    for name in ("family", "top 1", "share of the family's ceiling", "closer"):
        families.add_column(name)
    for family in dict.fromkeys(value.family for value in taxonomy):
        mask = np.array([taxonomy[v].family == family for _, v, _ in steered])
        limit = recognised[np.array([taxonomy[v].family == family for v, _ in corpus])].mean()
        families.add_row(family, f"{top1[mask].mean():.3f}", f"{top1[mask].mean() / limit:.3f}", f"{closer[mask].mean():.3f}")
    console.print(families)
    drawn = random.Random(0).sample(steered, min(args.examples, len(steered)))
    if args.comments:
        lines = [{"value": v, "question": e["text"], "comment": g.text, "sensible": None} for e, v, g in drawn]
        args.comments.write_text(yaml.safe_dump(lines, allow_unicode=True, sort_keys=False, width=160), encoding="utf-8")
    else:
        for entry, value, generation in drawn:
            console.print(f'[bold]{value}[/] on "{entry["text"]}"\n  {generation.text}', highlight=False)
    resources.close()


def multiple_choice(resources: Resources, grammar: Grammar, count: int) -> tuple[float, float]:
    """Share of multiple-choice questions of the grammar answered rightly, and the share that guessing would get."""
    right, chances = [], []
    for _ in range(count):
        prompt, answer, *_ = grammar.choice_by_stance()
        options = len(re.findall(r"^[A-Z]\. ", prompt.text, re.MULTILINE))
        request = ScoreRequest([{"role": "user", "content": prompt.text}], tuple(LETTERS[:options]))
        right.append((resources.engine.score(request), answer.text))
        chances.append(1 / options)
    said = [LETTERS[int(np.argmax(future.result().probabilities))] == answer for future, answer in right]
    return float(np.mean(said)), float(np.mean(chances))


def majority(resources: Resources, grammar: Grammar, count: int, passages: int = 5) -> np.ndarray:
    """What the probability of the first option, the one in favour, gains when all passages but one are for it instead of all but one against, [count]."""
    asked = []
    for _ in range(count):
        situation = grammar.act_situation()
        options = [situation.fill(option) for option in grammar.random.choice(grammar.frames["options"])]
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        both = []
        for most, least in (("for", "against"), ("against", "for")):
            stances = [most] * (passages - 1) + [least]
            texts = [situation.fill(grammar.random.choice(grammar.frames["stance"][stance])) for stance in stances]
            prompts = [load_prompt("score_options").render(passage=text, query=situation.text, options=lines) for text in texts]
            requests = [ScoreRequest([{"role": "user", "content": prompt}], tuple(LETTERS[: len(options)])) for prompt in prompts]
            both.append([resources.engine.score(request) for request in requests])
        asked.append(both)
    means = [[np.mean([future.result().probabilities[0] for future in futures]) for futures in both] for both in asked]
    return np.array([for_it - against_it for for_it, against_it in means])


if __name__ == "__main__":
    main()
