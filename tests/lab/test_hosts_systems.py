"""StarChat and CLIP, tiny and random but in their real file formats, served by hosts of an
inventory whose models and weight sets are files of the operator's own."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fleets
import pytest
import requests
import yaml
from fleets import HOME, ROOT, Fleet, Host, fleet, ok, run

from gpufleet.cli.test import DEMO_ENVIRONMENT
from gpufleet.weights import manifest

SHAPES = ROOT / "files" / "demo" / "modeldemo" / "pictures" / "shapes.jpg"
SYSTEMS = {"starchat": "gpt-bigcode", "clip": "clip"}
QUESTIONS = {"starchat": "Sort a list", "clip": "a red square\na photo of a cat"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of both, their weight sets' YAML and their models'."""
    python = DEMO_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-demo, which writes the tiny models: ./fleet test unit makes it")
    folder = tmp_path_factory.mktemp("own")
    path = {"PYTHONPATH": str(ROOT / "files" / "demo")}
    ok(run(python, ROOT / "tests" / "demo" / "tiny_systems.py", folder / "weights", **path))
    for system, kind in SYSTEMS.items():
        name = f"{system}-tiny"
        listed = [file.model_dump() for file in manifest.of(folder / "weights" / name)]
        weights = {
            "schema": 1,
            "title": f"the weights of {name}",
            "folder": name,
            "kind": kind,
            "sources": [{"url": "http://mirror.gpufleet.test/weights"}],
            "evidence": {"source": "made for a test", "seen": "today", "state": "verified"},
            "files": listed,
        }
        model = {
            "schema": 2,
            "title": f"Tiny {system}",
            "system": system,
            "accelerators": ["cpu"],
            "needs": {"disk_mib": 1600, "memory_mib": 1500},
            "weights": [f"{name}-weights.yaml"],
            system: {"folder": name},
            "health": {"question": QUESTIONS[system]},
        }
        (folder / f"{name}-weights.yaml").write_text(yaml.safe_dump(weights))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(model))
    return folder


@pytest.fixture(scope="module")
def lab(can_boot: None) -> Iterator[Fleet]:
    fleets.sweep()
    name = f"t-{os.getpid()}-systems"
    try:
        yield fleets.boot(name, 2)
    finally:
        fleets.take_down(name)


@pytest.fixture(scope="module")
def inventory(own: Path, lab: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """h1 serves StarChat, h2 CLIP."""
    given = {
        f"h{number}": {
            "model": str(own / f"{system}-tiny.yaml"),
            "weights": {"source": str(own / "weights")},
        }
        for number, system in enumerate(SYSTEMS, 1)
    }
    return lab.inventory(tmp_path_factory.mktemp("inventory"), {}, **given)


@pytest.fixture(scope="module")
def served(lab: Fleet, inventory: Path) -> dict[str, Host]:
    """System -> the host that serves it, after one apply."""
    done = fleet("apply", "-i", inventory, "--json")
    for host in lab.hosts:
        assert "demo" in done.changed(host.name)
    return dict(zip(SYSTEMS, lab.hosts, strict=True))


def post(host: Host, system: str, messages: list[dict[str, Any]], **more: Any) -> requests.Response:
    body = {"model": f"{system}-tiny", "temperature": 0, "messages": messages, **more}
    with host.tunnel() as url, requests.Session() as session:
        session.trust_env = False
        return session.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def said(reply: requests.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def about_shapes(text: str) -> dict[str, Any]:
    url = "data:image/jpeg;base64," + base64.b64encode(SHAPES.read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [picture, {"type": "text", "text": text}]}


def test_an_own_model_is_served_under_its_files_name(served: dict[str, Host]) -> None:
    for system, host in served.items():
        with host.tunnel() as url:
            health = fleets.get(f"{url}/healthz").json()
            assert (health["status"], health["model"]) == ("ok", f"{system}-tiny")
            models = fleets.get(f"{url}/v1/models").json()["data"]
            assert [model["id"] for model in models] == [f"{system}-tiny"]
            page = fleets.get(url)
            assert page.status_code == 200
            assert f"{system}-tiny" in page.text


def test_the_configuration_names_the_weights_on_the_host(served: dict[str, Host]) -> None:
    for system, host in served.items():
        config = yaml.safe_load(host.sh(f"cat {HOME}/config/demo.yaml"))["model"]
        assert (config["arch"], config["precision"]) == (system, "auto")
        assert "config.json" in host.sh(f"ls {config['path']}").split()


def test_starchat_answers_and_reads_its_instructions(served: dict[str, Host]) -> None:
    question = {"role": "user", "content": QUESTIONS["starchat"]}
    plain = said(post(served["starchat"], "starchat", [question], max_tokens=20))
    assert plain
    assert plain == said(post(served["starchat"], "starchat", [question], max_tokens=20))
    spoken = [{"role": "system", "content": "Answer in French."}, question]
    assert said(post(served["starchat"], "starchat", spoken, max_tokens=20)) != plain


def test_starchat_refuses_what_it_cannot_answer(served: dict[str, Host]) -> None:
    reply = post(served["starchat"], "starchat", [about_shapes("What is this?")])
    assert reply.status_code == 400
    assert "reads no pictures" in reply.json()["error"]["message"]
    long = {"role": "user", "content": "word 7 " * 3000}
    reply = post(served["starchat"], "starchat", [long])
    assert reply.status_code == 400
    assert "256 in all" in reply.json()["error"]["message"]


def test_clip_says_how_well_each_label_fits(served: dict[str, Host]) -> None:
    answer = said(post(served["clip"], "clip", [about_shapes("a red square\na cat\na dog")]))
    shares = {line.split("% ")[1]: float(line.split("% ")[0]) for line in answer.splitlines()}
    assert {label.split(" (")[0] for label in shares} == {"a red square", "a cat", "a dog"}
    assert abs(sum(shares.values()) - 100) < 0.1
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_clip_gives_a_single_label_no_certainty(served: dict[str, Host]) -> None:
    answer = said(post(served["clip"], "clip", [about_shapes("a photo of a cat")]))
    assert "%" not in answer
    assert answer.startswith("a photo of a cat (cosine ")


def test_clip_refuses_a_question_without_a_picture(served: dict[str, Host]) -> None:
    reply = post(served["clip"], "clip", [{"role": "user", "content": "a cat"}])
    assert reply.status_code == 400


def test_a_second_apply_changes_nothing(served: dict[str, Host], inventory: Path) -> None:
    before = {system: host.pid for system, host in served.items()}
    done = fleet("apply", "-i", inventory, "--json")
    for system, host in served.items():
        assert done.changed(host.name) == {}
        assert host.pid == before[system]


def test_weights_that_changed_here_are_refused_before_anything_changes(
    served: dict[str, Host], inventory: Path, own: Path
) -> None:
    shard = own / "weights" / "starchat-tiny" / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        done = fleet("apply", "-i", inventory, "--json")
    finally:
        shard.write_bytes(whole)
    assert done.code == 1
    assert shard.name in done.out + done.err
    assert served["starchat"].healthy()
