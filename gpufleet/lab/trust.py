"""What makes a host work behind the operator's company: its certificates and its proxies."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from gpufleet.lab.machine import run

_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
_DISTRIBUTION = Path("/usr/share/ca-certificates")
_LOCAL = Path("/usr/local/share/ca-certificates")
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy")
# What of the operator's apt configuration concerns the way to the archive, not the machine.
_APT_OPTION = re.compile(
    r"^(Acquire::(?:(?:https?|ftp)::Proxy\b.*|Check-Valid-Until|Check-Date|Retries|Languages))"
    r' "(.+)";$',
    re.MULTILINE,
)


def certificates(text: str) -> dict[bytes, str]:
    """The PEM certificates of a bundle by their DER bytes; damaged ones are left out."""
    found = {}
    for pem in _PEM.findall(text):
        try:
            found[ssl.PEM_cert_to_DER_cert(pem)] = pem
        except ValueError:
            continue
    return found


def _read(paths: Iterable[Path]) -> dict[bytes, str]:
    found: dict[bytes, str] = {}
    for path in paths:
        if path.is_file():
            found |= certificates(path.read_text(errors="replace"))
    return found


def added_certificates(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What this machine trusts beyond its distribution: file name -> PEM, sorted.

    The administrator's additions, and what SSL_CERT_FILE (or the system's bundle) holds besides:
    a company that intercepts TLS puts its certificate in one of them.
    """
    bundle = Path(environment.get("SSL_CERT_FILE", _BUNDLE))
    trusted = _read([*sorted(_LOCAL.rglob("*.crt")), bundle])
    own = _read(sorted(_DISTRIBUTION.rglob("*.crt")))
    named = {
        f"operator-{sha256(der).hexdigest()[:12]}.crt": pem + "\n"
        for der, pem in trusted.items()
        if der not in own
    }
    return dict(sorted(named.items()))


def apt_options(dump: str | None = None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The operator's apt options that hosts need too, as lines of an apt.conf.

    `dump` is the output of ``apt-config dump``, asked for when absent. Proxies of the
    environment, which apt honours, count where apt's configuration names none.
    """
    dump = run("apt-config", "dump") if dump is None else dump
    options = dict(_APT_OPTION.findall(dump))
    for scheme in ("http", "https"):
        proxy = environment.get(f"{scheme}_proxy")
        if proxy:
            options.setdefault(f"Acquire::{scheme}::Proxy", proxy)
    return [f'{key} "{value}";' for key, value in options.items()]


def proxy_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The operator's proxy variables, both spellings, for a host's /etc/environment."""
    found = {}
    for name in _PROXY_VARIABLES:
        value = environment.get(name) or environment.get(name.upper())
        if value:
            found[name] = found[name.upper()] = value
    return found


def seen_from_host(text: str, gateway: ipaddress.IPv4Address) -> str:
    """`text` with proxies on the operator's loopback moved to where hosts see the operator."""
    return re.sub(
        r"(?<=://)(127\.\d+\.\d+\.\d+|localhost|\[::1\])(?=[:/]|$|\")", str(gateway), text
    )
