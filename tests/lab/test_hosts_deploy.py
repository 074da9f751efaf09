"""A deploy makes a demo that answers right, and applied again it changes nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import fleets
import pytest
from fleets import ROOT, UNIT, Fleet, Host, fleet, ok, run
from modeldemo.pico import pictures

from gpufleet import catalog
from gpufleet.settings import Settings
from gpufleet.weights import local

CONCERNS = ["base", "python_env", "weights", "config", "demo"]

#: Answers every question with the catalogue's health answer, as fast and as well-formed as the
#: demo: what is wrong with it is only what it says.
LIAR = """
import http.server, json
class Liar(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"status": "ok", "model": "pico", "data": [{"id": "pico"}]})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "ANSWER"}
        self.reply({"choices": [{"message": message}]})
    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
http.server.ThreadingHTTPServer(("127.0.0.1", 7860), Liar).serve_forever()
"""


def test_a_plan_of_fresh_hosts_lists_what_apply_would_do(deployed: Fleet) -> None:
    plan = deployed.seen["plan"]
    assert plan.code == 3, plan.out + plan.err
    for host in deployed.hosts:
        # Health comes last where it is listed: nothing answers yet.
        assert list(plan.pending(host.name))[: len(CONCERNS)] == CONCERNS
        assert "Run the service" in plan.pending(host.name)["demo"]


def test_a_plan_changes_nothing_on_the_hosts(deployed: Fleet) -> None:
    snapshots = zip(deployed.seen["fresh"], deployed.seen["planned"], strict=True)
    assert [fleets.touched(before, after) for before, after in snapshots] == [[], []]


def test_the_first_apply_changes_every_host_in_every_concern(deployed: Fleet) -> None:
    for host in deployed.hosts:
        assert list(deployed.seen["apply"].changed(host.name)) == CONCERNS


def test_every_host_answers_about_pictures_that_were_never_trained_on(deployed: Fleet) -> None:
    examples = pictures.held_out_examples(seed=7, count=12)
    for host in deployed.hosts:
        with host.tunnel() as url:
            answers = [fleets.ask(url, example) for example in examples]
        right = map(pictures.is_right, answers, [example.answer for example in examples])
        assert sum(right) >= 11, dict(zip(answers, examples, strict=True))


def test_pyinfra_alone_applies_it_and_finds_nothing_to_change(deployed: Fleet) -> None:
    pyinfra = Path(sys.executable).with_name("pyinfra")
    before = [host.snapshot() for host in deployed.hosts]
    done = run(
        *(pyinfra, "inventory/lab.py", "deploy.py", "-y"),
        PYINFRA_PROGRESS="off",
        GPUFLEET_LAB=deployed.name,
    )
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.out + done.err)
    assert done.code == 0, said
    said, _, table = said.partition("--> Results:")
    for host in deployed.hosts:
        outcomes = re.findall(rf"^ *\[{host.name}\] (No changes|Success|Error|Skipped)", said, re.M)
        assert len(outcomes) >= 10, said
        assert set(outcomes) == {"No changes"}, said
    total = re.search(r"Grand total +(\d+) +(\S+) +(\S+) +(\d+)", table)
    assert total is not None, table
    assert (total[2], total[3], total[4]) == ("-", "-", total[1])
    for host, snapshot in zip(deployed.hosts, before, strict=True):
        assert fleets.touched(snapshot, host.snapshot()) == []


def test_a_plan_of_healthy_hosts_has_nothing_pending(deployed: Fleet) -> None:
    plan = ok(deployed.plan())
    for host in deployed.hosts:
        assert plan.pending(host.name) == {}


def test_one_concern_runs_alone_with_pyinfra(deployed: Fleet, one: Host) -> None:
    config = one.path("/opt/minigpt4/config/minigpt4_eval.yaml")
    right = config.read_text()
    config.unlink()
    pyinfra = Path(sys.executable).with_name("pyinfra")
    alone = ("inventory/lab.py", "tasks.config.config", "-y", "--limit", one.name)
    ok(run(pyinfra, *alone, GPUFLEET_LAB=deployed.name))
    assert config.read_text() == right


def test_only_runs_the_named_concern(deployed: Fleet, one: Host) -> None:
    one.sh(f"systemctl stop {UNIT}")
    done = deployed.apply("--only", "config", "--limit", one.name)
    ran = {concern["name"] for concern in done.document["hosts"][0]["concerns"]}
    assert ran <= {"preflight", "config"}
    assert one.show("ActiveState") == "inactive"
    ok(deployed.apply("--only", "demo", "--limit", one.name))
    assert one.show("ActiveState") == "active"


def test_demo_check_passes_when_every_host_answers_right(deployed: Fleet) -> None:
    done = ok(fleet("demo", "--check", "--name", deployed.name, "--json"))
    reports = done.document["check"]
    assert [report["host"] for report in reports] == [host.name for host in deployed.hosts]
    for report in reports:
        assert report["asked"] >= 40
        assert report["accuracy"] >= 0.95
        assert report["passed"] is True


def test_demo_check_fails_and_names_the_host_that_answers_wrongly(
    deployed: Fleet, one: Host, two: Host
) -> None:
    liar = LIAR.replace("ANSWER", health_answer())
    two.path("/usr/local/lib/liar.py").write_text(liar)
    drop_in = two.path(f"/etc/systemd/system/{UNIT}.d/liar.conf")
    drop_in.parent.mkdir()
    drop_in.write_text(
        "[Service]\nType=exec\nExecStart=\nExecStart=/usr/bin/python3 /usr/local/lib/liar.py\n"
    )
    try:
        two.sh(f"systemctl daemon-reload && systemctl restart {UNIT}")
        fleets.until(two.healthy, "the liar answers", 30)
        done = fleet("demo", "--check", "--name", deployed.name)
        assert done.code == 1, done.out + done.err
        table = [line.split() for line in done.out.splitlines()]
        assert [row[-1] for row in table if row and row[0] == one.name][-1] == "ok"
        verdicts = [" ".join(row) for row in table if row and row[0] == two.name]
        assert any("below 95%" in verdict for verdict in verdicts), done.out
        wrong = [line for line in done.out.splitlines() if "Right: " in line]
        assert len(wrong) >= 20
        assert {line.split(":")[0] for line in wrong} == {two.name}
    finally:
        two.path("/usr/local/lib/liar.py").unlink()
        drop_in.unlink()
        drop_in.parent.rmdir()
        two.sh(f"systemctl daemon-reload && systemctl restart {UNIT}")


def health_answer() -> str:
    """The answer that a host must give to be called healthy."""
    import yaml

    catalogue = yaml.safe_load((ROOT / "catalog" / "models" / "pico.yaml").read_text())
    return str(catalogue["health"]["answer"])


@pytest.mark.parametrize("number", [0, 1])
def test_weights_on_the_host_are_those_of_the_catalogue(deployed: Fleet, number: int) -> None:
    files = local.files(Settings(), catalog.model("pico"))
    host = deployed.hosts[number]
    here = fleets.weights(host).relative_to(host.root)
    sums = dict(
        reversed(line.split("  ", 1))
        for line in host.sh(
            f"cd /{here} && find -L . -type f -printf '%P\\0' | xargs -0 sha256sum"
        ).splitlines()
    )
    assert sums == {file.path: file.sha256 for file in files}
