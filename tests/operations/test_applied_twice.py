"""Operations that need no root, really applied to a folder of this machine, and looked at."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all, disconnect_all
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.operation import OperationMeta, add_op
from pyinfra.api.operations import run_ops
from pyinfra.api.state import StateStage

from gpufleet.catalog import WeightFile
from gpufleet.demo import operations as demo
from gpufleet.demo.plan import pack
from gpufleet.python_env import operations as python_env
from gpufleet.shell import failing
from gpufleet.weights import operations as weights


def apply(operation: Any, **arguments: Any) -> OperationMeta:
    """One run of one operation against this machine, as pyinfra does it."""
    state = State(Inventory((["@local"], {})), Config())
    state.current_stage = StateStage.Prepare
    connect_all(state)
    (meta,) = add_op(state, operation, **arguments).values()
    state.current_stage = StateStage.Execute
    try:
        run_ops(state)
    except PyinfraError:
        assert not meta.did_succeed()
    finally:
        disconnect_all(state)
    return meta


CONTENTS = {"a.pth": b"a" * 100_000, "llama/b 1.bin": os.urandom(5000), "c": b""}
FILES = [
    WeightFile(path=path, bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    for path, text in CONTENTS.items()
]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".verified"
    }


class TestWeights:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        folder = tmp_path / "the source"
        for path, content in CONTENTS.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        (folder / "not in the manifest").touch()
        return folder

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return tmp_path / "the host"

    def sync(self, source: Path, root: Path, **changes: Any) -> OperationMeta:
        given = {"files": FILES, "source": source, "bandwidth_kib": 0, **changes}
        return apply(
            weights.synced, folder=str(root / "w"), incoming=str(root / "incoming"), **given
        )

    def test_arrive_whole_and_then_nothing_changes(self, source: Path, root: Path):
        first = self.sync(source, root)
        assert first.did_succeed()
        assert first.did_change()
        assert tree(root / "w") == CONTENTS
        assert sorted(path.name for path in root.iterdir()) == ["w"]
        second = self.sync(source, root)
        assert second.did_succeed()
        assert not second.did_change()

    def test_a_transfer_that_was_cut_off_continues(self, source: Path, root: Path):
        part = root / "incoming" / "a.pth"
        part.parent.mkdir(parents=True)
        part.write_bytes(CONTENTS["a.pth"][:60_000])
        assert self.sync(source, root, bandwidth_kib=10_000).did_succeed()
        assert tree(root / "w") == CONTENTS

    def test_what_was_spoilt_on_the_host_is_sent_again_and_the_rest_left(
        self, source: Path, root: Path
    ):
        self.sync(source, root)
        (root / "w" / "llama" / "b 1.bin").write_bytes(b"spoilt")
        before = (root / "w" / "a.pth").stat()
        assert self.sync(source, root).did_change()
        assert tree(root / "w") == CONTENTS
        after = (root / "w" / "a.pth").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert not self.sync(source, root).did_change()

    def test_what_is_corrupt_here_never_gets_its_name_there(self, source: Path, root: Path):
        (source / "a.pth").write_bytes(b"A" * 100_000)
        assert not self.sync(source, root).did_succeed()
        assert set(tree(root / "w")) == set(CONTENTS) - {"a.pth"}
        (source / "a.pth").write_bytes(CONTENTS["a.pth"])
        assert self.sync(source, root).did_succeed()
        assert tree(root / "w") == CONTENTS


class TestOnAHostWithAStrictUmask:
    """As hardened systems have it. The service is not root and must read what it runs."""

    @pytest.fixture(autouse=True)
    def strict(self, tmp_path: Path) -> Iterator[None]:
        (tmp_path / "the host").mkdir()
        before = os.umask(0o077)
        yield
        os.umask(before)

    def closed(self, root: Path) -> list[str]:
        """Folders and files that others cannot enter or read."""
        paths = {path: 0o005 if path.is_dir() else 0o004 for path in root.rglob("*")}
        return [
            path.relative_to(root).as_posix()
            for path, needed in paths.items()
            if path.name not in {"incoming", ".verified"} and path.stat().st_mode & needed != needed
        ]

    def test_weights_can_be_read(self, tmp_path: Path):
        source, root = tmp_path / "source", tmp_path / "the host"
        for path, content in CONTENTS.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(content)
        given = {"files": FILES, "source": source, "bandwidth_kib": 0}
        incoming = str(root / "incoming")
        apply(weights.synced, folder=str(root / "weights/m"), incoming=incoming, **given)
        assert tree(root / "weights" / "m") == CONTENTS
        assert self.closed(root) == []

    def test_the_application_can_be_read(self, tmp_path: Path):
        package, root = tmp_path / "modeldemo", tmp_path / "the host"
        (package / "inner").mkdir(parents=True)
        (package / "inner" / "x.py").touch()
        apply(demo.application, root=str(root), app=pack(package))
        assert self.closed(root) == []


class TestTheApplication:
    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        folder = tmp_path / "modeldemo"
        (folder / "inner").mkdir(parents=True)
        (folder / "__init__.py").write_text("version = 1\n")
        (folder / "inner" / "page.html").write_text("<p>\n")
        return folder

    def test_is_unpacked_once_and_readable_by_the_service(self, package: Path, tmp_path: Path):
        app, root = pack(package), tmp_path / "the host"
        first = apply(demo.application, root=str(root), app=app)
        assert first.did_succeed()
        assert first.did_change()
        unpacked = root / "app" / app.digest
        assert tree(unpacked / "modeldemo") == tree(package)
        modes = {path.stat().st_mode & 0o777 for path in unpacked.rglob("*")}
        assert modes == {0o755, 0o644}
        assert list((root / "incoming").iterdir()) == []
        assert not apply(demo.application, root=str(root), app=app).did_change()

    def test_replaces_what_a_killed_run_had_unpacked(self, package: Path, tmp_path: Path):
        app, root = pack(package), tmp_path / "the host"
        (root / "incoming" / f"app-{app.digest}" / "old").mkdir(parents=True)
        assert apply(demo.application, root=str(root), app=app).did_succeed()
        assert sorted(p.name for p in (root / "app" / app.digest).iterdir()) == ["modeldemo"]

    def test_goes_when_no_service_uses_it_any_more(self, package: Path, tmp_path: Path):
        root = tmp_path / "the host"
        old = pack(package)
        apply(demo.application, root=str(root), app=old)
        (package / "__init__.py").write_text("version = 2\n")
        new = pack(package)
        apply(demo.application, root=str(root), app=new)
        assert apply(demo.prune, root=str(root), keep=new.digest).did_change()
        assert [path.name for path in (root / "app").iterdir()] == [new.digest]
        assert not apply(demo.prune, root=str(root), keep=new.digest).did_change()


def test_environments_that_no_lock_asks_for_go_and_the_one_in_use_stays(tmp_path: Path):
    for name in ("aaaa", "bbbb", "half"):
        (tmp_path / "envs" / name / "bin").mkdir(parents=True)
        (tmp_path / "envs" / name / "bin" / "python").touch(0o755)
        if name != "half":
            (tmp_path / "envs" / name / ".whole").write_text(f"{name}\n")
            (tmp_path / "envs" / f"named-{name}").symlink_to(name)
    assert apply(python_env.prune, root=str(tmp_path), keep=["bbbb"]).did_change()
    left = sorted(path.name for path in (tmp_path / "envs").iterdir())
    assert left == ["bbbb", "named-bbbb"]
    assert not apply(python_env.prune, root=str(tmp_path), keep=["bbbb"]).did_change()


def test_a_host_that_is_told_to_fail_says_one_line():
    line = str(failing('it\'s $HOME: `id` is "wrong"'))
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, 'it\'s $HOME: `id` is "wrong"\n')
