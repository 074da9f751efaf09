"""The base images of lab hosts: a fresh server of a distribution, built once and kept."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

from gpufleet.apt_sources import Entry
from gpufleet.errors import FleetError
from gpufleet.lab import sources, trust
from gpufleet.lab.locks import locked
from gpufleet.lab.machine import Progress, remove_tree, run, say_nothing
from gpufleet.lab.sources import Release

CACHE = Path("/var/cache/gpufleet")
IMAGES = CACHE / "images"
_KEYRINGS = CACHE / "keyrings"

# What an installer leaves on a server beside the essential packages: no curl, no rsync, no pip.
PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "dbus", "kmod", "procps", "cron", "logrotate"),
    *("openssh-server", "sudo", "iproute2", "iputils-ping", "netbase", "pciutils"),
    *("apt", "ca-certificates", "wget", "xz-utils", "less", "tzdata", "python3"),
)
# mmdebstrap's own words -> how much of a build is done when it says them (seen: 20 s in all).
_STAGES = {
    "running apt-get update": 0.02,
    "downloading packages with apt": 0.15,
    "extracting archives": 0.25,
    "installing essential packages": 0.35,
    "installing remaining packages": 0.50,
    "running --customize-hook": 0.92,
    "cleaning": 0.97,
}
_NO_ANSWER = re.compile(
    r"could not resolve|could not connect|unable to connect|connection (timed out|refused)"
    r"|network is unreachable|temporary failure|failed to fetch|no longer has a release file"
    r"|does not have a release file",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Recipe:
    """All that decides what an image holds; another recipe is another image."""

    release: Release
    sources: tuple[Entry, ...]
    certificates: dict[str, str]
    packages: tuple[str, ...] = PACKAGES
    # Raised when `_finish` changes, so that cached images are built anew.
    revision: int = 1

    @property
    def directory(self) -> Path:
        """Where the image is kept once it is built."""
        digest = sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return IMAGES / f"{self.release.distribution}-{self.release.version}-{digest}"


def recipe(release: Release) -> Recipe:
    """The recipe of `release` on this machine: its sources and what it trusts."""
    own = sources.for_release(sources.read(Path("/etc/apt")), release, sources.read_os_release())
    return Recipe(release, tuple(own), trust.added_certificates())


def ensure(wanted: Recipe, in_use: Sequence[Path] = (), progress: Progress = say_nothing) -> Path:
    """The root directory of the image of `wanted`, built when it is not there yet.

    Older images of the same release are removed, save those `in_use`. FleetError in one line
    where the archive does not answer or a package cannot be installed.
    """
    return kept(
        wanted.directory,
        "root",
        lambda building: build(wanted, building, progress),
        in_use,
        progress,
    )


def kept(
    target: Path,
    product: str,
    make: Callable[[Path], None],
    in_use: Sequence[Path],
    progress: Progress,
) -> Path:
    """`target`/`product`, which `make` puts into a directory that becomes `target` once whole.

    `target` is called WHAT-DIGEST: others of the same WHAT are removed, save those `in_use`.
    """
    if (target / product).exists():
        return target / product
    with locked(IMAGES, progress):
        if (target / product).exists():
            return target / product
        for leftover in IMAGES.glob(".building-*"):
            remove_tree(leftover)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=IMAGES))
        try:
            building.chmod(0o755)
            make(building)
            building.rename(target)
        except BaseException:
            remove_tree(building)
            raise
        keep = {target, *(each.parent for each in in_use)}
        for old in IMAGES.glob(f"{target.name.rpartition('-')[0]}-*"):
            if old.is_dir() and old not in keep:
                remove_tree(old)
    return target / product


def build(wanted: Recipe, building: Path, progress: Progress) -> None:
    """Make the image of `wanted` as `building`/root."""
    release, root = wanted.release, building / "root"
    certificates = building / "certificates"
    certificates.mkdir()
    for name, pem in wanted.certificates.items():
        (certificates / name).write_text(pem)
    trusting = "mkdir -p {0} && cp -r {1}/. {0}/ && chroot {2} update-ca-certificates".format(
        '"$1"/usr/local/share/ca-certificates', shlex.quote(str(certificates)), '"$1"'
    )
    command = [
        *("mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase"),
        # Hosts install packages at once: the package lists stay.
        *("--skip=cleanup/apt/lists", "--include=" + ",".join(wanted.packages)),
        *(f"--customize-hook={trusting}", "--dpkgopt=force-unsafe-io"),
        # Translations as a server has them, unless the operator's own apt does without.
        '--aptopt=Acquire::Languages "en"',
        *(f"--aptopt={option.rstrip(';')}" for option in trust.apt_options()),
    ]
    if wanted.sources:
        listed = building / f"{release.distribution}.sources"
        listed.write_text(sources.render(wanted.sources))
        command += [release.codename, str(root), str(listed)]
    else:
        # mmdebstrap's own default archive, with the sections that a server has.
        sections = (
            "main,non-free-firmware"
            if release.distribution == "debian"
            else "main,restricted,universe,multiverse"
        )
        keyring = _keyring(release, progress)
        command += [f"--components={sections}", f"--keyring={keyring}"]
        command += [release.codename, str(root)]
    log = IMAGES / f"{release.distribution}-{release.version}.log"
    _mmdebstrap(command, release, log, progress)
    _finish(wanted, root)
    shutil.rmtree(certificates)


def _mmdebstrap(command: Sequence[str], release: Release, log: Path, progress: Progress) -> None:
    progress(f"building the {release.name} image (once, about a minute)", 0.0)
    # In namespaces of its own, so that killing it takes its children and mounts along; dying
    # with us, so that nothing builds on when we are killed.
    contained = [
        *("setpriv", "--pdeathsig", "KILL"),
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
    ]
    said: list[str] = []
    with log.open("w") as kept:
        build = subprocess.Popen(
            [*contained, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": "/tmp", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            for line in build.stdout or ():
                kept.write(line)
                said.append(line.strip())
                for stage, fraction in _STAGES.items():
                    if line.startswith(f"I: {stage}"):
                        progress(f"{release.name} image: {stage}", fraction)
            failed = build.wait() != 0
        finally:
            if build.poll() is None:
                build.send_signal(signal.SIGKILL)
                build.wait()
    if failed:
        silence = next((line for line in said if _NO_ANSWER.search(line)), None)
        if silence:
            raise FleetError(
                f"the archive of {release.name} does not answer from this machine ({silence}): "
                "check the network and the proxy, or choose another --image"
            )
        # The first complaint is the cause; what follows is mmdebstrap giving up.
        cause = next((line for line in said if line.startswith("E:")), "mmdebstrap said nothing")
        raise FleetError(f"cannot build the {release.name} image: {cause}; see {log}")


def _keyring(release: Release, progress: Progress) -> Path:
    """The keyring that signs `release`, fetched through apt's own trust where it is missing."""
    keyring = Path(release.keyring)
    if keyring.exists():
        return keyring
    package = f"{release.distribution}-keyring"
    kept = _KEYRINGS / keyring.name
    if not kept.exists():
        progress(f"fetching {package}", None)
        _KEYRINGS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_KEYRINGS) as scratch:
            # Debian 12 does not carry Ubuntu's keyring; Debian 13, signed by keys that this
            # machine trusts, does.
            files = unpack([package], sources.RELEASES["debian:13"], Path(scratch))
            found = next(files.rglob(keyring.name), None)
            if found is None:
                raise FleetError(f"package {package} holds no {keyring.name}: cannot check archive")
            os.replace(found.resolve(), kept)
    return kept


def unpack(packages: Sequence[str], release: Release, scratch: Path) -> Path:
    """The files of `packages` of a release, downloaded and checked by apt, outside this machine's
    dpkg. FleetError where this machine has no sources of that distribution."""
    found = sources.for_release(sources.read(Path("/etc/apt")), release, sources.read_os_release())
    if not found:
        raise FleetError(
            f"this machine has no sources of {release.name} to fetch {' '.join(packages)} from"
        )
    for directory in ("lists/partial", "archives/partial", "etc", "files"):
        (scratch / directory).mkdir(parents=True)
    (scratch / "etc/fetch.sources").write_text(sources.render(found))
    (scratch / "status").touch()
    (scratch / "apt.conf").write_text(
        "\n".join(
            [
                f'Dir::Etc::SourceList "/dev/null"; Dir::Etc::SourceParts "{scratch}/etc";',
                f'Dir::State::Lists "{scratch}/lists"; Dir::State::Status "{scratch}/status";',
                f'Dir::Cache "{scratch}"; APT::Sandbox::User "root"; Acquire::Languages "none";',
                'APT::Update::Post-Invoke-Success ""; #clear APT::Update;',
            ]
        )
    )
    apt = ("env", "-C", str(scratch), f"APT_CONFIG={scratch}/apt.conf", "apt-get", "-qq")
    run(*apt, "update")
    run(*apt, "download", *packages)
    for archive in scratch.glob("*.deb"):
        run("dpkg-deb", "-x", archive, scratch / "files")
    return scratch / "files"


def _finish(wanted: Recipe, root: Path) -> None:
    """What an installer does after the packages, and nothing that it would not."""
    release, etc = wanted.release, root / "etc"
    _write_sources(wanted, root)
    for given in (*etc.glob("ssh/ssh_host_*"), etc / "resolv.conf", etc / "hostname"):
        given.unlink(missing_ok=True)  # the operator's, or meant to be each host's own
    (etc / "machine-id").write_text("")
    (etc / "fstab").write_text("# A container: its root is mounted from outside.\n")
    (etc / "default/locale").write_text("LANG=C.UTF-8\n")
    (etc / "apt/apt.conf.d/99mmdebstrap").unlink(missing_ok=True)
    (etc / "dpkg/dpkg.cfg.d/99mmdebstrap").unlink(missing_ok=True)
    # Nothing to administer from the outside of a container: these would fail or wait.
    masked = ["systemd-networkd-wait-online.service", "systemd-resolved.service"]
    run("systemctl", f"--root={root}", "mask", "--quiet", *masked)
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    information = {"image": release.name, "built": int(time.time()), "packages": wanted.packages}
    (root.parent / "image.json").write_text(json.dumps(information, indent=2) + "\n")


def _write_sources(wanted: Recipe, root: Path) -> None:
    """One apt source file, in the form that this release's installer writes."""
    apt, release = root / "etc/apt", wanted.release
    chosen = []
    for entry in wanted.sources or sources.read(apt):
        key = entry.signed_by
        if key.startswith(str(_KEYRINGS)):
            options = [(k, v if v != key else release.keyring) for k, v in entry.options]
            entry = replace(entry, options=tuple(options))
        elif key.startswith("/") and not (root / key[1:]).exists():
            (root / key[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(key, root / key[1:])
        chosen.append(entry)
    for old in [apt / "sources.list", *(apt / "sources.list.d").iterdir()]:
        old.unlink(missing_ok=True)
    if release.name == "ubuntu:22.04":
        (apt / "sources.list").write_text(sources.render_one_line(chosen))
    else:
        listed = apt / f"sources.list.d/{release.distribution}.sources"
        listed.write_text(sources.render(chosen))
