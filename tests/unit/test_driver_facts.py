"""What the GPU script prints becomes a picture; on a machine without a GPU it says so."""

from __future__ import annotations

import pytest
from pyinfra.api import FactProcessError

from gpufleet.driver.facts import GpuFacts
from gpufleet.driver.files import OWNED
from gpufleet.driver.picture import Gpu, Offer
from gpufleet.driver.plan import parse

#: Lines as a host with two cards of different health prints them.
LINES = """\
gpu\t0000:31:00.0\t20b2\tnvidia
gpu\t0000:4b:00.0\t20b2\tnvidia
lost\t0000:4b:00.0
lost\t0000:4b:00.0
nvswitch
loaded\t580.95.05
module\t3\t1
module\t0\t0
userland\t580.95.05
smi\t0
smi_line\t00000000:31:00.0, NVIDIA A100-SXM4-80GB, 81920, 580.95.05
unit\tId\tnvidia-persistenced.service
unit\tLoadState\tloaded
unit\tActiveState\tactive
unit\tId\tnvidia-fabricmanager.service
unit\tLoadState\tnot-found
unit\tActiveState\tinactive
fabricmanager\t580.95.05
device\tnvidia0
device\tnvidiactl
holder\tnvidia-persiste\t612
owned\t/etc/modprobe.d/gpufleet-nouveau.conf\t644\tabc
""".splitlines()


def test_every_line_finds_its_place():
    picture = parse(LINES)
    assert picture.gpus == (
        Gpu("0000:31:00.0", "20b2", "nvidia"),
        Gpu("0000:4b:00.0", "20b2", "nvidia"),
    )
    assert picture.lost == ("0000:4b:00.0",)
    assert picture.nvswitch
    assert (picture.loaded, picture.userland) == ("580.95.05", "580.95.05")
    assert picture.smi.gpus == (("00000000:31:00.0", "NVIDIA A100-SXM4-80GB", 81920),)
    assert (picture.smi.driver, picture.smi.error) == ("580.95.05", "")
    assert (picture.persistenced, picture.fabricmanager) == ("active", "absent")
    assert picture.fabricmanager_version == "580.95.05"
    assert picture.devices == ("nvidia0", "nvidiactl")
    assert picture.holders == ("nvidia-persiste (pid 612)",)
    assert picture.owned == (("/etc/modprobe.d/gpufleet-nouveau.conf", "644 abc"),)


def test_modules_that_use_one_another_do_not_keep_one_another():
    """nvidia is used three times, once by nvidia_uvm, which goes with it."""
    assert parse(LINES).refcount == 2
    assert parse(["module\t1\t1", "module\t0\t0"]).refcount == 0


def test_the_properties_of_a_unit_may_come_in_any_order():
    lines = ["unit\tLoadState\tloaded", "unit\tActiveState\tfailed"]
    lines += ["unit\tId\tnvidia-persistenced.service", "unit\tActiveState\tactive"]
    lines += ["unit\tLoadState\tloaded", "unit\tId\tnvidia-fabricmanager.service"]
    picture = parse(lines)
    assert (picture.persistenced, picture.fabricmanager) == ("failed", "active")


def test_an_empty_value_at_the_end_may_be_lost_on_the_way():
    assert parse(["gpu\t0000:01:00.0\t2684"]) == parse(["gpu\t0000:01:00.0\t2684\t"])
    assert parse(["gpu\t0000:01:00.0\t2684"]).gpus[0].driver == ""


def smi(status: int, *lines: str):
    return parse([f"smi\t{status}", *(f"smi_line\t{line}" for line in lines)]).smi


class TestNvidiaSmi:
    def test_that_is_not_there_says_nothing(self):
        assert not parse([]).smi.installed
        assert not smi(127, "sh: nvidia-smi: not found").installed

    def test_that_fails_is_quoted_in_one_line(self):
        said = smi(
            18,
            "Failed to initialize NVML: Driver/library version mismatch",
            "NVML library version: 535.261",
        )
        assert said.installed
        assert said.gpus == ()
        assert said.error == (
            "Failed to initialize NVML: Driver/library version mismatch; "
            "NVML library version: 535.261"
        )

    def test_that_lists_some_and_complains_of_others_is_heard_in_both(self):
        said = smi(
            15,
            "00000000:31:00.0, NVIDIA A100-SXM4-80GB, 81920, 580.95.05",
            "[GPU is lost], [GPU is lost], [GPU is lost], 580.95.05",
        )
        assert [address for address, _, _ in said.gpus] == ["00000000:31:00.0"]
        assert "GPU is lost" in said.error

    def test_that_hangs_is_said_to(self):
        assert smi(124).error == "nvidia-smi did not answer within 20 s"
        assert smi(137).error == "nvidia-smi did not answer within 20 s"

    def test_that_fails_without_a_word_is_said_to(self):
        assert smi(255).error == "nvidia-smi ended with status 255 and said nothing"

    def test_of_a_chip_without_memory_of_its_own_is_read(self):
        """GB10 shares the machine's memory."""
        said = smi(0, "0000000F:01:00.0, NVIDIA GB10, [N/A], 580.95.05")
        assert said.gpus == (("0000000F:01:00.0", "NVIDIA GB10", 0),)
        assert said.error == ""


@pytest.mark.parametrize(
    ("name", "needs", "moved_to"),
    [
        ("nvidia-headless-no-dkms-535-server", "nvidia-headless-no-dkms-580-server", "580"),
        ("nvidia-fabricmanager-570", "nvidia-fabricmanager-580", "580"),
        (
            "nvidia-headless-no-dkms-580-server",
            "nvidia-kernel-common-580-server (<= 580.178.04-1), libnvidia-compute-580-server",
            "",
        ),
        # The same branch, another flavour.
        ("nvidia-headless-no-dkms-615-server", "nvidia-headless-no-dkms-615-server-open", ""),
        # 149 is the kernel's, not a branch.
        (
            "linux-modules-nvidia-580-server-6.8.0-149-generic",
            "linux-image-6.8.0-149-generic | linux-image-unsigned-6.8.0-149-generic",
            "",
        ),
        ("nvidia-kernel-dkms", "dkms (>= 3.0.3-4~)", ""),
        ("nvidia-fabricmanager-470", "", ""),
    ],
)
def test_a_package_that_stands_for_another_branch_is_known(name: str, needs: str, moved_to: str):
    assert parse([f"offer\t{name}\t1\t{needs}"]).offers == (Offer(name, "1", moved_to),)


@pytest.mark.parametrize(
    "line", ["module\tx\t0", "smi\tten", "gpu\ta\tb\tc\td"], ids=["refcnt", "status", "too many"]
)
def test_output_that_is_not_the_scripts_is_a_fact_error(line: str):
    """Any other exception would end the run for every host."""
    with pytest.raises(FactProcessError):
        GpuFacts().process([line])


def test_noise_is_passed_over():
    assert parse(["Welcome to Debian", *LINES]) == parse(LINES)


def test_the_real_script_runs_here_without_a_complaint(sh):
    done = sh(GpuFacts().command())
    assert done.returncode == 0
    assert done.stderr == ""
    picture = GpuFacts().process(done.stdout.splitlines())
    assert all(gpu.device for gpu in picture.gpus)
    if not picture.gpus:
        assert picture.offers == ()
        assert picture.lost == ()


def test_the_files_that_the_driver_concern_owns_are_looked_at():
    command = str(GpuFacts().command())
    assert all(path in command for path in OWNED)
