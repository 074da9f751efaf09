"""The demo on a host: what is packed, what its unit says, and when it must be restarted."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpufleet import ROOT
from gpufleet.catalog import Model
from gpufleet.demo.facts import Applications, DemoAnswer, DemoProcesses, DemoService
from gpufleet.demo.plan import (
    TEMPLATE,
    UNIT,
    Answer,
    Application,
    Service,
    address,
    addresses,
    beside,
    digest,
    front,
    instance,
    is_current,
    is_right,
    own_address,
    pack,
    parse,
    parse_answer,
    processes,
    unit,
    users,
)
from gpufleet.errors import FleetError
from gpufleet.managed.plan import ManagedFile
from gpufleet.settings import Settings
from gpufleet.settings import parse as parse_settings

INPUTS = {
    "environment": "e" * 16,
    "application": "a" * 16,
    "weights": "pico-0123456789abcdef",
    "config": "model:\n",
}


def settings(**data: Any) -> Settings:
    return parse_settings(data, "host")


class TestTheApplicationIsPacked:
    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        folder = tmp_path / "one" / "modeldemo"
        for path, text in {"__init__.py": "", "api.py": "x = 1\n", "pico/page.html": "<p>"}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        return folder

    def names(self, app: Application) -> list[str]:
        with tarfile.open(fileobj=io.BytesIO(app.archive)) as tar:
            return tar.getnames()

    def test_with_every_file_below_its_own_name(self, package: Path):
        assert self.names(pack(package)) == [
            "modeldemo/__init__.py",
            "modeldemo/api.py",
            "modeldemo/pico/page.html",
        ]

    def test_into_the_same_bytes_on_every_machine_and_day(self, package: Path, tmp_path: Path):
        first = pack(package)
        other = tmp_path / "two" / "modeldemo"
        shutil.copytree(package, other)
        for path in other.rglob("*"):
            os.utime(path, (0, 0))
            path.chmod(0o777)
        assert pack(other) == first

    def test_without_compiled_modules(self, package: Path):
        first = pack(package)
        for folder in (package, package / "pico"):
            (folder / "__pycache__").mkdir()
            (folder / "__pycache__" / "api.cpython-311.pyc").write_bytes(b"\x00")
        assert pack(package) == first

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: (p / "api.py").write_text("x = 2\n"),
            lambda p: (p / "api.py").rename(p / "apy.py"),
            lambda p: (p / "api.py").unlink(),
            lambda p: (p / "pico" / "more.py").touch(),
        ],
        ids=["edited", "renamed", "removed", "added"],
    )
    def test_under_another_digest_when_anything_in_it_changes(self, package: Path, change):
        first = pack(package)
        change(package)
        assert pack(package).digest != first.digest

    def test_so_that_it_unpacks_to_what_was_packed(self, package: Path, tmp_path: Path):
        (tmp_path / "x.tar").write_bytes(pack(package).archive)
        (tmp_path / "out").mkdir()
        subprocess.run(["tar", "-xf", tmp_path / "x.tar", "-C", tmp_path / "out"], check=True)
        for path in package.rglob("*.*"):
            copy = tmp_path / "out" / path.relative_to(package.parent)
            assert copy.read_bytes() == path.read_bytes()

    def test_as_it_is_in_the_checkout_and_python_can_read_it(self):
        app = pack(ROOT / "files" / "demo" / "modeldemo")
        assert {"modeldemo/__main__.py", "modeldemo/api.py"} <= set(self.names(app))
        with tarfile.open(fileobj=io.BytesIO(app.archive)) as tar:
            for member in tar:
                assert not member.name.endswith(".pyc")
                if member.name.endswith(".py"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    compile(stream.read(), member.name, "exec")


def test_a_digest_tells_its_parts_apart():
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("a", "") != digest("a")
    assert digest("a", "b") == digest("a", "b")
    assert re.fullmatch("[0-9a-f]{16}", digest())


Unit = Callable[..., tuple[ManagedFile, str]]


@pytest.fixture
def make(model: Model) -> Unit:
    """The unit and its revision for a host's inventory data."""

    def make(
        inputs: dict[str, str] | None = None,
        examples: str | None = None,
        several: bool = False,
        behind: bool = False,
        **data: Any,
    ):
        entry = model.model_copy(update={"examples": examples})
        given = {**INPUTS, **(inputs or {})}
        one = settings(**data)
        folder = one.root / "config"
        config = [
            ManagedFile(str(folder / name), given["config"])
            for name in ("minigpt4.yaml", "minigpt4_eval.yaml")
        ]
        return unit(one, entry, **{**given, "config": config}, several=several, behind=behind)

    return make


@pytest.mark.parametrize("name", INPUTS)
def test_the_revision_changes_with_each_thing_that_the_service_runs_or_reads(make: Unit, name: str):
    assert make({name: "x" * 16})[1] != make()[1]


@pytest.mark.parametrize(
    "data",
    [
        {"demo": {"port": 7861}},
        {"demo": {"bind": "0.0.0.0"}},
        {"demo": {"threads": 2}},
        {"demo": {"queue": 9}},
        {"demo": {"memory_max": "8G"}},
        {"demo": {"start_timeout": 60}},
        {"user": "other"},
        {"root": "/srv/x"},
        {"model": "other"},
        {"accelerator": "cuda"},
    ],
    ids=json.dumps,
)
def test_the_revision_changes_with_each_setting_of_the_service(make: Unit, data: dict[str, Any]):
    assert make(**data)[1] != make()[1]


@pytest.mark.parametrize(
    "data",
    [
        {"health": {"timeout": 5}},
        {"weights": {"bandwidth_kib": 100}},
        {"mirrors": {"site": "nju"}},
        {"base": {"packages": ["htop"]}},
        {"python_env": {"source": "index"}},
    ],
    ids=json.dumps,
)
def test_the_revision_does_not_change_with_what_the_service_does_not_see(
    make: Unit, data: dict[str, Any]
):
    assert make(**data)[1] == make()[1]


def directives(text: str) -> dict[str, list[tuple[str, str]]]:
    """A unit file as systemd reads it: section → (key, value)."""
    sections: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in text.splitlines():
        if not line or line.startswith(("#", ";")):
            continue
        if line.startswith("["):
            assert line not in sections
            current = sections[line] = []
        else:
            key, found, value = line.partition("=")
            assert found, line
            assert re.fullmatch("[A-Za-z]+", key), line
            current.append((key, value))
    return sections


Directives = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def service(make: Unit) -> Directives:
    """The [Service] section of the unit for a host's inventory data."""
    return lambda **data: directives(make(**data)[0].content)["[Service]"]


class TestTheUnit:
    @pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
    @pytest.mark.parametrize("bind", ["127.0.0.1", "0.0.0.0", "::1"])
    def test_has_its_sections_and_says_nothing_twice(self, make: Unit, accelerator: str, bind: str):
        file, _ = make(accelerator=accelerator, demo={"bind": bind})
        sections = directives(file.content)
        assert list(sections) == ["[Unit]", "[Service]", "[Install]"]
        lists = {"Environment", "SystemCallFilter"}
        for pairs in sections.values():
            counts = Counter(key for key, _ in pairs if key not in lists)
            assert {key for key, count in counts.items() if count > 1} == set()

    def test_is_roots_file_and_is_verified_by_systemd_before_it_lands(self, make: Unit):
        file, _ = make()
        assert file.path == f"/etc/systemd/system/{UNIT}"
        assert (file.mode, file.owner, file.group) == ("644", "root", "root")
        assert file.validate == "systemd-analyze verify {}"

    def test_starts_the_environments_own_interpreter_with_every_setting(self, service: Directives):
        data = {"port": 7861, "bind": "0.0.0.0", "threads": 3, "queue": 4, "max_seconds": 60}
        values = dict(service(root="/srv/x", model="other", demo=data))
        assert shlex.split(values["ExecStart"]) == [
            f"/srv/x/envs/{INPUTS['environment']}/bin/python",
            *("-m", "modeldemo", "serve"),
            *("--cfg-path", "/srv/x/config/minigpt4_eval.yaml"),
            *("--model-config", "/srv/x/config/minigpt4.yaml"),
            *("--model-id", "other"),
            *("--host", "0.0.0.0", "--port", "7861", "--share-port", "--device", "cpu"),
            *("--max-waiting", "4", "--max-seconds", "60"),
            *("--weights", INPUTS["weights"], "--threads", "3"),
            *("--examples", f"/srv/x/app/{INPUTS['application']}/modeldemo/pictures"),
        ]
        assert values["WorkingDirectory"] == f"/srv/x/app/{INPUTS['application']}"

    def test_lets_nobody_in_before_it_answers_where_a_gateway_can_send_them_elsewhere(
        self, service: Directives
    ):
        assert "--late" in shlex.split(dict(service(behind=True))["ExecStart"])
        assert "--late" not in shlex.split(dict(service())["ExecStart"])

    def test_leaves_the_threads_to_torch_unless_they_are_set(self, service: Directives):
        assert "--threads" not in dict(service())["ExecStart"]

    @pytest.mark.parametrize("examples", ["examples", "two words", "100%"])
    def test_names_the_folder_of_examples_as_one_word(self, service: Directives, examples: str):
        words = shlex.split(dict(service(examples=examples))["ExecStart"])
        assert words[-2:] == [
            "--examples",
            f"/opt/minigpt4/weights/pico-0123456789abcdef/{examples}".replace("%", "%%"),
        ]

    def test_runs_as_the_service_account_within_its_limits(self, service: Directives):
        values = dict(service(user="demo", demo={"memory_max": "24G", "start_timeout": 60}))
        assert values["User"] == values["Group"] == "demo"
        assert values["MemoryMax"] == "24G"
        assert values["TimeoutStartSec"] == "60"
        assert values["Type"] == "notify"
        assert values["Restart"] == "on-failure"

    def test_tells_the_process_its_revision_where_the_facts_look_for_it(self, make: Unit):
        file, revision = make()
        assert f"\nEnvironment=MODELDEMO_REVISION={revision}\n" in file.content

    def test_fetches_nothing_at_run_time(self, service: Directives):
        words = " ".join(value for key, value in service() if key == "Environment").split()
        assert {
            "HF_HUB_OFFLINE=1",
            "TRANSFORMERS_OFFLINE=1",
            "GRADIO_ANALYTICS_ENABLED=False",
        } <= set(words)
        assert len({word.split("=")[0] for word in words}) == len(words)

    @pytest.mark.parametrize(
        ("bind", "allowed"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False)]
    )
    def test_lets_only_this_host_in_when_it_listens_on_loopback(
        self, service: Directives, bind: str, allowed: bool
    ):
        values = dict(service(demo={"bind": bind}))
        assert (values["IPAddressAllow"] == "localhost") is allowed
        assert (values.get("IPAddressDeny") == "any") is allowed

    def test_sees_no_devices_on_a_cpu_host_and_the_cards_on_a_cuda_host(self, service: Directives):
        assert dict(service())["PrivateDevices"] == "yes"
        # ProtectClock too means a list of devices, and so no others, before systemd 253.
        lists = {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock"}
        assert not lists & dict(service(accelerator="cuda")).keys()

    def test_may_use_a_card_as_its_driver_does(self, service: Directives):
        """Its files may be the group video's alone, and it binds threads and memory to nodes."""
        found = {name: service(accelerator=name) for name in ("cpu", "cuda")}
        filters = {
            name: [value for key, value in lines if key == "SystemCallFilter"]
            for name, lines in found.items()
        }
        assert filters["cpu"] == ["@system-service", "~@privileged @resources"]
        assert filters["cuda"] == ["@system-service", "~@privileged"]
        assert dict(found["cuda"])["SupplementaryGroups"] == "video"
        assert "SupplementaryGroups" not in dict(found["cpu"])

    @pytest.mark.parametrize(
        "key", ["NoNewPrivileges", "ProtectHome", "PrivateTmp", "RestrictSUIDSGID"]
    )
    def test_is_locked_down(self, service: Directives, key: str):
        values = dict(service())
        assert values[key] == "yes"
        assert values["ProtectSystem"] == "strict"
        assert values["CapabilityBoundingSet"] == ""

    def test_holds_no_percent_sign_that_systemd_would_expand(self, make: Unit):
        """Addresses may name an interface: fe80::1%eth0."""
        file, _ = make(demo={"bind": "fe80::1%eth0"})
        assert re.findall(r"(?<!%)%(?!%)", file.content.replace("%%", "")) == []

    def test_has_root_make_the_gpus_device_files_and_goes_on_without(self, service: Directives):
        """The service's own account may not, and nobody else need have asked since the boot."""
        before = dict(service(accelerator="cuda"))["ExecStartPre"]
        assert before.startswith("-+/bin/sh -c ")
        assert "nvidia-modprobe -u" in before
        assert "ExecStartPre" not in dict(service(accelerator="cpu"))

    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
    @pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
    def test_is_good_to_systemd_itself(self, make: Unit, tmp_path: Path, accelerator: str):
        root = Path("/") / str(tmp_path.resolve())[1:]
        python = root / "envs" / INPUTS["environment"] / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to("/bin/true")
        file, _ = make(root=str(root), accelerator=accelerator, user="daemon")
        path = tmp_path / UNIT
        path.write_text(file.content)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", path],
            capture_output=True,
            text=True,
            check=False,
        )
        said = [line for line in done.stderr.splitlines() if UNIT in line]
        assert (done.returncode, said) == (0, [])


SHOWN = """\
ActiveState=active
UnitFileState=enabled
NeedDaemonReload=no
MemoryCurrent=734003200
ActiveEnterTimestamp=Fri 2026-11-20 10:00:00 UTC
revision_on_disk=r1
revision_running=r1
health={"status": "ok", "model": "a=b"}
""".splitlines()


def test_what_systemd_says_is_read():
    assert parse(SHOWN) == Service(
        active="active",
        enabled=True,
        needs_reload=False,
        revision_on_disk="r1",
        revision_running="r1",
        since="Fri 2026-11-20 10:00:00 UTC",
        memory_bytes=734003200,
        health='{"status": "ok", "model": "a=b"}',
    )


def test_a_host_without_the_unit_has_an_inactive_service():
    lines = ["ActiveState=inactive", "UnitFileState=", "MemoryCurrent=[not set]", "health="]
    assert parse(lines) == Service("inactive", False, False, None, None)
    assert parse([]) == parse(lines) == DemoService.default()


def test_the_process_that_was_asked_for_is_current():
    assert is_current(parse(SHOWN), "r1")


@pytest.mark.parametrize(
    "line",
    [
        "ActiveState=activating",
        "ActiveState=failed",
        "ActiveState=inactive",
        "UnitFileState=disabled",
        "UnitFileState=masked",
        "NeedDaemonReload=yes",
        "revision_running=r0",
        "revision_running=",
    ],
)
def test_any_other_state_is_not_current(line: str):
    assert not is_current(parse([*SHOWN, line]), "r1")


def test_a_unit_that_was_written_but_not_restarted_is_not_current():
    assert not is_current(parse([*SHOWN, "revision_on_disk=r2"]), "r2")


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ('{"choices": [{"message": {"content": "Red."}}]}', Answer("Red.")),
        (
            '{"error": {"message": "the queue is full", "type": "overloaded"}}',
            Answer(None, "the queue is full"),
        ),
        (
            "curl: (7) Failed to connect\nto 127.0.0.1",
            Answer(None, "curl: (7) Failed to connect to 127.0.0.1"),
        ),
        ("", Answer(None, "nothing answered")),
        ("<html>502</html>", Answer(None, "<html>502</html>")),
        ('{"choices": []}', Answer(None, '{"choices": []}')),
        ('{"error": "broken"}', Answer(None, '{"error": "broken"}')),
        ("[1]", Answer(None, "[1]")),
        ("null", Answer(None, "null")),
        ("7", Answer(None, "7")),
    ],
)
def test_what_the_demo_printed_is_an_answer_or_the_reason_why_there_is_none(
    output: str, answer: Answer
):
    assert parse_answer(output) == answer


def test_a_long_complaint_is_cut():
    assert len(parse_answer("x" * 10_000).problem) == 200


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("The circle is red.", "The circle is red.", True),
        ("the CIRCLE  is red", "The circle is red.", True),
        (" The circle\nis red. ", "The circle is red.", True),
        ("The circle is blue.", "The circle is red.", False),
        ("The circle is red. It is big.", "The circle is red.", False),
        ("Thecircle is red.", "The circle is red.", False),
        ("", "The circle is red.", False),
        ("Any words", None, True),
        (" \n", None, False),
    ],
)
def test_answers_are_right_but_for_case_blanks_and_the_last_full_stop(
    answer: str, expected: str | None, same: bool
):
    assert is_right(answer, expected) is same


@pytest.mark.parametrize(
    ("bind", "asked"),
    [
        ("127.0.0.1", "http://127.0.0.1:7860"),
        ("0.0.0.0", "http://127.0.0.1:7860"),
        ("10.1.2.3", "http://10.1.2.3:7860"),
        ("::1", "http://[::1]:7860"),
        ("::", "http://[::1]:7860"),
    ],
)
def test_the_demo_is_asked_where_it_can_be_reached_from_its_own_host(bind: str, asked: str):
    assert address(settings(demo={"bind": bind})) == asked


class TestHowManyProcesses:
    @pytest.mark.parametrize(
        ("data", "gpus", "count"),
        [
            ({}, 0, 1),
            ({"demo": {"processes": 3}}, 0, 3),
            ({"accelerator": "cuda"}, 8, 8),
            ({"accelerator": "cuda"}, 1, 1),
            ({"accelerator": "cuda"}, 0, 1),  # preflight says what is wrong with that
            ({"accelerator": "cuda", "demo": {"processes": 1}}, 8, 1),
            ({"accelerator": "cuda", "runtime": "upstream"}, 8, 1),
        ],
        ids=str,
    )
    def test_are_one_a_gpu_and_one_on_cpu_unless_set(self, data, gpus: int, count: int):
        assert processes(settings(**data), gpus) == count

    def test_are_not_several_of_the_upstream_runtime(self):
        with pytest.raises(FleetError, match="processes is 2: the upstream runtime runs one"):
            processes(settings(runtime="upstream", demo={"processes": 2}), 0)


class TestSeveralProcesses:
    @pytest.fixture
    def file(self, make: Unit) -> Callable[..., ManagedFile]:
        return lambda **data: make(several=True, **data)[0]

    def environment(self, count: int, gpus: int, **data: Any) -> list[dict[str, str]]:
        found = [f for f in beside(settings(**data), count, gpus) if f.path.endswith(".env")]
        assert [f.path for f in found] == [f"/opt/minigpt4/processes/{i}.env" for i in range(count)]
        return [dict(line.split("=") for line in f.content.splitlines()) for f in found]

    def test_share_the_gpus_evenly_and_have_ports_of_their_own(self):
        found = self.environment(3, 2, accelerator="cuda")
        assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["0", "1", "0"]
        assert [one["PORT"] for one in found] == ["7861", "7862", "7863"]

    def test_see_no_gpu_named_on_cpu(self):
        assert self.environment(2, 0, demo={"port": 9000}) == [{"PORT": "9001"}, {"PORT": "9002"}]

    def test_are_instances_of_one_unit_that_only_this_host_reaches(self, file):
        text = file(demo={"bind": "0.0.0.0"}).content
        values = dict(directives(text)["[Service]"])
        assert file().path == f"/etc/systemd/system/{TEMPLATE}"
        assert values["EnvironmentFile"] == "/opt/minigpt4/processes/%i.env"
        assert values["ExecStart"].endswith(" --host 127.0.0.1 --port ${PORT}")
        assert values["ExecStart"].count("--port") == 1
        assert values["IPAddressDeny"] == "any"
        assert directives(text)["[Install]"] == [("WantedBy", "minigpt4-demo.target")]
        assert ("PartOf", "minigpt4-demo.target") in directives(text)["[Unit]"]

    def test_number_gpus_as_nvidia_smi_does(self, file):
        words = [v for k, v in directives(file(accelerator="cuda").content)["[Service]"]]
        assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in words

    def test_are_asked_one_by_one_and_through_what_stands_before_them(self):
        asked = addresses(settings(demo={"bind": "0.0.0.0"}), 2)
        assert asked == [f"http://127.0.0.1:{port}" for port in (7861, 7862, 7860)]
        assert addresses(settings(), 1) == ["http://127.0.0.1:7860"]

    def test_have_the_demos_own_address_in_front_of_them(self):
        balancer = front(settings(demo={"bind": "0.0.0.0", "port": 9000}), 2)
        assert balancer.listen == "0.0.0.0:9000"
        assert [one.address for one in balancer.backends] == ["127.0.0.1:9001", "127.0.0.1:9002"]
        assert own_address(balancer, instance(5)) == "127.0.0.1:9006"

    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
    def test_are_good_to_systemd_itself(self, file, tmp_path: Path):
        python = tmp_path / "envs" / INPUTS["environment"] / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to("/bin/true")
        data = {"root": str(tmp_path), "user": "daemon", "demo": {"auth_file": "x"}}
        path = tmp_path / instance(0)
        path.write_text(file(**data).content)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", path],
            capture_output=True,
            text=True,
            check=False,
        )
        said = [line for line in done.stderr.splitlines() if "minigpt4-demo@" in line]
        assert (done.returncode, said) == (0, [])


def test_one_process_on_a_host_of_many_gpus_sees_the_first_alone(service: Directives):
    words = [value for key, value in service(accelerator="cuda") if key == "Environment"]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0" in words


class TestUsersAndPasswords:
    def test_are_named_by_their_place_and_never_said_in_the_unit(self, service: Directives):
        values = dict(service(demo={"auth_file": "~/my-secret-file"}))
        assert values["LoadCredential"] == "auth:/opt/minigpt4/secrets/auth"
        assert values["ExecStart"].endswith(" --auth-file ${CREDENTIALS_DIRECTORY}/auth")
        assert "my-secret-file" not in str(values)

    def test_are_asked_of_nobody_unless_there_are_any(self, service: Directives):
        values = dict(service())
        assert "LoadCredential" not in values
        assert "--auth-file" not in values["ExecStart"]

    def test_travel_without_comments_and_blank_lines(self):
        kept = "a:pass word\nb:x:y in it\n"
        assert users("# who\n\n a:pass word \nb:x:y in it\n", "f") == kept

    @pytest.mark.parametrize(
        ("line", "what"),
        [
            ("hunter2", "write USER:PASSWORD"),
            (":hunter2", "write USER:PASSWORD"),
            ("hunter2:", "write USER:PASSWORD"),
            ("me:hunter2", "the password has under 8 characters; take a longer one"),
            ("a:hunter2hunter2", "this user was named before"),
        ],
    )
    def test_that_cannot_be_used_are_refused_without_being_shown(self, line: str, what: str):
        with pytest.raises(FleetError) as refused:
            users(f"a:long enough\n{line}\n", "/home/me/users")
        assert str(refused.value) == f"demo.auth_file /home/me/users line 2: {what}"

    def test_are_refused_where_there_are_none(self):
        with pytest.raises(FleetError, match="no user in it"):
            users("# nobody yet\n", "users")


def several(*, old: int | None = None, down: int | None = None, beside: str = "") -> Service:
    """Two processes, one of which may be `old` or `down`, as the facts see them."""
    lines = []
    for number in range(2):
        lines += [f"unit={instance(number)}", *SHOWN]
        lines += ["revision_running=r0"] if number == old else []
        lines += ["ActiveState=failed"] if number == down else []
    return DemoProcesses().process([*lines, "unit=", "target=on", "health={}", beside])


class TestSeveralAreOneService:
    def test_that_is_current_when_each_is(self):
        service = several()
        assert is_current(service, "r1")
        assert [one.name for one in service.processes] == [instance(0), instance(1)]
        assert (service.active, service.enabled, service.health) == ("active", True, "{}")
        assert service.memory_bytes == 2 * 734003200

    @pytest.mark.parametrize("number", [0, 1])
    def test_that_is_down_when_one_is(self, number: int):
        service = several(down=number)
        assert service.active == "failed"
        assert not is_current(service, "r1")

    @pytest.mark.parametrize("number", [0, 1])
    def test_that_is_old_when_one_is(self, number: int):
        service = several(old=number)
        assert (service.revision_running, service.revision_on_disk) == ("r0", "r1")
        assert not is_current(service, "r1")

    def test_that_is_not_current_with_what_another_number_left(self):
        service = several(beside=f"leftover={instance(2)}")
        assert service.leftover == (instance(2),)
        assert not is_current(service, "r1")

    def test_that_does_not_start_at_boot_without_its_target(self):
        lines = [f"unit={instance(0)}", *SHOWN, "unit="]
        assert not DemoService().process(lines).enabled


def test_one_process_is_not_current_while_several_are_left():
    assert not is_current(parse([*SHOWN, "leftover=minigpt4-demo.target"]), "r1")


def test_applications_are_listed_by_digest(tmp_path: Path, sh):
    root = tmp_path / "the root"
    for name in ("a1", "b2"):
        (root / "app" / name / "modeldemo" / "__pycache__").mkdir(parents=True)
        (root / "app" / name / "modeldemo" / "b.py").write_text(name)
        (root / "app" / name / "modeldemo" / "a.py").write_text("a")
    packed = pack(root / "app" / "a1" / "modeldemo")
    (root / "app" / "a1" / "modeldemo" / "__pycache__" / "a.pyc").write_text("compiled")
    (root / "app" / "a file").touch()
    done = sh(Applications().command(root=str(root)))
    assert (done.returncode, done.stderr) == (0, "")
    found = Applications().process(done.stdout.splitlines())
    assert found.keys() == {"a1", "b2"}
    # What is packed here is recognised there, and nothing else is.
    assert found["a1"] == packed.checksum != found["b2"]
    assert sh(Applications().command(root=str(tmp_path / "none"))).stdout == ""


class Demo(BaseHTTPRequestHandler):
    """Answers like the demo's API, with what it was asked."""

    def do_POST(self) -> None:
        self.server.users.append(self.headers.get("Authorization"))
        self.server.asked.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        body = json.dumps({"choices": [{"message": {"content": "Two."}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here; preflight installs it on hosts")
class TestTheQuestionThatAHostAsksItself:
    @pytest.fixture
    def demo(self) -> Iterator[ThreadingHTTPServer]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Demo)
        server.asked, server.users = [], []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.server_close()

    def ask(self, sh, port: int, picture: Path | None, question: str, users: str = "") -> Answer:
        command = DemoAnswer().command(
            address=f"http://127.0.0.1:{port}",
            model="pico",
            picture=str(picture) if picture else None,
            question=question,
            timeout=10,
            users=users,
        )
        done = sh(command)
        assert (done.returncode, done.stderr) == (0, "")
        return DemoAnswer().process(done.stdout.splitlines())

    @pytest.mark.parametrize(
        "question",
        [
            "How many shapes are there?",
            'What\'s "this" \\ $HOME `id` %s & é 图?',
            "Is this a PICTURE of a cat?",
        ],
        ids=["plain", "letters", "the marker itself"],
    )
    def test_holds_the_picture_and_the_words_as_they_are(
        self, sh, demo: ThreadingHTTPServer, tmp_path: Path, question: str
    ):
        picture = tmp_path / "health &.png"
        picture.write_bytes(os.urandom(300_000))  # more than a command line may hold
        assert self.ask(sh, demo.server_port, picture, question) == Answer("Two.")
        ((path, body),) = demo.asked
        assert path == "/v1/chat/completions"
        request = json.loads(body)
        assert (request["model"], request["temperature"]) == ("pico", 0)
        url, words = request["messages"][0]["content"]
        assert words == {"type": "text", "text": question}
        prefix, _, data = url["image_url"]["url"].partition(",")
        assert prefix == "data:image/png;base64"
        assert base64.b64decode(data) == picture.read_bytes()

    @pytest.mark.parametrize("question", ["Sort a list", "Is this a PICTURE?"])
    def test_is_words_alone_for_a_model_without_pictures(
        self, sh, demo: ThreadingHTTPServer, question: str
    ):
        assert self.ask(sh, demo.server_port, None, question) == Answer("Two.")
        ((_, body),) = demo.asked
        assert json.loads(body)["messages"][0]["content"] == [{"type": "text", "text": question}]

    def test_is_asked_as_the_first_user_of_the_hosts_file(
        self, sh, demo: ThreadingHTTPServer, tmp_path: Path
    ):
        (tmp_path / "x.png").write_bytes(b"x")
        word = 'a:"quoted" \\ word $(id) `id`'
        (tmp_path / "auth").write_text(f"me:{word}\nyou:other\n")
        asked = self.ask(sh, demo.server_port, tmp_path / "x.png", "?", str(tmp_path / "auth"))
        assert asked == Answer("Two.")
        self.ask(sh, demo.server_port, tmp_path / "x.png", "?")
        basic = "Basic " + base64.b64encode(f"me:{word}".encode()).decode()
        assert demo.users == [basic, None]

    def test_gets_the_reason_when_nobody_listens(
        self, sh, demo: ThreadingHTTPServer, tmp_path: Path
    ):
        (tmp_path / "x.png").write_bytes(b"x")
        answer = self.ask(sh, 1, tmp_path / "x.png", "?")
        assert answer.text is None
        assert "curl: (7)" in answer.problem
