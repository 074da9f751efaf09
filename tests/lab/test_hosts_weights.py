"""Damaged weights on the operator's machine stop the apply before any host changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from fleets import ROOT, Fleet, fleet, lines_about, ok, touched, words


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The model's files in a folder of the test's own."""
    return Path(shutil.copytree(ROOT / "files" / "weights" / "pico", tmp_path / "weights"))


def test_every_bad_file_of_every_host_is_named_and_nothing_changes(
    deployed: Fleet, copy: Path, tmp_path: Path
) -> None:
    flipped, cut, missing = sorted(copy.glob("*.pth"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 0x10
    flipped.write_bytes(content)
    size = cut.stat().st_size
    os.truncate(cut, size - 1)
    missing.unlink()
    before = [(host.snapshot(), host.pid) for host in deployed.hosts]
    inventory = deployed.inventory(tmp_path, {"weights": {"source": str(copy)}})
    done = fleet("apply", "-i", inventory)
    assert done.code == 1
    assert "Traceback" not in done.out + done.err
    assert len(done.err.splitlines()) == 3 * len(deployed.hosts)
    for host in deployed.hosts:
        said = {
            next(Path(word) for word in line.split() if word.startswith("/")): line
            for line in lines_about(done.err, host)
        }
        assert set(said) == {flipped, cut, missing}
        words(said[flipped], "corrupt", "sha256", "copy it from")
        words(said[cut], f"truncated: {size - 1} of {size} bytes", "copy it from")
        words(said[missing], "is missing", "copy it from")
    for host, (snapshot, pid) in zip(deployed.hosts, before, strict=True):
        assert touched(snapshot, host.snapshot()) == []
        assert host.pid == pid
        assert host.healthy()


def test_a_folder_that_is_not_there_is_named(deployed: Fleet, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    inventory = deployed.inventory(tmp_path, h1={"weights": {"source": str(nowhere)}})
    done = fleet("apply", "-i", inventory)
    assert done.code == 1
    words(done.complaint, deployed.hosts[0].name, "weights.source", str(nowhere), "fetch")


def test_the_same_files_from_another_folder_change_nothing(
    deployed: Fleet, copy: Path, tmp_path: Path
) -> None:
    inventory = deployed.inventory(tmp_path, {"weights": {"source": str(copy)}})
    done = ok(fleet("apply", "-i", inventory, "--only", "weights", "--json"))
    for host in deployed.hosts:
        assert done.changed(host.name) == {}
