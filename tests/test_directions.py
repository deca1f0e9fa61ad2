"""Fitting directions: what was planted is found, and every value gets one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from tiny_models import DEPTH, WIDTH, tiny_engine

from vispa_graph.engine.directions import FitSettings, first_component, fit_direction, fit_directions, fit_probe
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.prompts import load_prompt
from vispa_graph.taxonomy_index.taxonomy import Pair, Taxonomy, Value

METHODS = ("probe", "mean_difference", "pca")
LAYERS = (2, 5, 7)


def planted(pairs=200, layers=3, width=24, distance=1.5, seed=0):
    """Positive and negative states [pairs, L, d] that lie `distance` to either side along a unit vector [L, d] of their own."""
    random = np.random.default_rng(seed)
    units = random.standard_normal((layers, width))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    centre = random.standard_normal((layers, width))
    noise = random.standard_normal((2, pairs, layers, width))
    return (centre + noise[0] + distance * units).astype(np.float32), (centre + noise[1] - distance * units).astype(np.float32), units


def cosine(one, other):
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def fit(method, positives, negatives, **options):
    return fit_direction("value", positives, negatives, FitSettings(method, LAYERS[: positives.shape[1]]), **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_the_planted_direction_is_found_at_every_layer(method, seed):
    positives, negatives, units = planted(seed=seed)
    direction = fit(method, positives, negatives)
    assert (direction.value, direction.method, direction.layers) == ("value", method, LAYERS)
    assert direction.vectors.shape == units.shape
    assert direction.vectors.dtype == direction.bias.dtype == direction.accuracy.dtype == np.float32
    for vector, unit in zip(direction.vectors, units, strict=True):
        assert cosine(vector, unit) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_exchanging_the_classes_turns_the_direction_round(method):
    positives, negatives, _ = planted()
    forward, backward = fit(method, positives, negatives), fit(method, negatives, positives)
    assert np.allclose(forward.vectors, -backward.vectors, rtol=1e-2, atol=1e-3)


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(2, 12))
def test_positives_project_higher_on_the_principal_component_which_is_a_unit_vector(seed, pairs, width):
    positives, negatives, _ = planted(pairs, 1, width, seed=seed)
    component = first_component(positives[:, 0].astype(np.float64), negatives[:, 0].astype(np.float64))
    assert np.linalg.norm(component) == pytest.approx(1)
    assert (positives[:, 0] @ component).mean() >= (negatives[:, 0] @ component).mean()


def test_the_principal_component_explains_the_pair_differences_best():
    positives, negatives, _ = planted(distance=0.5)
    differences = (positives - negatives)[:, 0].astype(np.float64)
    component = first_component(positives[:, 0].astype(np.float64), negatives[:, 0].astype(np.float64))
    values, vectors = np.linalg.eigh(differences.T @ differences)
    assert abs(component @ vectors[:, -1]) == pytest.approx(1)
    assert ((differences @ component) ** 2).sum() == pytest.approx(values[-1])


def test_the_mean_difference_is_the_difference_of_the_class_means():
    positives, negatives, _ = planted()
    assert np.allclose(fit("mean_difference", positives, negatives[:50]).vectors, positives.mean(0) - negatives[:50].mean(0), atol=1e-4)


@pytest.mark.parametrize(("positive", "negative", "width"), [(60, 60, 8), (30, 300, 8), (20, 20, 100), (15, 60, 300)])
@pytest.mark.parametrize("regularisation", [0.01, 1.0])
def test_the_probe_is_the_optimum_of_the_logistic_loss_with_classes_of_equal_weight(positive, negative, width, regularisation):
    positives, negatives, _ = planted(max(positive, negative), 1, width, distance=0.4)
    p, n = positives[:positive, 0].astype(np.float64), negatives[:negative, 0].astype(np.float64)
    w, b = fit_probe(p, n, regularisation)
    total = positive + negative
    weights = np.r_[np.full(positive, total / 2 / positive), np.full(negative, total / 2 / negative)]
    features, labels = np.concatenate([p, n]), np.r_[np.ones(positive), np.zeros(negative)]
    residual = regularisation * weights * (labels - 1 / (1 + np.exp(-(features @ w + b))))
    # Where the gradient of w.w/2 + C * loss vanishes, and that of the bias with it.
    assert np.allclose(w, residual @ features, rtol=1e-2, atol=1e-3 * np.abs(w).max())
    assert residual.sum() == pytest.approx(0, abs=1e-3 * np.abs(residual).sum())


def test_a_probe_gives_each_class_its_side_of_one_half():
    positives, negatives, _ = planted(distance=4.0)
    direction = fit("probe", positives, negatives)
    for layer in range(len(LAYERS)):
        w, b = direction.vectors[layer], direction.bias[layer]
        assert (positives[:, layer] @ w + b > 0).all()
        assert (negatives[:, layer] @ w + b < 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_accuracy_of_classes_far_apart_is_one(method):
    positives, negatives, _ = planted(distance=6.0)
    assert fit(method, positives, negatives).accuracy.tolist() == [1.0] * len(LAYERS)


@pytest.mark.parametrize("method", METHODS)
def test_the_accuracy_of_classes_that_are_alike_is_about_one_half(method):
    positives, negatives, _ = planted(pairs=4000, width=4, distance=0.0)
    assert np.abs(fit(method, positives, negatives).accuracy - 0.5).max() < 0.05


@pytest.mark.parametrize("method", ["probe", "mean_difference"])
def test_the_accuracy_is_balanced_between_classes_of_different_size(method):
    positives, negatives, _ = planted(distance=0.6, width=6)
    positives = positives[:25]
    direction = fit(method, positives, negatives)
    labels = [1] * len(positives) + [0] * len(negatives)
    for layer, vector in enumerate(direction.vectors):
        p, n = positives[:, layer], negatives[:, layer]
        bias = direction.bias[layer] if method == "probe" else -vector @ (p.mean(0) + n.mean(0)) / 2
        guesses = np.concatenate([p, n]) @ vector + bias > 0
        expected = balanced_accuracy_score(labels, guesses)
        assert 0.5 < expected < 1
        assert direction.accuracy[layer] == pytest.approx(expected, abs=1e-6)


def test_only_a_probe_has_a_bias():
    positives, negatives, _ = planted()
    assert np.abs(fit("probe", positives, negatives).bias).min() > 0
    for method in ("mean_difference", "pca"):
        assert not fit(method, positives, negatives).bias.any()


def test_a_fixed_magnitude_is_the_methods_own_unless_given():
    positives, negatives, _ = planted()
    assert [fit(method, positives, negatives).alpha for method in METHODS] == [1.0, 0.5, 1.0]
    assert fit("mean_difference", positives, negatives, alpha=0.08).alpha == 0.08


# A whole taxonomy


def value_of(name, pairs=20, alpha=None):
    """A value whose sentences name it, their side and their number."""
    twins = tuple(Pair(f"{name} + {number}", f"{name} - {number}") for number in range(pairs))
    forms = {"first_person_sentence": twins[: pairs // 2], "third_person_question": twins[pairs // 2 :]}
    return Value(name, name, "family", "source", "definition", ("a facet",), forms, alpha=alpha)


class PlantedEngine(FakeEngine):
    """States of sentences such as "honor + 3": a tone that all positive sentences share, and a meaning that each value has alone."""

    def __init__(self, names, tone=2.0, meaning=1.5):
        super().__init__(depth=9)
        random = np.random.default_rng(0)
        axes, _ = np.linalg.qr(random.standard_normal((32, 32)))
        self.tone, self.meanings = axes[0], dict(zip(names, axes[1:], strict=False))
        self.sizes, self.read_texts = (tone, meaning), []

    def read(self, conversations, progress=None):
        self.read_texts += conversations
        if progress:
            progress(len(conversations))
        random = np.random.default_rng(1)
        states = []
        for text in conversations:
            name, side, _ = text.split(" ")
            sign = 1 if side == "+" else -1
            state = sign * self.sizes[0] * self.tone + sign * self.sizes[1] * self.meanings[name]
            states.append([layer * 10 + state + 0.5 * random.standard_normal(32) for layer in range(self.depth)])
        return np.array(states, dtype=np.float32)


NAMES = ("honor", "justice", "care", "duty")


@pytest.fixture
def values():
    return Taxonomy([value_of(name) for name in NAMES])


@pytest.mark.parametrize("method", ["probe", "mean_difference"])
def test_opposed_twins_find_tone_and_meaning_and_the_other_values_take_the_tone_out(method, values):
    engine = PlantedEngine(NAMES)
    opposed = fit_directions(engine, values, FitSettings(method, LAYERS, "opposed"))
    others = fit_directions(engine, values, FitSettings(method, LAYERS, "opposed+others"))
    for name in NAMES:
        for without, beside in zip(opposed[name].vectors, others[name].vectors, strict=True):
            assert cosine(without, engine.tone) > 0.6
            assert cosine(beside, engine.tone) < cosine(without, engine.tone) - 0.2
            assert cosine(beside, engine.meanings[name]) > cosine(without, engine.meanings[name]) + 0.1
            assert max(cosine(beside, engine.meanings[other]) for other in NAMES if other != name) < 0


def test_the_other_values_positives_are_the_negatives_beside_the_twins(values):
    engine = PlantedEngine(NAMES)
    texts = sentences(values)
    states = dict(zip(texts, engine.read(texts)[:, list(LAYERS)], strict=True))
    directions = fit_directions(PlantedEngine(NAMES), values, FitSettings("mean_difference", LAYERS, "opposed+others"))
    for name in NAMES:
        own = [states[text] for text in texts if text.startswith(f"{name} +")]
        against = [states[text] for text in texts if text.startswith(f"{name} -") or (" + " in text and not text.startswith(name))]
        assert len(against) == 20 * len(NAMES)
        assert np.allclose(directions[name].vectors, np.mean(own, 0) - np.mean(against, 0), atol=1e-4)


def sentences(values):
    """Every sentence once, each value's positives before its negatives."""
    return [text for value in values for side in ("positive", "negative") for text in (getattr(pair, side) for pair in value.all_pairs)]


def test_pca_uses_the_opposed_twins_whatever_the_contrast(values):
    directions = [fit_directions(PlantedEngine(NAMES), values, FitSettings("pca", LAYERS, contrast)) for contrast in ("opposed", "opposed+others")]
    for name in NAMES:
        assert np.array_equal(directions[0][name].vectors, directions[1][name].vectors)


@pytest.mark.parametrize("contrast", ["opposed", "opposed+others"])
def test_a_single_value_can_be_fitted(contrast):
    directions = fit_directions(PlantedEngine(NAMES), Taxonomy([value_of("honor")]), FitSettings("probe", LAYERS, contrast))
    assert list(directions) == ["honor"]


def test_only_the_chosen_layers_are_fitted_each_on_its_own_states(values):
    one = fit_directions(PlantedEngine(NAMES), values, FitSettings("mean_difference", (5,)))
    several = fit_directions(PlantedEngine(NAMES), values, FitSettings("mean_difference", LAYERS))
    for name in NAMES:
        assert (one[name].layers, several[name].layers) == ((5,), LAYERS)
        assert np.array_equal(one[name].vectors[0], several[name].vectors[1])
        assert not np.allclose(several[name].vectors[0], several[name].vectors[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reading", ["raw", "chat"])
def test_every_value_gets_a_finite_direction_in_the_order_of_the_taxonomy(method, reading, taxonomy):
    subset = taxonomy.subset(taxonomy.ids[:8])
    directions = fit_directions(FakeEngine(), subset, FitSettings(method, LAYERS, "opposed+others", reading))
    assert tuple(directions) == subset.ids
    for value_id, direction in directions.items():
        assert (direction.value, direction.method, direction.layers) == (value_id, method, LAYERS)
        assert direction.vectors.shape == (3, 4)
        assert direction.bias.shape == direction.accuracy.shape == (3,)
        assert all(np.isfinite(array).all() for array in (direction.vectors, direction.bias, direction.accuracy))
        assert ((direction.accuracy >= 0) & (direction.accuracy <= 1)).all()


def test_the_whole_shipped_taxonomy_is_fitted_in_one_reading(taxonomy):
    engine = FakeEngine()
    readings = []
    read = engine.read
    engine.read = lambda texts, progress=None: readings.append(list(texts)) or read(texts, progress)
    directions = fit_directions(engine, taxonomy, FitSettings("mean_difference", (0,)))
    assert tuple(directions) == taxonomy.ids
    assert readings == [sentences(taxonomy)]


@settings(deadline=None, max_examples=20)
@given(st.permutations(NAMES))
def test_the_order_of_the_values_does_not_change_a_direction(names):
    fixed = FitSettings("mean_difference", LAYERS, "opposed+others")
    straight = fit_directions(FakeEngine(), Taxonomy([value_of(name) for name in NAMES]), fixed)
    permuted = fit_directions(FakeEngine(), Taxonomy([value_of(name) for name in names]), fixed)
    for name in NAMES:
        assert np.allclose(permuted[name].vectors, straight[name].vectors, atol=1e-6)


def test_a_values_own_magnitude_is_used_by_the_mean_difference_only():
    values = Taxonomy([value_of("honor", alpha=0.3), value_of("care")])
    found = {method: fit_directions(PlantedEngine(NAMES), values, FitSettings(method, LAYERS)) for method in METHODS}
    assert {method: found[method]["honor"].alpha for method in METHODS} == {"probe": 1.0, "mean_difference": 0.3, "pca": 1.0}
    assert found["mean_difference"]["care"].alpha == 0.5


def test_progress_rises_from_step_to_step_and_ends_at_the_total(values):
    steps = []
    fit_directions(FakeEngine(), values, FitSettings("mean_difference", LAYERS), lambda done, total: steps.append((done, total)))
    assert len({total for _, total in steps}) == 1
    done = [step for step, _ in steps]
    assert done == sorted(set(done))
    assert steps[-1][0] == steps[-1][1]


def test_read_as_chat_four_sentences_of_one_side_stand_before_a_situation_that_twins_share(values):
    engine, heard = FakeEngine(), []
    read = engine.read
    engine.read = lambda texts, progress=None: heard.extend(texts) or read(texts, progress)
    fit_directions(engine, values, FitSettings("mean_difference", LAYERS, reading="chat"))
    template = load_prompt("comment").render(text="").strip()
    situations = {}
    for sentence, conversation in zip(sentences(values), heard, strict=True):
        assert [turn["role"] for turn in conversation] == ["user"]
        read, situation = conversation[0]["content"].split(template)
        assert read.startswith(f"{sentence} ")
        side, other = (" + ", " - ") if " + " in sentence else (" - ", " + ")
        assert read.count(side) == 4
        assert other not in read
        situations[sentence] = situation
    assert all(situations[sentence] == situations[sentence.replace(" + ", " - ")] for sentence in situations)
    assert len(set(situations.values())) > 1


def test_directions_fitted_on_a_model_tell_its_own_sentences_apart(taxonomy):
    engine = tiny_engine()
    try:
        directions = fit_directions(engine, taxonomy.subset(["honor", "fairness"]), FitSettings("probe", tuple(range(DEPTH))))
    finally:
        engine.close()
    for direction in directions.values():
        assert direction.vectors.shape == (DEPTH, WIDTH)
        assert direction.accuracy.min() > 0.5
