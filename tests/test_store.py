"""Directions on disk: what is kept comes back, and nothing else is ever used."""

import hashlib
import json
import multiprocessing
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file
from tiny_models import byte_tokenizer, tiny_model
from tokenizers import normalizers

from vispa_graph.engine.contract import Direction
from vispa_graph.engine.directions import FitSettings
from vispa_graph.engine.fake import FakeEngine
from vispa_graph.engine.fingerprint import fingerprint
from vispa_graph.engine.pairs import digest, make_twins
from vispa_graph.engine.store import DirectionStore, folder_name, is_for, manifest_key
from vispa_graph.errors import StoreError
from vispa_graph.taxonomy_index.taxonomy import Pair

FIT = FitSettings("probe", (1, 3), "opposed", "raw", 0.5)
KEY = manifest_key(FakeEngine(), FIT)
MANIFEST = "manifest.json"
VALUES = ("honor", "self-direction")


def numbers(random, *shape):
    return random.standard_normal(shape).astype(np.float32)


def direction(value="honor", seed=0, layers=FIT.layers, method="probe"):
    random, size = np.random.default_rng([seed, *value.encode()]), len(layers)
    arrays = numbers(random, size, 6), numbers(random, size), 1.0, numbers(random, size) ** 2, numbers(random, size) ** 2
    return Direction(value, method, tuple(layers), *arrays)


def opened(folder, key=KEY, **options):
    return DirectionStore(folder, key, model_name="tiny", **options)


def found(folder, value="honor", source="read", layers=FIT.layers, key=KEY):
    """What a process that comes later finds."""
    return opened(folder, key).load(value, source, "probe", layers)


def same(one, other):
    """Whether two directions are equal to the bit."""
    if (one.value, one.method, one.layers, one.alpha) != (other.value, other.method, other.layers, other.alpha):
        return False
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("vectors", "bias", "accuracy", "held_out")]
    return all((x is None) == (y is None) and (x is None or (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())) for x, y in pairs)


@pytest.fixture
def folder(tmp_path):
    """A store of two values."""
    place = tmp_path / "cache" / "directions"
    store = opened(place)
    for value in VALUES:
        store.add(direction(value), "read")
    return place


@pytest.fixture
def file(folder):
    """The file of "honor"."""
    return next(path for path in folder.glob("*.safetensors") if opened(path.parent)._entries["honor", "read"][0].file == path)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def made(draw):
    layers = tuple(sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=4))))
    width = draw(st.integers(1, 5))

    def array(*shape):
        return draw(arrays.arrays(np.float32, shape, elements=finite))

    held_out = array(len(layers)) if draw(st.booleans()) else None
    value = draw(st.from_regex(r"[a-z0-9]+(-[a-z0-9]+){0,2}|@attribute", fullmatch=True))
    return Direction(value, "probe", layers, array(len(layers), width), array(len(layers)), 1.0, array(len(layers)), held_out)


@settings(deadline=None, max_examples=40)
@given(made())
def test_loading_what_was_kept_gives_the_same_to_the_bit(tmp_path_factory, kept):
    place = tmp_path_factory.mktemp("store") / "directions"
    opened(place).add(kept, "read")
    assert is_for(place, KEY)
    assert same(found(place, kept.value, layers=kept.layers), kept)
    shutil.rmtree(place.parent)


def test_several_values_in_one_file_come_back_each(tmp_path):
    opened(tmp_path).add_all([(direction(value), value) for value in VALUES])
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert all(same(found(tmp_path, value, value), direction(value)) for value in VALUES)


def test_vectors_are_views_of_the_mapped_file(tmp_path):
    opened(tmp_path).add(direction(layers=range(20)), "read")
    for layers in (range(20), range(5, 12)):
        loaded = found(tmp_path, layers=tuple(layers))
        assert not loaded.vectors.flags.owndata
        assert np.array_equal(loaded.vectors, direction(layers=range(20)).vectors[list(layers)])


def test_blocks_come_from_as_many_files_as_hold_them_in_ascending_order(tmp_path):
    store = opened(tmp_path)
    store.add(direction(layers=(1, 5), seed=1), "read")
    store.add(direction(layers=(3,), seed=2), "read")
    assert store.layers("honor", "read") == {1, 3, 5}
    loaded = found(tmp_path, layers=(1, 3, 5))
    expected = np.stack(
        [direction(layers=(1, 5), seed=1).vectors[0], direction(layers=(3,), seed=2).vectors[0], direction(layers=(1, 5), seed=1).vectors[1]]
    )
    assert np.array_equal(loaded.vectors, expected)
    assert loaded.layers == (1, 3, 5)


def test_a_value_read_from_other_sentences_is_another(folder):
    assert opened(folder).layers("honor", "read") == {1, 3}
    assert opened(folder).layers("honor", "read otherwise") == frozenset()


def test_shipped_directions_are_found_beside_those_of_the_cache_but_only_where_the_key_is_theirs(folder, tmp_path):
    store = opened(tmp_path / "own", shipped=folder)
    store.add(direction("karma"), "read")
    assert same(store.load("honor", "read", "probe", FIT.layers), direction("honor"))
    assert same(store.load("karma", "read", "probe", FIT.layers), direction("karma"))
    assert len(list(folder.glob("*.safetensors"))) == len(VALUES)
    assert opened(tmp_path / "other", OTHERS["method"], shipped=folder).layers("honor", "read") == frozenset()


# What directions belong to


def key_of(engine=None, revision=None, dictionary=None, **changes):
    return manifest_key(engine or FakeEngine(), replace(FIT, **changes), revision=revision, dictionary=dictionary)


class AnotherModel(FakeEngine):
    fingerprint = "another"


OTHERS = {
    "model": key_of(AnotherModel()),
    "revision": key_of(revision="v2"),
    "method": key_of(method="pca"),
    "contrast": key_of(contrast="opposed+others"),
    "reading": key_of(reading="chat"),
    "regularisation": key_of(regularisation=1.0),
    "solver": key_of(solver="saga"),
    "dictionary": key_of(dictionary="d"),
    "format": {**KEY, "format": 1},
}


def test_the_manifest_says_in_plain_words_what_the_directions_belong_to(folder):
    assert json.loads((folder / MANIFEST).read_text(encoding="utf-8")) == {
        "model_name": "tiny",
        "key": {
            "format": 2,
            "model": "fake",
            "revision": None,
            "method": "probe",
            "contrast": "opposed",
            "reading": "raw",
            "regularisation": 0.5,
            "solver": "exact",
            "dictionary": None,
        },
    }


@pytest.mark.parametrize("what", OTHERS)
def test_directions_of_something_else_are_refused_by_what_differs(what, folder):
    assert not is_for(folder, OTHERS[what])
    with pytest.raises(StoreError, match=rf"something else: {what} differ\. Remove"):
        opened(folder, OTHERS[what])


def test_each_key_has_a_folder_of_its_own_and_always_the_same():
    assert len({folder_name(key) for key in (KEY, *OTHERS.values())}) == len(OTHERS) + 1
    assert folder_name(KEY) == folder_name(dict(reversed(KEY.items())))


def test_the_model_of_a_key_is_its_weights_its_dtype_its_tokenizer_and_its_chat_template():
    plain = fingerprint(tiny_model(), byte_tokenizer())
    half = tiny_model().bfloat16()
    reworded = byte_tokenizer(chat=True)
    reworded.chat_template = reworded.chat_template.replace("[assistant]", "[answer]")
    others = [
        fingerprint(tiny_model(seed=1), byte_tokenizer()),
        fingerprint(half, byte_tokenizer()),
        fingerprint(half.float(), byte_tokenizer()),
        fingerprint(tiny_model(), byte_tokenizer(spaced_letters=False)),
        fingerprint(tiny_model(), byte_tokenizer(chat=True)),
        fingerprint(tiny_model(), reworded),
    ]
    assert len({plain, *others}) == 7
    lowering = byte_tokenizer()
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert fingerprint(tiny_model(), lowering) != plain
    used = byte_tokenizer()
    used("a text that is cut", truncation=True, max_length=3)
    assert fingerprint(tiny_model(), used) == plain


def test_what_is_read_decides_the_source_sentences_prompt_and_other_values(monkeypatch):
    pairs = [Pair(f"I do {n}.", f"I leave {n}.") for n in range(8)]
    one, other = make_twins(pairs, "chat"), make_twins([Pair("She does it.", "She leaves it.")], "chat")
    sources = {
        digest(one, []),
        digest(one, [other]),
        digest(make_twins(pairs, "raw"), []),
        digest(make_twins([*pairs[:-1], Pair("I do it.", "I leave it.")], "chat"), []),
    }
    monkeypatch.setattr("vispa_graph.engine.pairs.load_prompt", lambda name: type("Prompt", (), {"render": lambda self, text: f"On {text}:"})())
    assert len({*sources, digest(make_twins(pairs, "chat"), [])}) == 5


# Damage


def overwrite(content):
    return lambda path: path.write_bytes(content)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.6)])


def flip_the_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def rewrite(**changes):
    """Change tensors or metadata, and give the file the name of its new content: only the content itself is wrong."""

    def change(path):
        tensors = {**load_file(path), **{f"0.{name}": array for name, array in changes.items() if name != "entries"}}
        entries = changes.get("entries", json.dumps([{"value": "honor", "source": "read", "layers": [1, 3]}]))
        path.unlink()
        save_file({name: array for name, array in tensors.items() if array is not None}, path, {"directions": entries} if entries else None)
        path.rename(path.with_stem(hashlib.sha256(path.read_bytes()).hexdigest()[:32]))

    return change


nan, inf = np.float32(np.nan), np.float32(np.inf)
DAMAGE = {
    "cut short": truncate,
    "empty": overwrite(b""),
    "something else": overwrite(b"not tensors at all"),
    "one bit flipped": flip_the_last_bit,
    "no metadata": rewrite(entries=None),
    "metadata that is not JSON": rewrite(entries="{"),
    "metadata that is no list": rewrite(entries="3"),
    "an entry without layers": rewrite(entries='[{"value": "honor", "source": "read"}]'),
    "a NaN in the vectors": rewrite(vectors=np.full((2, 6), nan)),
    "an infinite bias": rewrite(bias=np.full(2, inf)),
    "a NaN in the accuracy": rewrite(accuracy=np.full(2, nan)),
    "a NaN in the held-out accuracy": rewrite(held_out=np.full(2, nan)),
    "vectors of fewer layers": rewrite(vectors=np.ones((1, 6), np.float32)),
    "a bias of more layers": rewrite(bias=np.ones(3, np.float32)),
    "a bias for every number": rewrite(bias=np.ones((2, 6), np.float32)),
    "no vectors": rewrite(vectors=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_its_place_and_the_remedy(damage, folder, file):
    DAMAGE[damage](file)
    with pytest.raises(StoreError, match="Remove") as refused:
        found(folder)
    assert str(folder) in str(refused.value)


def test_a_file_that_was_taken_away_is_as_if_it_had_never_been(folder, file):
    file.unlink()
    assert opened(folder).layers("honor", "read") == frozenset()
    assert same(found(folder, "self-direction"), direction("self-direction"))


def test_a_file_that_is_damaged_while_it_is_open_is_refused_when_first_used(folder, file):
    store = opened(folder)
    flip_the_last_bit(file)
    with pytest.raises(StoreError, match="not what was written"):
        store.load("honor", "read", "probe", FIT.layers)


MANIFESTS = {
    "missing": lambda path: path.unlink(),
    "cut short": truncate,
    "empty": overwrite(b""),
    "not text": overwrite(b"\xff\xfe\x00"),
    "a list": overwrite(b"[1]"),
    "null": overwrite(b"null"),
    "without a key": overwrite(b"{}"),
    "with a key that is no mapping": overwrite(b'{"key": [1]}'),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_store_whose_manifest_cannot_be_read_is_refused_and_belongs_to_nothing(damage, folder):
    assert is_for(folder, KEY)
    MANIFESTS[damage](folder / MANIFEST)
    assert not is_for(folder, KEY)
    with pytest.raises(StoreError, match="cannot be read"):
        opened(folder)


@pytest.mark.parametrize("part", ["vectors", "bias", "accuracy", "held_out"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_never_kept(part, bad, tmp_path):
    broken = direction()
    getattr(broken, part)[..., -1] = bad
    with pytest.raises(StoreError, match="not finite"):
        opened(tmp_path / "directions").add(broken, "read")
    assert not (tmp_path / "directions").exists()


# Writing


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    store = opened(tmp_path)
    store.add(direction(), "read")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.add(direction("karma"), "read")
    assert sorted(tmp_path.iterdir()) == before


def test_files_can_be_read_by_whoever_may_read_what_the_process_writes(folder, tmp_path):
    (tmp_path / "plain").write_text("")
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_keeping_the_same_twice_changes_nothing(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    opened(folder).add(direction(), "read")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_of_two_fits_of_the_same_every_reader_takes_the_same(tmp_path, monkeypatch):
    for seed in (1, 2):
        opened(tmp_path).add(direction(seed=seed), "read")
    one = found(tmp_path)
    assert any(same(one, direction(seed=seed)) for seed in (1, 2))
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *given: reversed(list(listed(*given))))  # on another file system
    assert same(one, found(tmp_path))


def test_threads_that_write_at_once_leave_all_that_they_wrote(tmp_path):
    place = tmp_path / "cache" / "directions"
    barrier = threading.Barrier(8)

    def write(number):
        barrier.wait()
        opened(place).add(direction(f"value{number}"), "read")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert all(same(found(place, f"value{number}"), direction(f"value{number}")) for number in range(8))


def write_when_told(place, number, ready, go):
    store = opened(place)
    ready.release()
    go.wait(60)
    for value in ("shared", f"value{number}"):
        store.add(direction(value), "read")


def test_processes_that_write_at_once_leave_all_that_they_wrote(tmp_path):
    place = tmp_path / "cache" / "directions"
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    processes = [context.Process(target=write_when_told, args=(place, number, ready, go)) for number in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=60)
    go.set()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert all(same(found(place, value), direction(value)) for value in ("shared", "value0", "value1"))
    assert len(list(place.iterdir())) == 4


def test_whoever_reads_while_others_write_sees_whole_values_or_none(tmp_path):
    done, seen = threading.Event(), []

    def read():
        while not done.is_set():
            store = opened(tmp_path)
            seen.extend(same(store.load(value, "read", "probe", FIT.layers), direction(value)) for value, source in store.sources)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        store = opened(tmp_path)
        for number in range(20):
            store.add(direction(f"value{number}"), "read")
        while not seen and reader.is_alive():
            pass
    finally:
        done.set()
        reader.join()
    assert seen
    assert all(seen)
