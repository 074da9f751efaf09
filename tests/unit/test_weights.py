"""Weights: a file counts only after its bytes were checked, on both sides."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from gpufleet import ROOT, catalog
from gpufleet.catalog import Model, WeightFile
from gpufleet.errors import FleetError
from gpufleet.settings import Settings, parse
from gpufleet.shell import script
from gpufleet.weights import operations
from gpufleet.weights.facts import WeightsOnHost
from gpufleet.weights.local import check_source, source
from gpufleet.weights.plan import Found, manifest_digest, to_record, to_send
from gpufleet.weights.plan import parse as parse_found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def weight(path: str, content: bytes) -> WeightFile:
    return WeightFile(path=path, bytes=len(content), sha256=digest(content))


A, B = weight("a.pth", b"a"), weight("d/b.bin", b"bb")
GOOD = {"a.pth": Found(A.sha256, True), "d/b.bin": Found(B.sha256, True)}


def test_files_that_are_right_and_recorded_are_left_alone():
    assert to_send([A, B], GOOD) == []
    assert to_record([A, B], GOOD) == []


def test_what_is_missing_or_differs_is_sent():
    assert to_send([A, B], {}) == [A, B]
    assert to_send([A, B], {**GOOD, "a.pth": Found("0" * 64, True)}) == [A]
    assert to_send([A, B], {"a.pth": Found(B.sha256, False)}) == [A, B]


def test_what_is_right_but_not_recorded_is_recorded_and_not_sent():
    found = {**GOOD, "a.pth": Found(A.sha256, False)}
    assert to_send([A, B], found) == []
    assert to_record([A, B], found) == [A]
    assert to_record([A, B], {"a.pth": Found("0" * 64, False)}) == []


def test_the_manifests_digest_names_the_set_of_files_in_any_order():
    assert manifest_digest([A, B]) == manifest_digest([B, A])
    others = [[A], [A, weight("d/b.bin", b"bc")], [A, weight("d/c.bin", b"bb")]]
    assert len({manifest_digest(files) for files in [[A, B], *others]}) == 4


def test_the_facts_lines_are_read():
    lines = [f"a.pth\t{A.sha256}\trecorded", f"d/b.bin\t{B.sha256}\tnew"]
    assert parse_found(lines) == {
        "a.pth": Found(A.sha256, True),
        "d/b.bin": Found(B.sha256, False),
    }


class TestTheFolderOnTheOperatorsMachine:
    def test_the_settings_name_it(self, settings: Settings, model: Model, weights: Path):
        assert source(settings, model) == weights

    def test_a_tilde_is_the_operators_home(self, model: Model):
        settings = parse({"weights": {"source": "~/w"}}, "host")
        assert source(settings, model) == Path.home() / "w"

    def test_the_catalogues_own_is_in_the_checkout(self):
        pico = catalog.model("pico")
        assert source(Settings(), pico) == ROOT / "files" / "weights" / "pico"

    def test_the_settings_win_over_the_catalogue(self, settings: Settings, weights: Path):
        assert source(settings, catalog.model("pico")) == weights

    def test_without_either_it_is_the_store(
        self, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        assert source(Settings(), model) == tmp_path / "gpufleet" / "weights"

    def test_a_folder_that_is_not_there_is_said_in_one_line(self, model: Model, tmp_path: Path):
        settings = parse({"weights": {"source": str(tmp_path / "none")}}, "host")
        (line,) = check_source(settings, model)
        assert line == (
            f"weights.source: no folder {tmp_path / 'none'}: ./fleet weights fetch {settings.model}"
        )


class TestTheOperatorsFiles:
    def test_good_files_have_no_problems(self, settings: Settings, model: Model):
        assert check_source(settings, model) == []

    @pytest.fixture
    def again(self, model: Model) -> str:
        """What gets the files of the small model again."""
        return f"./fleet weights fetch {model.weights[0]}"

    def test_a_missing_file_is_named(
        self, settings: Settings, model: Model, weights: Path, again: str
    ):
        (weights / "vit.pth").unlink()
        assert check_source(settings, model) == [f"{weights / 'vit.pth'} is missing: {again}"]

    def test_a_truncated_file_is_named_with_both_sizes(
        self, settings: Settings, model: Model, weights: Path, again: str
    ):
        path = weights / "llama" / "model 1.bin"
        os.truncate(path, 100)
        assert check_source(settings, model) == [f"{path} is truncated: 100 of 8192 bytes: {again}"]

    def test_a_corrupt_file_is_named_with_both_hashes(
        self, settings: Settings, model: Model, weights: Path, again: str
    ):
        path = weights / "vit.pth"
        path.write_bytes(b"vision towel")
        assert check_source(settings, model) == [
            f"{path} is corrupt: sha256 {digest(b'vision towel')[:12]}… is not the catalogue's "
            f"({digest(b'vision tower')[:12]}…): {again}"
        ]

    def test_a_file_that_cannot_be_reached_is_named_with_the_reason(
        self, settings: Settings, model: Model, weights: Path
    ):
        path = weights / "vit.pth"
        path.unlink()
        path.symlink_to("vit.pth")
        assert check_source(settings, model) == [
            f"{path} cannot be read: Too many levels of symbolic links: "
            "check its permissions and the disk"
        ]

    def test_a_file_that_cannot_be_read_is_named_with_the_reason(
        self, settings: Settings, model: Model, weights: Path
    ):
        """This process's memory looks like an empty file, and reading its page 0 fails."""
        path = weights / "vit.pth"
        path.unlink()
        path.symlink_to("/proc/self/mem")
        own = Path(model.weights[0])
        data = yaml.safe_load(own.read_text("utf-8"))
        data["files"] = [{"path": "vit.pth", "bytes": 0, "sha256": digest(b"")}]
        only = own.with_name("only-mem.yaml")
        only.write_text(yaml.safe_dump(data), "utf-8")
        assert check_source(settings, model.model_copy(update={"weights": (str(only),)})) == [
            f"{path} cannot be read: Input/output error: check its permissions and the disk"
        ]

    def test_a_folder_in_a_files_place_is_a_problem(
        self, settings: Settings, model: Model, weights: Path
    ):
        (weights / "vit.pth").unlink()
        (weights / "vit.pth").mkdir()
        (line,) = check_source(settings, model)
        assert line.startswith(f"{weights / 'vit.pth'} cannot be read: Is a directory: ")

    def test_every_problem_comes_at_once_and_missing_files_are_one_line(
        self, settings: Settings, model: Model, weights: Path
    ):
        for name in ("qformer.pth", "projection.pth"):
            (weights / name).unlink()
        (weights / "vit.pth").write_bytes(b"vision towel")
        corrupt, missing = check_source(settings, model)
        assert corrupt.startswith(f"{weights / 'vit.pth'} is corrupt: ")
        assert missing.startswith(
            f"{weights}: 2 files are missing (qformer.pth, projection.pth): ./fleet weights fetch "
        )

    def test_files_that_nobody_knows_stop_the_deploy_until_they_are_verified(
        self, settings: Settings, model: Model
    ):
        own = Path(model.weights[0])
        data = yaml.safe_load(own.read_text("utf-8"))
        del data["files"][-1]["sha256"]
        own.write_text(yaml.safe_dump(data), "utf-8")
        catalog.weight_set.cache_clear()
        with pytest.raises(FleetError, match=r"sha256 of health\.png is not known yet: .* verify"):
            check_source(settings, model)


class TestDigestsAreRememberedWhileAFileStays:
    @pytest.fixture
    def path(self, settings: Settings, model: Model, weights: Path) -> Path:
        """A file that was checked once, then changed in place without a trace."""
        path = weights / "vit.pth"
        os.utime(path, ns=(1, 1_700_000_000_123_456_789))
        assert check_source(settings, model) == []
        self.change(path)
        return path

    @staticmethod
    def change(path: Path) -> None:
        stamp = path.stat().st_mtime_ns
        with path.open("r+b") as stream:
            stream.write(b"VISION")
        os.utime(path, ns=(1, stamp))

    def test_the_same_size_time_and_inode_are_not_hashed_again(
        self, settings: Settings, model: Model, path: Path
    ):
        assert path.read_bytes() == b"VISION tower"
        assert check_source(settings, model) == []

    def test_another_time_is_hashed_again(self, settings: Settings, model: Model, path: Path):
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        (line,) = check_source(settings, model)
        assert "corrupt" in line

    def test_another_inode_is_hashed_again(self, settings: Settings, model: Model, path: Path):
        stamp = path.stat().st_mtime_ns
        twin = path.with_name("twin")
        twin.write_bytes(path.read_bytes())
        os.utime(twin, ns=(1, stamp))
        twin.replace(path)
        (line,) = check_source(settings, model)
        assert "corrupt" in line

    def test_another_size_is_noticed(self, settings: Settings, model: Model, path: Path):
        stamp = path.stat().st_mtime_ns
        with path.open("ab") as stream:
            stream.write(b"!")
        os.utime(path, ns=(1, stamp))
        (line,) = check_source(settings, model)
        assert "is a text of 13 bytes, not the file" in line

    @pytest.mark.parametrize("text", ["", "{", "[]", "null"])
    def test_a_cache_that_was_spoilt_is_no_cache(
        self, settings: Settings, model: Model, path: Path, cache: Path, text: str
    ):
        for kept in (cache / "sha256").iterdir():
            kept.write_text(text)
        (line,) = check_source(settings, model)
        assert "corrupt" in line

    def test_another_folders_file_of_that_name_is_hashed_itself(
        self, model: Model, path: Path, tmp_path: Path
    ):
        other = tmp_path / "other"
        subprocess.run(["cp", "-a", path.parent, other], check=True)
        (line,) = check_source(parse({"weights": {"source": str(other)}}, "host"), model)
        assert "corrupt" in line


def test_a_cache_that_cannot_be_written_does_not_stop_the_check(
    settings: Settings, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert check_source(settings, model) == []


@dataclass
class Host:
    """Two folders that stand for a host's, where the real scripts run."""

    root: Path
    sh: Callable[..., subprocess.CompletedProcess[str]]

    @property
    def folder(self) -> Path:
        return self.root / "opt" / "weights" / "a model"

    @property
    def incoming(self) -> Path:
        return self.root / "opt" / "incoming"

    @property
    def list(self) -> Path:
        return self.root / "opt" / "incoming.sha256"

    def put(self, contents: dict[str, bytes], folder: Path | None = None) -> None:
        for path, content in contents.items():
            file = (folder or self.incoming) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(0o600)

    def verify(self, *files: WeightFile, source: Path | None = None):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.list.write_text(operations._listing(files).getvalue())
        folders = (str(source or self.incoming), str(self.folder))
        return self.sh(script(operations._VERIFY, *folders, str(self.list)))

    def found(self, *files: WeightFile) -> dict[str, Found]:
        paths = tuple(file.path for file in files)
        done = self.sh(WeightsOnHost().command(folder=str(self.folder), paths=paths))
        assert (done.returncode, done.stderr) == (0, "")
        return WeightsOnHost().process(done.stdout.splitlines())

    def files(self) -> set[str]:
        return {
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        } - {".verified"}


CONTENTS = {"a.pth": b"a", "d/e/b 1.bin": b"\x00" * 5000, "c": b""}
FILES = [weight(path, content) for path, content in CONTENTS.items()]


@pytest.fixture
def host(tmp_path: Path, sh) -> Host:
    return Host(tmp_path, sh)


class TestTheHostVerifiesWhatArrived:
    def test_good_files_get_their_names_and_a_record(self, host: Host):
        host.put(CONTENTS)
        done = host.verify(*FILES)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert host.files() == set(CONTENTS)
        assert host.found(*FILES) == {f.path: Found(f.sha256, True) for f in FILES}
        assert {(host.folder / p).stat().st_mode & 0o777 for p in CONTENTS} == {0o644}
        assert not host.incoming.exists()
        assert not host.list.exists()

    def test_a_corrupt_file_is_named_and_removed_and_the_others_are_kept(self, host: Host):
        host.put({**CONTENTS, "a.pth": b"A"})
        done = host.verify(*FILES)
        assert done.returncode == 1
        assert done.stderr == (
            "weight file a.pth is corrupt on this host: its sha256 is not the catalogue's; "
            "it was removed, apply again\n"
        )
        assert host.files() == set(CONTENTS) - {"a.pth"}
        assert not (host.incoming / "a.pth").exists()
        assert "a.pth" not in host.found(*FILES)

    def test_after_a_corrupt_file_the_next_try_completes(self, host: Host):
        host.put({**CONTENTS, "a.pth": b"A"})
        host.verify(*FILES)
        assert to_send(FILES, host.found(*FILES)) == [FILES[0]]
        host.put({"a.pth": b"a"})
        assert host.verify(FILES[0]).returncode == 0
        assert host.files() == set(CONTENTS)
        assert not host.incoming.exists()

    def test_a_file_that_did_not_arrive_fails_by_name(self, host: Host):
        host.put({path: text for path, text in CONTENTS.items() if path != "c"})
        done = host.verify(*FILES)
        assert done.returncode == 1
        assert "weight file c " in done.stderr
        assert host.files() == set(CONTENTS) - {"c"}

    def test_a_run_that_was_cut_off_keeps_what_it_had_verified(self, host: Host):
        host.put({"a.pth": b"a"})
        host.verify(FILES[0])
        host.put({"d/e/b 1.bin": b"\x00" * 100})
        assert to_send(FILES, host.found(*FILES)) == FILES[1:]
        host.put({"d/e/b 1.bin": b"\x00" * 5000, "c": b""})
        assert host.verify(*FILES[1:]).returncode == 0
        assert host.files() == set(CONTENTS)

    def test_a_file_that_is_there_already_is_recorded_in_place(self, host: Host):
        host.put(CONTENTS, host.folder)
        assert to_record(FILES, host.found(*FILES)) == FILES
        done = host.verify(*FILES, source=host.folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert host.files() == set(CONTENTS)
        assert host.found(*FILES) == {f.path: Found(f.sha256, True) for f in FILES}


class TestTheHostsRecord:
    @pytest.fixture(autouse=True)
    def verified(self, host: Host) -> None:
        host.put(CONTENTS)
        assert host.verify(*FILES).returncode == 0

    def sneak(self, path: Path) -> None:
        """Other bytes, same size and time."""
        stat = path.stat()
        with path.open("r+b") as stream:
            stream.write(b"x")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def test_it_is_used_while_nothing_touches_the_file(self, host: Host):
        record = host.folder / ".verified"
        record.write_text(record.read_text().replace(digest(b"a"), "0" * 64))
        assert host.found(FILES[0]) == {"a.pth": Found("0" * 64, True)}

    def test_other_bytes_of_the_same_size_and_time_are_hashed_again(self, host: Host):
        self.sneak(host.folder / "a.pth")
        assert host.found(FILES[0]) == {"a.pth": Found(digest(b"x"), False)}

    def test_a_changed_time_is_hashed_again(self, host: Host):
        path = host.folder / "a.pth"
        self.sneak(path)
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        assert host.found(FILES[0]) == {"a.pth": Found(digest(b"x"), False)}

    def test_a_replaced_file_is_hashed_again(self, host: Host):
        path = host.folder / "a.pth"
        subprocess.run(["cp", "-a", path, f"{path}.new"], check=True)
        self.sneak(Path(f"{path}.new"))
        Path(f"{path}.new").rename(path)
        assert host.found(FILES[0]) == {"a.pth": Found(digest(b"x"), False)}

    def test_a_touched_file_is_recorded_again_rather_than_sent(self, host: Host):
        os.utime(host.folder / "a.pth", (5, 5))
        found = host.found(*FILES)
        assert to_send(FILES, found) == []
        assert to_record(FILES, found) == [FILES[0]]
        assert host.verify(FILES[0], source=host.folder).returncode == 0
        assert to_record(FILES, host.found(*FILES)) == []

    def test_the_newest_line_of_a_file_counts(self, host: Host):
        stat = subprocess.run(
            ["stat", "-c", "%s %.9Z %i", host.folder / "a.pth"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        with (host.folder / ".verified").open("a") as record:
            record.write(f"{'0' * 64} {stat} a.pth\n")
        assert host.found(FILES[0]) == {"a.pth": Found("0" * 64, True)}

    def test_a_file_whose_name_ends_as_anothers_does_not_borrow_its_record(self, host: Host):
        host.put({"e/a.pth": b"other"}, host.folder)
        assert host.found(weight("e/a.pth", b"other")) == {
            "e/a.pth": Found(digest(b"other"), False)
        }

    def test_missing_files_are_not_listed(self, host: Host):
        (host.folder / "c").unlink()
        assert set(host.found(*FILES)) == {"a.pth", "d/e/b 1.bin"}


def test_a_host_without_the_folder_has_no_files(host: Host):
    assert host.found(*FILES) == {}
    assert WeightsOnHost.default() == {}


def test_the_list_of_files_is_one_that_sha256sum_reads(host: Host):
    host.put(CONTENTS)
    host.list.write_text(operations._listing(FILES).getvalue())
    done = host.sh(f"sha256sum --strict -c '{host.list}'", cwd=host.incoming)
    assert (done.returncode, done.stdout.count(": OK\n")) == (0, len(FILES))
