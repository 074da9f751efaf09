"""Preflight: every reason not to deploy is found and said, and a good host has none."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_hosts import debian, gpus
from gpu_hosts import settings as settings_of
from pyinfra.api import Config, FactProcessError, Inventory, State
from pyinfra.api.exceptions import DeployError
from pyinfra.api.state import StateStage
from pyinfra.context import ctx_host, ctx_inventory, ctx_state

from gpufleet.catalog import Model, WeightFile, drivers, weight_set
from gpufleet.catalog import model as catalog_model
from gpufleet.demo.plan import UNIT
from gpufleet.driver.picture import GpuPicture
from gpufleet.preflight.facts import Preflight
from gpufleet.preflight.plan import (
    CONDA_MIB,
    CUDA_MIB,
    SPARE_MIB,
    SUPPORTED,
    HostPicture,
    driver_findings,
    findings,
    idle_gpus,
    parse,
    part_findings,
    precision_findings,
    torch_findings,
)
from gpufleet.python_env.conda import Recipe
from gpufleet.settings import Settings
from gpufleet.settings import parse as parse_settings
from gpufleet.weights.plan import Stored

PYTHON = "python3.11"
GOOD = HostPicture(
    os="debian",
    os_version="12",
    os_codename="bookworm",
    arch="x86_64",
    uid=0,
    init="systemd",
    memory_kib=4096 * 1024,
    disk_free_kib=10_000 * 1024,
    disk_used_kib=0,
    python="/usr/bin/python3.11",
    gpus=(),
    driver=None,
    port_taken_by=None,
    port_is_ours=False,
)
LINES = """\
os\tdebian
os_like\t
os_version\t12
os_codename\tbookworm
arch\tx86_64
uid\t0
init\tsystemd
memory_kib\t4194304
disk_free_kib\t10240000
disk_used_kib\t0
python\t/usr/bin/python3.11
""".splitlines()


def found(model: Model, data: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    settings = parse_settings({"python_env": {"manager": "uv"}, **(data or {})}, "host")
    return findings(settings, "small", model, replace(GOOD, **changes), PYTHON)


def test_conda_needs_room_of_its_own(model: Model):
    enough = (SPARE_MIB + model.needs.disk_mib) * 1024
    assert found(model, disk_free_kib=enough) == []
    conda = {"python_env": {"manager": "miniconda"}}
    (line,) = found(model, conda, disk_free_kib=enough)
    assert f"this deploy needs {SPARE_MIB + model.needs.disk_mib + CONDA_MIB}" in line
    assert found(model, conda, disk_free_kib=enough + CONDA_MIB * 1024) == []


def test_torch_for_gpus_takes_its_place_on_the_disk(model: Model):
    enough = (SPARE_MIB + model.needs.disk_mib) * 1024
    card = {"gpus": ("0x20b5",), "driver": "580.65.06"}
    cuda = {"accelerator": "cuda"}
    (line,) = found(model, cuda, disk_free_kib=enough, **card)
    assert f"this deploy needs {SPARE_MIB + model.needs.disk_mib + CUDA_MIB}" in line
    assert found(model, cuda, disk_free_kib=enough + CUDA_MIB * 1024, **card) == []
    # One that runs on nothing else counts it itself.
    alone = model.model_copy(update={"accelerators": ("cuda",)})
    assert found(alone, cuda, disk_free_kib=enough, **card) == []


def test_conda_brings_its_own_python(model: Model):
    conda = {"python_env": {"manager": "miniforge"}}
    assert found(model, conda, python=None) == []
    assert found(model, python=None) != []


def cards() -> GpuPicture:
    """Two T4s with the driver of Debian 12."""
    return gpus("535.261.03")


def test_the_scripts_lines_are_read():
    assert parse(LINES) == GOOD


def test_graphics_cards_driver_and_port_are_read():
    picture = parse(
        [
            *LINES,
            "gpu\t0x20b5",
            "gpu\t0x20b5",
            "driver\t570.86.15",
            "gpu_memory_mib\t15360",
            "gpu_memory_mib\t81920",
            "port_taken\tunknown",
            "port_taken\tpython (pid 7)",
            f"port_cgroup\t0::/system.slice/{UNIT} ",
        ]
    )
    assert picture.gpus == ("0x20b5", "0x20b5")
    assert picture.driver == "570.86.15"
    assert picture.gpu_memory_mib == (15360, 81920)
    assert picture.port_taken_by == "python (pid 7)"
    assert picture.port_is_ours


def test_a_tool_that_is_missing_is_not_a_tool_that_does_not_answer():
    assert parse(LINES).driver is None
    assert parse([*LINES, "driver\t"]).driver == ""


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["bash: warning: setlocale: LC_ALL"],
        LINES[1:],
        [*LINES, "memory_kib\t"],
        [*LINES, "uid\troot"],
    ],
    ids=["nothing", "noise", "a line less", "no number", "a word"],
)
def test_output_that_is_not_the_scripts_is_a_fact_error(lines: list[str]):
    """Any other exception would end the run for every host."""
    with pytest.raises(FactProcessError):
        Preflight().process(lines)


def test_noise_around_the_scripts_lines_is_passed_over():
    assert parse(["Welcome to Debian", *LINES, "bye"]) == GOOD


class TestARunThatBringsWeightsAlone:
    """It needs neither a driver nor memory, a port or room for an environment."""

    def found(self, model: Model, *files: WeightFile, **changes: Any) -> list[str]:
        settings = parse_settings({"accelerator": "cuda"}, "host")
        picture = replace(GOOD, **changes)
        given = {"environment": False, "files": files, "serving": False}
        return findings(settings, "small", model, picture, "", **given)

    BIG = WeightFile(path="big", bytes=10**9, sha256="1" * 64)

    def test_takes_a_host_with_nothing_on_it(self, model: Model):
        bare = {"memory_kib": 1024, "disk_free_kib": 0, "init": "bash", "port_taken_by": "nginx"}
        assert self.found(model, self.BIG, weights=Stored(free=1 << 40), **bare) == []

    def test_finds_a_disk_that_is_too_small_for_them(self, model: Model):
        (line,) = self.found(model, self.BIG, weights=Stored(free=10**9))
        assert line.startswith("disk full: 1.0 GB free for weights, 1.0 GB of small are to come")

    def test_finds_an_account_that_may_nothing(self, model: Model):
        (line,) = self.found(model, uid=1000)
        assert line.startswith("not root")


def test_a_disk_without_room_for_the_weights_is_found(model: Model):
    big = WeightFile(path="big", bytes=10**12, sha256="1" * 64)
    settings = parse_settings({"python_env": {"manager": "uv"}}, "host")
    picture = replace(GOOD, weights=Stored(free=10**11))
    (line,) = findings(settings, "small", model, picture, PYTHON, files=[big])
    assert line.startswith("disk full: 100.0 GB free for weights, 1000.0 GB of small are to come")


def test_a_good_host_has_no_findings(model: Model):
    assert found(model) == []


@pytest.mark.parametrize(("os", "version"), sorted(SUPPORTED))
def test_every_supported_system_is_good(model: Model, os: str, version: str):
    assert found(model, os=os, os_version=version) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"uid": 1000}, "not root: connect as root, or set _sudo = True in the inventory"),
        (
            {"os": "fedora", "os_version": "42"},
            "fedora 42 is not supported: "
            "use one of debian 12, debian 13, ubuntu 22.04, ubuntu 24.04",
        ),
        ({"os_version": "11"}, "debian 11 is not supported: "),
        ({"arch": "aarch64"}, "architecture aarch64 is not supported: use x86_64"),
        ({"init": "bash"}, "init is bash, not systemd: the demo runs as a systemd service"),
        ({"python": None}, "no python3.11: the environment is locked for it; "),
        (
            {"memory_kib": 2000 * 1024 - 1},
            "1999 MiB of memory, model small needs 2000: use a larger host or a smaller model",
        ),
        (
            {"disk_free_kib": 1000 * 1024},
            f"disk full: 1000 MiB free for /opt/minigpt4, this deploy needs {1000 + SPARE_MIB}: "
            "free some space or set root to a folder on a larger disk",
        ),
        (
            {"port_taken_by": "nginx (pid 5)"},
            "port 7860 is in use by nginx (pid 5): stop it or set demo.port",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_reason_is_said_in_one_line(model: Model, changes: dict[str, Any], expected: str):
    (line,) = found(model, **changes)
    assert line.startswith(expected)
    assert "\n" not in line


def test_a_host_with_exactly_enough_is_good(model: Model):
    assert found(model, memory_kib=2000 * 1024, disk_free_kib=(1000 + SPARE_MIB) * 1024) == []


def test_what_an_earlier_deploy_takes_already_need_not_be_free(model: Model):
    assert found(model, disk_free_kib=SPARE_MIB * 1024, disk_used_kib=1000 * 1024) == []
    assert found(model, disk_free_kib=SPARE_MIB * 1024, disk_used_kib=5000 * 1024) == []
    (line,) = found(model, disk_free_kib=SPARE_MIB * 1024 - 1, disk_used_kib=5000 * 1024)
    assert line.startswith("disk full: ")


def test_the_demo_itself_may_hold_its_port(model: Model):
    assert found(model, port_taken_by="python (pid 5)", port_is_ours=True) == []


def test_an_accelerator_that_the_model_does_not_run_on_is_said(model: Model):
    cpu_only = model.model_copy(update={"accelerators": ("cpu",)})
    lines = found(cpu_only, {"accelerator": "cuda"}, gpus=("0x20b5",), driver="570.86.15")
    assert lines == ["model small does not run on accelerator cuda: set accelerator to cpu"]


def test_cuda_needs_a_card_and_then_a_driver_that_answers(model: Model):
    data = {"accelerator": "cuda"}
    assert "no NVIDIA GPU on the PCI bus" in found(model, data)[0]
    for driver in (None, ""):
        (line,) = found(model, data, gpus=("0x20b5",), driver=driver)
        assert line.startswith("the NVIDIA driver does not answer: ")
    assert found(model, data, gpus=("0x20b5",), driver="570.86.15") == []


def test_a_run_that_brings_the_driver_needs_none_but_one_that_fits(model: Model):
    settings = parse_settings({"accelerator": "cuda"}, "host")
    picture = replace(GOOD, gpus=("0x1eb8",), driver=None)

    def said(driver: list[str]) -> list[str]:
        return findings(settings, "small", model, picture, PYTHON, driver=driver)

    assert said([]) == []
    assert said(["no driver fits: x", "y"]) == ["no driver fits: x", "y"]


def test_a_run_without_the_environment_needs_no_interpreter(model: Model):
    settings = parse_settings({"accelerator": "cuda"}, "host")
    picture = replace(GOOD, gpus=("0x1eb8",), driver=None, python=None)
    cpu_only = model.model_copy(update={"accelerators": ("cpu",)})
    lines = findings(settings, "small", cpu_only, picture, "", environment=False, driver=[])
    assert lines == []


class TestTheDriver:
    def test_that_fits_and_can_be_built_has_no_findings(self):
        values = settings_of(driver={"cuda": "12.2"})
        assert driver_findings(values, debian(), cards(), drivers()) == []

    def test_that_is_too_old_for_the_environment_is_found(self):
        (line,) = driver_findings(settings_of(), debian(), cards(), drivers())
        assert "CUDA 13.0 of the environment needs driver 580 or later" in line

    def test_that_the_host_cannot_take_is_found_before_anything_changes(self):
        """Two drivers in one place: what would stop the work half-way is in the same verdict."""
        values = settings_of(driver={"cuda": "12.2"})
        (line,) = driver_findings(values, debian(runfile=True), cards(), drivers())
        assert "a .run file installed the driver here" in line


def test_all_findings_come_at_once_and_in_the_order_in_which_they_matter(model: Model):
    lines = found(
        model,
        {"accelerator": "cuda"},
        uid=1000,
        os="fedora",
        arch="riscv64",
        init="init",
        python=None,
        memory_kib=1,
        disk_free_kib=1,
        port_taken_by="x",
    )
    words = ["root", "fedora", "riscv64", "init is", PYTHON, "memory", "disk", "port", "GPU"]
    assert [word for word, line in zip(words, lines, strict=True) if word in line] == words


def look(sh, root: str = "/opt/none", port: int = 1) -> HostPicture:
    done = sh(Preflight().command(root=root, port=port, python=PYTHON))
    assert done.returncode == 0
    assert done.stderr == ""
    return Preflight().process(done.stdout.splitlines())


class TestTheRealScriptOnThisMachine:
    def test_it_says_what_this_machine_is(self, sh, tmp_path: Path):
        picture = look(sh, root=str(tmp_path / "not" / "there"))
        assert picture.arch == platform.machine()
        assert picture.uid == os.geteuid()
        assert picture.os == platform.freedesktop_os_release()["ID"]
        assert picture.os_codename == platform.freedesktop_os_release().get("VERSION_CODENAME", "")
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
        assert picture.memory_kib == pytest.approx(pages, rel=0.02)
        free = os.statvfs(tmp_path)
        assert picture.disk_free_kib == pytest.approx(
            free.f_bavail * free.f_frsize // 1024, rel=0.05
        )
        assert picture.disk_used_kib == 0
        assert picture.port_taken_by is None

    def test_it_counts_what_the_deploys_folder_takes(self, sh, tmp_path: Path):
        (tmp_path / "weights").write_bytes(b"x" * 2_000_000)
        assert 1_900 <= look(sh, root=str(tmp_path)).disk_used_kib <= 2_500

    @pytest.mark.parametrize(
        ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    )
    def test_it_finds_who_listens_on_the_port(self, sh, family: socket.AddressFamily, address: str):
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind((address, 0))
            listener.listen()
            picture = look(sh, port=listener.getsockname()[1])
        assert picture.port_taken_by is not None
        assert picture.port_taken_by.endswith(f"(pid {os.getpid()})")
        assert not picture.port_is_ours

    def test_a_connection_from_the_port_is_not_a_listener(self, sh):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            with socket.create_connection(address) as client:
                assert look(sh, port=client.getsockname()[1]).port_taken_by is None

    def test_it_looks_for_the_interpreter_where_the_environment_is_made_with_it(self):
        """python_env makes it with /usr/bin/python3.11: one elsewhere is of no use."""
        command = str(Preflight().command(root="/x", port=1, python=PYTHON))
        assert "/usr/bin/$3" in command
        assert "/usr/local/bin/$3" not in command


def fleet(answers: dict[str, Any], settings: Settings) -> State:
    """A run against pyinfra's own stand-in for hosts; `answers` are what their shells print."""
    data = {"weights": {"source": settings.weights.source}}
    state = State(Inventory(([(f"@fake/{name}", data) for name in answers], {})), Config())
    for host, answer in zip(state.inventory, answers.values(), strict=True):
        quick = {"fake_delay": 0, "fake_delay_jitter": 0}
        host.connector.data = {"fake_responses": {"MemTotal": answer}, **quick}
    return state


def run_preflight(state: State) -> None:
    """What deploy.py does first, for every host in turn."""
    from tasks.preflight import preflight

    state.current_stage = StateStage.Prepare
    with ctx_state.use(state), ctx_inventory.use(state.inventory):
        for host in state.inventory:
            host.connect()
            state.activate_host(host)
        for host in state.inventory:
            with ctx_host.use(host):
                preflight()


def test_every_finding_of_every_host_is_reported_before_anything_changes(settings: Settings):
    old = [line.replace("\t12", "\t11") for line in LINES]
    state = fleet({"a": old, "b": [*LINES, "port_taken\tx"]}, settings)
    with pytest.raises(DeployError) as error:
        run_preflight(state)
    message = str(error.value)
    assert "nothing was changed" in message
    assert "@fake/a: debian 11 is not supported" in message
    assert "@fake/b: port 7860 is in use by x" in message


def test_a_host_whose_shell_fails_is_named_and_does_not_hide_the_others(settings: Settings):
    """As with _sudo where sudo asks for a password."""
    state = fleet(
        {
            "a": {"success": False, "stderr": "sudo: a password is required"},
            "b": [*LINES, "port_taken\tx"],
        },
        settings,
    )
    with pytest.raises(DeployError) as error:
        run_preflight(state)
    message = str(error.value)
    assert "@fake/a: " in message
    assert "@fake/b: port 7860 is in use by x" in message


class TestTheMemoryOfTheGpus:
    @staticmethod
    def of(name: str, *memory: int, **data: Any) -> list[str]:
        settings = parse_settings({"accelerator": "cuda", "model": name, **data}, "host")
        return precision_findings(settings, name, catalog_model(name), memory)

    def test_that_holds_the_model_is_enough(self):
        assert self.of("minigpt4-vicuna-7b", 24564) == []
        assert self.of("minigpt4-vicuna-7b", 12288, demo={"precision": "8bit"}) == []
        assert self.of("pico", 4096) == []

    def test_that_does_not_says_which_precision_would_fit_it(self):
        (line,) = self.of("minigpt4-vicuna-7b", 15360)
        assert line.startswith("GPU memory of 15360 MiB, model minigpt4-vicuna-7b in fp16 needs ")
        assert "set demo.precision to 8bit (12000), or use a larger GPU" in line
        assert "set demo.precision to 4bit" in self.of("minigpt4-vicuna-13b", 15360)[0]

    def test_that_holds_it_in_no_precision_says_so(self):
        (line,) = self.of("minigpt4-vicuna-13b", 8192, demo={"precision": "8bit"})
        assert line.endswith(": use a larger GPU or a smaller model")

    def test_of_the_smallest_counts_as_each_gets_a_process(self):
        assert self.of("minigpt4-vicuna-7b", 81920, 15360) != []

    def test_that_is_not_known_yet_is_no_finding(self):
        assert self.of("minigpt4-vicuna-13b") == []

    def test_is_needed_for_8_bit(self):
        (line,) = self.of("pico", accelerator="cpu", demo={"precision": "8bit"})
        assert line.startswith("model pico in 8bit needs a GPU: set demo.precision to fp32")


class TestThePartsOfAModel:
    @pytest.fixture
    def files(self, model: Model) -> list[WeightFile]:
        (name,) = model.weights
        return [WeightFile(**file.model_dump(exclude={"md5"})) for file in weight_set(name).files]

    def test_that_its_sets_bring_are_no_finding(self, model: Model, files: list[WeightFile]):
        assert part_findings("small", model, files) == []

    def test_that_no_set_brings_are_named_one_by_one(
        self, model_data: dict[str, Any], files: list[WeightFile]
    ):
        wrong = {"llama_dir": "path/to/vicuna/weights", "vit_file": "other.pth"}
        data = {**model_data, "minigpt4": {**model_data["minigpt4"], **wrong}}
        lines = part_findings("small", Model.model_validate(data), files)
        assert len(lines) == 2
        assert lines[0].startswith("model small has vit_file other.pth, and none of its weight ")
        assert "llama_dir path/to/vicuna/weights" in lines[1]


def test_torch_without_cuda_is_a_finding_where_there_shall_be_a_gpu():
    def made(*pip: str) -> Recipe:
        return Recipe("own", "3.10", ("conda-forge",), ("pip",), pip)

    (line,) = torch_findings("cuda", [made("torch==2.0.0+cpu", "numpy==1.26.4")])
    assert line.startswith("environment own has torch==2.0.0+cpu, which is torch without CUDA")
    assert torch_findings("cpu", [made("torch==2.0.0+cpu")]) == []
    assert torch_findings("cuda", [made("torch==2.0.0+cu118")]) == []


def test_a_gpu_that_the_model_will_not_use_is_told_and_stops_nothing():
    cpu, cuda = (parse_settings({"accelerator": one}, "host") for one in ("cpu", "cuda"))
    two = replace(GOOD, gpus=("0x20b5", "0x20b5"))
    assert "this host has 2 NVIDIA GPUs, and accelerator is cpu" in str(idle_gpus(cpu, two))
    assert idle_gpus(cuda, two) is None
    assert idle_gpus(cpu, GOOD) is None
