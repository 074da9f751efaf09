"""The wheelhouse: real pip downloads of tiny wheels from a folder, checked, resumed, shared."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from gpufleet import ROOT
from gpufleet.errors import FleetError
from gpufleet.python_env import wheelhouse
from gpufleet.python_env.plan import PYTHON, Lock

NO_INDEX = "file:///nowhere"


def make_wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> str:
    """Write a wheel of one module and return its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(
        f"{path},sha256={_urlsafe(text)},{len(text)}\n" for path, text in files.items()
    )
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(zipfile.ZipInfo(member), text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _urlsafe(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def make_lock(path: Path, **hashes: str) -> Lock:
    """A lock of `name_version=sha256` pairs."""
    lines = [
        f"{key.replace('__', '==')} \\\n    --hash=sha256:{digest}\n"
        for key, digest in hashes.items()
    ]
    path.write_text("".join(lines))
    return Lock(path, PYTHON)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place where pip may look."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(shelf: Path, tmp_path: Path) -> Lock:
    return make_lock(tmp_path / "tiny.lock", tiny__1=make_wheel(shelf, "tiny", "1"))


def wheels(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.whl"))


def refusal(lock: Lock, into: Path, torch_index: str = NO_INDEX) -> str:
    with pytest.raises(FleetError) as error:
        wheelhouse.build(lock, torch_index, into)
    message = str(error.value)
    assert "\n" not in message
    assert not (into / lock.digest / ".whole").exists()
    return message


def test_every_wheel_of_the_lock_is_there_and_checked_and_the_lock_beside_them(
    tiny: Lock, tmp_path: Path
):
    folder = wheelhouse.build(tiny, NO_INDEX, tmp_path / "house")
    assert folder == tmp_path / "house" / tiny.digest
    assert wheels(folder) == ["tiny-1-py3-none-any.whl"]
    assert (folder / "requirements.lock").read_text() == tiny.text
    assert (folder / ".whole").exists()
    digest = hashlib.sha256((folder / wheels(folder)[0]).read_bytes()).hexdigest()
    assert digest in tiny.text


def test_a_whole_wheelhouse_is_kept_in_the_users_cache_and_returned_without_asking_pip(
    tiny: Lock, shelf: Path, cache: Path
):
    first = wheelhouse.build(tiny, NO_INDEX)
    assert first == cache / "wheelhouse" / tiny.digest
    for wheel in shelf.iterdir():
        wheel.unlink()  # pip would find nothing now
    started = time.monotonic()
    assert wheelhouse.build(tiny, NO_INDEX) == first
    assert time.monotonic() - started < 0.1


def test_a_wheel_with_another_hash_is_refused_naming_it(tiny: Lock, shelf: Path, tmp_path: Path):
    make_wheel(shelf, "tiny", "1", tag="py2.py3-none-any")
    (shelf / "tiny-1-py3-none-any.whl").unlink()
    message = refusal(tiny, tmp_path / "house")
    assert "tiny.lock" in message
    assert "tiny==1" in message
    assert "hash" in message.lower()


def test_a_requirement_without_a_hash_is_refused(tiny: Lock, tmp_path: Path):
    (tmp_path / "tiny.lock").write_text("tiny==1\n")
    assert "hash" in refusal(tiny, tmp_path / "house").lower()


def test_a_wheel_that_cannot_be_had_is_said_with_what_to_do(
    tiny: Lock, shelf: Path, tmp_path: Path
):
    (shelf / "tiny-1-py3-none-any.whl").unlink()
    message = refusal(tiny, tmp_path / "house")
    assert message.startswith("pip cannot download tiny.lock (")
    assert "tiny==1" in message
    assert "check `pip config list`" in message


def test_a_wheel_for_another_system_does_not_count(shelf: Path, tmp_path: Path):
    digest = make_wheel(shelf, "tiny", "1", tag="cp311-cp311-macosx_11_0_arm64")
    lock = make_lock(tmp_path / "mac.lock", tiny__1=digest)
    assert "tiny==1" in refusal(lock, tmp_path / "house")


def test_wheels_for_the_hosts_are_taken_whatever_this_machine_is(shelf: Path, tmp_path: Path):
    new, old = "cp311-cp311-manylinux_2_28_x86_64", "cp39-abi3-manylinux2014_x86_64"
    first, second = make_wheel(shelf, "tiny", "1", new), make_wheel(shelf, "more", "2", old)
    lock = make_lock(tmp_path / "l", tiny__1=first, more__2=second)
    folder = wheelhouse.build(lock, NO_INDEX, tmp_path / "house")
    assert wheels(folder) == [f"more-2-{old}.whl", f"tiny-1-{new}.whl"]


def test_a_download_that_was_cut_off_continues(shelf: Path, tmp_path: Path):
    first, second = make_wheel(shelf, "tiny", "1"), make_wheel(shelf, "more", "2")
    lock = make_lock(tmp_path / "two.lock", tiny__1=first, more__2=second)
    (shelf / "more-2-py3-none-any.whl").rename(tmp_path / "away.whl")
    refusal(lock, tmp_path / "house")
    (tmp_path / "away.whl").rename(shelf / "more-2-py3-none-any.whl")
    folder = wheelhouse.build(lock, NO_INDEX, tmp_path / "house")
    assert wheels(folder) == ["more-2-py3-none-any.whl", "tiny-1-py3-none-any.whl"]


def test_a_wheel_that_was_cut_off_is_downloaded_anew(tiny: Lock, shelf: Path, tmp_path: Path):
    name = "tiny-1-py3-none-any.whl"
    folder = tmp_path / "house" / tiny.digest
    folder.mkdir(parents=True)
    (folder / name).write_bytes((shelf / name).read_bytes()[:100])
    (folder / "wanted.txt").write_text("left behind by the killed run\n")
    wheelhouse.build(tiny, NO_INDEX, tmp_path / "house")
    assert (folder / name).read_bytes() == (shelf / name).read_bytes()
    assert not (folder / "wanted.txt").exists()


class TestLocalVersions:
    """Builds of torch without CUDA, which an index may lack."""

    @pytest.fixture
    def local(self, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lock:
        """A lock of a plain wheel on the shelf and a local one on PyTorch's index alone."""
        index = tmp_path / "index" / "torch"
        digest = make_wheel(index, "torch", "2.0+cpu")
        page = '<a href="torch-2.0%2Bcpu-py3-none-any.whl">torch-2.0+cpu-py3-none-any.whl</a>'
        (index / "index.html").write_text(f"<!DOCTYPE html><html><body>{page}</body></html>")
        monkeypatch.delenv("PIP_NO_INDEX")
        (tmp_path / "empty").mkdir()
        monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty").as_uri())
        plain = make_wheel(shelf, "tiny", "1")
        return make_lock(tmp_path / "local.lock", **{"tiny__1": plain, "torch__2.0+cpu": digest})

    def test_they_come_from_the_index_of_the_settings(self, local: Lock, tmp_path: Path):
        folder = wheelhouse.build(local, (tmp_path / "index").as_uri(), tmp_path / "house")
        assert wheels(folder) == ["tiny-1-py3-none-any.whl", "torch-2.0+cpu-py3-none-any.whl"]

    def test_they_come_from_where_pip_is_configured_to_look_if_they_are_there(
        self, local: Lock, shelf: Path, tmp_path: Path
    ):
        name = "torch-2.0+cpu-py3-none-any.whl"
        (tmp_path / "index" / "torch" / name).rename(shelf / name)
        assert name in wheels(wheelhouse.build(local, NO_INDEX, tmp_path / "house"))

    def test_the_settings_that_name_no_such_index_are_said_in_one_line(
        self, local: Lock, tmp_path: Path
    ):
        nowhere = (tmp_path / "empty").as_uri()
        message = refusal(local, tmp_path / "house", nowhere)
        assert message.startswith("pip finds no torch==2.0+cpu where it is configured to look")
        assert nowhere in message
        assert message.endswith("set python_env.torch_index")


def test_a_folder_that_cannot_be_made_is_said_in_one_line(tiny: Lock, tmp_path: Path):
    (tmp_path / "file").touch()
    message = refusal(tiny, tmp_path / "file")
    assert message.startswith(f"cannot make {tmp_path / 'file' / tiny.digest}: ")


def test_threads_of_one_process_build_it_once(tiny: Lock, tmp_path: Path):
    results: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(wheelhouse.build(tiny, NO_INDEX, tmp_path / "house"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "house" / tiny.digest] * 4


def test_processes_build_it_once_and_wait_for_each_other(tiny: Lock, tmp_path: Path):
    code = (
        "import sys; from pathlib import Path\n"
        "from gpufleet.python_env import wheelhouse; from gpufleet.python_env.plan import Lock\n"
        f"lock = Lock(Path(sys.argv[1]), {PYTHON!r})\n"
        f"print(wheelhouse.build(lock, {NO_INDEX!r}, Path(sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", code, str(tiny.path), str(tmp_path / "house")]
    builders = [
        subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) for _ in range(2)
    ]
    for builder in builders:
        out, err = builder.communicate(timeout=60)
        assert (out, err) == (f"{tmp_path / 'house' / tiny.digest}\n", "")


def test_a_builder_waits_while_another_process_holds_the_wheelhouse(tiny: Lock, tmp_path: Path):
    house = tmp_path / "house"
    house.mkdir()
    hold = (
        "import fcntl, sys, time\n"
        "f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(1)\n"
    )
    flock = house / f"{tiny.digest}.flock"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(flock)], stdout=-1, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    started = time.monotonic()
    wheelhouse.build(tiny, NO_INDEX, house)
    assert time.monotonic() - started > 0.9
    holder.wait()
    holder.stdout.close()


def test_older_wheelhouses_are_forgotten_and_half_ones_and_the_newest_kept(
    tiny: Lock, tmp_path: Path
):
    house = tmp_path / "house"
    for age in range(5):
        folder = house / f"old{age}"
        folder.mkdir(parents=True)
        (folder / ".whole").touch()
        os.utime(folder / ".whole", (1_000_000 - age, 1_000_000 - age))
    (house / "half").mkdir()
    wheelhouse.build(tiny, NO_INDEX, house)
    left = {path.name for path in house.iterdir() if path.is_dir()}
    assert left == {tiny.digest, "half", "old0", "old1"}
