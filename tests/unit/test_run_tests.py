"""What `fleet test` says of tests that failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpufleet.cli import test as command

BROKEN = """
import pytest

@pytest.fixture
def careful():
    yield
    assert False, "left something behind"

def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_untidy(careful): pass
"""


@pytest.fixture
def broken(tmp_path: Path) -> list[str]:
    """The command that runs three tests, one of which passes, as `fleet test` would."""
    file = tmp_path / "test_broken.py"
    file.write_text(BROKEN)
    pytest_command = command._pytest(Path(sys.executable), [str(file)], None)
    return [*pytest_command, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]


def test_a_part_that_failed_names_its_tests_and_how(broken: list[str]) -> None:
    done = command._run("a part", broken)
    assert not done.ok
    assert done.failed == (
        "test_broken::test_bad: AssertionError: one is not two assert 1 == 2",
        "test_broken::test_untidy: failed on teardown with "
        '"AssertionError: left something behind assert False"',
    )


def test_the_last_pytest_repeats_what_failed_before_it(capfd: pytest.CaptureFixture[str]) -> None:
    file = "tests/unit/test_kernel_task.py"
    before = {command.FAILED_BEFORE: "tests/lab\ntest_lab::test_bad: one is not two"}
    done = command._run("last", command._pytest(Path(sys.executable), [file], None), before)
    assert done.ok
    *_, first, second, last = capfd.readouterr().out.splitlines()
    assert (first, second) == ("tests/lab", "test_lab::test_bad: one is not two")
    assert " passed in " in last
