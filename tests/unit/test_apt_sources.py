"""apt's source files: both formats are read, written back and told apart from other people's."""

from __future__ import annotations

import pytest

from gpufleet import catalog, render
from gpufleet.apt_sources import Entry, is_distribution, parse, split_security

# Real files of real systems, but for the host names.
DEBIAN_12_CONTAINER = """\
Types: deb
# http://snapshot.example.org/archive/debian/20250407T000000Z
URIs: http://deb.example.org/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
# http://snapshot.example.org/archive/debian-security/20250407T000000Z
URIs: http://deb.example.org/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
DEBIAN_12_CLOUD = """\
Types: deb deb-src
URIs: mirror+file:///etc/apt/mirrors/debian.list
Suites: bookworm bookworm-updates bookworm-backports
Components: main

Types: deb deb-src
URIs: mirror+file:///etc/apt/mirrors/debian-security.list
Suites: bookworm-security
Components: main
"""
DEBIAN_13 = """\
Types: deb
URIs: http://deb.example.org/debian/
Suites: trixie trixie-updates
Components: main non-free-firmware
Signed-By: /usr/share/keyrings/debian-archive-keyring.pgp
"""
UBUNTU_22_04 = """\
# See http://help.example.org/community/UpgradeNotes for how to upgrade to
# newer versions of the distribution.
deb http://archive.example.org/ubuntu/ jammy main restricted
# deb-src http://archive.example.org/ubuntu/ jammy main restricted

## Major bug fix updates produced after the final release of the
## distribution.
deb http://archive.example.org/ubuntu/ jammy-updates main restricted
deb http://archive.example.org/ubuntu/ jammy universe
deb http://archive.example.org/ubuntu/ jammy-backports main restricted universe multiverse
deb http://security.example.org/ubuntu/ jammy-security main restricted
"""
UBUNTU_24_04 = """\
# Ubuntu sources have moved to /etc/apt/sources.list.d/ubuntu.sources
# See http://help.example.org/community/UpgradeNotes
Types: deb
URIs: http://archive.example.org/ubuntu/
Suites: noble noble-updates noble-backports
Components: main universe restricted multiverse
Signed-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg

## Ubuntu security updates. Aside from URIs and Suites,
## this should mirror your choices in the previous section.
Types: deb
URIs: http://security.example.org/ubuntu/
Suites: noble-security
Components: main universe restricted multiverse
Signed-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg
"""
EMBEDDED_KEY = """\
Types: deb
URIs: https://packages.example.org/tool/deb
Suites: stable
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBFcFx9ABEADBn6VbjlHdzwhR0Yx/QTs4pGbkcGn8RGvXlnHEZtPsQrYbHDHQ
 # not a comment, but a line of a value
 -----END PGP PUBLIC KEY BLOCK-----
X-Repolib-Name: Tool
"""


def written(path: str, entries: list[Entry]) -> str:
    """The entries as gpufleet writes them to that path."""
    template = "apt.sources.j2" if path.endswith(".sources") else "apt.list.j2"
    return render.text(template, site=catalog.mirrors().sites["nju"], entries=entries)


def test_a_deb822_file_of_several_stanzas_is_read_whole():
    plain, security = parse("debian.sources", DEBIAN_12_CONTAINER)
    assert plain == Entry(
        types=("deb",),
        uris=("http://deb.example.org/debian",),
        suites=("bookworm", "bookworm-updates"),
        components=("main",),
        options=(("Signed-By", "/usr/share/keyrings/debian-archive-keyring.gpg"),),
    )
    assert security.suites == ("bookworm-security",)


@pytest.mark.parametrize("value", ["no", "No", "false", "0"])
def test_a_disabled_stanza_is_left_out(value: str):
    text = f"Enabled: {value}\n{DEBIAN_13}"
    assert parse("x.sources", text) == []


def test_an_enabled_stanza_counts_and_does_not_keep_the_field():
    assert parse("x.sources", f"Enabled: yes\n{DEBIAN_13}") == parse("x.sources", DEBIAN_13)


def test_field_names_are_read_in_any_case():
    (entry,) = parse("x.sources", "types: deb\nuris: http://h.example.org/debian\nSUITES: sid\n")
    assert (entry.types, entry.suites) == (("deb",), ("sid",))


def test_stanzas_may_be_parted_by_several_lines_with_blanks():
    text = DEBIAN_13 + "\n \t\n\n" + DEBIAN_13
    assert len(parse("x.sources", text)) == 2


def test_a_stanza_of_comments_alone_is_no_entry():
    assert parse("x.sources", "# one\n# two\n\n" + DEBIAN_13) == parse("x.sources", DEBIAN_13)


def test_values_may_be_folded_over_lines():
    text = (
        "Types: deb\nURIs: http://a.example.org/debian\n http://b.example.org/debian\nSuites: x\n"
    )
    (entry,) = parse("x.sources", text)
    assert entry.uris == ("http://a.example.org/debian", "http://b.example.org/debian")


def test_an_embedded_key_is_kept_line_by_line():
    (entry,) = parse("tool.sources", EMBEDDED_KEY)
    key = entry.signed_by
    assert "-----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBFcFx9AB" in key
    assert "\n # not a comment, but a line of a value\n" in key
    assert ("X-Repolib-Name", "Tool") in entry.options


def test_a_one_line_file_is_read_without_its_comments():
    entries = parse("sources.list", UBUNTU_22_04)
    assert [entry.suites for entry in entries] == [
        ("jammy",),
        ("jammy-updates",),
        ("jammy",),
        ("jammy-backports",),
        ("jammy-security",),
    ]
    assert entries[0].components == ("main", "restricted")


def test_one_line_options_get_the_names_that_deb822_gives_them():
    text = (
        "deb [ arch=amd64,arm64 signed-by=/k.gpg trusted=yes by-hash=force lang=en ] "
        "https://cuda.example.org/repos/debian12/x86_64 /  # flat\n"
        "\tdeb-src\thttp://h.example.org/debian\tbookworm\tmain contrib\n"
    )
    flat, source = parse("x.list", text)
    assert flat.suites == ("/",)
    assert flat.components == ()
    assert flat.options == (
        ("Architectures", "amd64 arm64"),
        ("Signed-By", "/k.gpg"),
        ("Trusted", "yes"),
        ("By-Hash", "force"),
        ("Languages", "en"),
    )
    assert source.types == ("deb-src",)
    assert source.components == ("main", "contrib")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("debian.sources", DEBIAN_12_CONTAINER),
        ("debian.sources", DEBIAN_12_CLOUD),
        ("debian.sources", DEBIAN_13),
        ("ubuntu.sources", UBUNTU_24_04),
        ("tool.sources", EMBEDDED_KEY),
        ("two.sources", EMBEDDED_KEY + "\n" + DEBIAN_13),
        ("flat.sources", "Types: deb\nURIs: https://cuda.example.org/x86_64\nSuites: /\n"),
        ("sources.list", UBUNTU_22_04),
        (
            "x.list",
            "deb [arch=amd64,arm64 signed-by=/k.gpg trusted=yes target=Packages] "
            "https://cuda.example.org/x86_64 /\n",
        ),
        ("cd.list", "deb cdrom:[Debian GNU/Linux 12.1.0 _Bookworm_ - amd64]/ bookworm main\n"),
    ],
)
def test_what_is_written_back_means_the_same(path: str, text: str):
    entries = parse(path, text)
    assert entries
    assert parse(path, written(path, entries)) == entries


def test_a_deb822_entry_of_several_types_and_addresses_becomes_every_line_of_the_list_format():
    entry = Entry(("deb", "deb-src"), ("http://a.example.org/d", "http://b.example.org/d"), ("x",))
    lines = parse("x.list", written("x.list", [entry]))
    assert {(e.types, e.uris) for e in lines} == {
        ((t,), (u,)) for t in entry.types for u in entry.uris
    }


@pytest.mark.parametrize(
    ("path", "text", "os", "codename"),
    [
        ("debian.sources", DEBIAN_12_CONTAINER, "debian", "bookworm"),
        ("debian.sources", DEBIAN_12_CLOUD, "debian", "bookworm"),
        ("debian.sources", DEBIAN_13, "debian", "trixie"),
        ("sources.list", UBUNTU_22_04, "ubuntu", "jammy"),
        ("ubuntu.sources", UBUNTU_24_04, "ubuntu", "noble"),
    ],
    ids=["debian 12", "debian 12 cloud", "debian 13", "ubuntu 22.04", "ubuntu 24.04"],
)
def test_every_default_source_is_the_distributions_own(
    path: str, text: str, os: str, codename: str
):
    entries = parse(path, text)
    assert [is_distribution(entry, os, codename) for entry in entries] == [True] * len(entries)


@pytest.mark.parametrize(
    ("line", "os", "codename"),
    [
        # like Docker's: the path ends as the distribution's does, the component is its own
        (
            "deb [arch=amd64 signed-by=/etc/apt/keyrings/d.gpg] "
            "https://download.example.org/linux/debian bookworm stable",
            "debian",
            "bookworm",
        ),
        # like NodeSource's
        ("deb https://deb.example.org/node_20.x nodistro main", "debian", "bookworm"),
        # like NVIDIA's: a flat repository
        ("deb https://cuda.example.org/compute/cuda/repos/debian12/x86_64/ /", "debian", "12"),
        # like Tailscale's: path, suite and component are all the distribution's, the key is not
        (
            "deb [signed-by=/usr/share/keyrings/t-archive-keyring.gpg] "
            "https://pkgs.example.org/stable/debian bookworm main",
            "debian",
            "bookworm",
        ),
        # like Zabbix's: the key is in trusted.gpg.d, so the source names none
        ("deb https://repo.example.org/zabbix/7.0/debian bookworm main", "debian", "bookworm"),
        ("deb https://repo.example.org/zabbix/7.0/ubuntu jammy main", "ubuntu", "jammy"),
        # like PostgreSQL's
        ("deb https://apt.example.org/pub/repos/apt bookworm-pgdg main", "debian", "bookworm"),
        # like a PPA
        ("deb https://ppa.example.org/deadsnakes/ppa/ubuntu jammy main", "ubuntu", "jammy"),
        # the distribution's, but another release of it: a mixed system is its owner's business
        ("deb http://deb.example.org/debian trixie main", "debian", "bookworm"),
        ("deb cdrom:[Debian GNU/Linux 12.1.0]/ bookworm main", "debian", "bookworm"),
    ],
    ids=[
        "docker",
        "nodesource",
        "cuda",
        "tailscale",
        "zabbix debian",
        "zabbix ubuntu",
        "postgresql",
        "ppa",
        "other release",
        "cdrom",
    ],
)
def test_somebody_elses_source_is_not_the_distributions(line: str, os: str, codename: str):
    (entry,) = parse("x.list", line)
    assert not is_distribution(entry, os, codename)


def test_an_embedded_key_makes_a_source_somebody_elses():
    text = EMBEDDED_KEY.replace("tool/deb", "debian").replace("stable", "bookworm")
    (entry,) = parse("x.sources", text)
    assert not is_distribution(entry, "debian", "bookworm")


def test_a_stanza_that_mixes_releases_is_left_to_its_owner():
    text = DEBIAN_13.replace("trixie-updates", "trixie-updates bookworm")
    (entry,) = parse("x.sources", text)
    assert not is_distribution(entry, "debian", "trixie")


def test_security_suites_are_split_off_with_everything_else_alike():
    (entry,) = parse(
        "x.sources",
        "Types: deb\nURIs: http://a.example.org/ubuntu\n"
        "Suites: noble noble-security noble-updates\nComponents: main\nSigned-By: /k\n",
    )
    plain, security = split_security(entry)
    assert plain is not None
    assert security is not None
    assert plain.suites == ("noble", "noble-updates")
    assert security.suites == ("noble-security",)
    assert (plain.uris, plain.options) == (security.uris, security.options)


def test_an_entry_of_one_kind_is_not_split():
    plain, security = parse("debian.sources", DEBIAN_12_CONTAINER)
    assert split_security(plain) == (plain, None)
    assert split_security(security) == (None, security)
