"""Asks mirror sites, as the real clients would, whether they work and how fast: runs on a host.

The host's own python3 runs this text; it needs nothing but Python 3.8's standard library. The only
argument is the JSON document that `gpufleet.mirrors.probe.plan` writes; the answer is one line of
JSON, and the same is kept in the file that the plan names.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import queue
import re
import socket
import ssl
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

#: Requests that run at the same time: first to see who answers, then to see how fast.
CHECKING, MEASURING = 24, 4
#: Seconds that one answer may take, and that one measurement lasts.
PATIENCE, SAMPLE_SECONDS = 5.0, 1.0
#: Bytes of one measurement, of a small answer, and of the largest page that is read.
SAMPLE, HEAD, PAGE = 512 * 1024, 16 * 1024, 1536 * 1024

#: What a file begins with, by the end of its name (zip, bzip2, xz, gzip, script, JSON).
MAGIC = {
    ".whl": b"PK\x03\x04",
    ".conda": b"PK\x03\x04",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ",
    ".gz": b"\x1f\x8b",
    ".sh": b"#!",
    ".json": b"{",
}

MACHINES = {
    "x86_64": {"subdir": "linux-64", "deb": "amd64", "machine": "x86_64"},
    "aarch64": {"subdir": "linux-aarch64", "deb": "arm64", "machine": "aarch64"},
}


def names(machine: str) -> dict[str, str]:
    """What a machine is called: `subdir` by conda, `deb` by apt."""
    other = {"subdir": f"linux-{machine}", "deb": machine, "machine": machine}
    return MACHINES.get(machine, other)


class Wrong(Exception):
    """Why a site cannot be used: a word for programs and a line for people."""

    def __init__(self, state: str, why: str) -> None:
        super().__init__(why)
        self.state = state
        self.why = why


class Reply:
    """An answer that was read as far as was asked for."""

    def __init__(self, status: int, url: str, body: bytes, total: int | None) -> None:
        self.status = status
        self.url = url
        self.body = body
        self.total = total
        self.seconds = 0.0


class Budget:
    """Bytes that may still be read, over all threads."""

    def __init__(self, most: int) -> None:
        self.left = most
        self.spent = 0
        self._lock = threading.Lock()

    def take(self, wanted: int) -> int:
        """Reserve up to so many bytes."""
        with self._lock:
            given = min(wanted, self.left)
            self.left -= given
            return given

    def back(self, unused: int, used: int) -> None:
        """Give back what was reserved and not read."""
        with self._lock:
            self.left += unused
            self.spent += used


def place(url: str) -> str:
    """The host of an address, with a port that is not the scheme's own."""
    parts = urlsplit(url)
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    port = "" if parts.port in (None, usual) else f":{parts.port}"
    return (parts.hostname or "") + port


class Within(urllib.request.HTTPRedirectHandler):
    """Follows redirects as long as they stay within the site."""

    def __init__(self, hosts: set[str]) -> None:
        self.hosts = hosts

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """The next request; Wrong where it would leave the site."""
        where = place(newurl)
        fp.close()
        if where not in self.hosts:
            tail = urlsplit(req.full_url).path.rstrip("/").rpartition("/")[2]
            if tail and tail in urlsplit(newurl).path:
                raise Wrong("elsewhere", f"redirects to {where}")
            raise Wrong("portal", f"a page of {where} answers in its place: a login portal?")
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise Wrong("elsewhere", "redirects from https to http")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Site:
    """One site as the plan describes it, and whether it answers at all."""

    def __init__(self, given: dict[str, Any], budget: Budget) -> None:
        self.name: str = given["site"]
        self.via: str = given["via"]
        self.base: str = given["base"]
        self.hosts: set[str] = set(given["hosts"]) | {place(self.base)}
        self.services: dict[str, Any] = given["services"]
        self.budget = budget
        self.dead: Wrong | None = None
        self.slow = 0
        self._opener = urllib.request.build_opener(Within(self.hosts))

    def get(
        self,
        path: str,
        client: tuple[str, str],
        accept: str = "*/*",
        most: int = HEAD,
        ranged: bool = True,
        sample: bool = False,
    ) -> Reply:
        """Read `most` bytes at most from an address; a sample is what comes in its time.

        Raises Wrong for any answer but 200 and 206.
        """
        if self.dead is not None:
            raise self.dead
        url = urljoin(self.base + "/", path)
        if place(url) not in self.hosts:
            raise Wrong("elsewhere", f"its index links files on {place(url)}")
        headers = {"User-Agent": client[1], "Accept": accept}
        if ranged:
            headers["Range"] = f"bytes=0-{most - 1}"
        granted = self.budget.take(most)
        if granted < min(most, HEAD):
            self.budget.back(granted, 0)
            raise Wrong("unmeasured", "the probe's bytes are used up")
        body = b""
        started = time.monotonic()
        try:
            request = urllib.request.Request(url, headers=headers)
            with self._opener.open(request, timeout=PATIENCE) as answer:
                begun = time.monotonic()
                piece = b""
                while len(body) < granted:
                    if sample and time.monotonic() - begun > SAMPLE_SECONDS:
                        break
                    if not sample and time.monotonic() - started > PATIENCE:
                        why = f"gives {len(body)} bytes in {PATIENCE:g} s"
                        raise Wrong("slow", why)
                    piece = answer.read1(min(granted - len(body), 65536))
                    if not piece:
                        break
                    body += piece
                reply = Reply(answer.status, answer.geturl(), body, total_of(answer))
                reply.seconds = time.monotonic() - begun
                expected = answer.headers.get("Content-Length")
                if not piece and expected and len(body) < min(int(expected), granted):
                    raise Wrong("cut", f"cuts the connection after {len(body)} bytes")
        except urllib.error.HTTPError as error:
            error.close()
            raise self._refusal(error.code, path, client) from None
        except Wrong:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            wrong = self._broken(error, len(body))
            self.slow += wrong.state == "slow"
            # A site that hangs would hold up the others that wait for a thread.
            if wrong.state in ("unreachable", "certificate") or self.slow > 1:
                self.dead = wrong
            raise wrong from None
        finally:
            self.budget.back(granted - len(body), len(body))
        if reply.status not in (200, 206):
            raise Wrong("refused", f"answers {reply.status} for {path}")
        return reply

    def _refusal(self, status: int, path: str, client: tuple[str, str]) -> Wrong:
        """What an error status means."""
        if status in (404, 410):
            return Wrong("missing", f"has no {path} ({status})")
        if status == 511:
            return Wrong("portal", "the network wants a login first (511)")
        if status == 403 and client != CURL:
            try:
                self.get(path, CURL)
            except Wrong:
                pass
            else:
                return Wrong("refused", f"answers 403 to {client[0]}, though not to curl")
        return Wrong("refused", f"answers {status} to {client[0]} for {path}")

    def _broken(self, error: Exception, read: int) -> Wrong:
        """What a connection that failed means."""
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            if not authorities():
                hint = "the host knows no certificate authorities: install ca-certificates"
                return Wrong("certificate", hint)
            return Wrong("certificate", f"its certificate is wrong: {reason.verify_message}")
        if isinstance(reason, ssl.SSLError):
            return Wrong("certificate", f"speaks no TLS: {reason.reason or reason}")
        if isinstance(reason, socket.gaierror):
            return Wrong("unreachable", "its name cannot be resolved")
        if isinstance(reason, (socket.timeout, TimeoutError)):
            if reason is not error:
                return Wrong("unreachable", f"no connection within {PATIENCE:g} s")
            return Wrong("slow", f"gives {read} bytes in {PATIENCE:g} s")
        if isinstance(reason, ConnectionRefusedError):
            return Wrong("unreachable", "refuses connections")
        broken = (ConnectionError, http.client.IncompleteRead, http.client.RemoteDisconnected)
        if isinstance(reason, broken):
            return Wrong("cut", f"cuts the connection after {read} bytes")
        if isinstance(reason, OSError) and not isinstance(error, http.client.HTTPException):
            return Wrong("unreachable", f"cannot be reached: {reason.strerror or reason}")
        return Wrong("garbage", f"speaks no HTTP: {str(reason) or type(reason).__name__}")


def authorities() -> bool:
    """Whether the system has any certificate authority at all."""
    paths = ssl.get_default_verify_paths()
    if paths.cafile and os.path.exists(paths.cafile):
        return True
    return bool(paths.capath and os.path.isdir(paths.capath) and os.listdir(paths.capath))


def total_of(answer: Any) -> int | None:
    """The whole file's size in bytes, where the answer says it."""
    whole = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
    if whole:
        return int(whole[1])
    length = answer.headers.get("Content-Length", "")
    return int(length) if answer.status == 200 and length.isdigit() else None


def pip_agent() -> str:
    """What pip calls itself (pip/_internal/network/session.py), with the host's own version."""
    try:
        from importlib.metadata import version

        pip = version("pip")
    except Exception:  # a host without pip, or with a broken one
        pip = "26.1.2"
    libc, libc_version = platform.libc_ver()
    data = {
        "ci": None,
        "cpu": platform.machine(),
        "distro": {"libc": {"lib": libc, "version": libc_version}},
        "implementation": {"name": "CPython", "version": platform.python_version()},
        "installer": {"name": "pip", "version": pip},
        "openssl_version": ssl.OPENSSL_VERSION,
        "python": platform.python_version(),
        "system": {"name": platform.system(), "release": platform.release()},
    }
    return f"pip/{pip} " + json.dumps(data, separators=(",", ":"), sort_keys=True)


PIP = ("pip", pip_agent())
APT = ("apt", "Debian APT-HTTP/1.3 (2.6.1)")
CONDA = ("conda", f"conda/25.5.1 requests/2.32.3 CPython/3.12.11 Linux/{platform.release()}")
HF = ("huggingface_hub", f"unknown/None; hf_hub/0.34.4; python/{platform.python_version()}")
CURL = ("curl", "curl/7.88.1")

PIP_ACCEPT = (
    "application/vnd.pypi.simple.v1+json, "
    "application/vnd.pypi.simple.v1+html; q=0.1, text/html; q=0.01"
)


class Seen:
    """A check that passed: what was seen, which parts passed, and a file to measure."""

    def __init__(self, why: str, client: tuple[str, str], files: list[str]) -> None:
        self.why = why
        self.client = client
        self.files = files
        self.parts: list[str] = []
        self.dates: dict[str, float] = {}


def garbage(body: bytes, instead_of: str) -> Wrong:
    """An answer of 200 that is not what it should be: a login page, or anything else."""
    text = body[:4096].decode("utf-8", "replace")
    if re.search(r"<form|login|登录|认证", text, re.IGNORECASE) and "<" in text:
        return Wrong("portal", "a login page answers in its place")
    start = "".join(c if c.isprintable() else " " for c in text[:40]).strip()
    return Wrong("garbage", f"answers 200 with {start!r}, which is no {instead_of}")


def pypi(site: Site, spec: dict[str, Any]) -> Seen:
    """A page of the simple index: links to files of this site, each with its SHA-256."""
    reply = site.get(spec["page"], PIP, PIP_ACCEPT, most=PAGE, ranged=False)
    text = reply.body.decode("utf-8", "replace")
    links: list[str] = []
    if text.lstrip().startswith("{"):
        try:
            files = json.loads(text)["files"]
            links = [f["url"] for f in files if len(f["hashes"].get("sha256", "")) == 64]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise garbage(reply.body, "package index") from None
    else:
        links = re.findall(r"""href=["']([^"'#]+)#sha256=[0-9a-f]{64}""", text)
    wheels = [link for link in links if urlsplit(link).path.endswith(".whl")]
    if not wheels:
        raise garbage(reply.body, "package index")
    file = urljoin(reply.url, wheels[-1])
    if place(file) not in site.hosts:
        raise Wrong("elsewhere", f"its index links files on {place(file)}")
    return Seen(f"{len(links)} files with SHA-256 at {spec['page']}", PIP, [file])


def torch(site: Site, spec: dict[str, Any]) -> Seen:
    """A page, an index's or a flat one, that links wheels of torch for the CUDA tag."""
    reply = site.get(spec["page"], PIP, PIP_ACCEPT, most=PAGE, ranged=False)
    text = reply.body.decode("utf-8", "replace")
    links = re.findall(r"""href=["']([^"'#]+\.whl)""", text)
    links += re.findall(r'"url"\s*:\s*"([^"]+\.whl)"', text)
    name = re.compile(rf"(^|/)torch-[0-9][^/]*\+{re.escape(spec['tag'])}-[^/]*\.whl$")
    wheels = [link for link in links if name.search(unquote(link))]
    if not links:
        raise garbage(reply.body, "page of wheels")
    if not wheels:
        raise Wrong("missing", f"has no torch +{spec['tag']} at {spec['page']}")
    own = [link for link in wheels if spec["machine"] in link] or wheels
    file = urljoin(reply.url, own[-1])
    if place(file) not in site.hosts:
        raise Wrong("elsewhere", f"its index links files on {place(file)}")
    return Seen(f"{len(wheels)} wheels of torch +{spec['tag']}", PIP, [file])


def release(site: Site, path: str, suite: str | None) -> tuple[bytes, float]:
    """The beginning of an InRelease file and its date; Wrong if it is another suite's or stale."""
    reply = site.get(path, APT, most=HEAD)
    if not reply.body.startswith(b"-----BEGIN PGP SIGNED MESSAGE-----"):
        raise garbage(reply.body, "InRelease file")
    text = reply.body.decode("utf-8", "replace")
    fields = dict(re.findall(r"^([A-Za-z-]+): (.+?)\s*$", text, re.MULTILINE))
    if suite is not None and suite not in (fields.get("Suite"), fields.get("Codename")):
        names = fields.get("Codename") or fields.get("Suite")
        raise Wrong("garbage", f"{path} is that of {names}")
    try:
        until = fields.get("Valid-Until")
        if until and parsedate_to_datetime(until).timestamp() < time.time():
            raise Wrong("stale", f"{path} was valid until {until}")
        return reply.body, parsedate_to_datetime(fields["Date"]).timestamp()
    except (ValueError, TypeError, KeyError):
        raise garbage(reply.body, "InRelease file with a date") from None


def apt(site: Site, spec: dict[str, Any]) -> Seen:
    """The InRelease files of every suite that the host uses."""
    seen = Seen("", APT, [])
    first: Wrong | None = None
    for archive, where in spec["archives"].items():
        folder = where["path"].rstrip("/")
        try:
            for suite in where["suites"]:
                path = f"{folder}/dists/{suite}/InRelease"
                seen.dates[f"{archive}/{suite}"] = release(site, path, suite)[1]
        except Wrong as wrong:
            first = first or wrong
            continue
        seen.parts.append(archive)
        if not seen.files:
            index = f"{folder}/dists/{where['suites'][0]}/main/binary-{spec['deb']}/Packages"
            seen.files = [f"{index}.xz", f"{index}.gz"]
    if first is not None and not any(not part.endswith("-security") for part in seen.parts):
        raise first
    seen.why = "signed and current: " + ", ".join(sorted(seen.dates))
    if first is not None:
        seen.why += f"; but {first.why}"
    return seen


def cuda_apt(site: Site, spec: dict[str, Any]) -> Seen:
    """The InRelease file of the distribution's folder."""
    path = spec["path"].rstrip("/")
    _, date = release(site, path + "/InRelease", None)
    seen = Seen(f"signed: {path}", APT, [path + "/Packages.gz"])
    seen.dates["cuda"] = date
    return seen


def repodata(site: Site, channel: str, subdir: str) -> list[str]:
    """See that a channel's index for one platform is one; some packages of it."""
    path = f"{channel.rstrip('/')}/{subdir}/repodata.json"
    reply = site.get(path, CONDA)
    text = reply.body.decode("utf-8", "replace")
    whole = reply.total is not None and len(reply.body) >= reply.total
    if whole:
        try:
            index = json.loads(text)
            packages = {**index.get("packages", {}), **index.get("packages.conda", {})}
            says = index.get("info", {}).get("subdir", subdir)
            names = sorted(packages, key=lambda name: int(packages[name].get("size", 0)))
        except (ValueError, AttributeError, TypeError):
            raise garbage(reply.body, "repodata.json") from None
        if "packages" not in index and "packages.conda" not in index:
            raise garbage(reply.body, "repodata.json")
    else:
        keys = r'\s*\{\s*"(info|packages|packages\.conda|removed|repodata_version|signatures)"\s*:'
        if not re.match(keys, text):
            raise garbage(reply.body, "repodata.json")
        named = re.search(r'"info"\s*:\s*\{[^{}]*?"subdir"\s*:\s*"([^"]+)"', text)
        says = named[1] if named else subdir
        names = re.findall(r'"([A-Za-z0-9_.+!-]+\.(?:conda|tar\.bz2))"\s*:\s*\{', text)
    if says != subdir:
        raise Wrong("garbage", f"{path} is that of {says}")
    folder = path.rpartition("/")[0]
    return [f"{folder}/{name}" for name in names]


def conda(site: Site, spec: dict[str, Any]) -> Seen:
    """The indexes of every channel, for the host's platform and for any."""
    seen = Seen("", CONDA, [])
    wrong: dict[str, Wrong] = {}
    for name, channel in spec["channels"].items():
        packages: list[str] = []
        try:
            for subdir in (spec["subdir"], "noarch"):
                packages += repodata(site, channel, subdir)
        except Wrong as one:
            wrong[name] = one
            if one.state in ("slow", "cut"):
                break
            continue
        seen.parts.append(name)
        if name == spec["needs"]:
            # A package if its name was among the first bytes; a site may keep .conda files only.
            if not packages:
                wrong[name] = Wrong("missing", f"{channel} has no packages")
                seen.parts.remove(name)
                break
            own = [path for path in packages if path.endswith(".conda")]
            index = f"{channel.rstrip('/')}/{spec['subdir']}/repodata.json"
            seen.files = own[-1:] or [index]
    if spec["needs"] not in seen.parts:
        raise wrong.get(spec["needs"]) or next(iter(wrong.values()))
    seen.why = "indexes of " + ", ".join(seen.parts)
    if wrong:
        seen.why += "; but not " + ", ".join(f"{name}: {one.why}" for name, one in wrong.items())
    return seen


def installer(site: Site, spec: dict[str, Any]) -> Seen:
    """A shell script that is as large as its installer must be."""
    path = f"{spec['dir'].rstrip('/')}/{spec['file']}"
    reply = site.get(path, CURL)
    if not reply.body.startswith(b"#!"):
        raise garbage(reply.body, "installer")
    size = "" if reply.total is None else f", {reply.total} bytes"
    return Seen(spec["file"] + size, CURL, [path])


def hf(site: Site, spec: dict[str, Any]) -> Seen:
    """The API's answer about a small model, as the hub's client asks for it."""
    reply = site.get(spec["api"], HF, "application/json", most=PAGE, ranged=False)
    try:
        said = json.loads(reply.body.decode("utf-8", "replace"))
        name = said.get("id") or said.get("modelId")
    except (ValueError, AttributeError):
        raise garbage(reply.body, "answer of the API") from None
    if name != spec["id"]:
        raise garbage(reply.body, "answer of the API")
    return Seen(f"knows {name}", HF, [spec["file"]])


CHECKS: dict[str, Callable[[Site, dict[str, Any]], Seen]] = {
    "pypi": pypi,
    "apt": apt,
    "conda": conda,
    "miniconda": installer,
    "miniforge": installer,
    "torch": torch,
    "cuda_apt": cuda_apt,
    "hf": hf,
}


def measure(site: Site, seen: Seen) -> float:
    """Bytes a second of the first of the files that is there.

    Raises Wrong if none is, or if what comes is not what its name says.
    """
    wrong: Wrong | None = None
    for path in seen.files:
        try:
            reply = site.get(path, seen.client, most=SAMPLE, sample=True)
        except Wrong as one:
            if one.state != "missing":
                raise
            wrong = one
            continue
        ending = os.path.splitext(urlsplit(path).path)[1]
        if not reply.body.startswith(MAGIC.get(ending, b"")):
            raise garbage(reply.body, f"{ending} file")
        return len(reply.body) / max(reply.seconds, 1e-6)
    raise wrong or Wrong("missing", "has no file to measure")


class Job:
    """One service of one site, and what became of it."""

    def __init__(self, site: Site, service: str) -> None:
        self.site = site
        self.service = service
        self.seen: Seen | None = None
        self.wrong: Wrong | None = None
        self.speed: float | None = None

    def check(self) -> None:
        """See whether the service works."""
        try:
            self.seen = CHECKS[self.service](self.site, self.site.services[self.service])
        except Wrong as wrong:
            self.wrong = wrong

    def measure(self) -> None:
        """See how fast it is."""
        if self.seen is None:
            return
        try:
            self.speed = measure(self.site, self.seen)
        except Wrong as wrong:
            if wrong.state != "unmeasured":
                self.wrong = Wrong(wrong.state, f"its index is well, a file is not: {wrong.why}")

    def row(self, at: float) -> dict[str, Any]:
        """The result as the answer holds it."""
        wrong = self.wrong
        if wrong is None and self.seen is None:
            wrong = Wrong("unreachable", "no answer in time")
        row: dict[str, Any] = {
            "service": self.service,
            "site": self.site.name,
            "via": self.site.via,
            "state": wrong.state if wrong else "ok",
            "why": wrong.why if wrong else self.seen.why if self.seen else "",
            "speed": None if wrong or self.speed is None else round(self.speed),
            "at": int(at),
        }
        if self.seen is not None and wrong is None:
            row["parts"] = self.seen.parts
            row["dates"] = self.seen.dates
        return row


def run_all(work: list[Callable[[], None]], threads: int, until: float) -> None:
    """Do all of it, so many at once; what is not done by then is left."""
    waiting: queue.Queue[Callable[[], None]] = queue.Queue()
    for one in work:
        waiting.put(one)

    def worker() -> None:
        while time.monotonic() < until:
            try:
                one = waiting.get_nowait()
            except queue.Empty:
                return
            one()

    started = [threading.Thread(target=worker, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(max(until - time.monotonic(), 0))


def filled(value: Any, words: dict[str, str]) -> Any:
    """The plan with the host's own names for its architecture."""
    if isinstance(value, dict):
        return {key: filled(one, words) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, words) for one in value]
    if isinstance(value, str):
        return re.sub(r"\{(subdir|deb|machine)\}", lambda m: words[m[1]], value)
    return value


def kept(path: str) -> dict[str, Any]:
    """What earlier probes left, if it can be read."""
    try:
        with open(path, encoding="utf-8") as stream:
            document = json.load(stream)
        if document["version"] == 1:
            return {"services": dict(document["services"]), "found": list(document["found"])}
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return {"services": {}, "found": []}


def merged(
    old: dict[str, Any],
    rows: list[dict[str, Any]],
    digests: dict[str, str],
    at: float,
) -> dict[str, Any]:
    """Earlier results with the new ones; a service that was probed whole forgets its old ones."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["service"], row["site"], row["via"]

    new = {key(row) for row in rows}
    stay = [r for r in old["found"] if r["service"] not in digests and key(r) not in new]
    services = dict(old["services"])
    services.update({s: {"at": int(at), "digest": d} for s, d in digests.items()})
    return {"version": 1, "services": services, "found": stay + rows}


def write(path: str, text: str) -> None:
    """Put the file there whole, or not at all."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=folder, prefix=".mirrors-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except OSError:
        os.unlink(aside)
        raise


def main(text: str) -> None:
    """Probe what the plan says and print the answer."""
    plan = json.loads(text)
    time.sleep(plan["wait"])
    begun = time.monotonic()
    plan["sites"] = filled(plan["sites"], names(platform.machine()))
    budget = Budget(plan["bytes"])
    sites = [Site(given, budget) for given in plan["sites"]]
    jobs = [Job(site, s) for s in plan["services"] for site in sites if s in site.services]
    run_all([job.check for job in jobs], CHECKING, begun + plan["seconds"] * 0.6)
    running = [job for job in jobs if job.seen is not None and job.wrong is None]
    run_all([job.measure for job in running], MEASURING, begun + plan["seconds"])
    at = time.time()
    document = merged(kept(plan["cache"]), [job.row(at) for job in jobs], plan["digests"], at)
    answer = dict(document, bytes=budget.spent, seconds=round(time.monotonic() - begun, 2))
    try:
        write(plan["cache"], json.dumps(document, ensure_ascii=False) + "\n")
    except OSError as error:
        answer["unkept"] = f"{plan['cache']}: {error.strerror}"
    print(json.dumps(answer, ensure_ascii=True), flush=True)
    # Threads that still wait for a site do not keep the answer from ending.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
