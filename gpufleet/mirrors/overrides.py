"""Finds what would defeat a choice of mirrors: whatever wins over the files that were written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from gpufleet.apt_sources import parse, rivals
from gpufleet.mirrors.plan import CONDARC, PIP_CONF, UV_TOML, AptSources

#: Environment variable → the file that it wins over (pip, uv and conda: their documentation on
#: configuration).
VARIABLES = {
    "PIP_INDEX_URL": PIP_CONF,
    "PIP_EXTRA_INDEX_URL": PIP_CONF,
    "PIP_CONFIG_FILE": PIP_CONF,
    "UV_INDEX_URL": UV_TOML,
    "UV_DEFAULT_INDEX": UV_TOML,
    "UV_INDEX": UV_TOML,
    "UV_EXTRA_INDEX_URL": UV_TOML,
    "UV_CONFIG_FILE": UV_TOML,
    "CONDARC": CONDARC,
    "CONDA_CHANNELS": CONDARC,
}
#: What the demo's own unit sets, if anything does.
HF = "HF_ENDPOINT"
PROXIES = ("http_proxy", "https_proxy", "all_proxy")

_ASSIGNMENT = re.compile(
    rf"(?<![A-Za-z0-9_])({'|'.join([*VARIABLES, HF, *PROXIES, *map(str.upper, PROXIES)])})"
    r"=(\"[^\"]*\"|'[^']*'|[^\s;\"']*)"
)

#: pip's extra indexes have no order: whichever has the higher version wins (pip issue 11722).
_UNSAFE = {"PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL", "extra-index-url"}

_CHANNEL_KEYS = ("channels", "default_channels", "custom_channels", "channel_alias")

Kind = Literal["ours", "env", "pip", "uv", "conda", "proxy"]


@dataclass(frozen=True)
class Line:
    """A line of a host's configuration; number 0 is none, as for systemd's own environment."""

    kind: Kind
    path: str
    number: int
    text: str

    @property
    def where(self) -> str:
        """path:line."""
        return f"{self.path}:{self.number}" if self.number else self.path


@dataclass(frozen=True)
class Override:
    """One thing that wins over what the choice wrote, or that a person should know of."""

    code: str
    severity: Literal["warning", "note"]
    what: str
    where: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what} ({self.where}); {self.mend}"


def read(lines: Iterable[str]) -> list[Line]:
    """Read what the MirrorFiles fact prints of other configuration: kind, tab, path:number:text."""
    found = []
    for line in lines:
        kind, _, rest = line.partition("\t")
        if match := re.fullmatch(r"(/.*?|systemd):([0-9]+):(.*)", rest):
            found.append(Line(kind, match[1], int(match[2]), match[3]))  # type: ignore[arg-type]
    return found


def in_force(sources: AptSources) -> dict[str, str]:
    """The files of the choice that is in force: path → text, which is empty for apt's."""
    seen = read(sources.others)
    return {
        path: "".join(f"{line.text}\n" for line in seen if (line.kind, line.path) == ("ours", path))
        for path in sources.written
    }


def overrides(sources: AptSources, ours: Mapping[str, str]) -> tuple[Override, ...]:
    """Everything on a host that wins over the files of a choice, `ours` (path → text).

    What leads to a host that those files name themselves is left out: it defeats nothing.
    """
    seen = read(sources.others)
    found = [
        *_environment(seen, ours),
        *_pip(seen, ours),
        *_uv(seen, ours),
        *_conda(seen, ours),
        *_apt(sources, ours),
        *_proxies(seen),
    ]
    order = {"warning": 0, "note": 1}
    return tuple(sorted(dict.fromkeys(found), key=lambda one: order[one.severity]))


def _hosts(text: str) -> set[str]:
    return {urlsplit(url).netloc for url in re.findall(r"https?://[^\s\"',\]}]+", text)}


def _led_elsewhere(value: str, text: str) -> bool:
    """Whether a value leads anywhere but to the hosts that the text names."""
    hosts = _hosts(value)
    return not hosts or not hosts <= _hosts(text)


def _assignments(line: Line) -> Iterator[tuple[str, str]]:
    """(variable, value) of what a line of a shell, PAM or systemd file sets, known ones only."""
    if line.text.lstrip().startswith(("#", ";")):
        return
    # pam_env's own format: NAME DEFAULT=value
    text = re.sub(r"^(\w+)\s+(?:DEFAULT|OVERRIDE)=", r"\1=", line.text)
    for match in _ASSIGNMENT.finditer(text):
        yield match[1], match[2].strip("\"'")


def _environment(seen: Sequence[Line], ours: Mapping[str, str]) -> Iterator[Override]:
    for line in seen:
        if line.kind != "env":
            continue
        for name, value in _assignments(line):
            path = VARIABLES.get(name, "")
            if name == HF:
                yield Override(
                    "environment-hf",
                    "note",
                    f"{HF} is set for whoever logs in; the demo gets its own from the settings",
                    line.where,
                    "remove the line, or set mirrors.pinned.hf",
                )
            if path in ours and value and _led_elsewhere(value, ours[path]):
                yield Override(
                    "environment",
                    "warning",
                    f"{name} wins over {path}{_unsafe(name)}",
                    line.where,
                    _unset(line, name),
                )


def _unset(line: Line, name: str) -> str:
    if line.path == "systemd":
        return f"on the host: systemctl unset-environment {name}"
    return "remove the line, and log in anew"


def _unsafe(name: str) -> str:
    return ", and extra indexes are unsafe: anybody's higher version wins" * (name in _UNSAFE)


def _options(line: Line) -> tuple[str, str]:
    """Name and value of `name = value`, as in pip.conf and uv.toml."""
    name, _, value = line.text.partition("=")
    return name.strip().replace("_", "-"), value.strip()


def _pip(seen: Sequence[Line], ours: Mapping[str, str]) -> Iterator[Override]:
    for line in seen:
        name, value = _options(line)
        if line.kind == "ours" and line.path == PIP_CONF and name == "extra-index-url":
            yield Override(
                "pip-extra-index",
                "warning",
                f"pip also takes packages from an extra index{_unsafe(name)}",
                line.where,
                "serve those packages from one index, and remove the line",
            )
        if line.kind != "pip" or PIP_CONF not in ours or name not in _PIP:
            continue
        if name in _UNSAFE or _led_elsewhere(value, ours[PIP_CONF]):
            yield Override(
                "pip-file",
                "warning",
                f"{name} there wins over {PIP_CONF}{_unsafe(name)}",
                line.where,
                "remove the line or the file",
            )


_PIP = ("index-url", "extra-index-url", "no-index", "find-links")
_UV = ("index-url", "extra-index-url", "url", "no-index", "find-links")


def _uv(seen: Sequence[Line], ours: Mapping[str, str]) -> Iterator[Override]:
    for line in seen:
        name, value = _options(line)
        if line.kind != "uv" or UV_TOML not in ours or name not in _UV:
            continue
        if name in _UNSAFE or _led_elsewhere(value, ours[UV_TOML]):
            yield Override(
                "uv-file",
                "warning",
                f"{name} there wins over {UV_TOML}",
                line.where,
                "remove the line or the file",
            )


def _conda(seen: Sequence[Line], ours: Mapping[str, str]) -> Iterator[Override]:
    if CONDARC not in ours:
        return
    mapped = _keys(ours[CONDARC])
    custom = mapped.get("custom_channels")
    known = {"defaults", *(custom if isinstance(custom, dict) else {})}
    for path in dict.fromkeys(line.path for line in seen if line.kind == "conda"):
        lines = [line for line in seen if (line.kind, line.path) == ("conda", path)]
        keys = _keys("".join(f"{line.text}\n" for line in lines))
        for key in _CHANNEL_KEYS:
            if key not in keys:
                continue
            flat = _flat(keys[key])
            if key == "channels" and all(name in known for name in flat if "://" not in name):
                flat = [name for name in flat if "://" in name]  # names go through the mirror's map
                if not flat:
                    continue
            if flat and not _led_elsewhere(" ".join(flat), ours[CONDARC]):
                continue
            where = next((one.where for one in lines if one.text.lstrip().startswith(key)), path)
            yield Override(
                "conda-file",
                "warning",
                f"{key} there wins over {CONDARC}",
                where,
                "remove the key or the file, then conda clean -i",
            )


def _keys(text: str) -> dict[str, Any]:
    """A .condarc's settings; none where it is not YAML."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return document if isinstance(document, dict) else {}


def _flat(value: Any) -> list[str]:
    """Every text in a setting, however it is nested."""
    if isinstance(value, dict):
        return [text for one in value.values() for text in _flat(one)]
    if isinstance(value, list):
        return [text for one in value for text in _flat(one)]
    return [str(value)]


def _apt(sources: AptSources, ours: Mapping[str, str]) -> Iterator[Override]:
    if not any(path.startswith("/etc/apt/") for path in ours):
        return
    for path, text in sources.files.items():
        for entry in parse(path, text):
            if not rivals(entry, sources.os, sources.codename):
                continue
            uri = entry.uris[0]
            number = next((n for n, line in enumerate(text.splitlines(), 1) if uri in line), 0)
            suites = " ".join(entry.suites)
            yield Override(
                "apt-elsewhere",
                "warning",
                f"apt also takes the distribution's {suites} from {urlsplit(uri).hostname or uri}",
                path if path in ours else f"{path}:{number}",
                "remove or disable that source if the mirror shall be the only one",
            )


def _proxies(seen: Sequence[Line]) -> Iterator[Override]:
    for line in seen:
        if line.kind == "proxy" and not line.text.lstrip().startswith(("//", "#")):
            text = "apt asks through a proxy"
            yield Override("apt-proxy", "note", text, line.where, "nothing, if it is meant so")
        if line.kind == "env":
            for name, _ in _assignments(line):
                if name.lower() in PROXIES:
                    text = f"{name} is set: downloads go through a proxy"
                    yield Override("proxy", "note", text, line.where, "nothing, if it is meant so")
