"""Errors of pyinfra, paramiko and the hosts' tools, in one line. The inputs are recorded."""

import pytest

from gpufleet.run.advice import abort, connection, one_line, operation
from gpufleet.run.targets import Target

TARGET = Target("gpu1", "10.0.0.1", port=2222, known_hosts="/k/known_hosts")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "Could not connect ([Errno None] Unable to connect to port 2299 on 127.0.0.1)",
            "nothing answers there",
        ),
        ("Could not connect (timed out)", "no answer in time"),
        ("Could not resolve hostname ([Errno -2] Name or service not known)", "no such host name"),
        (
            "Authentication error (username=nobody, key=/k/key) (Authentication failed.)",
            "the host refused the key or user",
        ),
        ("SSH error (No authentication methods available)", "the host refused the key or user"),
        (
            "SSH host key error (Host key for 127.0.0.1 does not match.)",
            "its host key is not the one in known_hosts",
        ),
        (
            "SSH error (StrictPolicy: No host key for [127.0.0.1]:2222 found in known_hosts)",
            "its host key is not in known_hosts",
        ),
        ("SSH error (Error reading SSH protocol banner)", "the connection was closed"),
        ("Could not connect ([Errno 113] No route to host)", "no route to the host"),
        ("Something new", "Something new"),
    ],
)
def test_a_connection_error_has_a_reason_and_advice(said, reason):
    line = connection(said, TARGET)
    assert line.startswith(reason)
    assert "; " in line
    assert "\n" not in line


def test_a_changed_host_key_comes_with_the_command_that_forgets_it():
    line = connection("SSH host key error (Host key for 10.0.0.1 does not match.)", TARGET)
    assert "ssh-keygen -R '[10.0.0.1]:2222' -f /k/known_hosts" in line


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            [
                "dpkg: error processing archive /var/cache/apt/archives/x.deb (--unpack):",
                " cannot copy extracted data for './usr/lib/x.so': failed to write"
                " (No space left on device)",
                "Errors were encountered while processing:",
                " /var/cache/apt/archives/x.deb",
                "E: Sub-process /usr/bin/dpkg returned an error code (1)",
                "Error: executed 0 commands",
            ],
            "cannot copy extracted data for './usr/lib/x.so': failed to write"
            " (No space left on device); free space on the host",
        ),
        (
            [
                "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 1234 "
                "(apt-get)",
                "N: Be aware that removing the lock file is not a solution and may break your "
                "system.",
                "E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), is "
                "another process using it?",
                "Error: executed 0 commands",
            ],
            "E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), is another "
            "process using it?; another apt or dpkg runs on the host: wait for it to end",
        ),
        (
            ["curl: (6) Could not resolve host: example.org", "Error: executed 1 commands"],
            "curl: (6) Could not resolve host: example.org; the host cannot resolve names: check "
            "its DNS, or set mirrors.site",
        ),
        (
            ["OSError: [Errno 98] Address already in use"],
            "OSError: [Errno 98] Address already in use; another process has the port: stop it or "
            "set demo.port",
        ),
        (
            ["eva_vit_pico.pth: FAILED", "sha256sum: WARNING: 1 computed checksum did NOT match"],
            "sha256sum: WARNING: 1 computed checksum did NOT match; the file is damaged or not the "
            "expected one: fetch it again",
        ),
        (
            ["Traceback (most recent call last):", '  File "x.py", line 1', "KeyError: 'a'", ""],
            "KeyError: 'a'; see the log",
        ),
        (["Command timed out after 30s"], "Command timed out after 30s; it took too long: look at"),
        (
            ["Command socket/SSH error: EOFError()"],
            "Command socket/SSH error: EOFError(); the connection broke: apply again",
        ),
        (
            ["Unexpected error in Python callback: FleetError('gpu1: no room; make some',)"],
            "gpu1: no room; make some",
        ),
        (
            [
                "the demo does not answer: it is loading; see fleet logs",
                "Error: executed 0 commands",
            ],
            "the demo does not answer: it is loading; see fleet logs",
        ),
        ([], "it failed without a word; see the log"),
    ],
)
def test_a_failed_operation_says_the_line_that_tells_why(output, line):
    said = operation(output)
    assert said.startswith(line)
    assert "\n" not in said


def test_what_gpufleet_says_itself_gets_no_second_advice():
    assert operation(["port taken; free it"]) == "port taken; free it"


def test_what_a_script_of_gpufleets_says_comes_before_what_its_tools_say():
    said = ["E: Could not connect to m.example.org", "gpufleet: apt cannot use m; set another", "x"]
    assert operation(said) == "apt cannot use m; set another"


def test_a_long_line_keeps_its_ends():
    line = one_line("a" * 400 + "z" * 400, limit=100)
    assert len(line) <= 103
    assert line.startswith("aaa")
    assert line.endswith("zzz")


def test_an_expected_error_is_its_message():
    log = ["--> Loading inventory...", "--> pyinfra error in /r/inv.py line 12: no lab 'x' is up"]
    reason = abort(log)
    assert reason is not None
    assert reason.message == "no lab 'x' is up"


def test_an_exception_in_the_inventory_names_file_and_line():
    log = [
        "--> An exception occurred in: /r/inv.py:",
        "",
        "Traceback (most recent call last):",
        '  File "/v/pyinfra_cli/util.py", line 65, in exec_file',
        "    exec(PYTHON_CODES[filename], data)",
        '  File "/r/inv.py", line 3, in <module>',
        "ZeroDivisionError: division by zero",
        "",
    ]
    reason = abort(log)
    assert reason is not None
    assert reason.message == "/r/inv.py line 3: ZeroDivisionError: division by zero"


def test_an_invalid_setting_counts_as_invalid_input():
    log = [
        "--> An exception occurred in: /r/deploy.py:",
        '  File "/r/gpufleet/settings.py", line 3, in parse',
        "gpufleet.errors.UsageError: gpu1: setting port: too large; see all.py",
    ]
    reason = abort(log)
    assert reason is not None
    assert (reason.message, reason.invalid) == ("gpu1: setting port: too large; see all.py", True)


def test_hosts_that_failed_one_by_one_are_no_reason_of_their_own():
    assert abort(["--> pyinfra error in /r/x.py line 1: No hosts remaining!"]) is None
    assert abort(["--> Results:", "    Grand total"]) is None
