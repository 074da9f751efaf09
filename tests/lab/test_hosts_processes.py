"""Several processes of a host behind nginx, and a gateway before the fleet: nobody who asks notices
that one of them restarts, dies or goes away."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fleets
import pytest
import requests
from fleets import HOME, UNIT, Fleet, Host, fleet, ok, until, words
from modeldemo.pico import pictures

from gpufleet.weights.facts import WeightsInUse

PORT, GATEWAY = 7860, 8080
SECRET = "correct horse battery"


class Load:
    """Questions from several clients, one after the other each, until the block ends."""

    def __init__(self, url: str, clients: int = 3) -> None:
        example = pictures.held_out_examples(seed=5, count=1)[0]
        picture = "data:image/png;base64," + base64.b64encode(fleets.png(example)).decode()
        image = {"type": "image_url", "image_url": {"url": picture}}
        content = [image, {"type": "text", "text": example.question}]
        self.body = {
            "model": "pico",
            "temperature": 0,
            "max_tokens": 64,
            "messages": [{"role": "user", "content": content}],
        }
        self.url = url
        self.answered = 0
        #: When a question that got no whole answer began, and what became of it.
        self.failed: list[tuple[float, str]] = []
        self._over = threading.Event()
        self._clients = [
            threading.Thread(target=self._ask, args=(number == 0,)) for number in range(clients)
        ]

    def _ask(self, stream: bool) -> None:
        with requests.Session() as session:
            session.trust_env = False
            while not self._over.is_set():
                began = time.monotonic()
                try:
                    reply = session.post(
                        f"{self.url}/v1/chat/completions",
                        json={**self.body, "stream": stream},
                        timeout=120,
                    )
                    whole = "[DONE]" in reply.text if stream else "choices" in reply.text
                    said = "" if reply.status_code == 200 and whole else reply.text[:200]
                except requests.RequestException as error:
                    said = str(error)
                if said:
                    self.failed.append((began, said))
                else:
                    self.answered += 1
                # What restarts needs the cores too.
                self._over.wait(0.1)

    def __enter__(self) -> Load:
        for client in self._clients:
            client.start()
        until(lambda: self.answered, f"{self.url} answers", 60)
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for client in self._clients:
            client.join()


def unit(number: int) -> str:
    return f"minigpt4-demo@{number}.service"


def apply(
    deployed: Fleet, folder: Path, count: int, gateway: bool = True, **demo: Any
) -> fleets.Done:
    """Apply with so many processes on the first host and a gateway on the second."""
    own = {"bind": "0.0.0.0", "threads": 1, **demo}
    path = deployed.inventory(
        folder,
        h1={"demo": {**own, "processes": count}},
        h2={"demo": own, "gateway": {"enabled": gateway, "bind": "0.0.0.0"}},
    )
    return fleet("apply", "-i", path, "--json")


@pytest.fixture(scope="module")
def several(deployed: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The shared lab with two processes on its first host and a gateway on its second; afterwards
    as it was. What was asked meanwhile, where the one process listened, is in `seen`."""
    with deployed.hosts[0].tunnel() as url, Load(url) as load:
        ok(apply(deployed, tmp_path_factory.mktemp("two"), 2))
    deployed.seen["wider"] = load
    try:
        yield deployed
    finally:
        ok(deployed.apply())


def processes(url: str, asked: int = 12) -> Counter[str]:
    """Which processes' pages visitors without a cookie get: each process has an id of its own."""
    seen = [fleets.get(f"{url}/config").json()["app_id"] for _ in range(asked)]
    return Counter(map(str, seen))


def front(host: Host) -> str:
    return f"http://{host.address}:{PORT}"


def gateway(host: Host) -> str:
    return f"http://{host.address}:{GATEWAY}"


def test_from_one_process_to_two_no_request_fails(several: Fleet) -> None:
    load: Load = several.seen["wider"]
    assert load.failed == []
    assert load.answered > 20


def test_each_process_is_a_unit_of_its_own_and_nothing_of_the_one_is_left(
    several: Fleet, one: Host
) -> None:
    for number in range(2):
        assert one.show("ActiveState", unit(number)) == "active"
        assert one.show("UnitFileState", unit(number)) == "enabled"
    assert one.try_(f"systemctl cat {UNIT}").returncode != 0
    listening = one.sh("ss -Hltn").split()
    expected = {f"0.0.0.0:{PORT}", "127.0.0.1:7861", "127.0.0.1:7862"}
    assert {word for word in listening if ":78" in word} == expected
    masters = one.sh("ps -eo user,args | grep '[n]ginx: master'").splitlines()
    assert [line.split()[0] for line in masters] == ["minigpt4"]


def test_the_weights_that_they_read_are_known_to_be_in_use(several: Fleet, one: Host) -> None:
    said = one.sh(str(WeightsInUse().command(root=HOME))).splitlines()
    assert WeightsInUse().process(said) == {fleets.weights(one).name}


def test_the_distributions_web_server_is_left_off(several: Fleet, one: Host) -> None:
    assert one.try_("systemctl is-enabled nginx").stdout.strip() == "disabled"
    assert one.show("ActiveState", "nginx.service") == "inactive"
    assert not fleets.listens(80, one.address)


def test_applied_again_it_changes_nothing(several: Fleet, tmp_path: Path) -> None:
    before = [host.snapshot() for host in several.hosts]
    done = ok(apply(several, tmp_path, 2))
    assert [done.changed(host.name) for host in several.hosts] == [{}, {}]
    after = [host.snapshot() for host in several.hosts]
    assert [fleets.touched(*pair) for pair in zip(before, after, strict=True)] == [[], []]


def test_new_visitors_are_spread_and_each_stays_with_a_process(several: Fleet, one: Host) -> None:
    assert len(processes(front(one), 20)) == 2
    with requests.Session() as session:
        session.trust_env = False
        ids = {session.get(f"{front(one)}/config", timeout=60).json()["app_id"] for _ in range(8)}
        assert len(ids) == 1
        assert len(session.cookies) == 1


def test_the_gateway_spreads_them_over_the_fleet(several: Fleet, one: Host, two: Host) -> None:
    seen = processes(gateway(two), 30)
    assert len(seen) == 3
    assert set(processes(front(one), 20)) < set(seen)
    answer = fleets.ask(gateway(two), example := pictures.held_out_examples(seed=9, count=1)[0])
    assert pictures.is_right(answer, example.answer)


def test_every_process_has_its_figures(several: Fleet, one: Host) -> None:
    for number in range(2):
        assert "modeldemo_info" in fleets.get(f"{front(one)}/metrics/{number}").text
    missing = fleets.get(f"{front(one)}/metrics")
    assert missing.status_code == 404
    words(missing.text, "/metrics/0")


def test_status_and_logs_tell_of_each_process(several: Fleet, one: Host) -> None:
    done = ok(fleet("status", "-i", "inventory/lab.py", "--json", GPUFLEET_LAB=several.name))
    said = done.document["hosts"][0]
    assert said["healthy"] is True
    assert [each["name"] for each in said["processes"]] == [unit(0), unit(1)]
    assert {each["health"] for each in said["processes"]} == {"ok"}
    one.sh(f"systemctl stop {unit(1)}")
    try:
        done = fleet("status", "-i", "inventory/lab.py", GPUFLEET_LAB=several.name)
        assert done.code == 1
        words(done.out, f"{unit(1)} is inactive")
        assert one.healthy()  # the other one answers
    finally:
        one.sh(f"systemctl start {unit(1)}")
    logged = ok(fleet("logs", one.name, "-n", "50")).out
    assert logged.count("pico answers after") >= 2


def test_an_apply_that_changes_what_runs_fails_no_request(
    several: Fleet, one: Host, two: Host, tmp_path: Path
) -> None:
    before = [one.show("MainPID", unit(number)) for number in range(2)]
    alone = two.pid
    with Load(front(one), clients=2) as load, Load(gateway(two), clients=2) as of_the_fleet:
        done = ok(apply(several, tmp_path, 2, queue=9))
        after = [one.show("MainPID", unit(number)) for number in range(2)]
    assert load.failed == []
    # Nor of those whom the gateway sent to the host with one process.
    assert of_the_fleet.failed == []
    assert two.pid != alone
    assert load.answered > 20
    assert list(done.changed(one.name)) == ["demo"]
    assert not set(before) & set(after)
    # The second began to stop when the first was up again.
    since = "systemctl show -p {} --value --timestamp=unix {}"
    up = one.sh(since.format("ActiveEnterTimestamp", unit(0))).removeprefix("@")
    down = one.sh(since.format("ActiveExitTimestamp", unit(1))).removeprefix("@")
    assert int(up) <= int(down)


def test_a_process_that_dies_costs_what_it_was_answering_and_comes_back(
    several: Fleet, one: Host, two: Host
) -> None:
    with Load(gateway(two)) as load:
        one.sh(f"systemctl kill -s KILL {unit(0)}")
        # The kernel takes connections in its name until it is gone.
        until(lambda: one.show("ActiveState", unit(0)) != "active", "it is dead", 60)
        died = time.monotonic()
        until(lambda: one.show("ActiveState", unit(0)) == "active", "it is back", 120, every=1)
        asked = load.answered
        until(lambda: load.answered > asked + 10, "questions are answered", 60)
    assert len(load.failed) <= 3, load.failed  # one for each client
    assert all(began < died for began, _ in load.failed), load.failed


@pytest.mark.long
def test_what_does_not_come_back_ends_the_apply_and_the_others_go_on(
    several: Fleet, one: Host, tmp_path: Path
) -> None:
    drop_in = one.path(f"/etc/systemd/system/{unit(0)}.d/broken.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nExecStartPre=/bin/sh -c 'echo it is broken >&2; exit 1'\n")
    kept = one.show("MainPID", unit(1))
    try:
        with Load(front(one)) as load:
            done = apply(several, tmp_path / "broken", 2, queue=10)
        assert done.code == 1
        (line,) = done.document["errors"]
        words(line, one.name, unit(0), "did not start", "it is broken")
        assert load.failed == []
        assert one.show("MainPID", unit(1)) == kept
    finally:
        drop_in.unlink()
        drop_in.parent.rmdir()
    ok(apply(several, tmp_path / "mended", 2, queue=10))
    assert one.show("ActiveState", unit(0)) == "active"
    assert one.show("MainPID", unit(1)) != kept


@pytest.mark.long
def test_one_that_cannot_take_over_leaves_the_several_answering(
    several: Fleet, one: Host, tmp_path: Path
) -> None:
    drop_in = one.path(f"/etc/systemd/system/{UNIT}.d/broken.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nExecStartPre=/bin/sh -c 'echo it is broken >&2; exit 1'\n")
    try:
        with Load(front(one)) as load:
            done = apply(several, tmp_path / "one", 1, queue=11)
        assert done.code == 1
        words(done.document["errors"][0], one.name, UNIT, "did not start", "it is broken")
        assert load.failed == []
    finally:
        drop_in.unlink()
        drop_in.parent.rmdir()
    assert one.show("UnitFileState") == "disabled"
    ok(apply(several, tmp_path / "two", 2, queue=11))
    assert len(processes(front(one), 20)) == 2
    assert one.try_(f"systemctl cat {UNIT}").returncode != 0


@pytest.mark.long
def test_several_that_do_not_start_leave_the_one_answering(
    several: Fleet, two: Host, tmp_path: Path
) -> None:
    drop_in = two.path(f"/etc/systemd/system/{unit(1)}.d/broken.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nExecStartPre=/bin/sh -c 'echo it is broken >&2; exit 1'\n")
    own = {"bind": "0.0.0.0", "threads": 1}
    try:
        with Load(front(two)) as load:
            path = several.inventory(tmp_path, h2={"demo": {**own, "processes": 2}})
            done = fleet("apply", "-i", path, "--limit", two.name, "--json")
        assert done.code == 1
        words(done.document["errors"][0], two.name, unit(1), "did not start", "it is broken")
        assert load.failed == []
    finally:
        drop_in.unlink()
        drop_in.parent.rmdir()
    assert two.try_("systemctl is-enabled minigpt4-demo.target").stdout.strip() == "disabled"
    ok(apply(several, tmp_path / "again", 2))
    assert two.try_(f"systemctl cat {unit(1)}").returncode != 0


def test_a_host_that_the_gateway_cannot_reach_is_named_and_nothing_changes(
    several: Fleet, one: Host, tmp_path: Path
) -> None:
    path = several.inventory(
        tmp_path, h1={"demo": {"processes": 2}}, h2={"gateway": {"enabled": True}}
    )
    before = one.snapshot()
    done = fleet("apply", "-i", path)
    assert done.code != 0
    words(done.err, one.name, "listens on 127.0.0.1 only", "demo.bind")
    assert fleets.touched(before, one.snapshot()) == []


@pytest.mark.long
def test_a_host_that_goes_away_costs_what_it_was_answering(
    several: Fleet, one: Host, two: Host
) -> None:
    with Load(gateway(two), clients=4) as load:
        one.sh("systemctl stop minigpt4-demo.target 'minigpt4-demo@*' minigpt4-front")
        gone = time.monotonic()
        asked = load.answered
        until(lambda: load.answered > asked + 10, "the other host answers", 60)
        one.sh("systemctl start minigpt4-demo.target")
        until(one.healthy, "it is back", 120)
        until(lambda: len(processes(gateway(two), 8)) > 1, "it is asked again", 60)
    assert len(load.failed) <= 4, load.failed
    assert all(began < gone for began, _ in load.failed), load.failed


@pytest.mark.long
def test_more_processes_and_fewer_again_fail_no_request(
    several: Fleet, one: Host, tmp_path: Path
) -> None:
    with Load(front(one)) as load:
        ok(apply(several, tmp_path / "more", 3, queue=8))
        assert len(processes(front(one), 30)) == 3
        ok(apply(several, tmp_path / "fewer", 2, queue=8))
    assert load.failed == []
    assert one.show("ActiveState", unit(2)) == "inactive"
    assert not one.path(f"{HOME}/processes/2.env").exists()
    assert len(processes(front(one), 20)) == 2


@pytest.mark.long
def test_users_and_passwords_are_asked_for_and_never_shown(
    several: Fleet, one: Host, tmp_path: Path
) -> None:
    auth = tmp_path / "users"
    auth.write_text(f"# who may\nme:{SECRET}\n")
    auth.chmod(0o600)
    seen: list[str] = []
    watch = subprocess.Popen(
        [*one.lab.ssh_command(one.name), "while :; do ps -eo args; sleep 0.05; done"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    reader = threading.Thread(target=lambda: seen.append(watch.communicate()[0]))
    reader.start()
    try:
        done = ok(apply(several, tmp_path / "with", 2, auth_file=str(auth)))
    finally:
        watch.terminate()
        reader.join()
    kept = one.path(f"{HOME}/secrets/auth")
    assert kept.read_text() == f"me:{SECRET}\n"
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    logs = sorted(
        (fleets.ROOT / ".fleet" / "logs").glob("apply-*"), key=lambda p: p.stat().st_mtime
    )
    units = one.sh("systemctl cat 'minigpt4-demo@0' && systemctl show 'minigpt4-demo@0'")
    journal = one.sh("journalctl --no-pager -b")
    for text in (done.out, done.err, logs[-1].read_text(), units, journal, seen[0]):
        assert SECRET not in text
    again = ok(apply(several, tmp_path / "again", 2, auth_file=str(auth)))
    assert again.changed(one.name) == {}
    url = f"{front(one)}/v1/models"
    assert fleets.get(url).status_code == 401
    assert requests.get(url, auth=("me", SECRET), timeout=60).status_code == 200
    assert fleets.get(f"{front(one)}/healthz").status_code == 200
    ok(apply(several, tmp_path / "without", 2))
    assert not kept.exists()
    assert fleets.get(url).status_code == 200


def test_one_process_again_fails_no_request_and_leaves_nothing_of_several(
    several: Fleet, one: Host, two: Host
) -> None:
    with one.tunnel() as url, Load(url) as load:
        ok(several.apply())
    assert load.failed == []
    assert load.answered > 20
    for host in (one, two):
        left = host.sh(
            "find /etc /run /opt /var/cache /var/lib/gpufleet "
            r"-name '*minigpt4-front*' -o -name '*minigpt4-gateway*' -o -name 'minigpt4-demo@*' "
            "-o -name 'minigpt4-demo.target*' -o -path '/opt/minigpt4/processes*'"
        )
        assert left == ""
        assert host.show("ActiveState") == "active"
        assert host.show("UnitFileState") == "enabled"
        assert json.loads(host.sh("curl -s http://127.0.0.1:7860/healthz"))["status"] == "ok"
    plan = ok(several.plan())
    assert [plan.pending(host.name) for host in several.hosts] == [{}, {}]
