"""What a person sees of weights on their way, and what a run is told in place of settings."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import Any

import pytest
from rich.console import Console

from gpufleet.cli import output
from gpufleet.run import only, override
from gpufleet.run.events import Event, Picture
from gpufleet.run.override import Override
from gpufleet.settings import parse
from gpufleet.weights.plan import Progress

HALF = Progress("sending", "rsync", 600_000_000, 1_200_000_000, rate=10e6)
DONE = Progress("done", "rsync", 9, 9, files=12, sent=3_200_000, there=1_100_000, seconds=4.24)


def picture(**weights: Progress) -> Picture:
    """A run in which these hosts get weights."""
    made = Picture()
    for name, progress in weights.items():
        made.fold(Event("connected", name))
        made.fold(Event("started", name, concern="weights", operation="Bring the files of pico"))
        fold(made, name, progress)
    return made


def fold(made: Picture, name: str, progress: Progress) -> None:
    made.fold(Event("progress", name, concern="weights", message=json.dumps(asdict(progress))))


def test_progress_survives_the_pipe():
    assert picture(a=HALF).hosts["a"].weights == HALF


@pytest.mark.parametrize(
    ("progress", "said"),
    [
        (HALF, "50 % of 1.2 GB, 10.0 MB/s, 60 s left"),
        (
            Progress("sending", "swarm", 5, 10, rate=1, peers=1),
            "50 % of 10 B, 1 B/s, 5.0 s left, 1 peer",
        ),
        (Progress("sending", "rsync", 0, 10), "0 % of 10 B"),
        (Progress("waiting", why="waits for its turn"), "waits for its turn"),
        (Progress("cut"), "the connection broke"),
        (Progress("starting"), "begins"),
        (Progress("verifying", bytes=1, of=1), "the host verifies what arrived"),
    ],
)
def test_how_far_a_host_is_reads_as_words(progress: Progress, said: str):
    assert output.travelling(progress) == said


def test_the_line_below_tells_of_all_hosts_together():
    more = Progress("sending", "swarm", 0, 1_200_000_000, rate=20e6, peers=3)
    end = Progress("done", "rsync", 600_000_000, 600_000_000)
    line = output.overall(picture(a=HALF, b=more, c=end))
    assert line == "weights: 1 of 3 hosts, 40 % of 3.0 GB, 30.0 MB/s, 60 s left"
    assert output.overall(picture(a=end)) == ""
    assert output.overall(Picture()) == ""


def test_a_terminal_shows_a_line_a_host_and_one_for_all():
    screen = io.StringIO()
    swarm = Progress("sending", "swarm", 1, 4, rate=1, peers=2)
    Console(file=screen, width=130).print(output.screen(picture(gpu1=HALF, gpu2=swarm)))
    _, first, second, last = screen.getvalue().splitlines()
    assert first.startswith("gpu1")
    assert "━" in first
    assert "50 % of 1.2 GB, 10.0 MB/s, 60 s left" in first
    assert "25 % of 4 B, 1 B/s, 3.0 s left, 2 peers" in second
    assert last.startswith("weights: 0 of 2 hosts, 49 % of 1.2 GB")


def test_a_pipe_gets_a_line_at_every_tenth(capsys: pytest.CaptureFixture[str]):
    show, made = output._Lines(), picture(gpu1=Progress("waiting", why="waits for its turn"))
    for count in range(0, 101, 4):
        fold(made, "gpu1", Progress("sending", "rsync", count, 100))
        show(made)
    fold(made, "gpu1", Progress("verifying", "rsync", 100, 100))
    show(made)
    fold(made, "gpu1", DONE)
    show(made)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[1] == "gpu1 weights: 12 % of 100 B"
    assert lines[-1] == "gpu1 weights: the host verifies what arrived"


@pytest.mark.parametrize(
    ("progress", "always", "line"),
    [
        (
            DONE,
            False,
            "a weights: 12 files, 3.2 MB sent by rsync, 1.1 MB were there, 4.2 s",
        ),
        (Progress("done", files=1, there=5), True, "a weights: 1 file, 5 B were there"),
        (Progress("done", files=1, there=5), False, ""),
        (HALF, True, ""),
    ],
)
def test_a_summary_tells_what_travelled(progress: Progress, always: bool, line: str):
    assert output.arrived(picture(a=progress).hosts["a"], always) == line


def test_a_summary_says_why_there_was_no_swarm():
    alone = Progress("done", "rsync", files=1, sent=5, why="no other host reaches it")
    line = output.arrived(picture(a=alone).hosts["a"], False)
    assert line.endswith("(no swarm: no other host reaches it)")


def test_the_json_document_has_them_in_bytes_and_seconds():
    made = picture(a=DONE, b=HALF)
    documents = [output._host(host, "weights push") for host in made.hosts.values()]
    assert [one["weights"] for one in documents] == [
        {
            "via": "rsync",
            "files": 12,
            "bytes_sent": 3_200_000,
            "bytes_there": 1_100_000,
            "seconds": 4.24,
            "why": "",
        },
        None,
    ]


DATA: dict[str, Any] = {"weights": {"via": "rsync", "keep": 3, "bandwidth_kib": 5}}


class TestWhatARunIsToldInPlaceOfSettings:
    def test_wins_over_them(self, monkeypatch: pytest.MonkeyPatch):
        given = Override(model="clip-vit-b32", source="/s", via="swarm", bandwidth_kib=0)
        monkeypatch.setenv(override.ENV, given.dump())
        settings = override.settled(parse(DATA, "host"))
        assert settings.model == "clip-vit-b32"
        own = settings.weights
        assert (own.source, own.via, own.bandwidth_kib, own.keep) == ("/s", "swarm", 0, 3)
        assert override.read() == given

    @pytest.mark.parametrize("text", ["", Override().dump(), Override(deep=True).dump()])
    def test_leaves_them_as_they_are_where_it_says_nothing(
        self, monkeypatch: pytest.MonkeyPatch, text: str
    ):
        monkeypatch.setenv(override.ENV, text)
        settings = parse(DATA, "host")
        assert override.settled(settings) == settings


@pytest.mark.parametrize(
    ("names", "alone"),
    [("weights", True), ("preflight,weights", True), ("", False), ("weights,config", False)],
)
def test_a_run_knows_that_it_brings_weights_alone(
    monkeypatch: pytest.MonkeyPatch, names: str, alone: bool
):
    monkeypatch.setenv(only.ENV, names)
    assert only.alone("weights") is alone
