"""The store: what the catalogue does not know of weights is learnt once, and then held to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpufleet.catalog import WeightFile
from gpufleet.errors import FleetError
from gpufleet.weights.store import Learnt, Store, default, files, sets

A = WeightFile(path="a.bin", bytes=1, sha256=hashlib.sha256(b"a").hexdigest())
B = WeightFile(path="b.json", bytes=2, sha256=hashlib.sha256(b"bb").hexdigest())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def entry(tmp_path: Path, **parts: Any) -> str:
    """The path of a set's own file."""
    data = {
        "schema": 1,
        "title": "a set",
        "kind": "llama",
        "sources": [{"huggingface": "somebody/something"}],
        "evidence": {"source": "this test", "seen": "2026-11-21", "state": "listed"},
        **parts,
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(data), "utf-8")
    return str(path)


def test_what_the_catalogue_knows_needs_no_learning(store: Store, tmp_path: Path):
    name = entry(tmp_path, files=[A.model_dump(), B.model_dump()])
    assert store.files(name) == (A, B)


def test_files_have_their_paths_below_the_store(store: Store, tmp_path: Path):
    name = entry(tmp_path, folder="x/y", files=[A.model_dump()])
    assert [file.path for file in store.files(name)] == ["x/y/a.bin"]


def test_a_hash_that_nobody_knows_is_one_line_that_says_how_to_learn_it(
    store: Store, tmp_path: Path
):
    name = entry(tmp_path, files=[{"path": "a.bin", "bytes": 1}])
    with pytest.raises(FleetError) as error:
        store.files(name)
    assert str(error.value) == (
        f"weight set {name}: the sha256 of a.bin is not known yet: "
        f"./fleet weights fetch {name} --store {store.root}, "
        f"or ./fleet weights verify {name} --store {store.root}"
    )


def test_what_is_to_be_done_in_the_store_of_the_home_needs_no_option():
    assert Store(default()).command("fetch", "x", "--parts") == "./fleet weights fetch x --parts"
    assert Store(Path("a b")).command("fetch", "x") == "./fleet weights fetch x --store 'a b'"


def test_a_list_that_nobody_knows_is_said_and_a_merge_offered(store: Store, tmp_path: Path):
    made = {"base": "x", "delta": "y", "version": "v0"}
    name = entry(tmp_path, include=["*.bin"], made=made)
    with pytest.raises(FleetError, match=r"its files are not known yet: \./fleet weights merge "):
        store.files(name)


def test_what_was_learnt_completes_the_catalogue(store: Store, tmp_path: Path):
    name = entry(tmp_path, include=["*.json"], files=[{"path": "a.bin"}])
    store.learn(name, Learnt("somebody/something@" + "0" * 40, (A, B), "2026-11-21"))
    assert store.files(name) == (A, B)
    learnt = store.learnt(name)
    assert learnt is not None
    assert (learnt.origin[:10], learnt.at) == ("somebody/s", "2026-11-21")


def test_the_catalogues_word_goes_before_what_was_learnt(store: Store, tmp_path: Path):
    name = entry(tmp_path, files=[A.model_dump()])
    store.learn(name, Learnt("a merge", (A.model_copy(update={"sha256": "0" * 64}),)))
    assert store.files(name) == (A,)


def test_a_record_that_makes_no_sense_is_named(store: Store, tmp_path: Path):
    name = entry(tmp_path, include=["*.bin"])
    store.learn(name, Learnt("a merge", (A,)))
    (record,) = (store.root / ".learnt").iterdir()
    for text in (
        "{",
        "[]",
        '{"origin": "x"}',
        '{"origin": "x", "files": [{"path": "/etc/passwd"}]}',
    ):
        record.write_text(text)
        with pytest.raises(FleetError) as error:
            store.files(name)
        assert str(error.value).startswith(f"{record}: not a record of learnt files: remove it")


def test_a_models_name_means_its_sets():
    assert sets(["clip-vit-b32", "minigpt4-7b", "minigpt4-vicuna-7b"]) == [
        "clip-vit-b32",
        "minigpt4-7b",
        "vicuna-7b-v0",
        "blip2-flant5xxl",
        "eva-vit-g",
    ]


def test_sets_that_share_a_file_bring_it_once(store: Store, tmp_path: Path):
    one = entry(tmp_path, files=[A.model_dump()])
    both = Path(one).with_name("both.yaml")
    both.write_text(Path(one).read_text())
    assert files([one, str(both)], store) == (A,)
