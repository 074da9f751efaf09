"""fleet mirrors probe and show, with this machine as the host and real sites on its loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from gpufleet.cli import mirrors as cli
from gpufleet.errors import UsageError
from gpufleet.managed.facts import STATE
from gpufleet.mirrors import facts, probe
from gpufleet.mirrors.plan import RECORD
from gpufleet.run import mirrors

UNIT = Path(__file__).parents[1] / "unit"

#: Serves what the unit tests serve, from a process of its own, until its input ends.
SERVE = """
import sys
from loopback import serving
with serving() as good, serving(files={"/": b""}) as empty:
    print(good.place, empty.place, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def sites() -> Iterator[dict[str, Any]]:
    """Own sites as an inventory defines them: `good` has all services, `empty` only says so."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=UNIT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    good, empty = process.stdout.readline().split()
    services = {"pypi": {"index": "/pypi/simple"}, "miniconda": {"dir": "/anaconda/miniconda"}}
    common = {"scheme": "http", "services": services}
    yield {"good": {"hosts": [good], **common}, "empty": {"hosts": [empty], **common}}
    process.stdin.close()
    process.wait(10)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What gpufleet remembers on the host: a folder of the test in place of the machine's own."""
    folder = tmp_path / "state"
    monkeypatch.setattr(probe, "CACHE", probe.CACHE.replace(STATE, str(folder)))
    monkeypatch.setattr(facts, "_BOTH", facts._BOTH.replace(STATE, str(folder)))

    def process(self: facts.MirrorFiles, output: list[str]) -> Any:
        return facts.parse_sources(line.replace(str(folder), STATE) for line in output)

    monkeypatch.setattr(facts.MirrorFiles, "process", process)
    return folder


@pytest.fixture
def inventory(tmp_path: Path, sites: dict[str, Any]):
    """An inventory of this machine that knows the two sites and none of the catalogue's."""
    from gpufleet import catalog

    def write(**settings: Any) -> Path:
        own = {"site": "auto", "sites": sites, "exclude": list(catalog.mirrors().sites)}
        # pyinfra reads a file of one name once a process.
        path = tmp_path / f"hosts{len(list(tmp_path.glob('*.py')))}.py"
        path.write_text(f"hosts = [('@local', {{'mirrors': { ({**own, **settings})!r}}})]\n")
        return path

    return write


def test_every_site_is_probed_and_the_host_remembers(inventory, state: Path):
    (said,) = mirrors.probe(inventory())
    assert said.error is None
    assert said.answer is not None
    states = {(row.site, row.service): row.state for row in said.answer.found}
    assert states == {
        ("good", "pypi"): "ok",
        ("good", "miniconda"): "ok",
        ("empty", "pypi"): "missing",
        ("empty", "miniconda"): "missing",
    }
    kept = probe.read((state / "mirrors-probed.json").read_text())
    assert kept.found == said.answer.found
    assert said.answer.note == ""


def test_a_probe_may_be_of_one_site_and_one_service(inventory, state: Path):
    (said,) = mirrors.probe(inventory(), services=["pypi"], sites=["empty"])
    assert said.answer is not None
    assert [(row.site, row.service) for row in said.answer.found] == [("empty", "pypi")]


def test_what_cannot_be_probed_is_one_line(inventory, state: Path):
    with pytest.raises(UsageError, match="no such service; use one of apt, pypi,"):
        cli._services(["pipy"])
    (said,) = mirrors.probe(inventory(), sites=["mars"])
    assert said.error is not None
    assert said.error.startswith("@local: --site mars: no such site; use one of aliyun, bfsu")
    (said,) = mirrors.probe(inventory(), sites=["nju"])
    assert said.error is not None
    assert said.error.startswith("@local: nothing to probe: the named sites are excluded")
    assert not state.exists()


def test_show_says_what_the_next_apply_would_choose_and_probes_nothing(inventory, state: Path):
    (before,) = mirrors.show(inventory())
    assert before.answer is not None
    assert before.answer.due == ("pypi", "miniconda")
    assert before.answer.choice.picks["pypi"].why == "no site was probed"
    assert not state.exists()
    mirrors.probe(inventory())
    (after,) = mirrors.show(inventory())
    assert after.answer is not None
    assert after.answer.due == ()
    pick = after.answer.choice.picks["pypi"]
    assert (pick.name, pick.policy, pick.fallbacks) == ("good", "measured", ("official",))
    (pinned,) = mirrors.show(inventory(pinned={"pypi": "empty"}))
    assert pinned.answer is not None
    assert pinned.answer.choice.picks["pypi"].policy == "pinned"
    assert pinned.answer.choice.picks["miniconda"].name == "good"


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def test_the_documents_are_as_they_are_described(
    inventory, state: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(typer.Exit) as ended:
        cli.probe(inventory(), as_json=True)
    assert ended.value.exit_code == 0
    probed = document(capsys)
    assert (probed["version"], probed["command"], probed["exit_code"]) == (1, "mirrors probe", 0)
    (host,) = probed["hosts"]
    assert set(host) == {"name", "error", "note", "bytes", "seconds", "found"}
    assert host["bytes"] > 0
    described = {"service", "site", "via", "state", "why", "bytes_per_second", "parts", "at"}
    assert all(set(row) == described for row in host["found"])
    record = {"version": 1, "sites": {}}
    (state / Path(RECORD).name).write_text(json.dumps(record))
    with pytest.raises(typer.Exit) as ended:
        cli.show(inventory(), as_json=True)
    assert ended.value.exit_code == 0
    shown = document(capsys)
    assert (shown["version"], shown["command"]) == (1, "mirrors show")
    services = {row["service"]: row for row in shown["hosts"][0]["services"]}
    pypi = services["pypi"]
    assert (pypi["site"], pypi["policy"], pypi["probe_due"]) == ("good", "measured", False)
    assert pypi["url"].startswith("http://127.0.0.1:")
    assert {row["site"] for row in pypi["found"]} == {"good", "empty"}
    assert (services["hf"]["site"], services["hf"]["url"]) == ("official", None)


def test_the_tables_hold_every_result_and_a_service_without_any_site_fails(
    inventory, state: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(typer.Exit) as ended:
        cli.probe(inventory(exclude=["good"]), service=["pypi"])
    assert ended.value.exit_code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["HOST", "SERVICE", "SITE", "STATE", "MB/S", "WHY"]
    (line,) = [line for line in lines if " empty " in line]
    assert line.endswith("-     has no /pypi/simple/pip/ (404)")
    with pytest.raises(typer.Exit) as ended:
        cli.show(inventory())
    assert ended.value.exit_code == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if " miniconda " in line]
    assert line.endswith("no site was probed; apply probes first")
