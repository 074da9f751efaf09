"""What can be wrong with a mirror site, as the lines of nginx that make it so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gpufleet.errors import UsageError
from gpufleet.lab.network import MIRROR_NAMES

#: A fault of every path of the site, rather than of one service.
SITE = "site"


@dataclass(frozen=True)
class Service:
    """Where a mirror site keeps a service: regular expressions of paths (PCRE, as nginx has it)."""

    #: Everything of the service.
    paths: str
    #: What its clients read first, to learn what there is.
    index: str
    #: What they download then.
    packages: str


SERVICES: Mapping[str, Service] = {
    "apt": Service(r"^/(debian|ubuntu)[a-z-]*/", r"/dists/.*/(Packages|by-hash/)", r"/pool/"),
    "pypi": Service(r"^/pypi/", r"^/pypi/web/simple/.", r"^/pypi/(?!web/simple/)"),
    "torch": Service(r"^/pytorch/", r"^/pytorch/.*/$", r"\.whl$"),
    "conda": Service(r"^/anaconda/(pkgs|cloud)/", r"/[a-z_]*repodata\.json", r"\.(conda|bz2)$"),
    "miniconda": Service(r"^/anaconda/miniconda/", r"^/anaconda/miniconda/$", r"\.sh$"),
}

#: What an index said before anything that is asked for was released.
_STALE = {
    # A mirror that is being synchronised: its Packages are not those that its Release signs.
    "apt": "Package: old",
    "pypi": "<!DOCTYPE html><html><body></body></html>",
    "torch": "<!DOCTYPE html><html><body></body></html>",
    "conda": '{"info": {}, "packages": {}, "packages.conda": {}, "repodata_version": 1}',
    "miniconda": "<!DOCTYPE html><html><body></body></html>",
}
_HTML = "default_type text/html;"
#: Kind -> directives that hold for the service, and those for requests that the fault meets.
_KINDS = {
    "slow": ("", "set $limit_rate {rate};"),
    "forbidden": ("", "return 403;"),
    "missing": ("", "return 404;"),
    # The connection is closed without a word (nginx's own 444).
    "dropped": ("", "return 444;"),
    # A backend that stops after so many bytes, given up by the front.
    "cut": ("proxy_read_timeout 500ms;", "set $site 127.0.0.1:8081;"),
    "elsewhere": ("", f"return 302 https://{MIRROR_NAMES[1]}$request_uri;"),
    "garbage": ("", 'return 200 "7f3a garbage 9c1e";'),
    "portal": ("", f"return 302 http://{MIRROR_NAMES[2]}/;"),
    "stale": (_HTML, "return 200 '{stale}';"),
    "dead": ("", "return 444;"),
}
#: Kinds of fault, as `snippet` takes them; `certificate` is one of the whole site.
KINDS = (*_KINDS, "certificate")


def snippet(
    service: str,
    kind: str,
    *,
    path: str | None = None,
    agent: str | None = None,
    rate: str = "20k",
) -> str:
    """The lines of nginx's configuration that make `service` (or all, SITE) fail as `kind` says.

    Only requests whose path matches `path` and whose User-Agent matches `agent` meet it, both
    regular expressions; by default `stale` meets the index, `dead` the packages, the others
    everything. `rate` is what `slow` sends, bytes a second. UsageError for what there is not.
    """
    if service != SITE and service not in SERVICES:
        known = ", ".join([*SERVICES, SITE])
        raise UsageError(f"the mirror has no service {service!r}: it has {known}")
    if kind not in _KINDS or (service == SITE and kind in ("stale", "dead")):
        raise UsageError(f"no fault {kind!r} of {service}: there are {', '.join(KINDS)}")
    if path is None and service != SITE:
        known_paths = SERVICES[service]
        path = {"stale": known_paths.index, "dead": known_paths.packages}.get(kind)
    always, then = _KINDS[kind]
    then = then.format(rate=rate, stale=_STALE.get(service, "")) if "{" in then else then
    lines = ['set $met "";', *filter(None, [always])]
    lines.append(_when("$uri", path, "p"))
    lines.append(_when("$http_user_agent", agent, "a"))
    return "\n".join([*lines, f'if ($met = "pa") {{ {then} }}', ""])


def _when(variable: str, pattern: str | None, mark: str) -> str:
    """Notes `mark` where the pattern is met: nginx's `if` knows no `and`."""
    noted = f'set $met "${{met}}{mark}";'
    if pattern is None:
        return noted
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r}: no regular expression ({error})") from None
    if '"' in pattern:
        raise UsageError(f'{pattern!r}: a pattern holds no "')
    return f'if ({variable} ~* "{pattern}") {{ {noted} }}'
