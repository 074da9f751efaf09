"""Weights: a file counts only after its bytes were checked, on both sides."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from gpufleet import ROOT, catalog
from gpufleet.catalog import Model
from gpufleet.errors import FleetError
from gpufleet.settings import Settings, parse
from gpufleet.weights.local import check_source, source


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
        folder = tmp_path / "none"
        assert line == (
            f"weights.source: no folder {folder}: "
            f"./fleet weights fetch {settings.model} --store {folder}"
        )


class TestTheOperatorsFiles:
    def test_good_files_have_no_problems(self, settings: Settings, model: Model):
        assert check_source(settings, model) == []

    @pytest.fixture
    def again(self, model: Model, weights: Path) -> str:
        """What gets the files of the small model again; the folder's name has a space."""
        return f"./fleet weights fetch {model.weights[0]} --store '{weights}'"

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
