"""Runs of the real pyinfra command on this machine, through the local connector."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpufleet import ROOT
from gpufleet.errors import FleetError, UsageError
from gpufleet.run import pyinfra, state

DEPLOY = """
import io
from pyinfra import host
from pyinfra.api import DeployError, deploy
from pyinfra.facts.files import File
from pyinfra.operations import files, server
from gpufleet.run.events import emit
from gpufleet.run.only import selected

OUT = {out!r}

@deploy("base")
def base():
    wrote = files.put(name="Write one", src=io.StringIO("1"), dest=OUT + "/one")
    server.shell(name="After one", commands=["echo ran >> " + OUT + "/ran"], _if=wrote.did_change)
    server.shell(name="Unless two", commands=["touch " + OUT + "/two"],
                 _if=lambda: not host.get_fact(File, path=OUT + "/two"))

@deploy("kernel")
def kernel():
    {kernel}

if selected("base"):
    base()
if selected("kernel"):
    kernel()
"""


@pytest.fixture
def fleet(tmp_path):
    """Writes an inventory and a deploy; returns what apply and plan need."""

    def make(kernel: str = "pass", hosts: str = '["@local"]') -> dict[str, Path]:
        (tmp_path / "out").mkdir(exist_ok=True)
        deploy = tmp_path / "deploy.py"
        deploy.write_text(DEPLOY.format(out=str(tmp_path / "out"), kernel=kernel))
        (tmp_path / "inv.py").write_text(f"hosts = {hosts}\n")
        return {"inventory": tmp_path / "inv.py", "deploy": deploy}

    return make


def written(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "out").iterdir()}


def test_apply_changes_what_is_wrong_and_then_nothing(fleet, tmp_path):
    first = pyinfra.apply(**fleet())
    assert (first.errors, first.exit_code) == ((), 0)
    assert first.hosts[0].concerns["base"].changed == ["Write one", "After one", "Unless two"]
    assert written(tmp_path) == {"one", "ran", "two"}
    second = pyinfra.apply(**fleet())
    assert (second.exit_code, second.changed) == (0, 0)
    assert (tmp_path / "out" / "ran").read_text() == "ran\n"


def test_plan_lists_what_apply_would_change_and_changes_nothing(fleet, tmp_path):
    before = pyinfra.plan(**fleet())
    assert before.exit_code == 3
    assert before.hosts[0].pending == [
        ("base", "Write one"),
        ("base", "After one"),
        ("base", "Unless two"),
    ]
    assert written(tmp_path) == set()
    pyinfra.apply(**fleet())
    after = pyinfra.plan(**fleet())
    assert (after.exit_code, after.hosts[0].pending) == (0, [])


def test_plan_knows_what_depends_on_a_fact_alone(fleet, tmp_path):
    pyinfra.apply(**fleet())
    (tmp_path / "out" / "two").unlink()
    drifted = pyinfra.plan(**fleet())
    assert (drifted.exit_code, drifted.hosts[0].pending) == (3, [("base", "Unless two")])


def test_only_leaves_the_other_concerns_alone(fleet, tmp_path):
    result = pyinfra.apply(
        **fleet('server.shell(name="K", commands=["touch " + OUT + "/k"])'), only=["kernel"]
    )
    assert list(result.hosts[0].concerns) == ["kernel"]
    assert written(tmp_path) == {"k"}


def test_a_host_that_fails_does_not_stop_the_others(fleet, tmp_path):
    hosts = '["@local", ("gone", {"ssh_hostname": "127.0.0.1", "ssh_port": 1, "ssh_user": "ops"})]'
    result = pyinfra.apply(**fleet(hosts=hosts))
    assert result.exit_code == 1
    assert result.failed == ["gone"]
    assert result.errors == (
        "gone: cannot connect as ops@127.0.0.1:1: nothing answers there; check the address, that "
        "the host is on, and that sshd listens on this port",
    )
    assert written(tmp_path) == {"one", "ran", "two"}


def test_an_operation_that_fails_is_one_line_with_advice(fleet):
    result = pyinfra.apply(
        **fleet(
            "server.shell(name='Copy', commands=["
            "\"echo copying; echo 'cp: /x: No space left on device' >&2; exit 1\"])"
        )
    )
    assert result.exit_code == 1
    assert result.errors == (
        "@local: kernel: Copy: cp: /x: No space left on device; free space on the host",
    )
    assert result.hosts[0].concerns["base"].state == "ok"
    assert result.hosts[0].concerns["kernel"].state == "failed"


def test_findings_are_all_reported_and_nothing_changes(fleet, tmp_path):
    kernel = (
        'emit("finding", host=host.name, concern="preflight", message="disk full: free some");'
        ' emit("finding", host=host.name, concern="preflight", message="no GPU: add one");'
        ' raise DeployError("preflight, nothing was changed")'
    )
    result = pyinfra.apply(**fleet(kernel))
    assert result.exit_code == 1
    assert result.errors == (
        "@local: preflight: disk full: free some",
        "@local: preflight: no GPU: add one",
    )
    assert written(tmp_path) == set()


def test_every_invalid_setting_of_every_host_is_reported_before_any_connection(fleet, tmp_path):
    hosts = '[("a", {"accelerator": "tpu"}), ("@local", {"demo": {"prot": 1}})]'
    result = pyinfra.apply(**fleet(hosts=hosts))
    assert result.exit_code == 2
    assert len(result.errors) == 2
    assert result.errors[0].startswith("a: setting accelerator:")
    assert result.errors[1].startswith("@local: unknown setting demo.prot, did you mean demo.port?")
    assert written(tmp_path) == set()


def test_a_key_that_is_not_there_is_invalid_input(fleet):
    hosts = '[("a", {"ssh_key": "/nowhere/key"})]'
    result = pyinfra.apply(**fleet(hosts=hosts))
    assert (result.exit_code, result.errors) == (
        2,
        ("a: setting ssh_key: no such file /nowhere/key",),
    )


def test_a_limit_that_means_no_host_changes_nothing(fleet, tmp_path):
    result = pyinfra.apply(**fleet(), limit=["@local", "gpu9"])
    assert result.exit_code == 2
    assert result.errors == ("--limit gpu9: no such host or group; hosts: @local",)
    assert written(tmp_path) == set()


def test_an_inventory_without_hosts_is_invalid(fleet):
    result = pyinfra.plan(**fleet(hosts="3"))
    assert result.exit_code == 2
    assert "no hosts" in result.errors[0]


def test_an_exception_in_an_inventory_is_one_line(fleet, tmp_path):
    result = pyinfra.plan(**fleet(hosts="[1 / 0]"))
    assert result.exit_code == 2
    assert result.errors == (f"{tmp_path}/inv.py line 1: ZeroDivisionError: division by zero",)


def test_an_exception_in_the_deploy_stops_the_run_with_one_line(fleet, tmp_path):
    result = pyinfra.apply(**fleet('raise ValueError("odd\\nvalue")'))
    assert result.exit_code == 1
    assert len(result.errors) == 1
    assert "ValueError: odd" in result.errors[0]
    assert written(tmp_path) == set()


def test_values_beside_an_inventory_win_over_the_checkouts(fleet, tmp_path):
    options = fleet('server.shell(name=f"Threads {host.data.demo}", commands=["true"])')
    data = tmp_path / "group_data"
    data.mkdir()
    (data / "all.py").write_text('demo = {"threads": 3}\n')
    result = pyinfra.plan(**options, only=["kernel"])
    assert result.hosts[0].pending == [("kernel", "Threads {'threads': 3}")]


def test_an_inventory_elsewhere_has_the_checkouts_defaults(fleet):
    options = fleet('server.shell(name=f"Model {host.data.model}", commands=["true"])')
    assert pyinfra.plan(**options, only=["kernel"]).hosts[0].pending == [("kernel", "Model pico")]


def test_the_log_holds_pyinfras_output_and_is_the_owners(fleet):
    log = pyinfra.apply(**fleet()).log
    assert "Starting operation: base | Write one" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("there", "left"), [(3, {0, 1, 2}), (5, {0, 1, 2, 3, 4}), (8, {3, 4, 5, 6, 7})]
)
def test_the_newest_logs_are_kept(tmp_path, there, left):
    for number in range(there):
        path = tmp_path / f"{number}.log"
        path.touch()
        os.utime(path, (number, number))
    state.prune(tmp_path, keep=5)
    assert {int(path.stem) for path in tmp_path.iterdir()} == left


def test_what_is_no_inventory_file_is_refused(tmp_path):
    for name, text in (("gone.py", None), ("inv.ini", ""), ("bad.py", "hosts = [\n")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=name):
            pyinfra.plan(tmp_path / name)


def test_a_concern_that_is_none_is_refused(fleet):
    with pytest.raises(UsageError, match="no such concern"):
        pyinfra.plan(**fleet(), only=["base,bass"])


RUN = """
import sys
from pathlib import Path
from gpufleet.cli import output
from gpufleet.run import pyinfra
result = pyinfra.apply(Path(sys.argv[1]), deploy=Path(sys.argv[2]))
sys.exit(output.finish(result, as_json=False))
"""


def start(options: dict[str, Path]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(options["inventory"]), str(options["deploy"])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


SLOW = (
    'server.shell(name="Sleep", commands=["touch " + OUT + "/asleep; exec sleep 30"],'
    " _if=lambda: not {over})"
)


def running(part: str) -> list[int]:
    """Processes of pyinfra whose command line holds the text."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if part in line and "-m pyinfra" in line:
            found.append(int(entry.parent.name))
    return found


def test_one_apply_of_an_inventory_at_a_time(fleet, tmp_path):
    options = fleet(SLOW.format(over=False))
    first = start(options)
    try:
        wait_for(tmp_path / "out" / "asleep")
        with pytest.raises(FleetError, match=rf"process {first.pid} .* is applying it"):
            pyinfra.apply(**options)
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=30)


def test_ctrl_c_says_where_each_host_stopped_and_apply_continues(fleet, tmp_path):
    first = start(fleet(SLOW.format(over=False)))
    wait_for(tmp_path / "out" / "asleep")
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=30)
    assert first.returncode == 130
    assert "@local: stopped in kernel: Sleep" in said
    assert "continues from here" in said
    assert "Traceback" not in said
    assert running(str(tmp_path)) == []
    again = pyinfra.apply(**fleet(SLOW.format(over=True)))
    assert (again.exit_code, again.changed) == (0, 0)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux's parent-death signal"
)
def test_pyinfra_does_not_outlive_a_killed_fleet_command(fleet, tmp_path):
    first = start(fleet(SLOW.format(over=False)))
    wait_for(tmp_path / "out" / "asleep")
    assert len(running(str(tmp_path))) == 1
    first.kill()
    first.wait()
    deadline = time.monotonic() + 10
    while running(str(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_json_document_holds_what_happened(fleet):
    from gpufleet.cli.output import document

    options = fleet()
    planned = json.loads(json.dumps(document(pyinfra.plan(**options))))
    assert planned["version"] == 1
    assert planned["exit_code"] == 3
    assert planned["hosts"][0]["pending"][0] == {"concern": "base", "operation": "Write one"}
    applied = json.loads(json.dumps(document(pyinfra.apply(**options))))
    host = applied["hosts"][0]
    assert (host["name"], host["state"], host["changed"]) == ("@local", "done", 3)
    assert host["concerns"][0]["state"] == "ok"
    assert Path(applied["log"]).is_file()
