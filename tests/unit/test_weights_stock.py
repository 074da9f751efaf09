"""fleet weights list and verify: what is there, what is wrong, what to do, and what is learnt."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpufleet import ROOT, catalog
from gpufleet.cli.weights import verify
from gpufleet.weights import stock
from gpufleet.weights.digests import Digests, Progress
from gpufleet.weights.store import Store

PICO = ROOT / "files" / "weights" / "pico"
MODEL = ("vicuna-pico", "minigpt4-pico", "pico-q-former", "pico-vision", "pico-pictures")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy of pico's files that a test may spoil."""
    return Path(shutil.copytree(PICO, tmp_path / "store"))


class Fleet:
    """The real command, with a home of its own."""

    def __init__(self, home: Path) -> None:
        self.environment = {**os.environ, "HOME": str(home), "TERM": "dumb"}
        self.environment["XDG_DATA_HOME"] = str(home / "data")

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gpufleet.cli", "weights", *map(str, arguments)],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def json(self, *arguments: object) -> Any:
        done = self(*arguments, "--json")
        assert done.stderr == ""
        return json.loads(done.stdout)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def own(tmp_path: Path, **parts: Any) -> str:
    """An own set that nobody has published anything of but its patterns."""
    data = {
        "schema": 1,
        "title": "a set",
        "kind": "llama",
        "folder": "vicuna-pico",
        "hidden_size": 128,
        "vocabulary": 641,
        "sources": [{"huggingface": "somebody/something"}],
        "include": ["*.bin", "*.json", "tokenizer.model"],
        "evidence": {"source": "this test", "seen": "2026-11-21", "state": "listed"},
        **parts,
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(data), "utf-8")
    catalog.weight_set.cache_clear()
    return str(path)


def verified(store: Path, *names: str, **options: Any) -> stock.Verified:
    return stock.verify([(name, Store(store)) for name in names], **options)


def states(store: Path, name: str) -> dict[str, str]:
    found = stock.look(name, Store(store), Digests())
    return {file.path: file.state for file in found.files}


class TestVerify:
    def test_the_real_files_are_right(self, store: Path):
        assert verified(store, *MODEL, models={"pico": MODEL}).problems() == []

    def test_what_was_verified_counts_as_that_until_it_changes(self, store: Path):
        assert set(states(store, "vicuna-pico").values()) == {"here"}
        verified(store, "vicuna-pico")
        assert set(states(store, "vicuna-pico").values()) == {"verified"}
        os.utime(store / "vicuna-pico" / "config.json", ns=(1, 1))
        assert states(store, "vicuna-pico")["config.json"] == "here"

    def test_nothing_is_read_twice_unless_deep(self, store: Path):
        seen: list[int] = []
        for deep in (False, False, True):
            seen.append(0)
            verified(store, *MODEL, deep=deep, watch=lambda p: seen.__setitem__(-1, p.done))
        assert seen[1] == 0
        assert seen[0] == seen[2] > 4_000_000

    def test_deep_finds_what_changed_without_a_trace(self, store: Path):
        verified(store, "pico-vision")
        path = store / "eva_vit_pico.pth"
        stamp = path.stat().st_mtime_ns
        with path.open("r+b") as stream:
            stream.seek(100_000)
            stream.write(b"rot")
        os.utime(path, ns=(stamp, stamp))
        assert verified(store, "pico-vision").problems() == []
        (line,) = verified(store, "pico-vision", deep=True).problems()
        assert line == (
            f"{path} is corrupt: sha256 {digest(path)[:12]}… is not the catalogue's "
            f"({digest(PICO / path.name)[:12]}…): copy it from {PICO}"
        )

    def test_a_known_file_under_anothers_name_is_told_by_its_name(
        self, store: Path, tmp_path: Path
    ):
        name = own(
            tmp_path,
            folder="",
            kind="pictures",
            include=[],
            files=[{"path": "eva_vit_pico.pth", "sha256": "0" * 64}],
        )
        (line,) = verified(store, name).problems()
        assert line == (
            f"{store / 'eva_vit_pico.pth'} is eva_vit_pico.pth of pico-vision, under another name: "
            f"./fleet weights fetch {name} --store {store}"
        )

    def test_a_file_that_the_catalogues_hash_proves_right_is_right(self, store: Path):
        """Whatever it looks like: here a shard of which the index beside it was exchanged."""
        shutil.copy(
            store / "vicuna-pico-delta" / "pytorch_model.bin.index.json", store / "vicuna-pico"
        )
        (line,) = verified(store, "vicuna-pico").problems()
        assert "pytorch_model.bin.index.json" in line

    def test_missing_files_are_one_line_a_set(self, store: Path):
        for name in ("1.png", "2.png"):
            (store / "examples" / name).unlink()
        (line,) = verified(store, "pico-pictures").problems()
        assert line.startswith(f"{store}: 2 files are missing (examples/1.png, examples/2.png): ")

    def test_a_download_that_goes_on_is_partial(self, store: Path):
        (store / "eva_vit_pico.pth").unlink()
        partial = store / ".partial" / "eva_vit_pico.pth.35dcb5b89aa4d442"
        partial.parent.mkdir()
        partial.write_bytes(b"x" * 1000)
        partial.with_name("eva_vit_pico.pth.index.json.35dcb5b89aa4d442").write_bytes(b"x" * 2000)
        found = stock.look("pico-vision", Store(store), Digests())
        assert (found.state, found.here, found.bytes) == ("partial", 1000, 1452183)
        (line,) = verified(store, "pico-vision").problems()
        what = "is not whole yet: 1000 of 1452183 bytes"
        assert line == f"{store / 'eva_vit_pico.pth'} {what}: copy it from {PICO}"

    def test_a_download_that_ends_meanwhile_is_there_or_partial(self, store: Path):
        path = store / "eva_vit_pico.pth"
        partial = store / ".partial" / "eva_vit_pico.pth.35dcb5b89aa4d442"
        digests = Digests()
        for _ in range(300):
            partial.parent.mkdir()
            path.rename(partial)
            ends = threading.Thread(target=lambda: (partial.rename(path), partial.parent.rmdir()))
            ends.start()
            found = [stock.look("pico-vision", Store(store), digests) for _ in range(2)]
            ends.join()
            assert {one.state for one in found} <= {"partial", "verified", "here"}

    def test_a_file_that_changes_while_it_is_read_is_told_as_that(self, store: Path):
        path = store / "eva_vit_pico.pth"
        error = OSError(errno.EBUSY, "changed while it was read")
        seen = stock.look("pico-vision", Store(store), Digests())
        (one,) = stock._checked(seen, {path: error}, {}).files
        assert one.flaw is not None
        assert f"{path.name} {one.flaw.what}: {one.flaw.do}" == (
            "eva_vit_pico.pth changed while it was read: let the change end, then verify again"
        )

    def test_a_projection_that_does_not_fit_is_a_problem_of_the_model(self, store: Path):
        path = store / "vicuna-pico" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 4096}))
        assert verified(store, *MODEL, models={"pico": MODEL}).pairs == [
            "model pico: vicuna-pico (hidden size 4096, 7B) does not fit minigpt4-pico "
            "(hidden size 128): take the projection and the language model of one size"
        ]


class TestLearning:
    def test_a_set_that_nobody_published_is_learnt_once_it_is_whole(
        self, store: Path, tmp_path: Path
    ):
        name = own(tmp_path)
        found = verified(store, name)
        assert found.problems() == []
        assert found.sets[0].learnt is not None
        folder = store / "vicuna-pico"
        paths = {path.name: digest(path) for path in folder.iterdir()}
        assert {f.path: f.sha256 for f in found.sets[0].files} == paths
        assert {f.path.removeprefix("vicuna-pico/") for f in Store(store).files(name)} == set(paths)
        assert verified(store, name).sets[0].learnt is None

    def test_it_is_held_to_that_from_then_on(self, store: Path, tmp_path: Path):
        name = own(tmp_path)
        verified(store, name)
        path = store / "vicuna-pico" / "generation_config.json"
        text = path.read_text()
        path.write_text(text.replace("1", "3"))
        (line,) = verified(store, name).problems()
        assert "is not what was learnt" in line
        path.unlink()
        (line,) = verified(store, name).problems()
        assert line == f"{path} is missing: ./fleet weights fetch {name} --store {store}"

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model is missing"),
            (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
            (
                lambda folder: (folder / "pytorch_model-00002-of-00003.bin").unlink(),
                "pytorch_model-00002-of-00003.bin is missing",
            ),
            (
                lambda folder: os.truncate(folder / "pytorch_model-00002-of-00003.bin", 300_000),
                "is truncated: the end of its zip archive is missing",
            ),
            (
                lambda folder: (folder / "config.json").write_text("<html>"),
                "is a web page",
            ),
            (
                lambda folder: [
                    shutil.copy(path, folder)
                    for path in (folder.parent / "vicuna-pico-delta").glob("*.bin*")
                ],
                "is the delta, not the model",
            ),
        ],
    )
    def test_what_is_not_whole_or_not_right_is_not_learnt(
        self, store: Path, tmp_path: Path, spoil: Any, said: str
    ):
        name = own(tmp_path)
        if "delta" in said:
            for path in (store / "vicuna-pico").glob("*.bin*"):
                path.unlink()
        spoil(store / "vicuna-pico")
        found = verified(store, name)
        assert said in "\n".join(found.problems())
        assert Store(store).learnt(name) is None

    def test_what_cannot_be_written_down_is_one_line(self, store: Path, tmp_path: Path):
        name = own(tmp_path)
        record = store / ".learnt" / "own.json"
        record.with_suffix(f".{os.getpid()}").mkdir(parents=True)
        found = verified(store, name)
        (line,) = found.problems()
        assert line.startswith(f"cannot write {record}: Is a directory: make the store writable")
        assert {file.state for file in found.sets[0].files} == {"here"}

    def test_names_that_no_set_has_are_passed_over(self, store: Path, tmp_path: Path):
        name, folder = own(tmp_path), store / "vicuna-pico"
        (folder / "a\tb.json").write_text("{}")
        index = folder / "pytorch_model.bin.index.json"
        said = json.loads(index.read_text())
        said["weight_map"]["x"] = "../../outside.bin"
        index.write_text(json.dumps(said))
        found = verified(store, name)
        assert found.problems() == []
        assert {file.path for file in found.sets[0].files} == {
            path.name for path in folder.iterdir() if "\t" not in path.name
        }

    def test_only_asked_to_look_it_learns_nothing(self, store: Path, tmp_path: Path):
        name = own(tmp_path)
        assert verified(store, name, learn=False).problems() == []
        assert Store(store).learnt(name) is None

    def test_an_md5_proves_the_first_sight_where_no_sha256_was_published(
        self, store: Path, tmp_path: Path
    ):
        content = (store / "eva_vit_pico.pth").read_bytes()
        file = {"path": "eva_vit_pico.pth", "bytes": len(content)}
        for md5, known in ((hashlib.md5(content).hexdigest(), True), ("0" * 32, False)):
            files = [{**file, "md5": md5}]
            name = own(tmp_path, folder="", kind="vision-tower", include=[], files=files)
            found = verified(store, name)
            assert (Store(store).learnt(name) is not None) == known
            assert ("its md5 is not the catalogue's" in "".join(found.problems())) != known
            shutil.rmtree(store / ".learnt", ignore_errors=True)


class TestTheCommand:
    def test_list_shows_every_set_and_model_and_what_to_do(self, fleet: Fleet):
        done = fleet("list")
        assert (done.returncode, done.stderr) == (0, "")
        rows = {line.split()[0]: line for line in done.stdout.splitlines() if line}
        assert set(catalog.weight_sets()) | set(catalog.names()) <= set(rows)
        assert rows["vicuna-7b-v0"].split()[1:3] == ["missing", "0/?"]
        assert rows["vicuna-7b-v0"].endswith(" merge or fetch")
        assert rows["vicuna-pico"].split()[1:3] == ["here", "9/9"]
        assert rows["vicuna-pico"].endswith(" verify")

    def test_a_set_that_is_to_be_merged_brings_what_it_is_made_of(
        self, fleet: Fleet, tmp_path: Path, store: Path
    ):
        names = [one["name"] for one in fleet.json("list", "vicuna-7b-v0")["sets"]]
        assert names == ["vicuna-7b-v0", "llama-7b-hf", "vicuna-7b-delta-v0"]
        (first, *_) = fleet.json("list", "vicuna-7b-v0")["sets"]
        assert first["next"] == [
            "./fleet weights merge vicuna-7b-v0",
            "./fleet weights fetch vicuna-7b-v0",
        ]
        whole = fleet.json("list", "vicuna-pico", "--store", store)["sets"]
        assert [one["name"] for one in whole] == ["vicuna-pico"]

    def test_verify_then_list_says_verified(self, fleet: Fleet, store: Path):
        done = fleet("verify", "pico", "--store", store)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("5 of 5 sets verified, 4.5 MB read in ")
        document = fleet.json("list", "pico", "--store", store)
        assert {one["state"] for one in document["sets"]} == {"verified"}
        assert document["models"] == [
            {
                "name": "pico",
                "title": "MiniGPT-4 pico",
                "state": "verified",
                "weights": list(MODEL),
            }
        ]

    def test_verify_without_a_name_takes_what_is_there(self, fleet: Fleet, tmp_path: Path):
        (tmp_path / "few").mkdir()
        shutil.copy(PICO / "eva_vit_pico.pth", tmp_path / "few")
        done = fleet("verify", "--store", tmp_path / "few")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("1 of 1 sets verified")

    def test_problems_are_lines_on_stderr_and_exit_code_1(self, fleet: Fleet, store: Path):
        os.truncate(store / "eva_vit_pico.pth", 1000)
        (store / "blip2_pico_qformer.pth").write_text("<!doctype html><title>Sign in</title>")
        done = fleet("verify", "pico", "--store", store)
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"{store}/blip2_pico_qformer.pth is a web page saved under this name ('Sign in'): "
            f"log in to that site or network first, or copy it from {PICO}",
            f"{store}/eva_vit_pico.pth is truncated: 1000 of 1452183 bytes: copy it from {PICO}",
        ]
        assert done.stdout.startswith("3 of 5 sets verified")
        again = fleet.json("verify", "pico", "--store", store)
        assert again["problems"] == done.stderr.splitlines()
        assert (again["exit_code"], again["bytes_read"]) == (1, 0)

    def test_a_named_set_that_is_not_there_is_a_problem(self, fleet: Fleet, tmp_path: Path):
        done = fleet("verify", "eva-vit-g", "--store", tmp_path)
        assert done.returncode == 1
        assert done.stderr == (
            f"{tmp_path}/eva_vit_g.pth is missing: "
            f"./fleet weights fetch eva-vit-g --store {tmp_path}\n"
        )

    def test_an_unknown_name_is_one_line_and_exit_code_2(self, fleet: Fleet):
        for command in ("list", "verify"):
            done = fleet(command, "vicuna-7b-v9")
            assert (done.returncode, done.stdout) == (2, "")
            assert len(done.stderr.splitlines()) == 1
            assert "did you mean" in done.stderr


class TestWhileFilesAreRead:
    @pytest.fixture
    def large(self, tmp_path: Path) -> tuple[str, Path]:
        """A set with a file that takes a while to read, and the folder that it is in."""
        with (tmp_path / "large.png").open("wb") as stream:
            stream.truncate(20 << 30)
        files = [{"path": "large.png"}]
        return own(tmp_path, folder="", kind="pictures", include=[], files=files), tmp_path

    def start(self, fleet: Fleet, large: tuple[str, Path], **streams: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "gpufleet.cli", "weights", "verify", large[0]]
        return subprocess.Popen(
            [*command, "--store", str(large[1])],
            cwd=ROOT,
            env={**fleet.environment, "TERM": "xterm"},
            stderr=subprocess.PIPE,
            text=True,
            **streams,
        )

    def test_a_terminal_has_a_bar_and_ctrl_c_ends_it_at_once(
        self, fleet: Fleet, large: tuple[str, Path]
    ):
        ours, theirs = pty.openpty()
        process = self.start(fleet, large, stdout=theirs)
        os.close(theirs)
        shown = b""
        while b"/s" not in shown:
            shown += os.read(ours, 4096)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # the terminal is gone once the process is
            while os.read(ours, 4096):
                pass
        _, errors = process.communicate(timeout=60)
        assert b"hashing" in shown
        assert time.monotonic() - begun < 10
        assert (process.returncode, errors.strip()) == (130, "")

    def test_a_pipe_has_a_line_now_and_then(self, capsys: pytest.CaptureFixture[str]):
        show = verify._Lines()
        show(Progress(done=500_000_000, of=1_000_000_000, rate=1e8))
        assert capsys.readouterr().out == ""
        show._next = 0
        show(Progress(done=500_000_000, of=1_000_000_000, rate=1e8))
        assert capsys.readouterr().out == "hashed 500.0 MB of 1.0 GB, 100.0 MB/s, 5.0 s left\n"
