"""Decides what a file must be, what an answer is worth, and when to ask again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from fnmatch import fnmatch
from typing import Literal

from gpufleet.catalog import ListedFile, WeightSet, WeightSource

#: Room on the disk, in bytes, that a fetch leaves.
MARGIN = 64 * 2**20

#: What to do about a repository whose owner wants to know who takes it.
OPEN_GATE = "accept its terms on its page, then set HF_TOKEN or run hf auth login"

#: Seconds for which a server may ask to be left alone.
LONGEST_REST = 3600.0


@dataclass(frozen=True)
class Content:
    """What a file must be."""

    bytes: int | None
    sha256: str | None = None
    blob: str | None = None
    """Git's name for it: the SHA-1 of ``blob SIZE\\0`` and the content."""

    @property
    def identity(self) -> str:
        """What names the content, wherever it comes from. Empty: nothing can verify it."""
        return self.sha256 or self.blob or ""

    def agrees(self, other: Content) -> bool:
        """Whether nothing that both know differs, and both know something that names it."""
        pairs = [(self.bytes, other.bytes), (self.sha256, other.sha256), (self.blob, other.blob)]
        both = [(one, two) for one, two in pairs if one is not None and two is not None]
        named = [(one, two) for one, two in both if isinstance(one, str)]
        return bool(named) and all(one == two for one, two in both)


@dataclass(frozen=True)
class Remote:
    """A file as a source offers it."""

    path: str
    """Below the set's folder, as the set names it."""
    url: str
    content: Content


@dataclass(frozen=True)
class Policy:
    """How long and how often a source is asked again; times are in seconds."""

    patience: float = 72 * 3600.0
    """Without a single byte of progress, whatever the source."""
    first: float = 1.0
    most: float = 600.0
    strikes: int = 2
    """How often a source may give what the file is not."""
    connect: float = 20.0
    silence: float = 60.0
    """Without a byte, after which a connection is given up."""


def pause(policy: Policy, tries: int, luck: float, asked: float | None = None) -> float:
    """Seconds until the next try: doubled each time, half of it left to `luck` (0 to 1).

    Never shorter than what the server asked for, an hour at most.
    """
    grown = min(policy.first * 2.0 ** min(tries - 1, 40), policy.most)
    return max(grown * (0.5 + luck / 2), min(asked or 0.0, LONGEST_REST))


@dataclass(frozen=True)
class Answer:
    """The head of a server's answer; names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    moved: bool = False
    """Whether it is from where the address that was asked redirects to."""


@dataclass(frozen=True)
class Take:
    """The body is the file, from this byte on."""

    start: int
    total: int | None
    """Bytes of the whole file, where the answer says it."""


@dataclass(frozen=True)
class Turn:
    """The body is of no use.

    `later`: the same source may be asked again. `strike`: that is not the file; a few of them and
    the source is out. `never`: it will not give the file. `anew`: without a range.
    """

    then: Literal["later", "strike", "never", "anew"]
    why: str
    wait: float | None = None


def judge(answer: Answer, asked_from: int, content: Content, now: float) -> Take | Turn:
    """What an answer to a request for the file, from a byte on, is worth."""
    status, headers = answer.status, answer.headers
    if status in (200, 206):
        return _body(answer, asked_from, content)
    if status == 416:
        return Turn("anew", "has no such range")
    if status in (408, 425, 429) or status >= 500:
        return Turn("later", f"answers {status}", retry_after(headers.get("retry-after", ""), now))
    if headers.get("x-error-code") == "GatedRepo":
        return Turn("never", f"is gated: {OPEN_GATE}")
    if status in (401, 403) and answer.moved:
        # The address that a hub sends us to is signed and runs out; the next one is fresh.
        return Turn("strike", f"answers {status} where it redirects to")
    if status in (401, 403):
        return Turn("never", f"answers {status}: log in, or ask for access there")
    if status in (404, 410):
        return Turn("never", f"does not have it ({status})")
    return Turn("never", f"answers {status}")


def _body(answer: Answer, asked_from: int, content: Content) -> Take | Turn:
    headers = answer.headers
    if headers.get("content-encoding", "identity") != "identity":
        return Turn("strike", f"sends it {headers['content-encoding']}-encoded, unasked")
    start, total = 0, _number(headers.get("content-length"))
    if answer.status == 206:
        said = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", headers.get("content-range", ""))
        if said is None or int(said[1]) != asked_from:
            return Turn("anew", "sends another range than was asked for")
        start, total = asked_from, _number(said[2])
    if content.bytes is not None and total is not None and total != content.bytes:
        return Turn("strike", f"says that it has {total} bytes, not {content.bytes}")
    return Take(start, total)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def retry_after(text: str, now: float) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date; `now` is since 1970."""
    if text.strip().isdigit():
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - now, 0)
    except (ValueError, TypeError, IndexError):
        return None


def impostor(head: bytes) -> str | None:
    """What a file's first bytes are instead of weights, None if they are none of it."""
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "a web page: a login portal?"
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer"
    return None


def ordered(sources: Sequence[WeightSource], hub: str) -> list[WeightSource]:
    """The sources that a program can fetch from, in their order, those of the other hub last."""
    reachable = [one for one in sources if one.by_hand is None]
    other = "modelscope" if hub == "huggingface" else "huggingface"
    return sorted(reachable, key=lambda one: getattr(one, other) is not None)


def by_hand(sources: Sequence[WeightSource]) -> list[str]:
    """Pages that only a browser gets a file from."""
    return [one.by_hand for one in sources if one.by_hand is not None]


def wanted(weights: WeightSet, remote: Mapping[str, Remote]) -> dict[str, Content]:
    """The files of a set and what they must be: the catalogue's word, completed by a source's.

    What the two disagree on is the catalogue's.
    """
    listed = {file.path: content_of(file) for file in weights.files}
    for path, other in remote.items():
        if path in listed:
            listed[path] = completed(listed[path], other.content)
        elif any(fnmatch(path, pattern) for pattern in weights.include):
            listed[path] = other.content
    return listed


def content_of(file: ListedFile) -> Content:
    """What the catalogue says that a file must be."""
    return Content(file.bytes, file.sha256)


def completed(known: Content, other: Content) -> Content:
    """What is known, with what another source knows more; its word counts only if they agree."""
    if contradiction(known, other):
        return known
    size = other.bytes if known.bytes is None else known.bytes
    return Content(size, known.sha256 or other.sha256, known.blob or other.blob)


def contradiction(known: Content, other: Content) -> str | None:
    """Why a source's file is not the one that is wanted, None if it may be."""
    if known.sha256 and other.sha256 and known.sha256 != other.sha256:
        return f"has another file: sha256 {other.sha256[:12]}…, not {known.sha256[:12]}…"
    if known.bytes is not None and other.bytes is not None and known.bytes != other.bytes:
        return f"has another file: {other.bytes} bytes, not {known.bytes}"
    if known.blob and other.blob and known.blob != other.blob and not known.sha256:
        return f"has another file: {other.blob[:12]}…, not {known.blob[:12]}…"
    return None


def room(needed: int, free: int) -> str | None:
    """What is wrong with the disk, None if `needed` more bytes fit."""
    if needed == 0 or needed + MARGIN <= free:
        return None
    return f"needs {amount(needed)}, {amount(free)} are free"


def amount(size: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


#: What browsers and downloaders add to the name of a file that they have not finished.
_UNFINISHED = re.compile(r"\.(crdownload|part|download|opdownload|partial|tmp)$", re.IGNORECASE)


def same_name(path: str, found: str) -> bool:
    """Whether a browser gives a file of this path that name, finished or not.

    `x.bin` is found as ``x.bin``, ``x (1).bin``, ``x.bin.crdownload``, ``x.Ab3dE9.bin.part``.
    """
    name = path.rpartition("/")[2]
    stem, dot, ending = name.rpartition(".")
    if not dot:
        stem, ending = name, ""
    bare = _UNFINISHED.sub("", found)
    random = r"(\.[A-Za-z0-9_-]{6,10})?" if bare != found else ""
    pattern = rf"{re.escape(stem)}{random}( ?\(\d+\))?{re.escape(dot + ending)}( ?\(\d+\))?"
    return re.fullmatch(pattern, bare) is not None
