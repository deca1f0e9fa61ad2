"""Fitting directions: what was planted is found, and every value gets one."""

import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from tiny_models import DEPTH, WIDTH, tiny_engine

from vispa_graph.engine.directions import FitSettings, ReadOnce, fit_direction, fit_directions, separates
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.engine.methods import first_component, fit_probe
from vispa_graph.engine.pairs import make_twins
from vispa_graph.engine.store import DirectionStore, manifest_key
from vispa_graph.errors import NonFiniteError
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


def test_coordinates_that_say_the_same_trouble_nobody_with_scikit_learns_warnings(recwarn):
    random = np.random.default_rng(0)
    positives, negatives = (np.repeat(random.normal(size=(40, 1)), 8, axis=1) + shift for shift in (2, -2))
    weights, bias = fit_probe(positives, negatives, 1e18)
    assert ((positives @ weights + bias > 0).mean() + (negatives @ weights + bias < 0).mean()) / 2 > 0.95
    assert not recwarn


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
        states = []
        for text in conversations:
            random = np.random.default_rng(list(text.encode()))
            name, side, _ = text.split(" ")
            sign = 1 if side == "+" else -1
            state = sign * self.sizes[0] * self.tone + sign * self.sizes[1] * self.meanings[name]
            states.append([layer * 10 + state + 0.3 * random.standard_normal(32) for layer in range(self.depth)])
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


@pytest.mark.parametrize("contrast", ["opposed", "opposed+others"])
def test_every_sentence_of_the_taxonomy_is_read_once_many_at_a_time(taxonomy, contrast):
    engine = FakeEngine()
    readings = []
    read = engine.read
    engine.read = lambda texts, progress=None: readings.append(list(texts)) or read(texts, progress)
    directions = fit_directions(engine, taxonomy, FitSettings("mean_difference", (0,), contrast))
    assert tuple(directions) == taxonomy.ids
    assert sorted(text for texts in readings for text in texts) == sorted(sentences(taxonomy))
    assert min(map(len, readings)) >= 64 * 7


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
    for conversation in heard:
        assert [turn["role"] for turn in conversation] == ["user"]
        read, situation = conversation[0]["content"].split(template)
        sentence = " ".join(read.split()[:3])
        side, other = (" + ", " - ") if " + " in sentence else (" - ", " + ")
        assert read.count(side) == 4
        assert other not in read
        situations[sentence] = situation
    assert sorted(situations) == sorted(sentences(values))
    assert all(situations[sentence] == situations[sentence.replace(" + ", " - ")] for sentence in situations)
    assert len(set(situations.values())) > 1


# Held-out accuracy


def held(pairs, apart):
    mask = np.zeros(pairs, dtype=bool)
    mask[:apart] = True
    return mask, mask


@pytest.mark.parametrize("method", METHODS)
def test_the_held_out_accuracy_is_that_of_a_fit_without_the_pairs_held_out(method):
    positives, negatives, _ = planted(pairs=40, distance=0.5)
    mask = held(40, 12)[0]
    chosen = FitSettings(method, LAYERS)
    direction = fit_direction("value", positives, negatives, chosen, held=(mask, mask))
    apart = fit_direction("value", positives[~mask], negatives[~mask], chosen)
    for layer in range(len(LAYERS)):
        p, n = positives[:, layer].astype(float), negatives[:, layer].astype(float)
        b = apart.bias[layer] if method == "probe" else -apart.vectors[layer] @ (p[~mask].mean(0) + n[~mask].mean(0)) / 2
        expected = ((p[mask] @ apart.vectors[layer] + b > 0).mean() + (n[mask] @ apart.vectors[layer] + b <= 0).mean()) / 2
        assert direction.held_out[layer] == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(direction.vectors, fit_direction("value", positives, negatives, chosen).vectors)


def test_more_dimensions_than_sentences_are_always_told_apart_but_sentences_held_out_are_not():
    positives, negatives, _ = planted(pairs=30, width=200, distance=0.0)
    direction = fit_direction("value", positives, negatives, FitSettings("probe", LAYERS), held=held(30, 9))
    assert direction.accuracy.tolist() == [1.0] * 3
    assert direction.held_out.mean() < 0.75


def test_what_separates_is_judged_by_the_pairs_held_out():
    alike, apart = (planted(pairs=200, width=8, distance=distance)[:2] for distance in (0.0, 2.0))
    chosen = FitSettings("probe", LAYERS)
    assert separates(fit_direction("value", *apart, chosen, held=held(200, 60)))
    assert not separates(fit_direction("value", *alike, chosen, held=held(200, 60)))


def test_too_few_pairs_have_no_held_out_accuracy():
    found = fit_directions(PlantedEngine(NAMES), Taxonomy([value_of("honor", pairs=2)]), FitSettings("probe", LAYERS))
    assert found["honor"].held_out is None
    assert separates(found["honor"])


@given(st.integers(1, 100), st.sampled_from(["raw", "chat"]))
def test_about_three_in_ten_pairs_are_held_out_and_share_no_sentence_with_the_others(count, reading):
    twins = make_twins([Pair(f"p{n};", f"n{n};") for n in range(count)], reading)
    if not twins.held.any():
        assert count < (4 if reading == "raw" else 12)
        return
    assert 0.1 < twins.held.mean() < 0.5

    def words(prompts, kept):
        texts = [p if isinstance(p, str) else p[0]["content"] for p, k in zip(prompts, kept, strict=True) if k]
        return {word for text in texts for word in text.split() if word.endswith(";")}

    for side in (twins.positives, twins.negatives):
        assert not words(side, twins.held) & words(side, ~twins.held)


# The paper's solver


def test_saga_is_scikit_learns_on_the_seven_tenths_that_are_not_held_out():
    positives, negatives, _ = planted(pairs=40, width=12)
    mask = held(40, 12)
    direction = fit_direction("value", positives, negatives, FitSettings("probe", LAYERS, solver="saga"), held=mask)
    for layer in range(len(LAYERS)):
        p, n = positives[~mask[0], layer].astype(float), negatives[~mask[1], layer].astype(float)
        plain = LogisticRegression(solver="saga", max_iter=10_000, random_state=0).fit(np.concatenate([p, n]), [1] * len(p) + [0] * len(n))
        assert np.allclose(direction.vectors[layer], plain.coef_[0], atol=1e-6)
        assert direction.bias[layer] == pytest.approx(plain.intercept_[0], abs=1e-6)
        assert 0.5 <= direction.held_out[layer] <= 1


def test_saga_at_its_own_tolerance_stops_short_of_the_optimum():
    """Where the states' dimensions differ much in size, as those of a language model do."""
    positives, negatives, _ = planted(pairs=60, width=80, distance=0.3)
    scale = np.exp(np.random.default_rng(3).standard_normal(80) * 2).astype(np.float32)
    p, n = (positives[:, 0] * scale).astype(float), (negatives[:, 0] * scale).astype(float)
    assert np.linalg.norm(fit_probe(p, n, 1.0, "saga")[0]) < 0.95 * np.linalg.norm(fit_probe(p, n, 1.0)[0])


# With a store


def stored(folder, engine, names=NAMES, layers=LAYERS, progress=None, **options):
    chosen = FitSettings("mean_difference", layers, **options)
    store = DirectionStore(folder, manifest_key(engine, chosen), model_name="planted")
    return fit_directions(engine, Taxonomy([value_of(name) for name in names]), chosen, progress, store=store)


def test_what_is_in_the_store_is_neither_read_nor_fitted_again(tmp_path):
    first = stored(tmp_path, PlantedEngine(NAMES))
    engine = PlantedEngine(NAMES)
    again = stored(tmp_path, engine)
    assert engine.read_texts == []
    for name in NAMES:
        assert np.array_equal(first[name].vectors, again[name].vectors)
        assert np.array_equal(first[name].held_out, again[name].held_out)


def test_a_value_more_is_the_only_one_fitted(tmp_path):
    stored(tmp_path, PlantedEngine(NAMES), NAMES[:3])
    engine = PlantedEngine(NAMES)
    assert list(stored(tmp_path, engine)) == list(NAMES)
    assert {text.split()[0] for text in engine.read_texts} == {NAMES[3]}


def test_where_other_values_are_the_negatives_a_value_more_changes_them_all(tmp_path):
    stored(tmp_path, PlantedEngine(NAMES), NAMES[:3], contrast="opposed+others")
    again = stored(tmp_path, PlantedEngine(NAMES), contrast="opposed+others")
    fresh = fit_directions(
        PlantedEngine(NAMES), Taxonomy([value_of(name) for name in NAMES]), FitSettings("mean_difference", LAYERS, "opposed+others")
    )
    assert all(np.array_equal(again[name].vectors, fresh[name].vectors) for name in NAMES)


class BreaksAt(PlantedEngine):
    """Fails at the first batch with a sentence that begins so."""

    def __init__(self, names, beginning):
        super().__init__(names)
        self.beginning = beginning

    def read(self, conversations, progress=None):
        if any(text.startswith(self.beginning) for text in conversations):
            raise NonFiniteError("The activations are not finite.")
        return super().read(conversations, progress)


@pytest.mark.parametrize("beginning", ["value17 +", "value0 -", "value9 -"])
def test_where_other_values_are_the_negatives_a_fit_that_breaks_off_reads_nothing_twice(beginning, tmp_path):
    names = tuple(f"value{number}" for number in range(20))
    broken, again = BreaksAt(names, beginning), PlantedEngine(names)
    with pytest.raises(NonFiniteError):
        stored(tmp_path, broken, names, contrast="opposed+others")
    steps = []
    fitted = stored(tmp_path, again, names, contrast="opposed+others", progress=lambda done, total: steps.append((done, total)))
    texts = sentences([value_of(name) for name in names])
    assert broken.read_texts
    assert sorted(broken.read_texts + again.read_texts) == sorted(texts)
    assert steps[-1][0] == steps[-1][1]
    fresh = stored(tmp_path / "other", PlantedEngine(names), names, contrast="opposed+others")
    assert all(np.array_equal(fitted[name].vectors, fresh[name].vectors) for name in names)


def test_the_states_that_a_fit_keeps_are_gone_when_it_is_done(tmp_path):
    with pytest.raises(NonFiniteError):
        stored(tmp_path, BreaksAt(NAMES, "duty -"), contrast="opposed+others")
    assert len(list((tmp_path / "reading").iterdir())) == len(NAMES)
    stored(tmp_path, PlantedEngine(NAMES), contrast="opposed+others")
    assert not (tmp_path / "reading").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) == len(NAMES)


def one_bit_flipped(content):
    return content[:-2] + bytes([content[-2] ^ 0x20]) + content[-1:]  # in the last number, which stays finite


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"no tensors", lambda content: content[:-8], one_bit_flipped])
def test_kept_states_that_are_damaged_are_read_again(damage, tmp_path):
    with pytest.raises(NonFiniteError):
        stored(tmp_path, BreaksAt(NAMES, "duty -"), contrast="opposed+others")
    kept = next((tmp_path / "reading").iterdir())
    kept.write_bytes(damage(kept.read_bytes()))
    engine = PlantedEngine(NAMES)
    again = stored(tmp_path, engine, contrast="opposed+others")
    assert len([text for text in engine.read_texts if " + " in text]) == 20
    fresh = stored(tmp_path / "other", PlantedEngine(NAMES), contrast="opposed+others")
    assert all(np.array_equal(again[name].vectors, fresh[name].vectors) for name in NAMES)


def test_a_value_of_ones_own_is_set_against_those_that_are_shipped_and_changes_none_of_them(tmp_path, taxonomy):
    shipped = list(taxonomy)[:3]
    chosen = FitSettings("mean_difference", LAYERS, "opposed+others")
    store = DirectionStore(tmp_path, manifest_key(FakeEngine(), chosen), model_name="fake")
    before = fit_directions(FakeEngine(), shipped, chosen, store=store)
    own, engine, read = [value_of("frugality"), value_of("thrift")], FakeEngine(), []
    states = engine.read
    engine.read = lambda texts, progress=None: read.extend(texts) or states(texts, progress)
    after = fit_directions(engine, [*shipped, *own], chosen, store=store)
    assert sorted(read) == sorted([*sentences(own), *(pair.positive for value in shipped for pair in value.all_pairs)])
    assert all(np.array_equal(before[value.id].vectors, after[value.id].vectors) for value in shipped)
    alone = fit_directions(FakeEngine(), own, chosen)
    assert not np.allclose(alone["thrift"].vectors, after["thrift"].vectors)


def test_blocks_that_are_missing_are_added_to_those_that_are_there(tmp_path):
    few = stored(tmp_path, PlantedEngine(NAMES), layers=(2, 7))
    many = stored(tmp_path, PlantedEngine(NAMES), layers=LAYERS)
    fresh = stored(tmp_path / "other", PlantedEngine(NAMES), layers=LAYERS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 * len(NAMES)
    for name in NAMES:
        assert np.array_equal(many[name].vectors, fresh[name].vectors)
        assert np.array_equal(many[name].vectors[[0, 2]], few[name].vectors)
        assert many[name].layers == LAYERS


def test_a_fit_that_breaks_off_keeps_the_values_that_were_finished(tmp_path):
    names = tuple(f"value{number}" for number in range(20))

    class Breaking(PlantedEngine):
        def read(self, conversations, progress=None):
            if any(text.startswith("value9 ") for text in conversations):
                raise NonFiniteError("The activations are not finite.")
            return super().read(conversations, progress)

    with pytest.raises(NonFiniteError):
        stored(tmp_path, Breaking(names), names)
    engine = PlantedEngine(names)
    again = stored(tmp_path, engine, names)
    assert {text.split()[0] for text in engine.read_texts} == set(names[8:])
    fresh = stored(tmp_path / "other", PlantedEngine(names), names)
    assert all(np.array_equal(again[name].vectors, fresh[name].vectors) for name in names)


def test_a_changed_magnitude_needs_no_new_fit(tmp_path):
    stored(tmp_path, PlantedEngine(NAMES))
    engine, chosen = PlantedEngine(NAMES), FitSettings("mean_difference", LAYERS)
    store = DirectionStore(tmp_path, manifest_key(engine, chosen), model_name="planted")
    found = fit_directions(engine, Taxonomy([value_of("honor", alpha=0.3)]), chosen, store=store)
    assert found["honor"].alpha == 0.3
    assert engine.read_texts == []


def fit_in_a_process(folder, ready, go):
    ready.release()
    go.wait(60)
    stored(folder, PlantedEngine(NAMES))


def test_processes_that_fit_at_once_leave_a_whole_store(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    processes = [context.Process(target=fit_in_a_process, args=(tmp_path, ready, go)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=60)
    go.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    engine = PlantedEngine(NAMES)
    found = stored(tmp_path, engine)
    assert engine.read_texts == []
    fresh = stored(tmp_path / "other", PlantedEngine(NAMES))
    assert all(np.array_equal(found[name].vectors, fresh[name].vectors) for name in NAMES)


def test_several_methods_can_share_one_reading(values):
    engine = PlantedEngine(NAMES)
    once = ReadOnce(engine)
    for method in METHODS:
        shared = fit_directions(once, values, FitSettings(method, LAYERS))
        alone = fit_directions(PlantedEngine(NAMES), values, FitSettings(method, LAYERS))
        assert all(np.array_equal(shared[name].vectors, alone[name].vectors) for name in NAMES)
    assert sorted(engine.read_texts) == sorted(sentences(values))


# On models


def test_directions_fitted_on_a_model_tell_its_own_sentences_apart(taxonomy):
    engine = tiny_engine()
    try:
        directions = fit_directions(engine, taxonomy.subset(["honor", "fairness"]), FitSettings("probe", tuple(range(DEPTH))))
    finally:
        engine.close()
    for direction in directions.values():
        assert direction.vectors.shape == (DEPTH, WIDTH)
        assert direction.accuracy.min() > 0.5


@pytest.mark.parametrize("contrast", ["opposed", "opposed+others"])
@pytest.mark.parametrize("reading", ["raw", "chat"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_contrast_and_reading_are_choices_for_every_model(architecture, reading, contrast, taxonomy):
    engine = tiny_engine(architecture, chat=True)
    subset = taxonomy.subset(["honor", "fairness", "karma"])
    try:
        chosen = FitSettings("probe", (1, 3), contrast, reading)
        found = fit_directions(engine, subset, chosen)
        otherwise = fit_directions(engine, subset, FitSettings("probe", (1, 3), "opposed", "raw"))
    finally:
        engine.close()
    assert tuple(found) == subset.ids
    same = all(np.allclose(found[name].vectors, otherwise[name].vectors, atol=1e-4) for name in found)
    assert same == (chosen == FitSettings("probe", (1, 3)))


def test_one_sentence_at_a_time_gives_the_same_directions_as_batches(taxonomy):
    engine = tiny_engine()
    subset, chosen = taxonomy.subset(["honor", "fairness"]), FitSettings("mean_difference", (1, 3))
    try:
        together = fit_directions(engine, subset, chosen)
        read = engine.read
        engine.read = lambda texts, progress=None: np.concatenate([read([text], progress) for text in texts])
        alone = fit_directions(engine, subset, chosen)
    finally:
        engine.close()
    for name in together:
        assert np.allclose(together[name].vectors, alone[name].vectors, atol=1e-5)
