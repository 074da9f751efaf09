"""nginx before processes and before hosts, as each distribution has it: both configurations of
gpufleet's run on a host of each, over small web servers in place of the demo."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fleets
import pytest
import requests
from fleets import Host, ok, run, until, words

pytestmark = pytest.mark.long

FRONT, GATEWAY = 7860, 80

#: What answers as the demo does, as far as nginx can see: its port is who it is.
DEMO = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Demo(BaseHTTPRequestHandler):
    def do_GET(self):
        self.say()
    def do_POST(self):
        got = len(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(1 if "slow" in self.path else 0)
        self.say(got=got)
    def say(self, **more):
        body = json.dumps({"app_id": port, **more}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass

port = int(sys.argv[1])
ThreadingHTTPServer(("127.0.0.1", port), Demo).serve_forever()
"""

#: The part of the deploy that is looked at here: what tasks/demo.py and tasks/gateway.py run.
DEPLOY = """
from pathlib import Path

from gpufleet.demo.plan import TARGET, front
from gpufleet.gateway import operations
from gpufleet.gateway.plan import GATEWAY, Backend, Balancer, digest, files
from gpufleet.managed import operations as managed
from gpufleet.managed.plan import ManagedFile
from gpufleet.settings import parse

before = front(parse({"demo": {"bind": "0.0.0.0"}}, "host"), 2)
fleet = Balancer(
    name=GATEWAY,
    title="Gateway",
    listen="0.0.0.0:80",
    backends=(Backend("127.0.0.1:7860", 2), Backend("127.0.0.1:7870")),
    user="minigpt4",
    wanted_by="multi-user.target",
)
target = "[Unit]\\nDescription=All of them\\n[Install]\\nWantedBy=multi-user.target\\n"
operations.nginx(name="Install nginx")
managed.files(name="Target", wanted=[ManagedFile(f"/etc/systemd/system/{TARGET}", target)])
for one in (before, fleet):
    managed.files(name=f"Files of {one.name}", wanted=files(one))
    operations.balancing(name=f"Run {one.name}", balancer=one, configuration=digest(files(one)))
"""


@dataclass
class Server:
    """A host with both, and how to run the deploy on it again."""

    host: Host
    command: list[str | Path]

    @property
    def front(self) -> str:
        return f"http://{self.host.address}:{FRONT}"

    @property
    def gateway(self) -> str:
        return f"http://{self.host.address}:{GATEWAY}"


@pytest.fixture(scope="module", params=["debian:13", "ubuntu:22.04", "ubuntu:24.04"])
def server(
    request: pytest.FixtureRequest, can_boot: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    fleets.require_image(request.param)
    name = f"t-{os.getpid()}-{request.param.replace(':', '-').replace('.', '')}-nginx"
    folder = tmp_path_factory.mktemp("nginx")
    try:
        made = fleets.boot(name, 1, "--image", request.param)
        host = made.hosts[0]
        # What the concern base brings.
        apt = "apt-get -qq update && apt-get -qq -y --no-install-recommends install curl"
        host.sh(f"useradd --system minigpt4 && export DEBIAN_FRONTEND=noninteractive && {apt}", 180)
        host.path("/root/demo.py").write_text(DEMO)
        for port in (7861, 7862, 7870):
            host.sh(f"systemd-run --unit=demo-{port} python3 /root/demo.py {port}")
        (folder / "deploy.py").write_text(DEPLOY)
        inventory = made.inventory(folder)
        pyinfra = Path(sys.executable).with_name("pyinfra")
        yield Server(host, [pyinfra, inventory, folder / "deploy.py", "-y"])
    finally:
        fleets.take_down(name)


@pytest.fixture(scope="module")
def both(server: Server) -> Server:
    ok(run(*server.command))
    return server


def who(url: str, **options: Any) -> int:
    with requests.Session() as session:
        session.trust_env = False
        reply = session.get(f"{url}/config", timeout=30, **options)
    assert reply.status_code == 200, reply.text
    return int(reply.json()["app_id"])


def ask(url: str, size: int = 1000) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        return session.post(f"{url}/v1/chat/slow", data=b"x" * size, timeout=60)


def test_both_run_as_their_own_user_beside_a_web_server_that_is_left_off(both: Server) -> None:
    host = both.host
    for name in ("minigpt4-front", "minigpt4-gateway"):
        for unit in (f"{name}.service", f"{name}-watch.service"):
            assert host.show("ActiveState", unit) == "active"
            assert host.show("NRestarts", unit) == "0"
    assert host.show("ActiveState", "nginx.service") == "inactive"
    assert host.try_("systemctl is-enabled nginx").stdout.strip() == "disabled"
    masters = host.sh("ps -eo user,args | grep '[n]ginx: master'").splitlines()
    assert [line.split()[0] for line in masters] == ["minigpt4", "minigpt4"]
    said = host.sh(
        "journalctl -o cat -u 'minigpt4-*' -p warning; dpkg -L nginx | grep apparmor.d || :"
    )
    assert said == ""


def test_a_second_time_nothing_changes(both: Server) -> None:
    before = both.host.snapshot()
    ok(run(*both.command))
    assert fleets.touched(before, both.host.snapshot()) == []


def test_a_page_stays_and_new_visitors_are_spread(both: Server) -> None:
    for url, ports in ((both.front, {7861, 7862}), (both.gateway, {7861, 7862, 7870})):
        assert {who(url) for _ in range(40)} == ports
        with requests.Session() as session:
            session.trust_env = False
            stayed = {session.get(f"{url}/config", timeout=30).json()["app_id"] for _ in range(9)}
        assert len(stayed) == 1


def test_questions_go_to_whoever_has_the_fewest(both: Server) -> None:
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda _: ask(both.front), range(6)))
    assert Counter(answer.json()["app_id"] for answer in answers) == {7861: 3, 7862: 3}


def test_large_pictures_pass_and_too_large_ones_are_refused(both: Server) -> None:
    for url in (both.front, both.gateway):
        assert ask(url, 20 * 2**20).json()["got"] == 20 * 2**20
        refused = ask(url, 33 * 2**20)
        assert refused.status_code == 413
        words(refused.json()["error"]["message"], "over the limit of 32m")


def test_who_is_away_is_not_asked_and_asked_again_when_back(both: Server) -> None:
    host = both.host
    host.sh("systemctl stop demo-7861")
    try:
        assert {who(url) for url in (both.front, both.gateway) for _ in range(20)} == {7862, 7870}
        log = "journalctl -o cat -u minigpt4-front-watch"
        until(lambda: "not asked: 127.0.0.1:7861" in host.sh(log), "it is marked", 20)
        assert {ask(both.front).json()["app_id"] for _ in range(3)} == {7862}
    finally:
        host.sh("systemctl reset-failed; systemd-run --unit=demo-7861 python3 /root/demo.py 7861")
    until(lambda: 7861 in {who(both.front) for _ in range(20)}, "it is asked again", 30)


def test_it_ends_its_last_answer_when_it_is_told_to_go(both: Server) -> None:
    host = both.host
    balance = "runuser -u minigpt4 -- /etc/minigpt4-front/balance"
    host.sh("systemctl stop minigpt4-front-watch")
    try:
        with ThreadPoolExecutor(1) as client:
            asked = client.submit(ask, both.front)
            until(
                lambda: host.sh("ss -Htn state established sport = :7861 or sport = :7862"), "asked"
            )
            began = time.monotonic()
            host.sh(f"{balance} end")
            assert asked.result().status_code == 200
        assert time.monotonic() - began < 10
        assert not fleets.listens(FRONT, host.address)
    finally:
        host.sh("systemctl restart minigpt4-front minigpt4-front-watch")
    until(lambda: fleets.listens(FRONT, host.address), "it listens again", 20)
    assert json.loads(host.sh("curl -s http://127.0.0.1:7860/config"))["app_id"] in (7861, 7862)
