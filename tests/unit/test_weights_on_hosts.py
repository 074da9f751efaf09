"""Weights on a host: only what was verified there gets a name, and nothing is sent twice."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pytest

from gpufleet.catalog import WeightFile
from gpufleet.shell import script
from gpufleet.weights.facts import WeightsInUse, WeightsOnHost
from gpufleet.weights.plan import (
    ROOM,
    Earlier,
    Hashed,
    Landing,
    Stored,
    abandoned,
    folder,
    freed,
    landing,
    manifest_digest,
    no_room,
    older,
    parse,
    size,
    staging,
    target,
    version,
)
from gpufleet.weights.transfer import LAND, Way, land_list


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def weight(path: str, content: bytes) -> WeightFile:
    return WeightFile(path=path, bytes=len(content), sha256=digest(content))


A, B = weight("a.pth", b"a"), weight("d/b.bin", b"bb")
NAME = version("m", [A, B])
LINKS = {NAME: {file.path: target(file.path, file.sha256) for file in (A, B)}}
GOOD = Stored(recorded={A.sha256: 1, B.sha256: 2}, links=LINKS, versions={NAME: 9.0}, free=1 << 40)


class TestWhatAHostLacks:
    def test_is_nothing_where_all_is_recorded_and_linked(self):
        plan = landing("m", [A, B], GOOD)
        assert plan.nothing
        assert (plan.bytes, plan.to_send) == (3, 0)

    def test_is_everything_on_an_empty_host(self):
        plan = landing("m", [A, B], Stored())
        assert plan.send == (A, B)
        assert plan.link == (("a.pth", A.sha256), ("d/b.bin", B.sha256))
        assert (plan.sending, plan.to_send) == (3, 3)

    def test_is_what_was_read_and_is_not_what_its_name_says(self):
        found = replace(GOOD, hashed={B.sha256: Hashed("0" * 64, "line")})
        assert landing("m", [A, B], found).send == (B,)

    def test_is_a_record_of_what_was_read_and_is_right(self):
        found = replace(
            GOOD, recorded={A.sha256: 1}, hashed={B.sha256: Hashed(B.sha256, "the line")}
        )
        plan = landing("m", [A, B], found)
        assert (plan.send, plan.record, plan.nothing) == ((), ("the line",), False)

    def test_is_no_new_record_of_what_was_read_though_it_was_recorded(self):
        found = replace(GOOD, hashed={A.sha256: Hashed(A.sha256, "line")})
        assert landing("m", [A, B], found).nothing

    def test_is_a_link_that_leads_elsewhere(self):
        links = {NAME: {**LINKS[NAME], "a.pth": target("a.pth", B.sha256)}}
        plan = landing("m", [A, B], replace(GOOD, links=links))
        assert (plan.send, plan.link) == ((), (("a.pth", A.sha256),))

    def test_leaves_out_what_has_arrived_already(self):
        found = Stored(staged={NAME: {"d/b.bin": 1}, "m-" + "0" * 16: {"a.pth": 1}})
        assert landing("m", [A, B], found).to_send == 2

    def test_is_sent_once_where_two_files_are_the_same(self):
        twin = weight("twin", b"a")
        plan = landing("m", [A, twin], Stored())
        assert plan.send == (A,)
        assert [path for path, _ in plan.link] == ["a.pth", "twin"]

    def test_is_taken_from_the_layout_before_if_that_has_it(self):
        old = Earlier("/w/m/x", "1 2 3")
        plan = landing("m", [A, B], Stored(earlier={A.sha256: old}))
        assert (plan.send, plan.adopt) == ((B,), ((A.sha256, old),))


def test_the_manifests_digest_names_the_set_of_files_in_any_order():
    assert manifest_digest([A, B]) == manifest_digest([B, A])
    others = [[A], [A, weight("d/b.bin", b"bc")], [A, weight("d/c.bin", b"bb")]]
    assert len({manifest_digest(files) for files in [[A, B], *others]}) == 4


def test_links_lead_to_the_contents_from_any_depth():
    for path in ("a", "b/c", "b/c d/e"):
        place = PurePosixPath("/w/m-1", path)
        assert os.path.normpath(place.parent / target(path, "00")) == "/w/blobs/00"


class TestOlderVersions:
    MANY = replace(GOOD, versions={NAME: 1.0} | {f"m-{n:016x}": 10.0 + n for n in range(4)})

    @pytest.mark.parametrize("keep", [0, 1, 3, 4, 9])
    def test_go_but_for_the_newest(self, keep: int):
        going = older("m", NAME, self.MANY, keep)
        assert going == tuple(f"m-{n:016x}" for n in (3, 2, 1, 0))[keep:]

    def test_are_those_of_this_model_alone(self):
        names = ("m-x-0000000000000000", "mm-0000000000000000", "m-000", "blobs", "n")
        assert older("m", NAME, Stored(versions=dict.fromkeys(names, 0.0)), 0) == ()

    def test_include_the_layout_before_whatever_is_kept(self):
        assert older("m", NAME, Stored(versions={"m": 5.0, NAME: 6.0}), 7) == ("m",)

    def test_are_given_up_where_only_a_part_of_them_arrived(self):
        parts = {"m-" + "0" * 16: {"a": 1}, NAME: {"a": 1}, "x-" + "0" * 16: {"a": 1}, "m": {}}
        assert abandoned("m", NAME, Stored(staged=parts)) == ("m", "m-" + "0" * 16)

    def test_free_what_nothing_else_has(self):
        old, other = "m-" + "0" * 16, "x-" + "0" * 16
        links = {
            old: {"p": "../blobs/11", "q": "../blobs/22", "r": "../blobs/33"},
            other: {"q": "../blobs/22"},
        }
        found = Stored(
            recorded={"11": 100, "22": 200}, unsure={"33": 50}, links=links, versions={old: 1.0}
        )
        assert freed("m", NAME, found, []) == 150
        assert freed("m", NAME, found, ["11"]) == 50


class TestFreeSpace:
    BIG = WeightFile(path="big", bytes=10**9, sha256="1" * 64)

    def test_is_enough_for_what_is_there_already(self):
        assert no_room("m", [A, B], replace(GOOD, free=0)) is None
        touched = Stored(unsure={self.BIG.sha256: 10**9}, free=0)
        assert no_room("m", [self.BIG], touched) is None

    def test_is_needed_for_what_is_to_come_and_some_room(self):
        assert no_room("m", [self.BIG], Stored(free=10**9 + ROOM)) is None
        line = no_room("m", [self.BIG], Stored(free=10**9))
        assert line == (
            "disk full: 1.0 GB free for weights, 1.0 GB of m are to come and 268 MB shall stay "
            "free: free 268 MB more"
        )

    def test_counts_what_has_arrived(self):
        name = version("m", [self.BIG])
        found = Stored(free=ROOM + 10**8, staged={name: {"big": 9 * 10**8}})
        assert no_room("m", [self.BIG], found) is None

    def test_tells_what_older_versions_hold(self):
        old = "m-" + "0" * 16
        found = Stored(
            recorded={"22": 2 * 10**9}, links={old: {"x": "../blobs/22"}}, versions={old: 1.0}
        )
        line = no_room("m", [self.BIG], found)
        assert line is not None
        assert line.endswith("free 1.3 GB more; older versions of m hold 2.0 GB")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_960, "100 kB"),
        (1.25e6, "1.2 MB"),
        (999_600_000, "1.0 GB"),
        (29_500_000_000, "29.5 GB"),
    ],
)
def test_sizes_read_as_a_person_says_them(count: float, text: str):
    assert size(count) == text


@dataclass
class Host:
    """A folder that stands for a host's, where the real scripts run."""

    root: Path
    sh: Callable[..., subprocess.CompletedProcess[str]]

    @property
    def blobs(self) -> Path:
        return self.root / "weights" / "blobs"

    def blob(self, file: WeightFile) -> Path:
        return self.blobs / file.sha256

    def folder(self, files: Sequence[WeightFile], model: str = "m") -> Path:
        return Path(folder(str(self.root), version(model, files)))

    def arrive(self, contents: Mapping[str, bytes], files: Sequence[WeightFile]) -> None:
        for path, content in contents.items():
            file = Path(staging(str(self.root), version("m", files))) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(0o600)

    def found(self, *files: WeightFile, deep: bool = False) -> Stored:
        wanted = tuple(file.sha256 for file in files)
        command = WeightsOnHost().command(root=str(self.root), wanted=wanted, deep=deep)
        done = self.sh(command)
        assert (done.returncode, done.stderr) == (0, "")
        return WeightsOnHost().process(done.stdout.splitlines())

    def plan(self, *files: WeightFile) -> Landing:
        return landing("m", files, self.found(*files))

    def land(self, *files: WeightFile, plan: Landing | None = None, given: str | None = None):
        plan = plan or self.plan(*files)
        command = script(LAND, str(self.root), plan.version)
        return self.sh(command, input=land_list(plan) if given is None else given)

    def files(self, files: Sequence[WeightFile]) -> dict[str, bytes]:
        here = self.folder(files)
        return {
            path.relative_to(here).as_posix(): path.read_bytes()
            for path in here.rglob("*")
            if path.is_file()
        }


CONTENTS = {"a.pth": b"a", "d/e/b 1.bin": b"\x00" * 5000, "c": b""}
FILES = [weight(path, content) for path, content in CONTENTS.items()]


@pytest.fixture
def host(tmp_path: Path, sh) -> Host:
    return Host(tmp_path / "the host", sh)


class TestTheHostVerifiesWhatArrived:
    def test_good_files_get_their_names_and_a_record(self, host: Host):
        host.arrive(CONTENTS, FILES)
        done = host.land(*FILES)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert host.files(FILES) == CONTENTS
        assert host.plan(*FILES).nothing
        assert {host.blob(file).stat().st_mode & 0o777 for file in FILES} == {0o644}
        assert list((host.root / "incoming").iterdir()) == []

    def test_a_corrupt_file_is_named_and_removed_and_no_version_appears(self, host: Host):
        host.arrive({**CONTENTS, "a.pth": b"A"}, FILES)
        done = host.land(*FILES)
        assert done.returncode != 0
        assert done.stderr == (
            "weight file a.pth is corrupt on this host: its sha256 is not the one expected; "
            "it was removed, apply again\n"
        )
        assert not host.folder(FILES).exists()
        assert host.plan(*FILES).send == (FILES[0],)

    def test_after_a_corrupt_file_the_next_try_completes(self, host: Host):
        host.arrive({**CONTENTS, "a.pth": b"A"}, FILES)
        host.land(*FILES)
        host.arrive({"a.pth": b"a"}, FILES)
        assert host.land(*FILES).returncode == 0
        assert host.files(FILES) == CONTENTS

    def test_a_file_that_did_not_arrive_fails_by_name(self, host: Host):
        host.arrive({path: text for path, text in CONTENTS.items() if path != "c"}, FILES)
        done = host.land(*FILES)
        assert done.returncode != 0
        assert "weight file c " in done.stderr
        assert not host.folder(FILES).exists()

    @pytest.mark.parametrize("kept", range(7))
    def test_a_list_that_was_cut_off_does_nothing(self, host: Host, kept: int):
        host.arrive(CONTENTS, FILES)
        lines = land_list(host.plan(*FILES)).splitlines(keepends=True)
        assert len(lines) == 7
        cut = "".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2]
        done = host.land(*FILES, given=cut)
        assert done.returncode == 1
        assert "did not arrive whole" in done.stderr
        assert not (host.root / "weights").exists()

    def test_what_a_run_that_was_cut_off_had_done_is_done(self, host: Host):
        """The connection broke after the host was told, and it is told again."""
        host.arrive(CONTENTS, FILES)
        plan = host.plan(*FILES)
        assert host.land(*FILES, plan=plan).returncode == 0
        before = {file.path: host.blob(file).stat().st_ctime_ns for file in FILES}
        assert host.land(*FILES, plan=plan).returncode == 0
        assert {file.path: host.blob(file).stat().st_ctime_ns for file in FILES} == before
        assert host.plan(*FILES).nothing

    def test_a_version_never_lacks_a_content(self, host: Host):
        host.arrive(CONTENTS, FILES)
        plan = replace(host.plan(*FILES), send=())
        done = host.land(*FILES, plan=plan)
        assert done.returncode == 1
        assert "is not there: apply again" in done.stderr
        assert not host.folder(FILES).exists()


class TestTheHostsRecord:
    @pytest.fixture(autouse=True)
    def verified(self, host: Host) -> None:
        host.arrive(CONTENTS, FILES)
        assert host.land(*FILES).returncode == 0

    def sneak(self, path: Path) -> None:
        """Other bytes, same size and time."""
        stat = path.stat()
        with path.open("r+b") as stream:
            stream.write(b"x")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def test_it_spares_reading(self, host: Host):
        found = host.found(*FILES)
        assert found.recorded == {file.sha256: file.bytes for file in FILES}
        assert (found.unsure, found.hashed) == ({}, {})

    def test_deep_reads_all_the_same(self, host: Host):
        found = host.found(*FILES[:2], deep=True)
        assert {name: seen.sha256 for name, seen in found.hashed.items()} == {
            file.sha256: file.sha256 for file in FILES[:2]
        }

    def test_other_bytes_of_the_same_size_and_time_are_read_again(self, host: Host):
        self.sneak(host.blob(FILES[0]))
        assert host.found(*FILES).hashed[FILES[0].sha256].sha256 == digest(b"x")
        assert host.plan(*FILES).send == (FILES[0],)

    def test_a_replaced_content_is_read_again(self, host: Host):
        path = host.blob(FILES[0])
        subprocess.run(["cp", "-a", path, f"{path}.new"], check=True)
        Path(f"{path}.new").rename(path)
        assert set(host.found(*FILES).hashed) == {FILES[0].sha256}

    def test_a_touched_content_is_recorded_again_rather_than_sent(self, host: Host):
        os.utime(host.blob(FILES[0]), (5, 5))
        plan = host.plan(*FILES)
        assert (plan.send, len(plan.record)) == ((), 1)
        assert host.land(*FILES).returncode == 0
        assert host.plan(*FILES).nothing

    def test_what_is_not_wanted_is_not_read(self, host: Host):
        os.utime(host.blob(FILES[0]), (5, 5))
        found = host.found(*FILES[1:])
        assert (set(found.unsure), found.hashed) == ({FILES[0].sha256}, {})

    def test_a_content_that_is_gone_is_sent(self, host: Host):
        host.blob(FILES[0]).unlink()
        assert host.plan(*FILES).send == (FILES[0],)

    def test_without_the_record_all_is_read(self, host: Host):
        (host.blobs / ".verified").unlink()
        assert len(host.found(*FILES).hashed) == 3
        assert host.land(*FILES).returncode == 0
        assert host.plan(*FILES).nothing


def test_a_host_without_a_folder_has_nothing(host: Host):
    found = host.found(*FILES)
    assert replace(found, free=0, rsync=False) == Stored()
    assert found.free > 0
    assert WeightsOnHost.default() == Stored()


@pytest.mark.parametrize("link", ["weights", "incoming"])
def test_files_may_arrive_on_one_disk_and_stay_on_another(host: Host, link: str):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if Path(other).stat().st_dev == host.root.parent.stat().st_dev:
            pytest.skip("/dev/shm is this test's own disk")
        host.root.mkdir()
        (host.root / link).symlink_to(other)
        least = min(shutil.disk_usage(place).free for place in (host.root, other))
        assert abs(host.found(*FILES).free - least) < 1 << 30
        host.arrive(CONTENTS, FILES)
        assert host.land(*FILES).returncode == 0
        assert host.files(FILES) == CONTENTS
        assert host.plan(*FILES).nothing


def test_what_lies_in_the_staging_folder_counts_as_far_as_it_takes_space(host: Host):
    host.arrive({"a.pth": b"a" * 9000}, FILES)
    sparse = Path(staging(str(host.root), version("m", FILES))) / "d" / "e" / "b 1.bin"
    sparse.parent.mkdir(parents=True)
    with sparse.open("wb") as file:
        file.truncate(1 << 20)
    assert host.found(*FILES).staged == {version("m", FILES): {"a.pth": 9000, "d/e/b 1.bin": 0}}


class TestTheLayoutBefore:
    def test_counts_only_as_far_as_its_record_holds(self, host: Host):
        old = host.root / "weights" / "m"
        old.mkdir(parents=True)
        lines = []
        for path in ("one", "two 2"):
            (old / path).write_text(path)
            stat = subprocess.run(
                ["stat", "-c", "%s %.9Z %i", old / path], capture_output=True, text=True, check=True
            ).stdout.strip()
            lines.append(f"{digest(path.encode())} {stat} {path}\n")
        (old / ".verified").write_text("".join(lines))
        (old / "one").write_text("ONE")
        found = host.found()
        assert {sha256: seen.path for sha256, seen in found.earlier.items()} == {
            digest(b"two 2"): str(old / "two 2")
        }
        assert found.earlier[digest(b"two 2")].bytes == 5
        assert set(found.versions) == {"m"}


def test_what_the_service_uses_is_read_from_its_unit_and_configuration():
    lines = ["current", "version\tm-1", "version\tm-2"]
    assert WeightsInUse().process(lines) == {"m-1", "m-2"}
    assert WeightsInUse().process(lines[1:]) is None
    assert WeightsInUse.default() is None


@pytest.mark.parametrize("line", ["hash\tx", "recorded\tx\ty", "link\tx", "staged\tx\t1\t2"])
def test_lines_that_are_broken_are_no_answer(line: str):
    with pytest.raises(ValueError):
        parse([line])


class TestTheWayToAHost:
    def test_is_ssh_as_the_inventory_has_it(self):
        way = Way(("ssh", "-p", "22", "-o", "UserKnownHostsFile=/my files/it's", "10.0.0.1"))
        assert way.run("sh -c 'x y' sh") == [*way.ssh, "sh -c 'x y' sh"]
        assert way.rsync("/opt/x") == [
            "--rsh",
            "ssh -p 22 -o 'UserKnownHostsFile=/my files/it''s'",
            "10.0.0.1:/opt/x/",
        ]

    def test_becomes_root_by_sudo_without_asking(self):
        way = Way(("ssh", "fe80::1"), sudo=True)
        assert way.run("sh -c x") == ["ssh", "fe80::1", "sudo -n sh -c x"]
        assert way.rsync("/x")[2:] == ["--rsync-path", "sudo -n rsync", "[fe80::1]:/x/"]

    def test_is_none_where_the_host_is_this_machine(self):
        assert Way().run("sh -c x") == ["sh", "-c", "sh -c x"]
        assert Way().rsync("/x") == ["/x/"]
