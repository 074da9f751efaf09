"""The comparison that is run on a GPU's machine runs here too, at pico's sizes."""

import importlib.util
import json
import os
import subprocess
import sys
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
    told = []
    seen = bench.Seen(lambda: told.append(len(seen)))
    bench.measure(settings, "cpu", 12, 1, seen)
    assert not [name for name in seen if name.endswith("failed")]
    assert seen["tokens alike before the first that differs"] == "11 of 11"
    assert seen["second question's tokens"] > 150
    figures = [value for value in seen.values() if isinstance(value, float)]
    assert len(figures) >= 13
    assert all(value > 0 for value in figures)
    # A run that is cut off has told what it had by then.
    assert set(told) >= set(range(4, len(seen) + 1))


def test_what_fails_is_written_down_and_the_rest_is_measured(bench, tmp_path, monkeypatch):
    from modeldemo.minigpt4.context import Picture

    monkeypatch.setattr(Picture, "marks", property(lambda _: 1 / 0))
    output = tmp_path / "new" / "gpu.json"
    command = ["gpu.py", "--size", "pico", "--device", "cpu", "--precision", "fp32"]
    command += ["--precision", "4bit", "--tokens", "4", "--repeat", "1", "--output", str(output)]
    monkeypatch.setattr(bench.sys, "argv", command)
    found = bench.importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: name != "bitsandbytes" and found(name)
    )
    bench.main()
    seen = json.loads(output.read_text())["seen"]
    assert seen["pico fp32"]["picture, ms"] > 0
    assert "division by zero" in seen["pico fp32"]["answer failed"]
    assert seen["pico 4bit"] == {"left out": "there is no bitsandbytes here"}


def test_it_needs_nothing_that_serves(tmp_path):
    absent = ("bitsandbytes", "fastapi", "gradio", "prometheus_client", "starlette", "uvicorn")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import gpu; print('ok')"
    environment = {**os.environ, "PYTHONPATH": str(GPU.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
