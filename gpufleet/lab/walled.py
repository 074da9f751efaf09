"""The mirror host of a walled lab: a site for apt, PyPI, torch and conda, and all it can suffer."""

from __future__ import annotations

import base64
import json
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from gpufleet.apt_sources import archive
from gpufleet.errors import FleetError
from gpufleet.lab import faults, image, network, sources, trust
from gpufleet.lab.machine import Progress, run, say_nothing
from gpufleet.lab.state import write_whole

if TYPE_CHECKING:
    from gpufleet.lab.labs import Host, Lab

#: What inventories call the mirror site.
SITE = "lab"
_CERTIFICATE = "usr/local/share/ca-certificates/gpufleet-lab.crt"
#: A change of the mirror's configuration takes about 0.1 s.
_PATIENCE_SECONDS = 30.0

# Finishes what a killed run began, once that has ended: its shell outlives it here. The package
# lists are as old as the image.
_INSTALL = """set -e
exec 9>/run/gpufleet-mirror.lock
flock 9
export DEBIAN_FRONTEND=noninteractive
apt="apt-get -qq -o DPkg::Lock::Timeout=600"
state=$(dpkg-query -W -f '${db:Status-Status}' nginx 2>/dev/null || true)
if [ "$state" != installed ]; then
    dpkg --configure -a
    $apt install -y --no-install-recommends nginx || {
        $apt update; $apt install -y --no-install-recommends nginx; }
fi
mkdir -p /etc/nginx/mirror/faults /srv/mirror/pytorch/whl/cpu /srv/mirror/anaconda /var/cache/nginx
# It may hold the operator's password for an index; nginx reads it as root.
chmod 700 /etc/nginx/mirror
cd /etc/nginx/mirror
[ -e tls ] || {
    rm -rf tls.new; (umask 077; mkdir tls.new); cd tls.new
    key="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650"
    openssl req -x509 $key -keyout ca.key -out ca.crt -subj "/CN=gpufleet lab $1" \\
        -addext keyUsage=critical,keyCertSign,cRLSign
    openssl req $key -keyout site.key -out site.csr -subj "/CN=$2"
    printf 'extendedKeyUsage=serverAuth\\nsubjectAltName=' >san
    printf 'DNS:%s,DNS:%s,DNS:%s\\n' "$2" "$3" "$4" >>san
    openssl x509 -req -in site.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 \\
        -extfile san -out site.crt
    openssl req -x509 $key -keyout wrong.key -out wrong.crt -subj /CN=somebody-else.gpufleet.test
    cd ..; mv tls.new tls
}
"""
_RELOAD = "nginx -t -q && { systemctl -q is-active nginx && systemctl reload nginx || \
systemctl restart nginx; }"


@dataclass(frozen=True)
class Upstream:
    """Where the mirror fetches a folder from: ``scheme://host[:port]`` and a path ending in /."""

    origin: str
    path: str
    #: What HTTP's basic authentication sends, where the address holds a name and a password.
    authorization: str = ""

    @classmethod
    def at(cls, url: str) -> Upstream:
        """The folder at `url`; FleetError for what nginx cannot fetch, such as file: addresses."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FleetError(f"{url}: a walled lab's mirror can fetch from http and https only")
        account, _, host = parts.netloc.rpartition("@")
        authorization = base64.b64encode(account.encode()).decode() if account else ""
        return cls(f"{parts.scheme}://{host}", parts.path.rstrip("/") + "/", authorization)

    def below(self, folder: str) -> Upstream:
        """A folder of this one."""
        return replace(self, path=self.path + folder)

    @property
    def above(self) -> Upstream:
        """The folder that this one is in."""
        return replace(self, path=self.path.rstrip("/").rpartition("/")[0] + "/")

    @property
    def root(self) -> Upstream:
        """The whole host."""
        return replace(self, path="/")


@dataclass(frozen=True)
class PipIndex:
    """The package index that this machine's pip is configured with, and what it trusts there."""

    url: str
    certificates: str | None


def pip_index() -> PipIndex:
    """What pip itself makes of its configuration files, environment and defaults."""
    ask = (
        "import json; from pip._internal.commands import create_command\n"
        "options, _ = create_command('download').parse_args([])\n"
        "print(json.dumps([options.index_url, options.cert, options.proxy, options.no_index]))"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FleetError(
            f"this machine's pip does not say which index it uses ({done.stderr.strip()[-200:]}): "
            "check `pip config list`"
        )
    url, certificates, proxy, none = json.loads(done.stdout)
    if none or proxy:
        raise FleetError(
            "pip is configured with a proxy or without an index: "
            "a walled lab's mirror needs a direct way to an index; see `pip config list`"
        )
    return PipIndex(url, certificates)


def require_direct_way() -> None:
    """FleetError where this machine reaches the outside through an HTTP proxy only."""
    proxies = [line for line in trust.apt_options() if "::Proxy" in line and "DIRECT" not in line]
    variables = sorted(set(trust.proxy_variables()) - {"no_proxy", "NO_PROXY"})
    if proxies or variables:
        named = ", ".join([*variables, *proxies])
        raise FleetError(
            f"a walled lab's mirror needs a direct way out, and this machine uses a proxy ({named})"
        )


def file_hosts(page: str) -> list[str]:
    """The ``scheme://host`` of every absolute link of a simple page, HTML or JSON, sorted."""
    found = re.findall(r"""(?:href=["']|"url"\s*:\s*")(https?://[^/"'\s#?]+)/""", page)
    return sorted(set(found))


def _discover(index: Upstream, certificates: str | None) -> list[str]:
    """The hosts that hold the files of `index`, as the page of a project that hosts need says."""
    from gpufleet.python_env.plan import lock_for

    project = lock_for("cpu").split()[0].partition("==")[0].splitlines()[-1]
    request = urllib.request.Request(f"{index.origin}{index.path}{project}/")
    if index.authorization:
        request.add_header("Authorization", f"Basic {index.authorization}")
    trusted = ssl.create_default_context()
    if certificates:
        trusted.load_verify_locations(certificates)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted)
    )
    try:
        with opener.open(request, timeout=60) as answer:
            return file_hosts(answer.read().decode(errors="replace"))
    except OSError as error:
        raise FleetError(
            f"{urlsplit(index.origin).hostname}: pip's index does not answer for {project} "
            f"({error}): check `pip config list` and the network of this machine"
        ) from None


def _local_wheels(progress: Progress) -> list[Path]:
    """The wheels that no index of PyPI's kind has, such as torch without CUDA.

    From this machine's wheelhouse of the demo's environment where it is whole; else they alone
    are downloaded, by pip, once.
    """
    from gpufleet.python_env import wheelhouse
    from gpufleet.python_env.plan import Lock, lock_for
    from gpufleet.settings import PythonEnv

    lock = lock_for("cpu")
    folder = wheelhouse.cache() / lock.digest
    if not (folder / ".whole").exists():
        progress("downloading torch for the mirror host", None)
        kept = image.CACHE / "torch"
        kept.mkdir(parents=True, exist_ok=True)
        write_whole(kept / "local.lock", lock.split()[1])
        alone = Lock(kept / "local.lock", lock.python)
        folder = wheelhouse.build(alone, PythonEnv().torch_index, into=kept)
    return sorted(folder.glob("*+*.whl"))


def _page(links: Iterable[str]) -> str:
    return "<!DOCTYPE html>\n<html><body>\n" + "\n".join(links) + "\n</body></html>\n"


def _site(archives: Iterable[str]) -> dict[str, Any]:
    """The mirror as a site of catalog/mirrors.yaml."""
    return {
        "title": "the mirror host of a walled lab",
        "hosts": [network.MIRROR_NAMES[0]],
        "domain": SITE,
        "services": {
            "apt": {"archives": {name: f"/{name}" for name in archives}},
            "pypi": {"index": "/pypi/web/simple"},
            "conda": {
                "base": "/anaconda",
                "subchannels": ["main"],
                "cloud": {"conda-forge": "/anaconda/cloud"},
            },
            "miniconda": {"dir": "/anaconda/miniconda"},
            "torch": {"url": "/pytorch/whl/{cuda}", "style": "simple"},
        },
    }


def _last(done: subprocess.CompletedProcess[str]) -> str:
    said = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}").splitlines()
    return said[-1].strip()


@dataclass(frozen=True)
class Mirror:
    """The mirror of a walled lab that is up."""

    lab: Lab
    host: Host

    @property
    def name(self) -> str:
        """What the hosts know it as."""
        return network.MIRROR_NAMES[0]

    @property
    def url(self) -> str:
        """The site's address for the hosts, without a path."""
        return f"https://{self.name}"

    @property
    def root(self) -> Path:
        """Its filesystem as this machine sees it."""
        return self.lab.root(self.host)

    @property
    def _configuration(self) -> Path:
        return self.root / "etc/nginx/mirror"

    @property
    def _anaconda(self) -> Path:
        return self.root / "srv/mirror/anaconda"

    @property
    def _finished(self) -> Path:
        """The site's definition and its installer's checksum, written once all of it answers."""
        return self.lab.directory / "mirror-site.json"

    def settings(self) -> dict[str, Any]:
        """The settings with which a host takes everything from the mirror."""
        from gpufleet.lab import channel  # needs what a bare python3 has not, other labs do not

        try:
            made = json.loads(self._finished.read_text())
        except FileNotFoundError:
            raise FleetError(
                f"the mirror of lab {self.lab.name} is half-made: "
                f"`fleet lab up --name {self.lab.name}` completes it"
            ) from None
        return {
            "mirrors": {"site": SITE, "sites": {SITE: made["site"]}, "apt_security": True},
            "python_env": {
                "manager": "miniconda",
                "installer": channel.INSTALLER,
                "installer_sha256": made["installer_sha256"],
                "source": "index",
                "torch_index": f"{self.url}/pytorch/whl/cpu",
            },
        }

    def strays(self) -> dict[str, int]:
        """Host -> packets that it sent, or tried to send, to anything but this mirror."""
        return {host.name: network.strays(self.lab.name, host.name) for host in self.lab.hosts}

    def put_channel(self, folder: Path) -> None:
        """Serve the files of `folder` below /anaconda, beside those that are there.

        `folder` is as the mirror sites have it: pkgs/main, cloud/conda-forge, miniconda.
        """
        run("cp", "-r", "--no-preserve=mode,ownership", f"{folder}/.", self._anaconda)
        run("chmod", "-R", "a+rX", self._anaconda)

    def fault(
        self,
        service: str,
        kind: str,
        *,
        path: str | None = None,
        agent: str | None = None,
        rate: str = "20k",
    ) -> None:
        """Make `service`, or ``site`` for all of them, fail as `kind` says, until `clear`.

        Arguments as of `faults.snippet`, and the kind ``certificate`` of ``site``: one that is
        for another name and signed by nobody. A service has one fault at a time.
        """
        if (service, kind) == (faults.SITE, "certificate"):
            lines = "".join(
                f"{directive} /etc/nginx/mirror/tls/wrong.{suffix};\n"
                for directive, suffix in (
                    ("ssl_certificate", "crt"),
                    ("ssl_certificate_key", "key"),
                )
            )
            self._write("certificate.conf", lines)
        else:
            lines = faults.snippet(service, kind, path=path, agent=agent, rate=rate)
            self._write(f"faults/{service}.conf", lines)
        self._reload()

    def clear(self) -> None:
        """Put all right again."""
        for written in self._configuration.glob("faults/*.conf"):
            written.unlink()
        self._configuration.joinpath("certificate.conf").unlink(missing_ok=True)
        self._reload()

    def requests(self) -> list[str]:
        """What the front was asked: client, address, status, bytes and User-Agent a line."""
        return (self.root / "var/log/nginx/mirror.log").read_text().splitlines()

    def furnish(self, progress: Progress = say_nothing) -> None:
        """Install and configure what is missing of it, and make every host trust it."""
        from gpufleet.lab import channel

        if not (self._finished.exists() and self._generation()):
            progress("furnishing the mirror host", None)
            self._run(_INSTALL, self.lab.name, *network.MIRROR_NAMES)
            archives = self._archives()
            self._configure(archives)
            self._lay_torch(progress)
            anaconda = channel.ensure(progress)
            self.put_channel(anaconda)
            self._reload()
            made = {"site": _site(archives), "installer_sha256": channel.checksum(anaconda)}
            write_whole(self._finished, json.dumps(made, indent=2) + "\n")
        authority = (self._configuration / "tls/ca.crt").read_text()
        new = [host for host in self.lab.hosts if not self._trusted(host, authority)]
        if new:
            with ThreadPoolExecutor(max_workers=min(len(new), 16)) as pool:
                list(pool.map(lambda host: self._trust(host, authority), new))

    def _archives(self) -> dict[str, Upstream]:
        """Archive -> where this machine is configured to get it, as the lab's image has it."""
        found: dict[str, Upstream] = {}
        for entry in sources.read(self.root / "etc/apt"):
            for uri in entry.uris:
                if not archive(uri):
                    raise FleetError(
                        f"{urlsplit(uri).hostname}: this machine's apt source has a path of its "
                        "own, which no mirror site has: a walled lab needs /debian or /ubuntu"
                    )
                found.setdefault(archive(uri), Upstream.at(uri))
        return found

    def _configure(self, archives: Mapping[str, Upstream]) -> None:
        from gpufleet import render

        index = pip_index()
        self._write("upstream.pem", self._bundle(index))
        simple = Upstream.at(index.url)
        values = {
            "archives": archives,
            "index": simple,
            "file_hosts": [
                simple.root if host == simple.origin else Upstream.at(host)
                for host in _discover(simple, index.certificates)
            ],
        }
        self._write("site.conf", render.text("mirror-site.nginx.j2", **values))
        front = render.text(
            "mirror.nginx.j2",
            resolvers=[server for server in network.name_servers() if ":" not in server],
            services=faults.SERVICES,
            names=network.MIRROR_NAMES,
        )
        self._write("../nginx.conf", front)

    def _bundle(self, index: PipIndex) -> str:
        """What this machine trusts: the image's certificates, and those that pip has besides."""
        text = (self.root / "etc/ssl/certs/ca-certificates.crt").read_text()
        if index.certificates and Path(index.certificates).is_file():
            text += Path(index.certificates).read_text(errors="replace")
        return "".join(f"{pem}\n" for pem in trust.certificates(text).values())

    def _lay_torch(self, progress: Progress) -> None:
        """A wheel index of the builds without CUDA, from this machine's wheelhouse."""
        folder = self.root / "srv/mirror/pytorch/whl/cpu"
        projects: dict[str, list[str]] = {}
        for wheel in _local_wheels(progress):
            project = wheel.name.split("-")[0].replace("_", "-").lower()
            target = folder / project / wheel.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copyfile(wheel, target.with_suffix(".part"))
                target.with_suffix(".part").rename(target)
            link = f"{quote(wheel.name)}#sha256={sha256(wheel.read_bytes()).hexdigest()}"
            projects.setdefault(project, []).append(f'<a href="{link}">{wheel.name}</a><br>')
        for project, links in projects.items():
            write_whole(folder / project / "index.html", _page(links))
        names = [f'<a href="{project}/">{project}</a><br>' for project in projects]
        write_whole(folder / "index.html", _page(names))

    def _trusted(self, host: Host, authority: str) -> bool:
        bundle = self.lab.root(host) / "etc/ssl/certs/ca-certificates.crt"
        return authority.strip() in bundle.read_text()

    def _trust(self, host: Host, authority: str) -> None:
        (self.lab.root(host) / _CERTIFICATE).write_text(authority)
        done = self.lab.run(host, "update-ca-certificates")
        if done.returncode:
            raise FleetError(f"{host.name}: cannot trust the mirror: {_last(done)}")

    def _write(self, name: str, text: str) -> None:
        write_whole(self._configuration / name, text)

    def _run(self, script: str, *arguments: str) -> None:
        done = self.lab.run(self.host, join(["sh", "-c", script, "sh", *arguments]))
        if done.returncode:
            raise FleetError(f"{self.host.name}: {_last(done)}")

    def _reload(self) -> None:
        """Let nginx read its configuration, and wait until no request meets the old one."""
        wanted = f"{time.time_ns()}"
        self._write("generation.conf", f"return 200 {wanted};\n")
        self._run(_RELOAD)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        # The old worker accepts for a moment beside the new one.
        agreed = 0
        while agreed < 5:
            agreed = agreed + 1 if self._generation() == wanted else 0
            if time.monotonic() > deadline:
                raise FleetError(f"{self.host.name}: nginx does not take its configuration")
            time.sleep(0.01)

    def _generation(self) -> str:
        """Which configuration answers, '' where none does."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"http://{self.host.address}:8000/", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""
