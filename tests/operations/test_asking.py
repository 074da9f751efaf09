"""Asking hosts for facts: each answers for itself, and a host that cannot says why in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyinfra.api import FactBase, FactProcessError

from gpufleet.errors import UsageError
from gpufleet.run.asking import Asker, ask


class Says(FactBase[str]):
    """What the host's shell prints for a command line."""

    def command(self, line: str) -> str:
        return line

    @staticmethod
    def default() -> str:
        return "nothing"

    def process(self, output: list[str]) -> str:
        if output == ["garbage"]:
            raise FactProcessError("garbage is no answer")
        if output == ["blunder"]:
            return output[1]
        return " ".join(output)


@pytest.fixture
def inventory(tmp_path: Path):
    def write(hosts: str) -> Path:
        path = tmp_path / "hosts.py"
        path.write_text(f"hosts = {hosts}\n")
        return path

    return write


def test_every_host_answers_with_its_own_settings(inventory):
    path = inventory("[('@local', {'model': 'pico', 'demo': {'port': 7999}})]")
    told = []

    def question(host: Asker) -> tuple[str, int, str]:
        return host.fact(Says, line="echo one; echo two"), host.settings.demo.port, host.name

    (said,) = ask(path, question, told=lambda done, of: told.append((done, of)))
    assert said.answer == ("one two", 7999, "@local")
    assert (said.name, said.error) == ("@local", None)
    assert told == [(1, 1)]


def test_a_host_that_prints_nothing_has_the_facts_default(inventory):
    (said,) = ask(inventory("['@local']"), lambda host: host.fact(Says, line="true"))
    assert said.answer == "nothing"


def test_a_command_that_fails_is_no_answer(inventory):
    line = "echo partly; echo 'sh: E: no such thing' >&2; exit 3"
    (said,) = ask(inventory("['@local']"), lambda host: host.fact(Says, line=line))
    assert said.answer is None
    assert said.error is not None
    assert said.error.startswith("@local: cannot look at Says: sh: E: no such thing")
    assert "\n" not in said.error


def test_output_that_makes_no_sense_is_no_answer(inventory):
    (said,) = ask(inventory("['@local']"), lambda host: host.fact(Says, line="echo garbage"))
    assert said.error is not None
    assert "@local: what it says of Says makes no sense: garbage is no answer" in said.error
    (said,) = ask(inventory("['@local']"), lambda host: host.fact(Says, line="echo blunder"))
    assert said.error is not None


def test_a_host_that_hangs_is_given_up(inventory):
    path = inventory("[('@local', {'_timeout': 1})]")
    (said,) = ask(path, lambda host: host.fact(Says, line="exec sleep 5"))
    assert said.error == ("@local: no answer within 1 s; look at the host, then ask again")


def test_hosts_that_cannot_be_asked_do_not_keep_the_others_from_answering(inventory):
    hosts = """[
        ('gone', {'ssh_hostname': '127.0.0.1', 'ssh_port': 1, 'ssh_user': 'root'}),
        ('wrong', {'ssh_hostname': '127.0.0.1', 'kernel': {'pin': 7}}),
        '@local',
    ]"""
    gone, wrong, local = ask(inventory(hosts), lambda host: host.fact(Says, line="echo here"))
    assert local.answer == "here"
    assert gone.error is not None
    assert "gone: cannot connect as root@127.0.0.1:1" in gone.error
    assert wrong.error is not None
    assert "kernel.pin" in wrong.error


def test_only_hosts_of_the_limit_are_asked(inventory):
    path = inventory("['@local', 'gone.invalid']")
    said = ask(path, lambda host: host.name, limit=["@local"])
    assert [each.name for each in said] == ["@local"]


def test_a_limit_that_means_no_host_is_an_error(inventory):
    with pytest.raises(UsageError, match="no such host or group"):
        ask(inventory("['@local']"), lambda host: host.name, limit=["nobody"])
