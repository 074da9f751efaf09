"""Operations that need no root, really applied to a folder of this machine, and looked at."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
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
from gpufleet.shell import Hidden, failing
from gpufleet.shell import script as shell_script
from gpufleet.weights import operations as weights
from gpufleet.weights.plan import Progress, folder, staging, version
from gpufleet.weights.transfer import Way


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


def file_of(path: str, text: bytes) -> WeightFile:
    return WeightFile(path=path, bytes=len(text), sha256=hashlib.sha256(text).hexdigest())


def filled(folder: Path) -> Path:
    """The folder, with the files in it and another one."""
    for path, content in CONTENTS.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / "not in the manifest").touch()
    return folder


FILES = [file_of(path, text) for path, text in CONTENTS.items()]


def stat_line(path: Path, form: str = "%n %s %.9Z %i") -> str:
    """What the host's record says of a file."""
    return subprocess.run(
        ["stat", "-c", form, path.name], cwd=path.parent, capture_output=True, text=True, check=True
    ).stdout.strip()


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".verified"
    }


def apply_weights(source: Path, root: Path, model: str = "m", **changes: Any) -> OperationMeta:
    """One run of what brings weights, to a folder of this machine."""
    given = {"files": FILES, "report": lambda progress: None, **changes}
    return apply(weights.landed, root=str(root), model=model, source=source, way=Way(), **given)


def read(root: Path, model: str = "m", files: Sequence[WeightFile] = FILES) -> dict[str, bytes]:
    """What the model's folder holds, through its links."""
    return tree(Path(folder(str(root), version(model, files))))


class TestWeights:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return filled(tmp_path / "the source")

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return tmp_path / "the host"

    def blob(self, root: Path, path: str) -> Path:
        (digest,) = {file.sha256 for file in FILES if file.path == path}
        return root / "weights" / "blobs" / digest

    def staging(self, root: Path) -> Path:
        return Path(staging(str(root), version("m", FILES)))

    def test_arrive_whole_and_then_nothing_changes(self, source: Path, root: Path):
        first = apply_weights(source, root)
        assert first.did_succeed()
        assert first.did_change()
        assert read(root) == CONTENTS
        assert list((root / "incoming").iterdir()) == []
        second = apply_weights(source, root)
        assert second.did_succeed()
        assert not second.did_change()

    def test_what_they_did_is_reported(self, source: Path, root: Path):
        for sent in (sum(map(len, CONTENTS.values())), 0):
            said: list[Progress] = []
            apply_weights(source, root, report=said.append)
            assert (said[-1].state, said[-1].files, said[-1].sent) == ("done", 3, sent)
            assert said[-1].there + sent == 105_000

    def test_a_transfer_that_was_cut_off_continues(self, source: Path, root: Path):
        part = self.staging(root) / "a.pth"
        part.parent.mkdir(parents=True)
        part.write_bytes(CONTENTS["a.pth"][:60_000])
        said: list[Progress] = []
        assert apply_weights(source, root, bandwidth_kib=10_000, report=said.append).did_succeed()
        assert read(root) == CONTENTS
        assert said[-1].sent == 45_000

    def test_what_was_spoilt_on_the_host_is_sent_again_and_the_rest_left(
        self, source: Path, root: Path
    ):
        apply_weights(source, root)
        self.blob(root, "llama/b 1.bin").write_bytes(b"spoilt")
        before = self.blob(root, "a.pth").stat()
        assert apply_weights(source, root).did_change()
        assert read(root) == CONTENTS
        after = self.blob(root, "a.pth").stat()
        assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
        assert not apply_weights(source, root).did_change()

    def test_a_link_that_was_removed_or_replaced_is_put_right_and_nothing_sent(
        self, source: Path, root: Path
    ):
        apply_weights(source, root)
        here = Path(folder(str(root), version("m", FILES)))
        (here / "a.pth").unlink()
        (here / "c").unlink()
        (here / "c").write_text("a person's own")
        said: list[Progress] = []
        assert apply_weights(source, root, report=said.append).did_change()
        assert read(root) == CONTENTS
        assert said[-1].sent == 0

    def test_what_a_record_cannot_tell_is_read_again_only_with_deep(self, source: Path, root: Path):
        """Other bytes under an honest record: what a failing disk does."""
        apply_weights(source, root)
        blob, record = self.blob(root, "a.pth"), root / "weights" / "blobs" / ".verified"
        line = stat_line(blob)
        blob.write_bytes(b"b" * 100_000)
        record.write_text(record.read_text().replace(line, stat_line(blob)))
        assert not apply_weights(source, root).did_change()
        assert apply_weights(source, root, deep=True).did_change()
        assert read(root) == CONTENTS

    def test_what_is_corrupt_here_never_gets_its_name_there(self, source: Path, root: Path):
        (source / "a.pth").write_bytes(b"A" * 100_000)
        assert not apply_weights(source, root).did_succeed()
        assert read(root) == {}
        (source / "a.pth").write_bytes(CONTENTS["a.pth"])
        said: list[Progress] = []
        assert apply_weights(source, root, report=said.append).did_succeed()
        assert read(root) == CONTENTS
        assert said[-1].sent == 100_000

    def test_contents_that_another_model_has_are_not_sent(self, source: Path, root: Path):
        apply_weights(source, root)
        moved = [*FILES[:2], file_of("elsewhere/c 2", b""), file_of("d", b"new")]
        (source / "elsewhere").mkdir()
        (source / "elsewhere" / "c 2").touch()
        (source / "d").write_bytes(b"new")
        before = self.blob(root, "a.pth").stat()
        said: list[Progress] = []
        changes = {"files": moved, "report": said.append}
        assert apply_weights(source, root, "other", **changes).did_change()
        assert (said[-1].sent, said[-1].there) == (3, 105_000)
        assert read(root, "other", moved) == {
            "a.pth": CONTENTS["a.pth"],
            "llama/b 1.bin": CONTENTS["llama/b 1.bin"],
            "elsewhere/c 2": b"",
            "d": b"new",
        }
        assert read(root) == CONTENTS
        after = self.blob(root, "a.pth").stat()
        assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
        assert not apply_weights(source, root).did_change()

    def test_the_layout_before_is_taken_over_without_a_byte_sent(self, source: Path, root: Path):
        old = filled(root / "weights" / "m")
        lines = [f"{f.sha256} {stat_line(old / f.path, '%s %.9Z %i')} {f.path}\n" for f in FILES]
        (old / ".verified").write_text("".join(lines))
        said: list[Progress] = []
        assert apply_weights(source, root, report=said.append).did_succeed()
        assert said[-1].sent == 0
        assert read(root) == CONTENTS
        # The service that runs has the old folder in its configuration.
        kept = {path: (old / path).read_bytes() for path in CONTENTS}
        assert kept == CONTENTS
        assert not apply_weights(source, root).did_change()
        shutil.rmtree(old)
        assert not apply_weights(source, root).did_change()

    def test_older_versions_go_and_take_along_what_nothing_else_has(self, source: Path, root: Path):
        versions = []
        for number in range(3):
            (source / "d").write_bytes(b"%d" % number)
            versions.append([*FILES, file_of("d", b"%d" % number)])
            apply_weights(source, root, files=versions[-1])
            os.utime(folder(str(root), version("m", versions[-1])), (number, number))
        apply_weights(source, root, "other", files=versions[0])
        script = shell_script(weights._PRUNE, str(root), version("m", versions[1]))
        subprocess.run(["sh", "-c", str(script)], check=True)
        assert read(root, "m", versions[1]) == {}
        assert read(root, "m", versions[2]) == {**CONTENTS, "d": b"2"}
        assert read(root, "other", versions[0]) == {**CONTENTS, "d": b"0"}
        blobs = {path.name for path in (root / "weights" / "blobs").glob("[0-9a-f]*")}
        left = {file.sha256 for number in (0, 2) for file in versions[number]}
        assert blobs == left
        assert not apply_weights(source, root, files=versions[2]).did_change()


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
        source, root = filled(tmp_path / "source"), tmp_path / "the host"
        apply_weights(source, root)
        assert read(root) == CONTENTS
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


class TestASecret:
    WORD = 'me:a "battery" $word\n'

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "the host" / "secrets" / "auth"

    def keep(self, path: Path, content: str | None) -> OperationMeta:
        return apply(demo.kept, path=str(path), content=Hidden(content) if content else None)

    def test_is_kept_for_its_owner_alone_and_then_nothing_changes(self, path: Path):
        assert self.keep(path, self.WORD).did_change()
        assert path.read_text() == self.WORD
        assert [one.stat().st_mode & 0o777 for one in (path, path.parent)] == [0o600, 0o700]
        assert not self.keep(path, self.WORD).did_change()

    def test_that_changed_or_that_others_may_read_is_kept_anew(self, path: Path):
        self.keep(path, "me:another word\n")
        assert self.keep(path, self.WORD).did_change()
        path.chmod(0o644)
        assert self.keep(path, self.WORD).did_change()
        assert (path.read_text(), path.stat().st_mode & 0o777) == (self.WORD, 0o600)

    def test_goes_where_none_is_wanted(self, path: Path):
        self.keep(path, self.WORD)
        assert self.keep(path, None).did_change()
        assert not path.exists()
        assert not self.keep(path, None).did_change()

    def test_is_in_nothing_that_pyinfra_says(self, path: Path, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.DEBUG):
            self.keep(path, self.WORD)
            self.keep(path, self.WORD)
        assert str(path) in caplog.text
        assert "battery" not in caplog.text


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
