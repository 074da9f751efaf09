"""forecast and doctor on real hosts: what they foretell is what a real upgrade then does, and
neither changes anything."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from fleets import UNIT, Boot, Done, Fleet, Host, fleet, inventory, ok, until, words

from gpufleet.upgrade.facts import PackageState

#: The driver version that the stand-in module and libraries claim.
VERSION = "535.261.03"


def asked(command: str, path: Path | str, *options: str, **env: str) -> Done:
    return fleet(command, "-i", path, *options, **env)


def the(done: Done, host: Host) -> dict[str, Any]:
    """What the document says of the host."""
    (said,) = [each for each in done.document["hosts"] if each["name"] == host.name]
    assert isinstance(said, dict)
    return said


def module(release: str) -> bytes:
    """An ELF file that modinfo and depmod take for NVIDIA's module: nothing but a .modinfo."""
    info = {
        "license": "NVIDIA",
        "version": VERSION,
        "name": "nvidia",
        "vermagic": f"{release} SMP preempt mod_unload modversions ",
    }
    content = b"".join(f"{key}={value}\0".encode() for key, value in info.items())
    names = b"\0.modinfo\0.strtab\0.symtab\0.shstrtab\0"
    symbols = bytes(24)  # the null symbol that begins every table
    # name, type (PROGBITS 1, SYMTAB 2, STRTAB 3), flags (ALLOC 2), content, link, info, entry size
    sections = [
        (".modinfo", 1, 2, content, 0, 0, 0),
        (".strtab", 3, 0, b"\0", 0, 0, 0),
        (".symtab", 2, 0, symbols, 2, 1, 24),
        (".shstrtab", 3, 0, names, 0, 0, 0),
    ]
    offset, body, headers = 64, b"", bytes(64)
    for name, kind, flags, data, link, info_, size in sections:
        at = names.index(f"{name}\0".encode())
        headers += struct.pack(
            "<IIQQQQIIQQ", at, kind, flags, 0, offset, len(data), link, info_, 8, size
        )
        padded = data + bytes(-len(data) % 8)
        body, offset = body + padded, offset + len(padded)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    # ET_REL, EM_X86_64, section headers behind the content, the last section names them
    start = struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, offset, 0, 64, 0, 0, 64, 5, 4)
    return ident + start + body + headers


def versions(host: Host, name: str) -> list[str]:
    """The versions of a package that the archive has, newest first."""
    table = host.sh(f"apt-cache madison {name}")
    return list(dict.fromkeys(line.split("|")[1].strip() for line in table.splitlines()))


def test_hosts_without_gpus_have_none_to_lose_and_are_left_alone(deployed: Fleet) -> None:
    before = [host.snapshot() for host in deployed.hosts]
    lab = {"GPUFLEET_LAB": deployed.name}
    done = ok(asked("forecast", "inventory/lab.py", "--json", **lab))
    table = ok(asked("forecast", "inventory/lab.py", **lab))
    doctor = ok(asked("doctor", "inventory/lab.py", "--json", **lab))
    assert (done.document["version"], done.document["command"]) == (1, "forecast")
    for host in deployed.hosts:
        said = the(done, host)
        assert (said["error"], said["safe"], said["gpu"]) == (None, True, False)
        assert said["reboot"]["verdict"] == "safe"
        assert the(doctor, host)["findings"] == []
    for line in table.out.splitlines()[1:]:
        words(line, "safe", "no GPU to lose")
    assert [host.snapshot() for host in deployed.hosts] == before


def test_doctor_names_what_is_wrong_and_asks_the_others_all_the_same(
    deployed: Fleet, one: Host, two: Host, tmp_path: Path
) -> None:
    nobody = deployed.gateway.rpartition(".")[0] + ".250"
    hosts = {h.name: h.data() for h in (one, two)}
    hosts["gone"] = {**one.data(), "ssh_hostname": nobody}
    path = inventory(tmp_path, hosts)
    two.sh(f"systemctl stop {UNIT}")
    try:
        done = asked("doctor", path, "--json")
        lines = asked("doctor", path)
    finally:
        two.sh(f"systemctl start {UNIT}")
        until(two.healthy, "the demo answers again")
    assert (done.code, lines.code) == (1, 1)
    assert the(done, one)["healthy"]
    assert [each["code"] for each in the(done, two)["findings"]] == ["demo-down"]
    (line,) = [line for line in lines.out.splitlines() if line.startswith(two.name)]
    words(line, "error: the demo does not run", f"{UNIT} is inactive", "journalctl")
    words(lines.complaint, "gone: cannot connect as", nobody)
    forecast = asked("forecast", path, "--limit", "gone")
    assert forecast.code == 1
    words(forecast.complaint, nobody)


def test_hosts_of_one_image_are_alike_until_one_is_changed(boot: Boot) -> None:
    one, two = boot(2).hosts

    def state(host: Host) -> str:
        return host.sh(str(PackageState().command())).splitlines()[0]

    whole = state(one)
    assert len(whole) == 64
    assert state(two) == whole
    for change, back in (
        ("apt-mark hold bash", "apt-mark unhold bash"),
        ("touch /var/lib/apt/lists/x_Packages", "rm /var/lib/apt/lists/x_Packages"),
        ("echo 'Acquire::Retries 4;' > /etc/apt/apt.conf.d/z", "rm /etc/apt/apt.conf.d/z"),
    ):
        one.sh(change)
        assert state(one) != whole, change
        one.sh(back)
        assert state(one) == whole, back


def test_an_upgrade_does_what_the_forecast_said(boot: Boot, tmp_path: Path) -> None:
    """A real kernel of the archive with a stand-in module; a newer one comes without headers."""
    (host,) = boot(1).hosts
    newest, *older = versions(host, "linux-image-amd64")
    if not older:
        pytest.skip("the archive has one version of linux-image-amd64: nothing to upgrade to")
    depends = host.sh(f"apt-cache show linux-image-amd64={older[0]} | sed -n 's/^Depends: //p'")
    image = depends.split()[0]
    release = image.removeprefix("linux-image-")
    apt = "DEBIAN_FRONTEND=noninteractive apt-get -qq -y"
    # Debian's initrd would take it in, and with it the GPU.
    host.path("/etc/modprobe.d/nouveau.conf").write_text("blacklist nouveau\n")
    host.sh(f"{apt} install {image}={older[0]} linux-image-amd64={older[0]}", timeout=600)
    host.path(f"/lib/modules/{release}/nvidia.ko").write_bytes(module(release))
    library = host.path(f"/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{VERSION}")
    library.write_bytes(b"")
    host.sh(f"depmod {release}")
    assert host.sh(f"modinfo -k {release} -F version nvidia") == VERSION
    path = inventory(tmp_path, {host.name: {**host.data(), "accelerator": "cuda"}})

    before = host.snapshot()
    done = asked("forecast", path, "--json")
    said = the(done, host)
    assert host.snapshot() == before
    assert (said["reboot"]["verdict"], said["reboot"]["kernel"]) == ("safe", release)
    foretold = said["upgrade"]
    assert (foretold["verdict"], done.code) == ("unsafe", 4)
    assert [reason["code"] for reason in foretold["reasons"]] == ["no-headers", "no-module"]
    table = asked("forecast", path)
    rows = [line for line in table.out.splitlines() if line.startswith(host.name)]
    words(rows[0], release, "safe", "unsafe")
    words(rows[1], "upgrade: kernel", foretold["kernel"], "no headers", "--only kernel")

    host.sh(f"{apt} dist-upgrade", timeout=900)
    assert f"linux-image-{foretold['kernel']}" in host.sh("dpkg-query -W -f '${Package}\\n'")
    assert newest in host.sh("dpkg-query -W linux-image-amd64")
    now = asked("forecast", path, "--json")
    said = the(now, host)
    assert (now.code, said["reboot"]["verdict"]) == (4, "unsafe")
    assert said["reboot"]["kernel"] == foretold["kernel"]
    assert [reason["code"] for reason in said["reboot"]["reasons"]] == ["no-headers", "no-module"]
    assert said["upgrade"]["verdict"] == "nothing"
    assert {k["release"]: k["ok"] for k in said["kernels"]} == {
        release: True,
        foretold["kernel"]: False,
    }
