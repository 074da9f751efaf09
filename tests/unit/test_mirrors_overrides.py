"""What wins over the files of a choice is found, named and told apart from what does no harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpufleet.mirrors.doctor import findings
from gpufleet.mirrors.facts import MirrorFiles
from gpufleet.mirrors.overrides import Override, in_force, overrides
from gpufleet.mirrors.plan import CONDARC, PIP_CONF, UV_TOML, AptSources

DEBIAN = "/etc/apt/sources.list.d/debian.sources"
OURS = {
    PIP_CONF: "[global]\nindex-url = https://m.example.org/simple\n",
    UV_TOML: '[[index]]\nurl = "https://m.example.org/simple"\ndefault = true\n',
    CONDARC: (
        "channels: [conda-forge]\ndefault_channels: [https://m.example.org/pkgs/main]\n"
        "custom_channels: {conda-forge: https://m.example.org/cloud}\n"
    ),
    DEBIAN: "",
}


def found(*lines: str, ours: dict[str, str] | None = None, **files: str) -> list[Override]:
    """Overrides on a host whose other configuration has these lines, as the fact prints them."""
    texts = {f"/etc/apt/sources.list.d/{name}.list": text for name, text in files.items()}
    sources = AptSources("debian", "bookworm", texts, tuple(OURS), others=lines)
    return list(overrides(sources, OURS if ours is None else ours))


@pytest.mark.parametrize(
    ("line", "wins", "where"),
    [
        ("env\t/etc/environment:3:PIP_INDEX_URL=https://x.org/s", "PIP_INDEX_URL", ":3"),
        ("env\t/etc/profile.d/a.sh:1:export UV_INDEX='https://x.org/s'", "UV_INDEX", ":1"),
        ("env\t/root/.bashrc:9:  export A=1 CONDA_CHANNELS=defaults", "CONDA_CHANNELS", ":9"),
        ("env\t/etc/environment:1:PIP_CONFIG_FILE=/srv/pip.conf", "PIP_CONFIG_FILE", ":1"),
        ('env\tsystemd:0:UV_DEFAULT_INDEX="https://x.org/s"', "UV_DEFAULT_INDEX", "systemd"),
        (
            "env\t/etc/systemd/system.conf:4:DefaultEnvironment=A=b CONDARC=/x",
            "CONDARC",
            "system.conf:4",
        ),
        (
            "env\t/etc/systemd/system/d.service.d/x.conf:2:Environment=PIP_INDEX_URL=https://x.org",
            "PIP_INDEX_URL",
            "x.conf:2",
        ),
        ("env\t/root/.pam_environment:1:UV_INDEX DEFAULT=https://x.org", "UV_INDEX", ":1"),
        ("pip\t/root/.pip/pip.conf:2:index-url = https://x.org/s", "index-url", "/root/"),
        ("pip\t/opt/m/envs/e/pip.conf:2:index_url=https://x.org/s", "index-url", "/opt/m/envs/e"),
        ('uv\t/home/a/.config/uv/uv.toml:2:url = "https://x.org/s"', "url", "/home/a/"),
        ("conda\t/root/.condarc:5:channels: [https://x.org/main]", "channels", ".condarc:5"),
        ("conda\t/root/.condarc:1:channel_alias: https://x.org", "channel_alias", ".condarc:1"),
        ("conda\t/opt/m/conda/.condarc:1:channels: [bioconda]", "channels", "conda/.condarc:1"),
    ],
)
def test_what_leads_elsewhere_is_a_warning_with_its_place(line: str, wins: str, where: str):
    (one,) = found(line)
    assert one.severity == "warning"
    assert one.what.startswith(f"{wins} ")
    assert where in one.where
    assert one.mend
    assert "\n" not in str(one)


@pytest.mark.parametrize(
    "line",
    [
        "env\t/etc/environment:3:PIP_INDEX_URL=https://m.example.org/simple",
        "env\t/etc/environment:3:# PIP_INDEX_URL=https://x.org/s",
        "env\t/etc/environment:3:PIP_INDEX_URL=",
        "env\t/etc/environment:3:MY_PIP_INDEX_URL=https://x.org",
        "pip\t/root/.pip/pip.conf:2:# index-url = https://x.org/s",
        "pip\t/root/.pip/pip.conf:2:timeout = 60",
        "uv\t/root/.config/uv/uv.toml:1:default = true",
        "conda\t/opt/m/conda/.condarc:1:channels: [defaults]",
        "conda\t/root/.condarc:1:show_channel_urls: true",
        "conda\t/root/.condarc:1:{",
        "ours\t/etc/pip.conf:2:index-url = https://m.example.org/simple",
    ],
)
def test_what_defeats_nothing_is_passed_over(line: str):
    assert found(line) == []


def test_what_has_no_file_of_the_choice_to_win_over_is_passed_over():
    line = "env\t/etc/environment:3:PIP_INDEX_URL=https://x.org/s"
    assert found(line, ours={CONDARC: OURS[CONDARC]}) == []
    assert found(line, ours={}) == []


def test_an_extra_index_is_unsafe_wherever_it_leads():
    for line in (
        "env\t/etc/environment:1:PIP_EXTRA_INDEX_URL=https://x.org/s",
        "pip\t/root/.pip/pip.conf:1:extra-index-url = https://m.example.org/other",
        "ours\t/etc/pip.conf:4:extra-index-url = https://m.example.org/other",
    ):
        (one,) = found(line)
        assert "unsafe" in one.what


def test_proxies_and_the_endpoint_of_a_login_are_for_information():
    lines = (
        "env\t/etc/environment:1:https_proxy=http://proxy:3128",
        'proxy\t/etc/apt/apt.conf.d/80proxy:1:Acquire::http::Proxy "http://proxy:3128";',
        "env\t/root/.bashrc:1:export HF_ENDPOINT=https://x.org",
    )
    assert {(one.code, one.severity) for one in found(*lines)} == {
        ("proxy", "note"),
        ("apt-proxy", "note"),
        ("environment-hf", "note"),
    }


def test_the_distributions_suites_from_elsewhere_are_found_and_other_peoples_packages_are_not():
    other = "deb http://x.example.org/pub/mirrors/debian bookworm main contrib\n"
    (one,) = found(other=f"# a comment\n{other}")
    assert one.what == "apt also takes the distribution's bookworm from x.example.org"
    assert one.where == "/etc/apt/sources.list.d/other.list:2"
    docker = "deb https://download.example.org/linux/debian bookworm stable\n"
    assert found(docker=docker, own="deb http://d.example.org/debian bookworm main\n") == []
    assert found(other=other, ours={PIP_CONF: ""}) == []


def test_warnings_come_before_notes():
    lines = (
        "env\t/etc/environment:1:https_proxy=http://proxy:3128",
        "env\t/etc/environment:2:UV_INDEX=https://x.org",
    )
    assert [one.severity for one in found(*lines)] == ["warning", "note"]


def test_the_files_in_force_are_those_that_gpufleet_wrote():
    lines = ("ours\t/etc/pip.conf:1:[global]", "ours\t/etc/pip.conf:2:index-url = https://m/s")
    sources = AptSources("debian", "bookworm", {}, (PIP_CONF, DEBIAN), others=lines)
    assert in_force(sources) == {PIP_CONF: "[global]\nindex-url = https://m/s\n", DEBIAN: ""}
    assert in_force(AptSources("debian", "bookworm", {}, (), others=lines)) == {}


def test_the_fact_finds_the_lines_on_a_host_and_no_password(tmp_path: Path, sh):
    """The real script, on a copy of a host's folders."""
    home, root = tmp_path / "home", tmp_path / "opt"
    texts = {
        tmp_path / "etc/environment": "A=1\nPIP_INDEX_URL=https://me:secret@x.org/s\n",
        tmp_path / "etc/apt/apt.conf.d/80p": '//no\nAcquire::http::Proxy "http://u:secret@p:1";\n',
        tmp_path / "etc/pip.conf": "[global]\nindex-url = https://m/s\n",
        root / "envs/abc/pip.conf": "index-url = https://y/s\n",
        root / "conda/.condarc": "channels:\n  - https://z/main\n",
        home / ".config/uv/uv.toml": 'index-url = "https://w/s"\n',
        home / ".bashrc": "export CONDA_CHANNELS=main\n",
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = str(MirrorFiles().command(str(root), "nobody")).replace("/etc/", f"{tmp_path}/etc/")
    command = command.replace(f"{tmp_path}/etc/os-release", "/etc/os-release")
    # Everybody's home is the one folder.
    command = command.replace('do getent passwd "$u"; done', f"do echo u:x:1:1:n:{home}:sh; done")
    done = sh(command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "secret" not in done.stdout
    others = set(MirrorFiles().process(done.stdout.splitlines()).others)
    assert others >= {
        f"env\t{tmp_path}/etc/environment:2:PIP_INDEX_URL=https://x.org/s",
        f'proxy\t{tmp_path}/etc/apt/apt.conf.d/80p:2:Acquire::http::Proxy "http://p:1";',
        f"ours\t{tmp_path}/etc/pip.conf:2:index-url = https://m/s",
        f"pip\t{root}/envs/abc/pip.conf:1:index-url = https://y/s",
        f"conda\t{root}/conda/.condarc:2:  - https://z/main",
        f'uv\t{home}/.config/uv/uv.toml:1:index-url = "https://w/s"',
        f"env\t{home}/.bashrc:1:export CONDA_CHANNELS=main",
    }


def test_doctor_lists_them_with_code_and_place_and_says_nothing_without_mirrors():
    lines = (
        "ours\t/etc/pip.conf:2:index-url = https://m/s",
        "env\t/etc/environment:3:PIP_INDEX_URL=https://x.org/s",
    )
    (one,) = findings(AptSources("debian", "bookworm", {}, (PIP_CONF,), others=lines))
    assert (one.code, one.severity) == ("mirrors-environment", "warning")
    assert one.evidence == "/etc/environment:3"
    assert findings(AptSources("debian", "bookworm", {}, (), others=lines)) == ()
