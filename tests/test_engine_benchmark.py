"""The engine's benchmark compares like with like."""

from dataclasses import replace

import pytest
import torch

from benchmarks.engine import VALUES, Bench, config_of


@pytest.fixture
def bench_of():
    made = []

    def make(dtype):
        made.append(Bench(*config_of("cpu", tiny=True), "cpu", dtype))
        return made[-1]

    yield make
    for bench in made:
        bench.engine.close()


def test_texts_that_differ_from_the_official_procedures_end_a_run_in_float32(bench_of, monkeypatch):
    bench = bench_of(torch.float32)
    assert bench.agreement().startswith(f"{VALUES} of {VALUES} texts")
    steered = bench.steered

    def changed(*given):
        first, *others = steered(*given)
        return [replace(first, text="w2 " + first.text), *others]

    monkeypatch.setattr(bench, "steered", changed)
    with pytest.raises(SystemExit, match=f"Only {VALUES - 1} of {VALUES} texts"):
        bench.agreement()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="weights are packed by oneDNN")
@pytest.mark.parametrize(("dtype", "packs"), [(torch.float32, True), (torch.bfloat16, False)])
def test_rows_speak_of_packed_weights_only_where_weights_are_packed(dtype, packs, bench_of):
    assert any("packed weights" in row.name for row in bench_of(dtype).rows()) == packs
