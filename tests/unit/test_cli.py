"""The fleet command as a person calls it."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpufleet import ROOT

COMMANDS = ["demo", "plan", "apply", "status", "tunnel", "logs", "test", "lab"]


def fleet(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpufleet.cli", *arguments],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_every_command_explains_itself(command):
    done = fleet(*command, "--help")
    assert done.returncode == 0
    assert f"Usage: fleet {' '.join([*command, '']).lstrip()}" in done.stdout
    assert "\x1b" not in done.stdout


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from gpufleet import cli; cli._register();"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'pyinfra', 'paramiko', 'gevent', 'rich', 'jinja2', 'pydantic', 'requests', 'yaml'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["apply"], "Missing option '-i'"),
        (["aply"], "No such command 'aply'"),
        (["apply", "-i", "nowhere.py"], "nowhere.py: no such inventory file"),
        (["plan", "-i", "broken.py"], "broken.py line 2: '[' was never closed"),
        (["apply", "-i", "good.py", "--only", "bass"], "--only bass: no such concern"),
        (["apply", "-i", "good.py", "--limit", "gpu9"], "--limit gpu9: no such host or group"),
        (["status", "-i", "good.py", "--limit", "gpu9"], "--limit gpu9: no such host or group"),
        (["status", "-i", "raises.py"], "raises.py: ZeroDivisionError: division by zero"),
        (["plan", "-i", "raises.py"], "raises.py line 1: ZeroDivisionError: division by zero"),
        (["apply", "-i", "wrong.py"], "@local: unknown setting modle, did you mean model?"),
        (["tunnel", "gpu9", "-i", "good.py"], "--limit gpu9: no such host or group"),
        (["tunnel", "@local", "-i", "good.py"], "@local is not reached over SSH"),
        (["demo", "--check", "--pictures", "39"], "greater than or equal to 40"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_usage_is_one_line_and_exit_code_2(tmp_path, arguments, says):
    (tmp_path / "good.py").write_text('hosts = ["@local"]\n')
    (tmp_path / "wrong.py").write_text('hosts = [("@local", {"modle": "pico"})]\n')
    (tmp_path / "raises.py").write_text("hosts = [1 / 0]\n")
    (tmp_path / "broken.py").write_text("# a list\nhosts = [\n")
    done = fleet(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    # A usage error of the command line has its two lines of usage before it.
    assert len([line for line in done.stderr.splitlines() if says in line]) == 1


def test_a_port_in_use_is_said_before_ssh_starts(tmp_path):
    import socket

    (tmp_path / "inv.py").write_text('hosts = [("gpu1", {"ssh_hostname": "127.0.0.1"})]\n')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = fleet("tunnel", "gpu1", "-i", "inv.py", "--local", str(port), cwd=tmp_path)
    assert done.returncode == 2
    assert f"port {port} of this machine: Address already in use" in done.stderr
    assert done.stdout == ""


def test_status_of_a_host_that_does_not_answer_is_a_failure(tmp_path):
    (tmp_path / "inv.py").write_text(
        'hosts = [("gpu1", {"ssh_hostname": "127.0.0.1", "ssh_port": 1, "ssh_user": "ops"})]\n'
    )
    done = fleet("status", "-i", "inv.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "gpu1: cannot connect as ops@127.0.0.1:1: nothing answers there" in done.stderr
    assert "unreachable" in done.stdout
