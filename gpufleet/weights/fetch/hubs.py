"""Asks hubs which files a repository has, at which commit, and where each can be had."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from gpufleet.catalog import WeightSource
from gpufleet.weights.fetch.plan import OPEN_GATE, Content, Remote, retry_after
from gpufleet.weights.fetch.transfer import broken, untrusted

#: Hugging Face's own address, which HF_ENDPOINT and mirrors stand in for.
HUGGINGFACE = "https://huggingface.co"
#: ModelScope's, as its SDK has it (modelscope_hub 0.5.1, constants.py).
MODELSCOPE = "https://www.modelscope.cn"

#: Seconds that a hub may take to answer.
TIMEOUT = 30.0


_ODD_TOKEN = "is not asked: {} has characters that no token has: set it anew"


class Refused(Exception):
    """A source that will not have the files, however often it is asked; the text says why."""


class Unreachable(Exception):
    """A source that may answer later; `wait` is how many seconds it asked to be left alone."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass(frozen=True)
class Endpoints:
    """Where the hubs are."""

    huggingface: str = HUGGINGFACE
    modelscope: str = MODELSCOPE
    why: str = ""
    """What chose Hugging Face's."""
    named: bool = True
    """Whether a person named Hugging Face's, or it is its own: a token goes to no other."""


@dataclass(frozen=True)
class Listing:
    """What a source has of a set."""

    source: str
    """As people call it, such as ``lmsys/vicuna-7b-delta-v0 of mirror.example.org``."""
    origin: str
    """Without an address: ``lmsys/vicuna-7b-delta-v0@COMMIT``."""
    files: Mapping[str, Remote]
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What requests for its files need; may hold a token."""


def name_of(source: WeightSource, endpoints: Endpoints) -> str:
    """A source as people call it."""
    if source.huggingface is not None:
        return f"{source.huggingface} of {urlsplit(endpoints.huggingface).netloc}"
    if source.modelscope is not None:
        return f"{source.modelscope} of {urlsplit(endpoints.modelscope).netloc}"
    return urlsplit(source.url or "").netloc


def listing(
    source: WeightSource,
    endpoints: Endpoints,
    catalogued: Mapping[str, Content],
    pinned: str | None,
) -> Listing:
    """What a source has, under the names that the set gives the files.

    `catalogued` are the files that the catalogue knows by name, which is all that a plain address
    can be asked for. `pinned` is the origin of an earlier fetch: the same repository is asked at
    the same commit. Raises Refused or Unreachable.
    """
    name = name_of(source, endpoints)
    if source.url is not None:
        base = source.url.rstrip("/")
        there = {path: source.paths.get(path, path) for path in catalogued}
        files = {
            path: Remote(path, f"{base}/{quote(there[path])}", content)
            for path, content in catalogued.items()
        }
        return Listing(name, source.url, files)
    repository = source.huggingface or source.modelscope or ""
    revision = source.revision or commit_of(pinned, repository)
    if source.huggingface is not None:
        commit, files, headers = _huggingface(repository, source.kind, revision, endpoints)
    else:
        endpoint = endpoints.modelscope
        commit, files, headers = _modelscope(repository, revision, endpoint)
    here = {there: path for path, there in source.paths.items()}
    renamed = {
        here.get(path, path): Remote(here.get(path, path), one.url, one.content)
        for path, one in files.items()
    }
    return Listing(name, f"{repository}@{commit}", renamed, headers)


def commit_of(origin: str | None, repository: str) -> str | None:
    """The commit of an origin such as ``owner/name@COMMIT``, if it is of that repository."""
    of, _, commit = (origin or "").partition("@")
    return commit if of == repository and commit else None


_Files = tuple[str, dict[str, Remote], dict[str, str]]


def _huggingface(repository: str, kind: str, revision: str | None, endpoints: Endpoints) -> _Files:
    # Xet plays no part: only huggingface_hub's own downloads would use it.
    import httpx2
    from huggingface_hub import DatasetInfo, HfApi, ModelInfo, SpaceInfo, errors, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    endpoint = endpoints.huggingface
    token = None if endpoints.named else False
    only = "" if endpoints.named else "; a token goes only to a site that you name with --mirror"
    page = f"{endpoint}/{'' if kind == 'model' else kind + 's/'}{repository}"
    api = HfApi(endpoint, token=token, library_name="gpufleet")
    ask: Any = {"model": api.model_info, "dataset": api.dataset_info, "space": api.space_info}[kind]
    try:
        said: ModelInfo | DatasetInfo | SpaceInfo
        said = ask(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
        commit = str(said.sha or revision)
        files: dict[str, Remote] = {}
        for one in said.siblings or ():
            url = hf_hub_url(
                repository,
                one.rfilename,
                repo_type=None if kind == "model" else kind,
                revision=commit,
                endpoint=endpoint,
            )
            content = Content(one.size, None, one.blob_id)
            if one.lfs is not None:
                content = Content(one.lfs.size, one.lfs.sha256)
            files[one.rfilename] = Remote(one.rfilename, url, content)
    except errors.GatedRepoError:
        raise Refused(f"is gated: {OPEN_GATE}: {page}{only}") from None
    except errors.RepositoryNotFoundError:
        why = f"is not there, or private: look at {page}; for a private one set HF_TOKEN"
        raise Refused(f"{why}{only}") from None
    except errors.RevisionNotFoundError:
        raise Refused(f"has no commit {revision}: see {page}") from None
    except errors.OfflineModeIsEnabled:
        raise Refused("is not asked: HF_HUB_OFFLINE is set; unset it") from None
    except errors.HfHubHTTPError as error:
        answer = error.response
        raise _refusal(answer.status_code, answer.headers.get("retry-after", "")) from None
    except httpx2.HTTPError as error:
        raise _unanswered(error) from None
    except UnicodeEncodeError:
        raise Refused(_ODD_TOKEN.format("HF_TOKEN")) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Unreachable("answers with no list of files: a login portal?") from None
    if not files:
        raise Refused(f"lists no files: see {page}")
    return commit, files, build_hf_headers(token=token, library_name="gpufleet")


def _modelscope(repository: str, revision: str | None, endpoint: str) -> _Files:
    # By its HTTP API: the SDK (modelscope_hub 0.5.1) adds cryptography and more to the operator's
    # machine, and its downloads know one source and one version of a file.
    import requests

    api = f"{endpoint}/api/v1/models/{repository}/repo"
    headers = {"User-Agent": "gpufleet"}
    if token := os.environ.get("MODELSCOPE_API_TOKEN", "").strip():
        if not token.isascii():
            raise Refused(_ODD_TOKEN.format("MODELSCOPE_API_TOKEN"))
        headers |= {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
    wanted = revision or "master"
    try:
        answer = requests.get(
            f"{api}/files",
            params={"Revision": wanted, "Recursive": "True"},
            headers=headers,
            timeout=TIMEOUT,
        )
        if answer.status_code != 200:
            raise _refusal(answer.status_code, answer.headers.get("Retry-After", ""))
        said = answer.json()
        if not said.get("Success", True):
            raise Refused(f"answers {said.get('Code')}: {' '.join(str(said['Message']).split())}")
        rows: list[dict[str, Any]] = [r for r in said["Data"]["Files"] if r.get("Type") != "tree"]
        # Its answer names no commit; the newest of the files' own is the one that made it so.
        newest = max(rows, key=lambda row: row.get("CommittedDate", 0))
        commit = revision or str(newest.get("Revision") or wanted)
        files = {}
        for row in rows:
            query = urlencode({"Revision": commit, "FilePath": row["Path"]})
            content = Content(int(row["Size"]), str(row["Sha256"]).lower() or None)
            files[row["Path"]] = Remote(row["Path"], f"{api}?{query}", content)
    except requests.JSONDecodeError:
        raise Unreachable("answers with no list of files: a login portal?") from None
    except requests.RequestException as error:
        raise _unanswered(error) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Unreachable("answers with no list of files") from None
    return commit, files, headers


def _refusal(status: int, rest: str) -> Refused | Unreachable:
    if status in (408, 425, 429) or status >= 500:
        return Unreachable(f"answers {status}", retry_after(rest, time.time()))
    if status == 401:
        return Refused("answers 401: it is private, or your token is wrong or has run out")
    if status == 403:
        return Refused("answers 403: access to it must be asked for there")
    return Refused(f"answers {status}")


def _unanswered(error: Exception) -> Refused | Unreachable:
    return Refused(broken(error)) if untrusted(error) else Unreachable(broken(error))
