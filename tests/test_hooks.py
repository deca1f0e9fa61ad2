"""The permanent hooks and the plan of a batch, without an engine around them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import DEPTH, WIDTH, block_outputs, find_blocks, random_direction, steer, tiny_model

from vispa_graph.engine.contract import Direction, Steering, mix
from vispa_graph.engine.hooks import BatchPlan, Hooks
from vispa_graph.errors import NonFiniteError

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 70, 33, 101], [7, 7, 20, 250, 3]])

numbers = st.floats(-3, 3, width=32)
vectors = st.lists(numbers, min_size=3, max_size=3)


def direction_of(vector, *, bias=0.0, method="probe", alpha=1.0):
    return Direction("value", method, (0,), np.array([vector], np.float32), np.array([bias], np.float32), alpha, np.ones(1, np.float32))


def states_of(*rows):
    """One position a row: [rows, 1, d]."""
    return torch.tensor(rows, dtype=torch.float32)[:, None]


def sigmoid(score):
    return 1 / (1 + math.exp(-score))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_idle_hooks_leave_the_logits_bit_equal(architecture):
    model = tiny_model(architecture)
    with torch.inference_mode():
        before = model(IDS).logits
        hooks = Hooks(find_blocks(model))
        assert torch.equal(model(IDS).logits, before)
        hooks.remove()
        assert torch.equal(model(IDS).logits, before)


def test_removing_takes_every_hook_off_and_can_be_repeated():
    model = tiny_model()
    hooks = Hooks(find_blocks(model))
    assert all(block._forward_hooks for block in find_blocks(model))
    hooks.remove()
    hooks.remove()
    assert not any(block._forward_hooks for block in find_blocks(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "bloom"])
def test_steering_moves_the_logits_only_inside_its_context(architecture):
    model = tiny_model(architecture)
    hooks = Hooks(find_blocks(model))
    plan = BatchPlan([steer(random_direction([1, 3], method="pca")), None], CPU)
    with torch.inference_mode():
        before = model(IDS).logits
        with hooks.steering(plan):
            steered = model(IDS).logits
        after = model(IDS).logits
    assert not torch.allclose(steered[0], before[0], atol=1e-3)
    assert torch.equal(steered[1], before[1])
    assert torch.equal(after, before)


def test_an_error_inside_the_context_leaves_nothing_behind():
    model = tiny_model()
    hooks = Hooks(find_blocks(model))
    with torch.inference_mode():
        before = model(IDS).logits
        with pytest.raises(RuntimeError, match="stop"), hooks.steering(BatchPlan([steer(random_direction([1]))] * 2, CPU)):
            raise RuntimeError("stop")
        with pytest.raises(RuntimeError, match="stop"), hooks.recording(torch.tensor([0]), torch.tensor([0])) as recorded:
            raise RuntimeError("stop")
        assert torch.equal(model(IDS).logits, before)
    assert recorded == []


def test_the_magnitude_is_that_of_the_papers_formula():
    plan = BatchPlan([steer(direction_of([2.0, 0.0, 0.0], bias=-1.0), target=0.8)], CPU)
    steered = plan.apply(0, states_of([0.5, 4.0, -4.0]))
    eps = (math.log(0.8 / 0.2) - (-1.0) - 2.0 * 0.5) / 4.0
    assert plan.report(0).magnitude == pytest.approx((eps,))
    assert steered[0, 0].tolist() == pytest.approx([0.5 + 2 * eps, 4.0, -4.0])


@given(st.lists(st.tuples(vectors, vectors, numbers, st.floats(0.05, 0.95)), min_size=1, max_size=5))
def test_after_calibration_each_row_has_its_target_or_more(rows):
    plan = BatchPlan([steer(direction_of(w, bias=b), target=p) for w, _, b, p in rows], CPU)
    hidden = states_of(*(e for _, e, _, _ in rows))
    steered = plan.apply(0, hidden)
    for row, (w, e, b, target) in enumerate(rows):
        square = sum(x * x for x in w)
        if square < 1e-2:  # a direction too short to be one; what is added may be as large as it likes
            continue
        before = sigmoid(float(np.dot(w, e)) + b)
        after = sigmoid(float(np.dot(w, steered[row, 0].double().numpy())) + b)
        assert after == pytest.approx(max(before, target), abs=1e-4)
        if before > target + 1e-4:
            assert torch.equal(steered[row], hidden[row])
        assert plan.report(row).before == pytest.approx((before,), abs=1e-4)
        assert plan.report(row).after == pytest.approx((after,), abs=1e-4)


@given(st.lists(st.tuples(vectors, st.floats(0, 2, width=32), st.floats(0, 4, width=32)), min_size=1, max_size=4), st.permutations(range(4)))
def test_a_row_gets_the_same_whatever_its_place_among_the_others(rows, order):
    order = [index for index in order if index < len(rows)]
    plans = [steer(direction_of(w, method="pca", alpha=alpha), strength) for w, alpha, strength in rows]
    hidden = states_of(*(w for w, _, _ in rows))
    straight = BatchPlan(plans, CPU).apply(0, hidden)
    permuted = BatchPlan([plans[index] for index in order], CPU).apply(0, hidden[order])
    assert torch.equal(permuted, straight[order])


@given(vectors, vectors, numbers, st.floats(0.05, 0.95), st.floats(0.1, 3))
def test_suppressing_a_value_is_steering_toward_its_opposite(w, e, b, target, strength):
    away = BatchPlan([steer(direction_of(w, bias=b), -strength, target)], CPU)
    toward = BatchPlan([steer(direction_of([-x for x in w], bias=-b), strength, target)], CPU)
    assert torch.allclose(away.apply(0, states_of(e)), toward.apply(0, states_of(e)))


def test_a_suppressed_probe_ends_at_one_minus_its_target_or_stays_where_it_was_lower():
    for state, expected in (([2.0, 0.0, 0.0], 0.1), ([-4.0, 0.0, 0.0], sigmoid(-4.0))):
        plan = BatchPlan([steer(direction_of([1.0, 0.0, 0.0]), -1.0, 0.9)], CPU)
        plan.apply(0, states_of(state))
        assert plan.report(0).after[0] == pytest.approx(expected, abs=1e-5)


@given(st.lists(st.tuples(vectors, st.floats(-2, 2, width=32)), min_size=1, max_size=4), st.permutations(range(4)))
def test_a_row_of_several_values_gets_the_sum_of_what_each_adds_alone_in_any_order(parts, order):
    steerings = [steer(direction_of(w, method="pca"), strength) for w, strength in parts]
    hidden = states_of([0.1, -0.2, 0.3])
    alone = sum(BatchPlan([s], CPU).apply(0, hidden) - hidden for s in steerings)
    ordered = [steerings[index] for index in order if index < len(steerings)]
    mixed = BatchPlan([mix(ordered, [1] * len(ordered))], CPU).apply(0, hidden)
    assert torch.allclose(mixed - hidden, alone, atol=1e-5)


def test_the_magnitude_is_read_at_the_last_position_added_at_all_and_held_while_generating():
    plan = BatchPlan([steer(direction_of([1.0, 0.0, 0.0]))], CPU)
    prompt = torch.tensor([[[9.0, 0, 0], [-9.0, 0, 0], [0.0, 1, 0]]])
    eps = math.log(9)
    moved = torch.tensor([eps, 0, 0])
    assert torch.allclose(plan.apply(0, prompt), prompt + moved)
    following = torch.tensor([[[50.0, 2, 2]]])
    assert torch.allclose(plan.apply(0, following), following + moved)


def test_strength_multiplies_what_the_method_adds():
    hidden = states_of([0.0, 1.0, 0.0])
    probe, fixed = direction_of([1.0, 0.0, 0.0]), direction_of([1.0, 0.0, 0.0], method="mean_difference", alpha=0.5)
    for strength in (0.0, 0.5, 2.0):
        assert BatchPlan([steer(probe, strength)], CPU).apply(0, hidden)[0, 0, 0] == pytest.approx(strength * math.log(9))
        assert BatchPlan([steer(fixed, strength)], CPU).apply(0, hidden)[0, 0, 0] == pytest.approx(strength * 0.5)


@pytest.mark.parametrize("steering", [None, Steering(direction_of([1.0, 2.0, 3.0]), strength=0.0), Steering(direction_of([0.0, 0.0, 0.0]))])
def test_an_unsteered_row_beside_a_steered_one_stays_bit_equal(steering):
    hidden = states_of([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    steered = BatchPlan([steering, steer(direction_of([1.0, 0.0, 0.0]))], CPU).apply(0, hidden)
    assert torch.equal(steered[0], hidden[0])
    assert not torch.equal(steered[1], hidden[1])


def test_rows_may_be_steered_at_different_blocks():
    model = tiny_model()
    with block_outputs(model) as before:
        hooks = Hooks(find_blocks(model))
        with block_outputs(model) as after:
            plan = BatchPlan([steer(random_direction([0, 2], method="pca")), steer(random_direction([2, 3], method="pca", seed=1))], CPU)
            with torch.inference_mode(), hooks.steering(plan):
                model(IDS)
    changed = [[not torch.equal(before[layer][0][row], after[layer][0][row]) for layer in range(DEPTH)] for row in range(2)]
    assert changed == [[True, False, True, False, False], [False, False, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_magnitude_is_solved_in_float32_and_the_output_keeps_its_dtype(dtype):
    vector, state = [0.1, 0.2, 0.3], torch.tensor([[[0.3, -0.7, 0.9]]], dtype=dtype)
    plan = BatchPlan([steer(direction_of(vector))], CPU)
    assert plan.apply(0, state).dtype == dtype
    e, w = state[0, 0].double().numpy(), np.array(vector, np.float32).astype(np.float64)
    assert plan.report(0).magnitude == pytest.approx(((math.log(9) - w @ e) / (w @ w),), rel=1e-5)


def test_the_displacement_is_the_norm_of_all_that_was_added_as_a_share_of_the_last_state():
    vectors = np.array([[3.0, 0, 0], [0, 4.0, 0]], np.float32)
    direction = Direction("value", "pca", (0, 1), vectors, np.zeros(2, np.float32), 1.0, np.ones(2, np.float32))
    plan = BatchPlan([steer(direction, strength=2.0), None], CPU)
    plan.apply(0, states_of([0.0, 0.0, 20.0], [1.0, 1.0, 1.0]))
    plan.apply(1, states_of([0.0, 0.0, 40.0], [1.0, 1.0, 1.0]))
    report = plan.report(0)
    assert report.displacement == pytest.approx(10 / 40)
    assert report.magnitude == (2.0, 2.0)
    assert report.before is None
    assert report.after is None
    assert plan.report(1) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_states_that_are_not_finite_are_refused_with_the_layer(bad):
    plan = BatchPlan([steer(direction_of([1.0, 0.0, 0.0]))], CPU)
    with pytest.raises(NonFiniteError, match="layer 0"):
        plan.apply(0, states_of([bad, 0.0, 0.0]))


def test_recording_gives_the_states_at_the_places_asked_for_after_every_block():
    model = tiny_model()
    hooks = Hooks(find_blocks(model))
    rows, places = torch.tensor([0, 1, 1]), torch.tensor([4, 1, 3])
    with torch.inference_mode(), block_outputs(model) as outputs, hooks.recording(rows, places) as states:
        model(IDS)
    assert len(states) == DEPTH
    for layer, state in enumerate(states):
        assert state.shape == (3, WIDTH)
        for number, (row, place) in enumerate(zip(rows, places, strict=True)):
            assert torch.equal(state[number], outputs[layer][0][row, place])
