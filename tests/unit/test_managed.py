"""Managed files: the original is kept byte for byte, whatever happens, and comes back."""

from __future__ import annotations

import hashlib
import os
import subprocess
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
        return self.switch("", ("", path or self.path))

    def switch(self, check: str, *files: tuple[str, Path], text: str = operations._SWITCH):
        """Content (empty: what was there before) and path of each file."""
        arguments = []
        for number, (content, path) in enumerate(files):
            new = self.state / "incoming" / str(number)
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(content)
            arguments += [str(new) if content else "", str(path), "644", *self.me]
        return self.run(text, check, *arguments)

    def tree(self) -> dict[str, bytes | str]:
        """Everything but folders: bytes, or where a link leads."""
        return {
            str(p.relative_to(self.root)): str(p.readlink()) if p.is_symlink() else p.read_bytes()
            for p in self.root.rglob("*")
            if p.is_symlink() or p.is_file()
        }

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
    """The script, killed before each of its lines; those where it never comes by are left out."""
    lines = text.splitlines(keepends=True)
    killed = ["".join([*lines[:i], "kill -KILL $$\n", *lines[i:]]) for i in range(1, len(lines))]
    return [
        text
        for text in killed
        if subprocess.run(["sh", "-n"], input=text, text=True, stderr=subprocess.DEVNULL).returncode
        == 0
    ]


INSTALL_CUTS, SWITCH_CUTS = cuts(operations._INSTALL), cuts(operations._SWITCH)


def test_there_are_enough_places_to_be_killed_at():
    assert len(INSTALL_CUTS) > 20
    assert len(SWITCH_CUTS) > 50


@pytest.mark.parametrize("before", [ORIGINAL, None], ids=["replaced", "made"])
@pytest.mark.parametrize("cut", range(len(INSTALL_CUTS)))
def test_a_write_that_was_killed_still_knows_the_true_original(
    host: Host, cut: int, before: bytes | None
):
    if before is not None:
        host.path.write_bytes(before)
    host.install("one\n", text=INSTALL_CUTS[cut])
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


class TestASwitch:
    """Of three files: one that gpufleet wrote before, one of somebody's, one that is not there."""

    @pytest.fixture
    def three(self, host: Host) -> tuple[Path, Path, Path]:
        etc = host.root / "etc"
        one, two, three = etc / "one", etc / "two", etc / "new folder" / "three"
        one.write_bytes(ORIGINAL)
        two.write_text("somebody's\n")
        two.chmod(0o640)
        ok(host.switch("", ("one\n", one)))
        return one, two, three

    def files(self, three: tuple[Path, Path, Path]) -> list[tuple[str, Path]]:
        """To write two and three and to put one back."""
        return [("2\n", three[1]), ("3\n", three[2]), ("", three[0])]

    def test_changes_all_of_them(self, host: Host, three: tuple[Path, Path, Path]):
        ok(host.switch("", *self.files(three)))
        assert [path.read_bytes() for path in three] == [ORIGINAL, b"2\n", b"3\n"]
        assert three[1].stat().st_mode & 0o777 == 0o644
        ok(host.switch("", *(("", path) for path in three[1:])))
        assert three[1].read_text() == "somebody's\n"
        assert three[1].stat().st_mode & 0o777 == 0o640
        assert not three[2].exists()
        assert [path for path in host.state.rglob("*") if path.is_file()] == []

    def test_is_checked_with_everything_in_place_and_told_what_changed(
        self, host: Host, three: tuple[Path, Path, Path], tmp_path: Path
    ):
        seen = tmp_path / "seen"
        check = f'cat "$2" "$7" "${{12}}" > {seen}; echo "[$1][${{11}}]$#" >> {seen}'
        ok(host.switch(check, *self.files(three)))
        new = host.state / "incoming" / "0"
        assert seen.read_bytes() == b"2\n3\n" + ORIGINAL + f"[{new}][]15\n".encode()

    def test_that_does_not_pass_its_check_leaves_every_byte_and_note_as_it_was(
        self, host: Host, three: tuple[Path, Path, Path]
    ):
        before = host.tree()
        done = host.switch("echo the site is down >&2; exit 3", *self.files(three))
        assert (done.returncode, done.stderr) == (3, "the site is down\n")
        assert host.tree() == before
        assert three[1].stat().st_mode & 0o777 == 0o640

    def test_that_cannot_write_one_leaves_every_byte_and_note_as_it_was(
        self, host: Host, three: tuple[Path, Path, Path]
    ):
        before = host.tree()
        in_the_way = host.root / "etc" / "two" / "x"
        done = host.switch("", *self.files(three), ("4\n", in_the_way))
        assert done.returncode != 0
        assert host.tree() == before

    def test_refuses_all_where_somebody_edited_one_that_goes(
        self, host: Host, three: tuple[Path, Path, Path]
    ):
        three[0].write_text("mine\n")
        before = host.tree()
        done = host.switch("", *self.files(three))
        assert done.returncode == 1
        assert f"{three[0]} was edited since gpufleet wrote it" in done.stderr
        assert done.stderr.count("\n") == 1
        assert host.tree() == before

    def test_that_was_killed_while_it_was_checked_does_not_count_as_done(
        self, host: Host, three: tuple[Path, Path, Path]
    ):
        done = host.switch("kill -KILL $PPID", ("new\n", host.path))
        assert done.returncode in (-9, 137)
        facts = host.facts()
        owner = facts.present[str(host.path)].owner, facts.present[str(host.path)].group
        assert differing([ManagedFile(str(host.path), "new\n", "644", *owner)], facts)
        ok(host.restore())
        assert not host.path.exists()

    @pytest.mark.parametrize("cut", range(len(SWITCH_CUTS)))
    def test_that_was_killed_is_finished_or_undone_by_the_next(
        self, host: Host, three: tuple[Path, Path, Path], cut: int
    ):
        before = host.tree()
        done = host.switch("", *self.files(three), text=SWITCH_CUTS[cut])
        if done.returncode == 0:  # it did not come by
            return
        again = host.switch("exit 3", *self.files(three))
        left = {path: text for path, text in host.tree().items() if "/incoming/" not in path}
        assert again.returncode == 3
        settled = [path.read_bytes() for path in three if path.exists()]
        # What it began is undone, unless it was past its end already.
        assert left == before or settled == [ORIGINAL, b"2\n", b"3\n"]
        ok(host.switch("", *self.files(three)))
        ok(host.switch("", *(("", path) for path in three[1:])))
        assert [path.read_bytes() for path in three[:2]] == [ORIGINAL, b"somebody's\n"]
        assert [path.name for path in host.root.rglob("*gpufleet-new")] == []


def test_a_digest_is_the_one_that_sha256sum_prints(host: Host):
    ok(host.install("one\n"))
    assert host.facts().records[str(host.path)].sha256 == hashlib.sha256(b"one\n").hexdigest()
