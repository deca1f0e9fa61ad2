"""Directions on disk: what is saved comes back, and nothing else is ever used."""

import hashlib
import json
import multiprocessing
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vispa_graph.engine.contract import Direction
from vispa_graph.engine.directions import FitSettings
from vispa_graph.engine.store import folder_name, is_for, load_directions, manifest_key, save_directions
from vispa_graph.errors import StoreError

FIT = FitSettings("probe", (1, 3), "opposed", "raw", 0.5)
KEY = manifest_key("model-a", "taxonomy-a", FIT)
TENSORS, MANIFEST = "directions.safetensors", "manifest.json"


def some_directions(seed=0, layers=FIT.layers, values=("honor", "self-direction")):
    random = np.random.default_rng(seed)

    def numbers(*shape):
        return random.standard_normal(shape).astype(np.float32)

    return {
        value: Direction(value, "probe", layers, numbers(len(layers), 6), numbers(len(layers)), 0.25, numbers(len(layers)) ** 2) for value in values
    }


def same(one, other):
    """Whether two sets of directions are equal to the bit."""
    return list(one) == list(other) and all(
        (a.value, a.method, a.layers, a.alpha) == (b.value, b.method, b.layers, b.alpha)
        and all(
            x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
            for x, y in zip((a.vectors, a.bias, a.accuracy), (b.vectors, b.bias, b.accuracy), strict=True)
        )
        for a, b in zip(one.values(), other.values(), strict=True)
    )


@pytest.fixture
def folder(tmp_path):
    """A stored set of directions."""
    place = tmp_path / "cache" / "directions"
    save_directions(place, some_directions(), KEY, model_name="tiny")
    return place


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def direction_sets(draw):
    method = draw(st.sampled_from(["probe", "mean_difference", "pca"]))
    layers = tuple(sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=4))))
    width = draw(st.integers(1, 5))
    values = draw(st.lists(st.from_regex(r"[a-z0-9]+(-[a-z0-9]+){0,2}", fullmatch=True), min_size=1, max_size=4, unique=True))

    def array(*shape):
        return draw(arrays.arrays(np.float32, shape, elements=finite))

    return FitSettings(method, layers), {
        value: Direction(value, method, layers, array(len(layers), width), array(len(layers)), draw(st.floats(0, 10)), array(len(layers)))
        for value in values
    }


@settings(deadline=None, max_examples=40)
@given(direction_sets())
def test_loading_what_was_saved_gives_the_same_to_the_bit(tmp_path_factory, made):
    fit, directions = made
    place = tmp_path_factory.mktemp("store") / "directions"
    key = manifest_key("model", "taxonomy", fit)
    save_directions(place, directions, key, model_name="tiny")
    assert is_for(place, key)
    assert same(load_directions(place, key), directions)
    shutil.rmtree(place.parent)


def test_the_manifest_says_in_plain_words_what_the_directions_belong_to(folder):
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["model_name"] == "tiny"
    assert manifest["key"] == {
        "format": 1,
        "model": "model-a",
        "taxonomy": "taxonomy-a",
        "method": "probe",
        "layers": [1, 3],
        "contrast": "opposed",
        "reading": "raw",
        "regularisation": 0.5,
    }
    for value, direction in some_directions().items():
        assert manifest["values"][value]["alpha"] == 0.25
        assert manifest["values"][value]["accuracy"] == pytest.approx(direction.accuracy, abs=1e-4)


OTHERS = {
    "model": manifest_key("model-b", "taxonomy-a", FIT),
    "taxonomy": manifest_key("model-a", "taxonomy-b", FIT),
    "method": manifest_key("model-a", "taxonomy-a", replace(FIT, method="pca")),
    "layers": manifest_key("model-a", "taxonomy-a", replace(FIT, layers=(1, 2))),
    "contrast": manifest_key("model-a", "taxonomy-a", replace(FIT, contrast="opposed+others")),
    "reading": manifest_key("model-a", "taxonomy-a", replace(FIT, reading="chat")),
    "regularisation": manifest_key("model-a", "taxonomy-a", replace(FIT, regularisation=1.0)),
    "format": {**KEY, "format": 0},
}


@pytest.mark.parametrize("what", OTHERS)
def test_directions_of_something_else_are_refused_by_what_differs(what, folder):
    assert not is_for(folder, OTHERS[what])
    with pytest.raises(StoreError, match=rf"something else: {what} differ\. Remove the folder"):
        load_directions(folder, OTHERS[what])


def test_each_key_has_a_folder_of_its_own_and_always_the_same():
    assert len({folder_name(key) for key in (KEY, *OTHERS.values())}) == len(OTHERS) + 1
    assert folder_name(KEY) == folder_name(manifest_key("model-a", "taxonomy-a", FIT)) == folder_name(dict(reversed(KEY.items())))


def change_manifest(**changes):
    def change(folder):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}), encoding="utf-8")

    return change


def drop_from_manifest(name):
    def change(folder):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        del manifest[name]
        (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

    return change


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name, keep=0.6):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return change


def flip_a_bit(folder):
    content = bytearray((folder / TENSORS).read_bytes())
    content[-3] ^= 1
    (folder / TENSORS).write_bytes(bytes(content))


DAMAGE = {
    "no folder": shutil.rmtree,
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "manifest cut short": truncate(MANIFEST),
    "manifest empty": overwrite(MANIFEST, b""),
    "manifest not text": overwrite(MANIFEST, b"\xff\xfe\x00"),
    "manifest a list": overwrite(MANIFEST, b"[1, 2]"),
    "manifest null": overwrite(MANIFEST, b"null"),
    "manifest without a key": drop_from_manifest("key"),
    "manifest without a checksum": drop_from_manifest("sha256"),
    "manifest without values": drop_from_manifest("values"),
    "key that is no mapping": change_manifest(key=[1]),
    "values that are no mapping": change_manifest(values=["honor"]),
    "value without a magnitude": change_manifest(values={"honor": {}, "self-direction": {}}),
    "value without tensors": change_manifest(values={"honor": {"alpha": 1.0}, "self-direction": {"alpha": 1.0}, "face": {"alpha": 1.0}}),
    "value left out": change_manifest(values={"honor": {"alpha": 1.0}}),
    "magnitude that is not a number": change_manifest(values={"honor": {"alpha": None}, "self-direction": {"alpha": 1.0}}),
    "magnitude that is not finite": change_manifest(values={"honor": {"alpha": float("nan")}, "self-direction": {"alpha": 1.0}}),
    "tensors cut short": truncate(TENSORS),
    "tensors empty": overwrite(TENSORS, b""),
    "tensors something else": overwrite(TENSORS, b"not tensors at all"),
    "one bit flipped": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_with_its_place_and_the_remedy(damage, folder):
    DAMAGE[damage](folder)
    with pytest.raises(StoreError, match="Remove the folder") as refused:
        load_directions(folder, KEY)
    assert str(folder) in str(refused.value)


def test_tensors_that_are_no_safetensors_are_refused_even_with_the_right_checksum(folder):
    overwrite(TENSORS, b"not tensors at all")(folder)
    change_manifest(sha256=hashlib.sha256(b"not tensors at all").hexdigest())(folder)
    with pytest.raises(StoreError, match="cannot be read"):
        load_directions(folder, KEY)


@pytest.mark.parametrize("part", ["vectors", "bias", "accuracy"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_never_used(part, bad, tmp_path):
    directions = some_directions()
    getattr(directions["self-direction"], part)[..., -1] = bad
    save_directions(tmp_path / "directions", directions, KEY, model_name="tiny")
    with pytest.raises(StoreError, match="not finite"):
        load_directions(tmp_path / "directions", KEY)


@pytest.mark.parametrize("part", ["vectors", "bias", "accuracy"])
def test_arrays_of_other_shapes_than_the_layers_ask_for_are_refused(part, tmp_path):
    directions = some_directions()
    honor = directions["honor"]
    directions["honor"] = replace(honor, **{part: getattr(honor, part)[:1]})
    save_directions(tmp_path / "directions", directions, KEY, model_name="tiny")
    with pytest.raises(StoreError, match="Remove the folder"):
        load_directions(tmp_path / "directions", KEY)


@pytest.mark.parametrize("damage", ["no folder", "no manifest", "manifest cut short", "manifest not text", "manifest a list"])
def test_a_folder_whose_manifest_cannot_be_read_belongs_to_nothing(damage, folder):
    assert is_for(folder, KEY)
    DAMAGE[damage](folder)
    assert not is_for(folder, KEY)


# Saving


def test_a_save_that_fails_leaves_nothing_behind(tmp_path):
    directions = some_directions()
    broken = {**directions, "face": replace(directions["honor"], accuracy=None)}
    with pytest.raises((AttributeError, TypeError, ValueError)):
        save_directions(tmp_path / "cache" / "directions", broken, KEY, model_name="tiny")
    assert list((tmp_path / "cache").iterdir() if (tmp_path / "cache").exists() else []) == []


def test_a_save_that_fails_at_the_manifest_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        save_directions(tmp_path / "cache" / "directions", some_directions(), {**KEY, "extra": object()}, model_name="tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_save_where_a_file_stands_in_the_way_fails_and_leaves_it_alone(tmp_path):
    place = tmp_path / "directions"
    place.write_text("a file")
    with pytest.raises(OSError, match="directions"):
        save_directions(place, some_directions(), KEY, model_name="tiny")
    assert place.read_text() == "a file"
    assert list(tmp_path.iterdir()) == [place]


def test_saving_over_a_folder_that_is_there_keeps_the_first(folder):
    save_directions(folder, some_directions(seed=1), KEY, model_name="tiny")
    assert same(load_directions(folder, KEY), some_directions())
    assert list(folder.parent.iterdir()) == [folder]


def test_threads_that_save_at_once_leave_one_whole_folder(tmp_path):
    place = tmp_path / "cache" / "directions"
    barrier = threading.Barrier(8)

    def save(seed):
        barrier.wait()
        save_directions(place, some_directions(seed), KEY, model_name="tiny")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(8)))
    assert list(place.parent.iterdir()) == [place]
    stored = load_directions(place, KEY)
    assert any(same(stored, some_directions(seed)) for seed in range(8))


def save_when_told(place, seed, ready, go):
    directions = some_directions(seed)
    ready.release()
    go.wait(60)
    save_directions(place, directions, KEY, model_name="tiny")


def test_processes_that_save_at_once_leave_one_whole_folder(tmp_path):
    place = tmp_path / "cache" / "directions"
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    processes = [context.Process(target=save_when_told, args=(place, seed, ready, go)) for seed in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=60)
    go.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert list(place.parent.iterdir()) == [place]
    stored = load_directions(place, KEY)
    assert any(same(stored, some_directions(seed)) for seed in range(2))


def test_whoever_reads_while_others_save_sees_all_or_nothing(tmp_path):
    place = tmp_path / "directions"
    done, seen = threading.Event(), []

    def read():
        while not done.is_set():
            if place.exists():
                seen.append(same(load_directions(place, KEY), some_directions()))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        save_directions(place, some_directions(), KEY, model_name="tiny")
        while not seen and reader.is_alive():
            pass
    finally:
        done.set()
        reader.join()
    assert seen
    assert all(seen)
