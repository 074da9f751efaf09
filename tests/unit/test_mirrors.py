"""Mirrors: what one choice of a site writes on a host, as the tools themselves read it."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gpufleet import catalog
from gpufleet.apt_sources import parse
from gpufleet.catalog import SERVICES, Service, Site
from gpufleet.managed.facts import STATE
from gpufleet.mirrors.choice import Choice, Pick
from gpufleet.mirrors.facts import MirrorFiles
from gpufleet.mirrors.plan import (
    CACHE,
    CONDARC,
    PIP_CONF,
    RECORD,
    UV_TOML,
    AptSources,
    parse_sources,
    stale,
    wanted,
)

DEBIAN = "/etc/apt/sources.list.d/debian.sources"
DOCKER = "/etc/apt/sources.list.d/docker.list"
DEBIAN_TEXT = """\
Types: deb
URIs: http://deb.example.org/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.example.org/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
DOCKER_TEXT = "deb [arch=amd64] https://download.example.org/linux/debian bookworm stable\n"
HOST = AptSources("debian", "bookworm", {DEBIAN: DEBIAN_TEXT, DOCKER: DOCKER_TEXT}, ())
SITES = catalog.mirrors().sites
NJU = "https://mirrors.nju.edu.cn"


def carrying(service: Service) -> list[str]:
    return [name for name, site in SITES.items() if site.listed(service)]


def everything(site: Site) -> Choice:
    """The choice of one site for all that it is known to carry."""
    taken = {s: Pick(s, site, "pinned", "a test") for s in SERVICES if site.listed(s)}
    return Choice(taken)


def texts(site: Site, sources: AptSources = HOST, *, security: bool = False) -> dict[str, str]:
    files = wanted(everything(site), security, sources)
    assert len({file.path for file in files}) == len(files)
    return {file.path: file.content for file in files}


def bare(**services: object) -> Site:
    """A site with these services only."""
    return Site.model_validate({"hosts": ["m.example.org"], "services": services})


def test_one_choice_writes_pip_uv_conda_and_the_distributions_sources():
    assert set(texts(SITES["nju"])) == {PIP_CONF, UV_TOML, CONDARC, DEBIAN}


def test_the_files_are_roots_and_readable_by_all():
    for file in wanted(everything(SITES["nju"]), True, HOST):
        assert (file.mode, file.owner, file.group) == ("644", "root", "root")


def test_pip_conf_has_exactly_this_text():
    assert texts(SITES["nju"])[PIP_CONF] == (
        "# Written by gpufleet: 南京大学 Nanjing University. "
        "To change it, set mirrors.site and apply.\n"
        f"[global]\nindex-url = {NJU}/pypi/web/simple\n"
    )


@pytest.mark.parametrize("name", carrying("pypi"))
def test_pip_conf_sets_the_sites_index_and_nothing_else(name: str):
    """Above all no extra index: pip has no priorities, so that one is open to anybody's names."""
    site = SITES[name]
    parser = configparser.RawConfigParser()
    parser.read_string(texts(site)[PIP_CONF])
    options = {section: dict(parser[section]) for section in parser.sections()}
    assert options == {"global": {"index-url": f"https://{site.host}{site.services.pypi.index}"}}


def test_pip_itself_reads_the_sites_index_and_nothing_else(tmp_path: Path):
    conf = tmp_path / "pip.conf"
    conf.write_text(texts(SITES["nju"])[PIP_CONF], "utf-8")
    empty = tmp_path / "empty.conf"
    empty.touch()

    def configured(file: Path) -> set[str]:
        """What pip says it is configured with, given this file beside the machine's own."""
        done = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_CONFIG_FILE": str(file)},
            capture_output=True,
            text=True,
            check=True,
        )
        return {line for line in done.stdout.splitlines() if not line.startswith(":env:")}

    with_file, without = configured(conf), configured(empty)
    index = f"global.index-url='{NJU}/pypi/web/simple'"
    assert index in with_file
    assert {line for line in with_file - without if "index-url" not in line} == set()


@pytest.mark.parametrize("name", carrying("pypi"))
def test_uv_toml_names_the_site_as_the_one_default_index(name: str):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    site = SITES[name]
    assert tomllib.loads(texts(site)[UV_TOML]) == {
        "index": [{"url": f"https://{site.host}{site.services.pypi.index}", "default": True}]
    }


@pytest.mark.parametrize("name", carrying("conda"))
def test_condarc_maps_defaults_and_every_community_channel_to_the_site(name: str):
    site = SITES[name]
    condarc = yaml.safe_load(texts(site)[CONDARC])
    assert set(condarc) == {
        "channels",
        "show_channel_urls",
        "default_channels",
        "custom_channels",
    }
    assert condarc["channels"] == ["conda-forge"]
    assert set(condarc["custom_channels"]) == set(site.services.conda.cloud) >= {"conda-forge"}
    for url in [*condarc["default_channels"], *condarc["custom_channels"].values()]:
        assert url.startswith(f"https://{site.host}/")
    # conda appends the channel's name to the base, which therefore must not hold it
    for channel, url in condarc["custom_channels"].items():
        assert not url.endswith(f"/{channel}")


def test_condarc_of_a_site_with_all_subchannels():
    condarc = yaml.safe_load(texts(SITES["nju"])[CONDARC])
    assert condarc["default_channels"] == [
        f"{NJU}/anaconda/pkgs/{sub}" for sub in ("main", "r", "msys2")
    ]
    assert condarc["custom_channels"]["conda-forge"] == f"{NJU}/anaconda/cloud"


def test_zju_serves_the_nvidia_channel_from_another_base():
    condarc = yaml.safe_load(texts(SITES["zju"])[CONDARC])
    assert condarc["custom_channels"]["nvidia"] == "https://mirrors.zju.edu.cn/anaconda-r"


def test_apt_takes_packages_from_the_site_and_leaves_security_where_it_was():
    original = parse(DEBIAN, DEBIAN_TEXT)
    plain, security = parse(DEBIAN, texts(SITES["nju"])[DEBIAN])
    assert plain.uris == (f"{NJU}/debian",)
    assert (plain.suites, plain.components) == (original[0].suites, original[0].components)
    assert plain.options == original[0].options
    assert security == original[1]


def test_apt_takes_security_along_when_it_is_told_to():
    original = parse(DEBIAN, DEBIAN_TEXT)
    plain, security = parse(DEBIAN, texts(SITES["nju"], security=True)[DEBIAN])
    assert plain.uris == (f"{NJU}/debian",)
    assert security.uris == (f"{NJU}/debian-security",)
    assert security.suites == original[1].suites


def test_security_stays_where_it_was_when_the_site_does_not_carry_it():
    site = SITES["aliyun"]
    assert "debian-security" not in site.services.apt.archives
    _, security = parse(DEBIAN, texts(site, security=True)[DEBIAN])
    assert security == parse(DEBIAN, DEBIAN_TEXT)[1]


def test_a_third_partys_source_is_never_written():
    assert DOCKER not in texts(SITES["nju"], security=True)


def test_a_third_partys_entry_in_a_shared_file_is_written_back_as_it_was():
    path = "/etc/apt/sources.list"
    text = "deb http://deb.example.org/debian bookworm main\n" + DOCKER_TEXT
    sources = AptSources("debian", "bookworm", {path: text}, ())
    own, other = parse(path, texts(SITES["nju"], sources)[path])
    assert own.uris == (f"{NJU}/debian",)
    assert other == parse(path, DOCKER_TEXT)[0]


def test_an_ubuntu_stanza_with_all_suites_is_split_for_its_security():
    path = "/etc/apt/sources.list.d/ubuntu.sources"
    text = (
        "Types: deb\nURIs: http://archive.example.org/ubuntu/\n"
        "Suites: noble noble-updates noble-security\nComponents: main universe\n"
    )
    sources = AptSources("ubuntu", "noble", {path: text}, ())
    plain, security = parse(path, texts(SITES["tuna"], sources)[path])
    assert plain.uris == ("https://mirrors.tuna.tsinghua.edu.cn/ubuntu",)
    assert plain.suites == ("noble", "noble-updates")
    assert security.uris == ("http://archive.example.org/ubuntu/",)
    assert security.suites == ("noble-security",)


def test_debians_own_cloud_image_is_pointed_at_the_site():
    """Its sources name a list of mirrors rather than a mirror."""
    text = (
        "Types: deb deb-src\nURIs: mirror+file:///etc/apt/mirrors/debian.list\n"
        "Suites: bookworm bookworm-updates bookworm-backports\nComponents: main\n\n"
        "Types: deb deb-src\nURIs: mirror+file:///etc/apt/mirrors/debian-security.list\n"
        "Suites: bookworm-security\nComponents: main\n"
    )
    sources = AptSources("debian", "bookworm", {DEBIAN: text}, ())
    files = texts(SITES["nju"], sources, security=True)
    assert DEBIAN in files
    plain, security = parse(DEBIAN, files[DEBIAN])
    assert plain.uris == (f"{NJU}/debian",)
    assert security.uris == (f"{NJU}/debian-security",)


def test_two_addresses_of_one_archive_become_one():
    path = "/etc/apt/sources.list.d/x.sources"
    text = (
        "Types: deb\nURIs: http://a.example.org/debian http://b.example.org/debian/\n"
        "Suites: bookworm\nComponents: main\n"
    )
    sources = AptSources("debian", "bookworm", {path: text}, ())
    (entry,) = parse(path, texts(SITES["nju"], sources)[path])
    assert entry.uris == (f"{NJU}/debian",)


def test_a_site_without_a_service_writes_nothing_for_it():
    assert set(texts(bare(pypi={"index": "/pypi/simple"}))) == {PIP_CONF, UV_TOML}
    conda = {"base": "/anaconda", "cloud": {"conda-forge": "/anaconda/cloud"}}
    assert set(texts(bare(conda=conda))) == {CONDARC}
    assert set(texts(bare(apt={"archives": {"debian": "/debian"}}))) == {DEBIAN}
    assert texts(bare(apt={"archives": {"ubuntu": "/ubuntu"}})) == {}


def test_a_site_without_the_archive_does_not_rewrite_a_stanza_that_holds_all_suites():
    path = "/etc/apt/sources.list.d/ubuntu.sources"
    text = (
        "Types: deb\nURIs: http://archive.example.org/ubuntu/\n"
        "Suites: noble noble-security\nComponents: main\n"
    )
    assert texts(
        bare(pypi={"index": "/p"}), AptSources("ubuntu", "noble", {path: text}, ())
    ).keys() == {
        PIP_CONF,
        UV_TOML,
    }


@pytest.mark.parametrize(
    ("scheme", "os", "trusted"),
    [("https", "debian", True), ("https", "rocky", False), ("http", "debian", False)],
)
def test_pip_and_conda_trust_for_an_own_site_whom_the_host_trusts(scheme, os, trusted):
    services = {"pypi": {"index": "/simple"}, "conda": {"base": "/conda"}}
    site = Site.model_validate({"hosts": ["m.example.org"], "scheme": scheme, "services": services})
    written = texts(site, replace(HOST, os=os, files={}))
    ours = "/etc/ssl/certs/ca-certificates.crt"
    pip = configparser.ConfigParser()
    pip.read_string(written[PIP_CONF])
    assert pip["global"].get("cert") == (ours if trusted else None)
    assert yaml.safe_load(written[CONDARC]).get("ssl_verify") == (ours if trusted else None)
    listed = texts(SITES["nju"])
    assert "ca-certificates" not in listed[PIP_CONF] + listed[CONDARC]


def test_what_an_earlier_site_wrote_and_this_one_does_not_is_put_back():
    sources = AptSources("debian", "bookworm", HOST.files, (PIP_CONF, UV_TOML, CONDARC, DEBIAN))
    nju, volces = SITES["nju"], SITES["volces"]
    assert stale(wanted(everything(nju), False, sources), sources) == []
    assert stale(wanted(everything(volces), False, sources), sources) == [
        PIP_CONF,
        UV_TOML,
        CONDARC,
    ]
    assert stale([], sources) == [PIP_CONF, UV_TOML, CONDARC, DEBIAN]
    assert stale([], HOST) == []


def test_the_facts_lines_are_read_back_to_the_files_texts():
    lines = ["os\tdebian\tbookworm"]
    for path, text in HOST.files.items():
        lines += [f"file\t{path}", *(f"+{line}" for line in text.splitlines()), ""]
    lines.append(f"written\t{PIP_CONF}")
    assert parse_sources(lines) == AptSources("debian", "bookworm", HOST.files, (PIP_CONF,))


def test_what_gpufleet_remembers_on_a_host_is_no_source_of_apt(tmp_path: Path, sh):
    """One command reads it along with the sources."""
    (tmp_path / "mirrors-choice.json").write_text('{"version": 1}\n')
    (tmp_path / "mirrors-probed.json").write_text('{"version": 1,\n"found": []}\n')
    done = sh(str(MirrorFiles().command(root="/opt/x", user="x")).replace(STATE, str(tmp_path)))
    lines = done.stdout.replace(str(tmp_path), STATE).splitlines()
    found = MirrorFiles().process(lines)
    assert found.record == '{"version": 1}\n'
    assert found.cache == '{"version": 1,\n"found": []}\n'
    assert abs(found.now - time.time()) < 60
    assert not {RECORD, CACHE} & set(found.files)
    assert found.version or found.os == "debian"  # testing has none


def test_a_source_that_gpufleet_replaced_is_read_as_it_was_before(tmp_path: Path, sh):
    """The real script, on a copy of a host's folders."""
    etc, state = tmp_path / "etc", tmp_path / "state"
    texts = {
        etc / "apt/sources.list.d/debian.sources": "the mirror's\n",
        etc / "apt/sources.list.d/docker.list": DOCKER_TEXT,
        etc / "apt/sources.list": "no newline at the end",
        etc / "apt/sources.list.d/restored.list": "as it is now\n",
        etc / "pip.conf": "[global]\n",
    }
    originals = state / "originals" / str(etc)[1:] / "apt/sources.list.d"
    records = state / "written" / str(etc)[1:]
    texts[originals / "debian.sources"] = DEBIAN_TEXT
    texts[originals / "restored.list"] = "an original without a record does not count\n"
    texts[records / "apt/sources.list.d/debian.sources"] = "0" * 64
    texts[records / "pip.conf"] = "0" * 64
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = str(MirrorFiles().command(str(tmp_path), "root")).replace(STATE, str(state))
    done = sh(command.replace("/etc/", f"{etc}/").replace(f"{etc}/os-release", "/etc/os-release"))
    assert (done.returncode, done.stderr) == (0, "")
    found = MirrorFiles().process(done.stdout.splitlines())
    apt = f"{etc}/apt/sources.list"
    assert found.files == {
        apt: "no newline at the end\n",
        f"{apt}.d/docker.list": DOCKER_TEXT,
        f"{apt}.d/restored.list": "as it is now\n",
        f"{apt}.d/debian.sources": DEBIAN_TEXT,
    }
    assert set(found.written) == {f"{etc}/pip.conf", f"{apt}.d/debian.sources"}
    assert found.os in {"debian", "ubuntu"} or found.os
