"""Where the driver's packages come from: the source file that makes them known to apt."""

from __future__ import annotations

from dataclasses import replace

from gpufleet import apt_sources, catalog
from gpufleet.apt_sources import Entry
from gpufleet.kernel.picture import KernelPicture

#: The file that makes the driver's packages known to apt.
PATH = "/etc/apt/sources.list.d/gpufleet-driver.sources"


def repository_host(source: str) -> str | None:
    """The host of NVIDIA's repository for a setting driver.source, None for other sources."""
    if source == "nvidia-cn":
        return catalog.mirrors().sites["nvidia-cn"].host
    return "developer.download.nvidia.com" if source == "nvidia" else None


#: Which components of the distribution's archive hold the driver.
_COMPONENTS = {
    "debian": ("contrib", "non-free", "non-free-firmware"),
    "ubuntu": ("restricted",),
}

_CODENAMES = {
    ("debian", "12"): "bookworm",
    ("debian", "13"): "trixie",
    ("ubuntu", "22.04"): "jammy",
    ("ubuntu", "24.04"): "noble",
}


def repository(kernels: KernelPicture) -> str:
    """The distribution's folder in NVIDIA's repository, such as debian12 or ubuntu2404."""
    return kernels.os + kernels.os_version.replace(".", "")


def wanted(kernels: KernelPicture, source: str, text: str) -> str | None:
    """What `PATH` must hold so that apt knows the driver's packages; None if it does already.

    `text` is what the host's source files hold: a line `file`, tab, path, then lines after a plus.
    The distribution's components are added at the addresses that the host uses, its mirror's too.
    """
    files: dict[str, list[str]] = {}
    path = ""
    for line in text.splitlines():
        if line.startswith("file\t"):
            path = line.partition("\t")[2]
            files[path] = []
        elif line.startswith("+") and path:
            files[path].append(line[1:])
    own = "\n".join([*files.pop(PATH, []), ""])
    if site := repository_host(source):
        uri = f"https://{site}/compute/cuda/repos/{repository(kernels)}/x86_64"
        keyring = ("Signed-By", "/usr/share/keyrings/cuda-archive-keyring.gpg")
        entries = [Entry(("deb",), (uri,), ("/",), (), (keyring,))]
    elif source == "distribution":
        entries = _more_components(kernels, files)
    else:
        return None
    stanzas = [_stanza(entry) for entry in entries]
    whole = "\n".join(["# Written by gpufleet: where the driver's packages are.\n", *stanzas])
    return None if not entries or whole == own else whole


def _more_components(kernels: KernelPicture, files: dict[str, list[str]]) -> list[Entry]:
    codename = _CODENAMES.get((kernels.os, kernels.os_version), "")
    found = [
        entry
        for path, lines in files.items()
        for entry in apt_sources.parse(path, "\n".join([*lines, ""]))
        if "deb" in entry.types and apt_sources.is_distribution(entry, kernels.os, codename)
    ]
    having: dict[tuple[str, str], set[str]] = {}
    for entry in found:
        for uri in entry.uris:
            for suite in entry.suites:
                having.setdefault((uri, suite), set()).update(entry.components)
    more: dict[Entry, None] = {}
    for entry in found:
        for uri in entry.uris:
            for suite in entry.suites:
                there = having[uri, suite]
                lacking = tuple(c for c in _COMPONENTS.get(kernels.os, ()) if c not in there)
                if "main" in entry.components and lacking:
                    one = replace(entry, types=("deb",), uris=(uri,), suites=(suite,))
                    more[replace(one, components=lacking)] = None
    return list(more)


def _stanza(entry: Entry) -> str:
    fields = {
        "Types": " ".join(entry.types),
        "URIs": " ".join(entry.uris),
        "Suites": " ".join(entry.suites),
        "Components": " ".join(entry.components),
        **dict(entry.options),
    }
    return "".join(f"{key}: {value}\n" for key, value in fields.items() if value)
