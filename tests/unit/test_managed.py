"""Managed files: the original is kept byte for byte, whatever happens, and comes back."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gpufleet.managed import operations
from gpufleet.managed.facts import STATE, ManagedFiles
from gpufleet.managed.plan import Files, ManagedFile, Present, Record, differing, parse
from gpufleet.shell import script

FILE = ManagedFile("/etc/x.conf", "new\n")


def found(file: ManagedFile, **changes: str) -> Files:
    here = Present(file.mode, file.owner, file.group, file.sha256)
    return Files({file.path: replace(here, **changes)}, {file.path: Record(file.sha256)})


def test_a_file_that_is_as_wanted_and_recorded_is_not_written():
    assert differing([FILE], found(FILE)) == []


@pytest.mark.parametrize(
    "state",
    [
        Files({}, {}),
        found(FILE, sha256="0" * 64),
        found(FILE, mode="600"),
        found(FILE, owner="nobody"),
        found(FILE, group="nogroup"),
        replace(found(FILE), records={}),
        replace(found(FILE), records={FILE.path: Record("0" * 64)}),
        replace(found(FILE), present={}),
    ],
    ids=["nothing", "bytes", "mode", "owner", "group", "no record", "other record", "deleted"],
)
def test_a_file_that_differs_in_anything_is_written(state: Files):
    assert differing([FILE], state) == [FILE]


def test_only_the_files_that_differ_are_written_in_the_order_given():
    second, third = ManagedFile("/etc/b", "b"), ManagedFile("/etc/a", "a")
    assert differing([second, FILE, third], found(FILE)) == [second, third]


def test_the_facts_lines_are_read():
    lines = [
        f"file\t/etc/x.conf\t644\troot\troot\t{FILE.sha256}",
        f"record\t/etc/x.conf\t{'1' * 64}",
    ]
    assert parse(lines) == Files(
        {"/etc/x.conf": Present("644", "root", "root", FILE.sha256)},
        {"/etc/x.conf": Record("1" * 64)},
    )


class Host:
    """A folder that stands for a host, where the operations' real scripts run."""

    def __init__(self, root: Path, sh) -> None:
        self.root, self._sh = root, sh
        self.state = root / "var lib"
        self.me = f"{os.geteuid()}", f"{os.getegid()}"
        (root / "etc").mkdir()
        self.path = root / "etc" / "x.conf"

    def run(self, text: str, *arguments: str):
        return self._sh(script(text.replace(STATE, f'"{self.state}"'), *arguments))

    def install(self, content: str, path: Path | None = None, text: str = operations._INSTALL):
        new = self.root / "incoming"
        new.write_text(content)
        return self.run(text, str(new), str(path or self.path), "644", *self.me)

    def restore(self, path: Path | None = None):
        return self.run(operations._RESTORE, str(path or self.path))

    def facts(self) -> Files:
        command = str(ManagedFiles().command((str(self.path),))).replace(STATE, f'"{self.state}"')
        done = self._sh(command)
        assert (done.returncode, done.stderr) == (0, "")
        return parse(done.stdout.splitlines())


@pytest.fixture
def host(tmp_path: Path, sh) -> Host:
    return Host(tmp_path, sh)


def ok(done) -> None:
    assert (done.returncode, done.stderr) == (0, "")


ORIGINAL = b"before\r\n\xff\x00 no newline at the end"


def test_a_file_is_replaced_and_its_original_comes_back_byte_for_byte(host: Host):
    host.path.write_bytes(ORIGINAL)
    host.path.chmod(0o640)
    os.utime(host.path, (1_000_000, 1_000_000))
    ok(host.install("one\n"))
    assert host.path.read_text() == "one\n"
    assert host.path.stat().st_mode & 0o777 == 0o644
    ok(host.install("two\n"))
    assert host.path.read_text() == "two\n"
    ok(host.restore())
    assert host.path.read_bytes() == ORIGINAL
    assert host.path.stat().st_mode & 0o777 == 0o640
    assert host.path.stat().st_mtime == 1_000_000
    assert host.facts().records == {}


def test_a_file_that_was_not_there_is_gone_after_a_restore(host: Host):
    path = host.root / "etc" / "new folder" / "y.conf"
    ok(host.install("one\n", path))
    ok(host.install("two\n", path))
    assert path.read_text() == "two\n"
    ok(host.restore(path))
    assert not path.exists()
    assert [left for left in host.state.rglob("*") if left.is_file()] == []


def test_what_was_written_counts_as_right_until_it_changes(host: Host):
    ok(host.install("one\n"))
    facts = host.facts()
    present = facts.present[str(host.path)]
    wanted = ManagedFile(str(host.path), "one\n", "644", present.owner, present.group)
    assert differing([wanted], facts) == []
    host.path.write_text("edited\n")
    assert differing([wanted], host.facts()) == [wanted]


def test_nothing_is_left_behind_but_the_file(host: Host):
    ok(host.install("one\n"))
    assert [path.name for path in host.path.parent.iterdir()] == ["x.conf"]
    assert not (host.root / "incoming").exists()


def test_an_edited_file_is_not_restored_over(host: Host):
    host.path.write_bytes(ORIGINAL)
    ok(host.install("one\n"))
    host.path.write_text("mine\n")
    done = host.restore()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{host.path} was edited since gpufleet wrote it" in done.stderr
    assert host.path.read_text() == "mine\n"


def test_a_file_that_was_deleted_since_is_restored(host: Host):
    host.path.write_bytes(ORIGINAL)
    ok(host.install("one\n"))
    host.path.unlink()
    ok(host.restore())
    assert host.path.read_bytes() == ORIGINAL


def test_after_a_restore_the_next_original_is_what_lies_there_then(host: Host):
    host.path.write_bytes(ORIGINAL)
    ok(host.install("one\n"))
    ok(host.restore())
    host.path.write_text("a later original\n")
    ok(host.install("two\n"))
    ok(host.restore())
    assert host.path.read_text() == "a later original\n"


def test_an_original_that_is_a_link_comes_back_as_the_link(host: Host):
    target = host.root / "etc" / "target"
    target.write_text("elsewhere\n")
    host.path.symlink_to(target)
    ok(host.install("one\n"))
    assert not host.path.is_symlink()
    ok(host.install("two\n"))
    ok(host.restore())
    assert host.path.readlink() == target
    assert target.read_text() == "elsewhere\n"


def test_an_original_that_is_a_relative_link_comes_back_as_the_link(host: Host):
    (host.root / "etc" / "target").write_text("elsewhere\n")
    host.path.symlink_to("target")
    ok(host.install("one\n"))
    ok(host.install("two\n"))
    ok(host.restore())
    assert host.path.is_symlink()
    assert host.path.read_text() == "elsewhere\n"


def cuts(text: str) -> list[str]:
    """The script, killed after each of its top-level lines but the last."""
    lines = text.splitlines(keepends=True)
    ends = [i + 1 for i, line in enumerate(lines) if not line.startswith(" ")]
    parts = ["".join(lines[:end]) for end in ends[:-1]]
    return [part for part in parts if part.count("if [") == part.count("fi\n") + part.count("; fi")]


@pytest.mark.parametrize("before", [ORIGINAL, None], ids=["replaced", "made"])
@pytest.mark.parametrize("cut", range(len(cuts(operations._INSTALL))))
def test_a_write_that_was_killed_still_knows_the_true_original(
    host: Host, cut: int, before: bytes | None
):
    if before is not None:
        host.path.write_bytes(before)
    host.install("one\n", text=cuts(operations._INSTALL)[cut])
    ok(host.install("two\n"))
    assert host.path.read_text() == "two\n"
    ok(host.restore())
    assert (host.path.read_bytes() if host.path.exists() else None) == before


def test_a_write_that_was_killed_while_it_kept_the_original_starts_over(host: Host):
    host.path.write_bytes(ORIGINAL)
    torn = host.state / "originals" / str(host.path)[1:]
    torn.parent.mkdir(parents=True)
    torn.with_name("x.conf.copy").write_bytes(ORIGINAL[:5])
    ok(host.install("one\n"))
    ok(host.restore())
    assert host.path.read_bytes() == ORIGINAL


@pytest.mark.parametrize("before", [ORIGINAL, None], ids=["replaced", "made"])
def test_a_restore_that_was_killed_before_it_forgot_the_file_can_be_run_again(
    host: Host, before: bytes | None
):
    if before is not None:
        host.path.write_bytes(before)
    ok(host.install("one\n"))
    record = host.state / "written" / str(host.path)[1:]
    kept = record.read_text()
    ok(host.restore())
    record.write_text(kept)  # as it is when the last line, which removes it, was not reached
    ok(host.restore())
    assert (host.path.read_bytes() if host.path.exists() else None) == before
    assert host.facts().records == {}


def test_a_folder_that_it_makes_can_be_entered_by_the_service_whatever_the_umask(host: Host):
    path = host.root / "opt" / "config" / "minigpt4.yaml"
    before = os.umask(0o077)
    try:
        ok(host.install("one\n", path))
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (path, *path.parents[:2])] == [0o644, 0o755, 0o755]


def test_a_digest_is_the_one_that_sha256sum_prints(host: Host):
    ok(host.install("one\n"))
    assert host.facts().records[str(host.path)].sha256 == hashlib.sha256(b"one\n").hexdigest()
