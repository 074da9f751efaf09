"""The GPU double's recordings: valid, known by name, and laid where a host looks for them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from gpufleet import catalog, lab
from gpufleet.errors import UsageError
from gpufleet.lab.gpu_double import recording
from gpufleet.lab.gpu_double.recording import HOME, Recording


def test_every_recording_is_there():
    wanted = {"h100x8", "none", "mixed", "lost", "mismatch", "nouveau", "bare"}
    assert wanted <= set(recording.names())


@pytest.mark.parametrize("name", recording.names())
def test_a_recording_is_valid_and_its_parts_agree(name: str):
    made = recording.load(name)
    cards = [device for device in made.pci if device.kind.startswith("03")]
    generations = [catalog.drivers().generation(card.device) for card in cards]
    assert all(generations)
    if made.smi is not None and made.smi.gpus:
        listed = {row.address.removeprefix("0000").lower() for row in made.smi.gpus}
        assert listed == {card.address for card in cards if not card.lost}
    for module in made.modules.values():
        assert set(module.holders) <= set(made.modules)
        assert module.refcnt >= len(module.holders)
    bound = {card.driver for card in cards} - {""}
    assert bound <= set(made.modules)


def test_a_recording_that_there_is_not_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match=r"--gpus h100: no such recording; use one of .*h100x8"):
        recording.load("h100")


def test_a_typo_in_a_recording_is_refused():
    with pytest.raises(ValidationError):
        Recording.model_validate({"title": "x", "gpu": []})


@pytest.mark.parametrize("name", recording.names())
def test_all_of_a_double_says_that_it_is_one(name: str, tmp_path: Path):
    recording.lay(name, tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink() and HOME not in str(path):
            assert "GPU double" in path.read_text(), path
    assert "The GPU double" in (tmp_path / HOME / "README").read_text()


def test_its_programs_are_shell_that_can_be_read(tmp_path: Path):
    recording.lay("bare", tmp_path)
    programs = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_mode & 1]
    assert {path.name for path in programs} == {"appear", "nvidia-smi", "modprobe", "rmmod"}
    for path in programs:
        assert path.read_text().startswith("#!/bin/sh\n")
        subprocess.run(["sh", "-n", str(path)], check=True)


def test_only_what_shall_load_modules_brings_a_modprobe(tmp_path: Path):
    recording.lay("h100x8", tmp_path)
    assert not (tmp_path / "usr/local/sbin").exists()


def test_a_lost_gpu_answers_only_ones(tmp_path: Path):
    recording.lay("lost", tmp_path)
    devices = tmp_path / HOME / "sys/bus/pci/devices"
    assert (devices / "0000:4b:00.0/config").read_bytes()[:4] == b"\xff" * 4
    assert (devices / "0000:31:00.0/config").read_bytes()[:4] == bytes.fromhex("de10b220")
    assert (devices / "0000:4b:00.0/vendor").read_text() == "0x10de\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": ["h100"]}, "no such recording"),
        ({"gpus": ["none"], "vm": True}, "no GPU double"),
        ({"kernel": "6.1.0-50-amd64", "vm": True}, "a kernel of its own"),
        ({"kernel": "6.1; reboot"}, "no kernel release"),
        ({"kernel": ""}, "no kernel release"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused(options: dict[str, object], said: str):
    with pytest.raises(UsageError, match=said):
        lab.up("t-unit-none", 1, **options)  # type: ignore[arg-type]
