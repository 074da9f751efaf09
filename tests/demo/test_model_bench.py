"""The comparison that is run on a GPU's machine runs here too, at pico's sizes."""

import importlib.util
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_gpu", GPU)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_all_that_it_says_and_answers_as_generate_does(bench, tmp_path):
    settings = bench.write(tmp_path / "pico", "pico", "cpu")
    seen = bench.measure(settings, "cpu", tokens=12, repeat=1)
    assert seen["tokens alike before the first that differs"] == "11 of 11"
    assert seen["second question's tokens"] > 150
    figures = [value for value in seen.values() if isinstance(value, float)]
    assert len(figures) >= 12
    assert all(value > 0 for value in figures)
