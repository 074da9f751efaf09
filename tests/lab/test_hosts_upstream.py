"""Upstream's own way to run the model, on a host: a double of its repository, without a network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fleets import HOME, ROOT, Done, Fleet, Host, fleet, ok

sys.path.append(str(ROOT / "tests" / "demo"))

import upstream_double


@dataclass
class Switched:
    """The deployed lab's second host, with settings of its own while the tests run."""

    host: Host
    folder: Path
    fleet: Fleet
    repository: Path
    commit: str
    seen: dict[str, Any]

    def apply(self, **upstream: str) -> Done:
        """Apply to that host alone, with upstream's code from the repository here."""
        data: dict[str, Any] = {"accelerator": "cpu", "model": "pico"}
        if upstream:
            own = {"commit": self.commit, "environment": "modern", **upstream}
            data |= {"runtime": "upstream", "upstream": own}
        path = self.fleet.inventory(self.folder, data)
        return fleet("apply", "-i", path, "--limit", self.host.name, "--json")

    @property
    def place(self) -> str:
        return f"{HOME}/upstream/{self.commit}"


@pytest.fixture(scope="module")
def switched(deployed: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Switched]:
    folder = tmp_path_factory.mktemp("upstream")
    repository = folder / "repository"
    commit = upstream_double.repository(repository)
    made = Switched(deployed.hosts[1], folder, deployed, repository, commit, {})
    made.seen["apply"] = made.apply(source=str(repository))
    try:
        yield made
    finally:
        assert ok(made.apply()).changed(made.host.name)["demo"]


def test_the_same_service_runs_the_codes_own_demo(switched: Switched):
    host = switched.host
    changed = switched.seen["apply"].changed(host.name)
    assert changed["upstream"] == [
        f"Check out {switched.commit[:7]}",
        "Write the launcher and what it would download",
        "Link the vision tower",
    ]
    command = host.sh(f"tr '\\0' ' ' < /proc/{host.pid}/cmdline")
    assert f"--checkout {switched.place} " in command
    assert command.endswith(f"-- --cfg-path {HOME}/config/upstream.yaml --gpu-id 0")
    assert '"chatbot"' in host.sh("curl -s http://127.0.0.1:7860/config")
    status = fleet("status", "-i", switched.folder / "fleet.py", "--limit", host.name, "--json")
    assert ok(status).document["hosts"][0]["model"] == "pico"


def test_it_lies_there_as_it_was_committed_for_root_to_write(switched: Switched):
    host, git = switched.host, f"git -C {switched.place}"
    assert host.sh(f"{git} rev-parse HEAD") == switched.commit
    assert host.sh(f"{git} status --porcelain --ignored") == ""
    assert host.sh(f"{git} rev-list --count HEAD") == "1"
    assert host.sh(f"find {switched.place} ! -user root -o -perm /022 ! -type l") == ""
    assert host.sh(f"readlink -e {HOME}/upstream-home/hub/checkpoints/eva_vit_g.pth")
    assert host.try_("runuser -u minigpt4 -- touch x", 30).returncode != 0


def test_applied_again_it_changes_nothing(switched: Switched):
    pid = switched.host.pid
    assert switched.apply(source=str(switched.repository)).changed(switched.host.name) == {}
    assert switched.host.pid == pid


def test_a_file_that_was_edited_is_as_committed_again_and_the_service_runs_that(
    switched: Switched,
):
    host = switched.host
    file = host.path(f"{switched.place}/double/answer.py")
    file.write_text("def describe(model, picture):\n    return 'edited'\n")
    # What is left of the checkout is enough: the repository is not asked.
    gone = switched.repository.rename(switched.folder / "gone")
    mirror = (switched.folder / "nothing").as_uri()
    pid = host.pid
    changed = switched.apply(git=mirror).changed(host.name)
    gone.rename(switched.repository)
    assert changed["upstream"] == [f"Check out {switched.commit[:7]}"]
    assert file.read_text() == upstream_double.ANSWER
    assert host.pid not in (0, pid)


def test_code_that_cannot_be_had_changes_nothing_that_runs(switched: Switched):
    host, pid = switched.host, switched.host.pid
    done = switched.apply(git="file:///nowhere/code.git", commit="e" * 40)
    assert done.code == 1
    assert "upstream's code does not come from file:///nowhere/code.git" in done.out + done.err
    assert host.pid == pid
    assert host.healthy()


def test_a_copy_without_the_commit_is_a_finding_before_anything_changes(switched: Switched):
    done = switched.apply(source=str(switched.repository), commit="f" * 40)
    assert done.code == 1
    assert f"does not have commit {'f' * 40}: fetch it there" in done.out + done.err
    assert [one["changed"] for one in done.document["hosts"]] == [0]
