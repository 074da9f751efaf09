"""The environment: what its lock names, and what the host has of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpufleet import ROOT, catalog, settings
from gpufleet.errors import FleetError
from gpufleet.python_env.facts import CudaToolkit, EnvironmentsOnHost
from gpufleet.python_env.plan import (
    PYTHON,
    UV_LOCK,
    Environments,
    Lock,
    each_downloads,
    lock_for,
    parse,
)
from gpufleet.settings import Settings

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
TEXT = f"""\
alpha==1.0 \\
    --hash=sha256:{A} \\
    --hash=sha256:{B}
torch==2.13.0+cpu \\
    --hash=sha256:{C}
torch-like==2.0 ; python_version < "3.12" \\
    --hash=sha256:{A}
zeta==3.1.4
"""


@pytest.fixture
def lock(tmp_path: Path) -> Lock:
    path = tmp_path / "x.lock"
    path.write_text(TEXT)
    return Lock(path, "python3.11")


def test_local_versions_are_split_off_with_their_hashes(lock: Lock):
    common, local = lock.split()
    assert local == f"torch==2.13.0+cpu \\\n    --hash=sha256:{C}\n"
    assert common == TEXT.replace(local, "")


def test_a_lock_without_local_versions_is_not_split(tmp_path: Path):
    (tmp_path / "y.lock").write_text(f"alpha==1.0 \\\n    --hash=sha256:{A}\n")
    lock = Lock(tmp_path / "y.lock", PYTHON)
    assert lock.split() == (lock.text, "")


def test_the_digest_names_the_lock_and_its_interpreter(lock: Lock, tmp_path: Path):
    assert re.fullmatch("[0-9a-f]{16}", lock.digest)
    elsewhere = tmp_path / "other name.lock"
    elsewhere.write_text(TEXT)
    assert Lock(elsewhere, "python3.11").digest == lock.digest
    assert Lock(lock.path, "python3.12").digest != lock.digest
    before = lock.digest
    lock.path.write_text(TEXT.replace("3.1.4", "3.1.5"))
    assert lock.digest != before


def test_the_cpu_lock_is_exact_and_hashed_and_holds_a_torch_without_cuda():
    lock = lock_for("cpu")
    common, local = lock.split()
    requirements = re.split(r"\n(?=\S)", lock.text.strip())
    assert all(re.match(r"[\w.-]+==\S+", requirement) for requirement in requirements)
    assert all("--hash=sha256:" in requirement for requirement in requirements)
    assert re.match(r"torch==[\d.]+\+cpu ", local)
    assert "torch==" not in common
    assert not re.search(r"^nvidia-|^triton==", lock.text, re.MULTILINE)


def test_the_lock_of_the_default_settings_exists():
    assert lock_for(Settings().accelerator).python == PYTHON


def test_a_lock_that_is_missing_is_said_in_one_line():
    with pytest.raises(FleetError) as error:
        lock_for("npu")
    message = str(error.value)
    assert "\n" not in message
    assert "files/demo/npu.lock is missing" in message


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^\s+]+)", text, re.MULTILINE))


def test_the_cuda_lock_has_the_cpu_locks_versions_and_the_catalogues_cuda():
    lock = lock_for("cuda")
    requirements = re.split(r"\n(?=\S)", lock.text.strip())
    assert all("--hash=sha256:" in requirement for requirement in requirements)
    assert lock.split()[1] == ""  # every index has all of it
    ours, theirs = pins(lock.text), pins(lock_for("cpu").text)
    assert theirs.items() <= ours.items()
    assert "bitsandbytes" in ours
    cuda = catalog.drivers().environments.cuda
    assert ours["nvidia-cuda-runtime"].startswith(f"{cuda}.")


def test_uvs_lock_names_uv_alone():
    assert UV_LOCK.path.parent == ROOT / "files" / "demo"
    assert re.findall(r"^([\w-]+)==", UV_LOCK.text, re.MULTILINE) == ["uv"]


def test_the_facts_lines_are_read():
    assert parse([f"whole\t{A[:16]}", f"half\t{B[:16]}"]) == Environments(
        frozenset({A[:16]}), frozenset({A[:16], B[:16]})
    )


def test_an_environment_counts_as_whole_only_with_its_own_marker_and_an_interpreter(
    tmp_path: Path, sh
):
    root = tmp_path / "the root"

    def make(name: str, marker: str | None, python: bool = True) -> None:
        folder = root / "envs" / name
        (folder / "bin").mkdir(parents=True)
        if python:
            (folder / "bin" / "python").touch(0o755)
        if marker is not None:
            (folder / ".whole").write_text(f"{marker}\n")

    make("a1", "a1")
    make("b2", None)
    make("c3", "a1")
    make("d4", "d4", python=False)
    make("e5", "")
    (root / "envs" / "a file").touch()
    done = sh(EnvironmentsOnHost().command(root=str(root)))
    assert (done.returncode, done.stderr) == (0, "")
    found = EnvironmentsOnHost().process(done.stdout.splitlines())
    assert found == Environments(frozenset({"a1"}), frozenset({"a1", "b2", "c3", "d4", "e5"}))


def test_a_name_that_leads_to_an_environment_is_none_itself(tmp_path: Path, sh):
    (tmp_path / "envs" / "a1").mkdir(parents=True)
    (tmp_path / "envs" / "modern").symlink_to("a1")
    (tmp_path / "envs" / "old").symlink_to("gone")
    done = sh(EnvironmentsOnHost().command(root=str(tmp_path)))
    found = EnvironmentsOnHost().process(done.stdout.splitlines())
    assert (found.whole, found.all) == (frozenset(), frozenset({"a1"}))


def test_conda_counts_as_whole_only_with_its_marker_and_its_programs(tmp_path: Path, sh):
    def seen() -> str:
        done = sh(EnvironmentsOnHost().command(root=str(tmp_path)))
        assert (done.returncode, done.stderr) == (0, "")
        return EnvironmentsOnHost().process(done.stdout.splitlines()).conda

    assert seen() == ""
    (tmp_path / "conda" / "bin").mkdir(parents=True)
    assert seen() == "half"
    for name in ("conda", "python"):
        (tmp_path / "conda" / "bin" / name).touch(0o755)
    assert seen() == "half"
    (tmp_path / "conda" / ".whole").write_text(f"{A}\n")
    assert seen() == A
    (tmp_path / "conda" / "bin" / "conda").unlink()
    assert seen() == "half"


def test_files_for_login_shells_are_known_by_gpufleets_records():
    record = "/var/lib/gpufleet/written/etc/profile.d/gpufleet-cuda.sh"
    found = parse([f"written\t{record}"])
    assert found.records(["/etc/profile.d/gpufleet-cuda.sh"])
    assert not found.records(["/etc/profile.d/gpufleet-conda.sh"])


def test_a_cuda_toolkit_that_is_not_there_is_missing(sh):
    done = sh(CudaToolkit().command(version="11.8"))
    assert (done.returncode, done.stderr) == (0, "")
    assert CudaToolkit().process(done.stdout.splitlines()) == "missing"


def test_a_host_without_environments_has_none(tmp_path: Path, sh):
    done = sh(EnvironmentsOnHost().command(root=str(tmp_path / "none")))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert EnvironmentsOnHost.default() == Environments(frozenset(), frozenset())


@pytest.mark.parametrize(
    ("accelerator", "source", "itself"),
    [
        ("cuda", "auto", True),
        ("cpu", "auto", False),
        ("cuda", "wheelhouse", False),
        ("cpu", "index", True),
    ],
)
def test_gigabytes_for_gpus_come_from_the_hosts_own_index_unless_told(
    accelerator: str, source: str, itself: bool
):
    data = {"accelerator": accelerator, "python_env": {"source": source}}
    assert each_downloads(settings.parse(data, "host")) is itself
