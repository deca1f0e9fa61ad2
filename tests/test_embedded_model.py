"""What must hold of the embedded language model when it is steered. The judge does not use the model."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from benchmarks.embedded_model import QUESTIONS
from benchmarks.judge import Judge
from vispa_graph import Settings, create_graph
from vispa_graph.engine.contract import GenerationRequest
from vispa_graph.prompts import load_prompt
from vispa_graph.resources import Resources, embedded_folder

pytestmark = pytest.mark.slow

# A fixed list: 20 questions by 3 values each, every value at least once.
PAIRS = 60


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(scope="module")
def resources(own_cache):
    made = Resources(Settings(cache=own_cache))
    yield made
    made.close()


@pytest.fixture(scope="module")
def questions():
    return [entry["text"] for entry in yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))]


def ask(resources, question, value):
    prompt = load_prompt("comment").render(text=question)
    steering = resources.steering(value) if value else None
    return resources.engine.generate(GenerationRequest([{"role": "user", "content": prompt}], steering, max_new_tokens=60))


def said(output):
    """All that an answer says in words."""
    return {key: output[key] for key in ("mode", "response", "values", "attribution", "notes")} | {
        "comments": [c["text"] for c in output["comments"]]
    }


def test_it_is_at_most_25_megabytes():
    assert sum(path.stat().st_size for path in embedded_folder().rglob("*") if path.is_file()) <= 25_000_000


def test_its_shipped_directions_belong_to_the_shipped_weights_and_values(resources, own_cache):
    assert set(resources.directions) == set(resources.taxonomy.ids)
    assert not (own_cache / "directions").exists(), "the directions were fitted again: run python -m training.install"


def test_at_least_6_in_10_steered_comments_are_closer_to_their_value_than_the_unsteered_one(resources, questions, encoder):
    values = resources.taxonomy.ids
    pairs = [(questions[number % 20 * 4], values[number % len(values)]) for number in range(PAIRS)]
    assert len(set(pairs)) == PAIRS
    steered = [ask(resources, question, value) for question, value in pairs]
    unsteered = {question: ask(resources, question, None) for question in dict.fromkeys(question for question, _ in pairs)}
    judge = Judge(encoder, values)
    after = judge.scores([future.result().text or "-" for future in steered])
    before = judge.scores([unsteered[question].result().text or "-" for question, _ in pairs])
    closer = sum(a[values.index(v)] > b[values.index(v)] for a, b, (_, v) in zip(after, before, pairs, strict=True))
    assert closer >= 0.6 * PAIRS, f"only {closer} of {PAIRS}"


def test_comments_of_different_values_on_one_question_differ(resources, questions):
    for question in questions[:5]:
        texts = [
            ask(resources, question, value).result().text for value in ("self-direction", "security", "tradition", "benevolence", "justice", "karma")
        ]
        assert len(set(texts)) == len(texts)


def test_the_same_query_twice_gives_the_same_answer_also_when_others_ask_at_the_same_time(resources, questions):
    graph = create_graph(resources=resources)
    alone = {question: graph.invoke({"query": question}) for question in questions[:8]}
    assert graph.invoke({"query": questions[0]}) == alone[questions[0]]
    with ThreadPoolExecutor(8) as pool:
        together = dict(zip(questions[:8], pool.map(lambda question: graph.invoke({"query": question}), questions[:8]), strict=True))
    for question in questions[:8]:
        assert said(together[question]) == said(alone[question])
        for one, other in zip(together[question]["comments"], alone[question]["comments"], strict=True):
            # The last bits of a float depend on the shape of the batch.
            assert one["steering"]["magnitude"] == pytest.approx(other["steering"]["magnitude"], rel=1e-3, abs=1e-3)


def test_all_three_modes_answer_and_every_value_is_heard(resources):
    graph = create_graph(resources=resources)
    query = "Should my father, 84, have an operation he does not want?"
    overton = graph.invoke({"query": query})
    assert {value for a in overton["attribution"] for value in a["values"]} == {v["id"] for v in overton["values"]}
    assert len(overton["values"]) >= 4
    steerable = graph.invoke({"query": query, "attribute": "self-direction"})
    assert steerable["chosen"] == {"value": "self-direction", "reason": "the attribute names this value"}
    distributional = graph.invoke({"query": query, "options": ["Yes", "No", "It depends"]})
    assert sum(distributional["distribution"].values()) == pytest.approx(1)
