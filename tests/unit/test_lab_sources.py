"""Which of a machine's apt sources a lab host is installed from."""

from pathlib import Path

import pytest

from gpufleet.apt_sources import Entry, parse
from gpufleet.errors import FleetError, UsageError
from gpufleet.lab import sources

BOOKWORM = {"ID": "debian", "VERSION_CODENAME": "bookworm"}
KEYRING = ("Signed-By", "/usr/share/keyrings/debian-archive-keyring.gpg")
OFFICIAL = """\
Types: deb deb-src
URIs: http://deb.example/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.example/debian-security
Suites: bookworm-security
Components: main
"""
THIRD_PARTY = """\
deb [arch=amd64 signed-by=/etc/apt/keyrings/docker.asc] https://d.example/debian bookworm stable
deb [signed-by=/usr/share/keyrings/vpn-archive-keyring.gpg] https://vpn.example/debian bookworm main
deb http://pgdg.example/apt bookworm-pgdg main
deb cdrom:[Debian GNU/Linux 12]/ bookworm main
"""


@pytest.fixture
def etc_apt(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def chosen(etc_apt: Path, image: str, os_release: dict[str, str] = BOOKWORM) -> list[Entry]:
    return sources.for_release(sources.read(etc_apt), sources.release(image), os_release)


def test_only_the_distributions_own_archive_counts(etc_apt: Path) -> None:
    (etc_apt / "sources.list.d/debian.sources").write_text(OFFICIAL)
    (etc_apt / "sources.list.d/others.list").write_text(THIRD_PARTY)
    main, security = chosen(etc_apt, "debian:12")
    assert main.uris == ("http://deb.example/debian",)
    assert main.types == ("deb",)
    assert main.suites == ("bookworm", "bookworm-updates")
    assert main.options == (KEYRING,)
    assert security.suites == ("bookworm-security",)


def test_another_release_of_the_distribution_comes_from_the_same_archive(etc_apt: Path) -> None:
    (etc_apt / "sources.list.d/debian.sources").write_text(OFFICIAL)
    main, security = chosen(etc_apt, "debian:13")
    assert main.uris == ("http://deb.example/debian",)
    assert main.suites == ("trixie", "trixie-updates")
    assert security.suites == ("trixie-security",)


def test_a_suite_called_stable_stands_for_the_release_asked(etc_apt: Path) -> None:
    (etc_apt / "sources.list").write_text("deb http://deb.example/debian stable main contrib\n")
    (entry,) = chosen(etc_apt, "debian:12")
    assert entry.suites == ("bookworm",)
    assert entry.components == ("main", "contrib")


def test_a_list_of_mirrors_in_a_file_is_followed(etc_apt: Path) -> None:
    mirrors = etc_apt / "mirrors.list"
    mirrors.write_text("# nearest first\nhttps://one.example/debian\nhttps://two.example/debian\n")
    (etc_apt / "sources.list").write_text(f"deb mirror+file:{mirrors} bookworm main\n")
    (entry,) = chosen(etc_apt, "debian:12")
    assert entry.uris == ("https://one.example/debian", "https://two.example/debian")


def test_a_companys_mirror_is_taken_where_nothing_else_serves(etc_apt: Path) -> None:
    company = (
        "deb [signed-by=/etc/apt/keyrings/acme.gpg] https://apt.acme.example/d12 bookworm main\n"
    )
    (etc_apt / "sources.list").write_text(company)
    assert chosen(etc_apt, "debian:12")[0].uris == ("https://apt.acme.example/d12",)
    (etc_apt / "sources.list.d/debian.sources").write_text(OFFICIAL)
    assert chosen(etc_apt, "debian:12")[0].uris == ("http://deb.example/debian",)


def test_another_distribution_is_left_to_its_own_default(etc_apt: Path) -> None:
    (etc_apt / "sources.list.d/debian.sources").write_text(OFFICIAL)
    assert chosen(etc_apt, "ubuntu:22.04") == []


def test_a_derivative_counts_as_what_it_derives_from(etc_apt: Path) -> None:
    mint = {
        "ID": "linuxmint",
        "ID_LIKE": "ubuntu debian",
        "VERSION_CODENAME": "virginia",
        "UBUNTU_CODENAME": "jammy",
    }
    (etc_apt / "sources.list").write_text(
        "deb http://mint.example virginia main upstream import\n"
        "deb http://archive.example/ubuntu jammy main universe\n"
    )
    (entry,) = chosen(etc_apt, "ubuntu:24.04", mint)
    assert entry.uris == ("http://archive.example/ubuntu",)
    assert entry.suites == ("noble",)


@pytest.mark.parametrize("name", ["debian.sources", "sources.list"])
def test_what_is_rendered_reads_back_as_it_was(name: str) -> None:
    entries = [
        Entry(("deb",), ("http://a.example/debian",), ("bookworm",), ("main",), (KEYRING,)),
        Entry(("deb",), ("http://b.example/debian",), ("bookworm-security",), ("main", "contrib")),
    ]
    render = sources.render if name.endswith(".sources") else sources.render_one_line
    assert parse(name, render(entries)) == entries


def test_a_key_inside_the_file_survives_rendering() -> None:
    key = (
        "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n -----END PGP PUBLIC KEY BLOCK-----"
    )
    options = (("Signed-By", key),)
    entry = Entry(("deb",), ("http://a.example/debian",), ("bookworm",), ("main",), options)
    assert parse("x.sources", sources.render([entry])) == [entry]


def test_an_unknown_image_is_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'debian:11': choose one of debian:12, debian:13, ubun"):
        sources.release("debian:11")


def test_a_machine_without_os_release_is_told_what_the_lab_needs(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="the lab needs Debian or Ubuntu with root"):
        sources.read_os_release(tmp_path / "os-release")
