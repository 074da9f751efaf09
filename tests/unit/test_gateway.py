"""nginx before processes and hosts: who is behind it, what it is told, and who is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpufleet import ROOT
from gpufleet.demo.plan import front
from gpufleet.errors import FleetError
from gpufleet.gateway.facts import BalancerState
from gpufleet.gateway.plan import (
    MAX_BODY,
    Backend,
    Balancer,
    Member,
    Running,
    digest,
    files,
    gateway,
    is_right,
    join,
    parse,
    paths,
)
from gpufleet.settings import parse as parse_settings

OPEN = {"bind": "0.0.0.0"}


def member(name: str, **data: Any) -> Member:
    return Member(name, f"{name}.example.net", parse_settings({"demo": OPEN, **data}, name))


def content(balancer: Balancer, file: str) -> str:
    (found,) = (one.content for one in files(balancer) if one.path.endswith(file))
    return found


@pytest.fixture
def processes() -> Balancer:
    return front(parse_settings({"demo": {"processes": 3}}, "host"), 3)


@pytest.fixture
def fleet() -> Balancer:
    hosts = [member("a"), member("b", demo={**OPEN, "processes": 8})]
    return gateway(hosts[0], hosts)


class TestAGateway:
    def test_asks_every_host_of_the_model_at_its_own_address_by_its_processes(self):
        hosts = [
            member("a"),
            member("b", demo={**OPEN, "port": 7900, "processes": 8}),
            member("c", demo={"bind": "10.1.2.3"}),
            member("d", demo={"bind": "fe80::1"}),
        ]
        assert gateway(hosts[0], hosts).backends == (
            Backend("127.0.0.1:7860"),
            Backend("b.example.net:7900", 8),
            Backend("10.1.2.3:7860"),
            Backend("[fe80::1]:7860"),
        )

    def test_asks_no_host_of_another_model_or_without_the_api(self):
        hosts = [member("a"), member("b", model="other"), member("c", runtime="upstream")]
        assert gateway(hosts[0], hosts).backends == (Backend("127.0.0.1:7860"),)

    def test_listens_where_it_is_set_to(self):
        one = member("a", gateway={"bind": "::", "port": 80})
        assert gateway(one, [one]).listen == "[::]:80"

    def test_reaches_a_demo_of_its_own_host_that_listens_on_loopback(self):
        one = member("a", demo={})
        assert gateway(one, [one]).backends == (Backend("127.0.0.1:7860"),)

    def test_refuses_another_host_that_listens_on_loopback_in_one_line(self):
        hosts = [member("a"), member("b", demo={})]
        with pytest.raises(FleetError) as refused:
            gateway(hosts[0], hosts)
        line = str(refused.value)
        assert line.startswith("b: its demo listens on 127.0.0.1 only")
        assert "the gateway a" in line
        assert "set its demo.bind" in line
        assert "\n" not in line

    def test_refuses_the_port_of_its_own_demo(self):
        one = member("a", gateway={"port": 7860})
        with pytest.raises(FleetError, match=r"^a: gateway.port is 7860, which demo.port is too"):
            gateway(one, [one])


def test_addresses_are_joined_with_ports():
    assert (join("10.0.0.1", 1), join("::1", 2)) == ("10.0.0.1:1", "[::1]:2")


class TestItsFiles:
    def test_are_the_ones_that_are_removed(self, fleet: Balancer):
        assert tuple(file.path for file in files(fleet)) == paths("minigpt4-gateway")

    def test_touch_nothing_of_another_nginx(self, fleet: Balancer, processes: Balancer):
        for balancer in (fleet, processes):
            for file in files(balancer):
                assert not file.path.startswith("/etc/nginx")
                assert balancer.name in file.path
                assert (file.owner, file.group) == ("root", "root")

    def test_are_checked_by_who_reads_them(self, fleet: Balancer):
        checks = [file.validate or "" for file in files(fleet)]
        assert checks[0] == "sh -n {}"
        assert "nginx -t" in checks[2]
        assert checks[3] == checks[4] == "systemd-analyze verify {}"

    def test_probe_every_backend(self, processes: Balancer):
        asked = re.findall(r'url = "(.*)"', content(processes, "probes"))
        assert asked == [f"http://127.0.0.1:{port}/healthz" for port in (7861, 7862, 7863)]

    @pytest.mark.parametrize("kind", ["page", "api"])
    def test_have_every_backend_for_page_and_api_where_it_can_be_marked(
        self, fleet: Balancer, kind: str
    ):
        text = content(fleet, "nginx.conf")
        block = re.search(rf"upstream {kind} \{{(.*?)\}}", text, re.DOTALL)
        assert block is not None
        # As the marks of `balance` expect it: one a line, the address right after the word.
        servers = re.findall(r"^ *server (\S+) weight=(\d+) max_fails=1", block[1], re.M)
        assert servers == [("127.0.0.1:7860", "1"), ("b.example.net:7860", "8")]

    def test_never_send_a_question_twice(self, fleet: Balancer, processes: Balancer):
        for balancer in (fleet, processes):
            text = content(balancer, "nginx.conf")
            assert "non_idempotent" not in text
            # Nor on a connection that may be closed under it.
            assert not re.search(r"^ *keepalive ", text, re.M)

    def test_let_in_what_the_application_lets_in_and_little_more(self):
        sys.path.insert(0, str(ROOT / "files" / "demo"))
        try:
            from modeldemo.images import MAX_BYTES
        finally:
            sys.path.pop(0)
        own = MAX_BYTES * 4 // 3 + 4 * 1024 * 1024
        limit = int(MAX_BODY.removesuffix("m")) * 2**20
        assert own <= limit < own + 2 * 2**20

    def test_give_each_process_its_own_figures_and_say_where(self, processes: Balancer):
        text = content(processes, "nginx.conf")
        found = re.findall(r"location = /metrics/(\d) \{\s+proxy_pass (\S+);", text)
        assert found == [
            (str(number), f"http://127.0.0.1:{7861 + number}/metrics") for number in range(3)
        ]

    def test_cookies_of_front_and_gateway_are_not_the_same(
        self, fleet: Balancer, processes: Balancer
    ):
        cookies = {
            re.findall(r"\$cookie_(\w+)", content(one, "nginx.conf"))[0]
            for one in (fleet, processes)
        }
        assert cookies == {"minigpt4_gateway", "minigpt4_front"}

    def test_may_take_a_low_port_only_where_it_is_asked_for(self, fleet: Balancer):
        unit = "minigpt4-gateway.service"
        assert "CAP_NET_BIND_SERVICE" not in content(fleet, unit)
        low = replace(fleet, listen="0.0.0.0:80")
        assert "AmbientCapabilities=CAP_NET_BIND_SERVICE" in content(low, unit)

    def test_keep_a_front_on_loopback_to_this_host(self, fleet: Balancer, processes: Balancer):
        assert "IPAddressDeny=any" in content(processes, "minigpt4-front.service")
        assert "IPAddressDeny" not in content(fleet, "minigpt4-gateway.service")

    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
    @pytest.mark.parametrize("kind", ["", "-watch"])
    def test_are_good_to_systemd_itself(self, fleet: Balancer, tmp_path: Path, kind: str):
        for file in files(replace(fleet, user="daemon")):
            if file.path.endswith(".service"):
                program = "/bin/true" if "/balance" in file.content else ""
                assert program
                text = re.sub(r"/etc/\S+/balance", program, file.content)
                (tmp_path / Path(file.path).name).write_text(text)
        path = tmp_path / f"minigpt4-gateway{kind}.service"
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", path],
            capture_output=True,
            text=True,
            check=False,
        )
        said = [line for line in done.stderr.splitlines() if "minigpt4" in line]
        assert (done.returncode, said) == (0, [])


STATE = ["there=/etc/x", "active=yes", "enabled=yes", "fresh=yes", "watch_fresh=yes", "loaded=c1"]


class TestWhatRuns:
    def test_is_read(self):
        assert parse(STATE) == Running(True, True, True, True, "c1", ("/etc/x",))
        assert parse([]) == BalancerState.default() == Running()

    def test_is_right_with_the_configuration_in_force(self):
        assert is_right(parse(STATE), "c1")
        assert not is_right(parse(STATE), "c2")

    @pytest.mark.parametrize(
        "line", ["active=no", "enabled=no", "fresh=no", "watch_fresh=no", "loaded="]
    )
    def test_is_not_right_otherwise(self, line: str):
        assert not is_right(parse([*STATE, line]), "c1")

    def test_is_known_by_the_configuration_alone(self, fleet: Balancer):
        assert digest(files(fleet)) == digest(files(replace(fleet, title="another")))
        assert digest(files(fleet)) != digest(files(replace(fleet, listen="0.0.0.0:1")))


def test_a_process_gets_longer_for_its_last_answer_than_any_answer_may_take():
    balancer = front(parse_settings({"demo": {"max_seconds": 900}}, "host"), 2)
    assert balancer.drain_seconds > 900
    assert f"+ {balancer.drain_seconds}))" in content(balancer, "balance")
