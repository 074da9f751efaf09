"""Reads GRUB's menu, and which of its entries boots next."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gpufleet.kernel.picture import Grub, Kernel, NextBoot
from gpufleet.kernel.release import age

_UNNAMED = "names no entry of grub.cfg: GRUB boots the first one without a word"


@dataclass(frozen=True)
class Entry:
    """An entry of GRUB's menu; a submenu has entries of its own and no release."""

    title: str
    id: str
    release: str
    entries: tuple[Entry, ...] = ()


@dataclass
class _Open:
    """A brace of grub.cfg that is not closed yet; no title: it is no entry's."""

    title: str | None
    id: str = ""
    release: str = ""
    entries: tuple[Entry, ...] = ()


def menu(lines: Iterable[str]) -> tuple[str, tuple[Entry, ...]]:
    """The default that grub.cfg has, and its entries, as grub-mkconfig writes them.

    `${saved_entry}` is the default where GRUB_DEFAULT is `saved`.
    """
    default = ""
    stack = [_Open(None)]
    for line in lines:
        words = line.split(None, 1)
        if not words:
            continue
        if words[0] in {"menuentry", "submenu"}:
            stack.append(_opened(line))
        elif words[0] == "}":
            if len(stack) > 1:
                done = stack.pop()
                if done.title is not None:
                    entry = Entry(done.title, done.id, done.release, done.entries)
                    stack[-1].entries += (entry,)
        elif line.rstrip().endswith("{"):
            stack.append(_Open(None))
        elif words[0] in {"linux", "linux16", "linuxefi"}:
            image = words[1].split()[0].rpartition("/")[2] if len(words) > 1 else ""
            kernel = re.fullmatch(r"(?:vmlinuz|vmlinux|kernel)-(.+)", image)
            stack[-1].release = stack[-1].release or (kernel[1] if kernel else "")
        elif line.strip().startswith("set default="):
            value = line.strip().removeprefix("set default=").strip('"')
            if "next_entry" not in value and len(stack) == 1:
                default = value
    return default, stack[0].entries


def _opened(line: str) -> _Open:
    try:
        words = shlex.split(line)
    except ValueError:  # a title over several lines; its entry counts, its name does not
        words = line.split()
    title = words[1] if len(words) > 1 else ""
    for option, value in pairwise(words):
        if option in {"$menuentry_id_option", "--id"}:
            return _Open(title, value)
    return _Open(title)


def resolve(entries: Sequence[Entry], wanted: str) -> tuple[str, bool]:
    """The release that GRUB boots for a default, and whether the default names an entry.

    GRUB takes a number, a title or an id, and `>` between a submenu and what is in it; what it
    does not find is entry 0, without a word (normal/menu.c, get_entry_number and run_menu).
    """
    head, _, rest = wanted.replace(">>", "\0").partition(">")
    head = head.replace("\0", ">").strip()
    rest = rest.replace("\0", ">>")
    if not entries:
        return "", False
    number = int(head) if head.isdecimal() else None
    chosen = next(
        (
            entry
            for place, entry in enumerate(entries)
            if (place == number if number is not None else head and head in {entry.title, entry.id})
        ),
        None,
    )
    entry, whole = (entries[0], not head) if chosen is None else (chosen, True)
    if not entry.entries:
        return entry.release, whole and not rest
    release, found = resolve(entry.entries, rest if chosen is not None else "")
    return release, whole and found


def _entries(entries: Iterable[Entry], above: str = "") -> Iterable[tuple[str, str]]:
    for entry in entries:
        path = f"{above}{entry.id or entry.title.replace('>', '>>')}"
        if entry.entries:
            yield from _entries(entry.entries, f"{path}>")
        elif entry.release and "recovery" not in f"{entry.id} {entry.title}":
            yield path, entry.release


def read(
    cfg: Iterable[str],
    environment: Mapping[str, str],
    default: str,
    dropins: Sequence[str],
    *,
    writable: bool,
) -> Grub:
    """GRUB as a host has it: the lines of grub.cfg, grubenv, what GRUB_DEFAULT is in the end, the
    files of grub.d that set it, and whether GRUB can write grubenv."""
    written, entries = menu(cfg)
    saved = environment.get("saved_entry", "")
    made = written or default
    chosen = saved if made in {"saved", "${saved_entry}"} else made
    release, resolved = resolve(entries, chosen)
    if made != chosen:
        reason = f"saved_entry {chosen}" if chosen else "no saved_entry: first entry of grub.cfg"
    elif made in {"", "0"}:
        reason = "first entry of grub.cfg"
    else:
        reason = f"GRUB_DEFAULT {made}"
    if chosen and not resolved:
        reason += f" {_UNNAMED}"
    return Grub(
        present=True,
        default=default,
        dropins=tuple(dropins),
        entries=tuple(_entries(entries)),
        saved_entry=saved,
        next_entry=environment.get("next_entry", ""),
        env_writable=writable,
        written=made,
        boots=release,
        boots_reason=reason,
        next_boots=resolve(entries, environment.get("next_entry", "")),
    )


def next_boot(kernels: Sequence[Kernel], grub: Grub, grubby: str = "") -> NextBoot:
    """The kernel that the next reboot starts: what grubby says, else GRUB's next_entry, its
    default, or, without GRUB, the newest kernel. `grubby` is a path such as /boot/vmlinuz-…"""
    if grubby:
        return NextBoot(grubby.rpartition("/")[2].partition("-")[2], "grubby --default-kernel")
    if grub.present and grub.next_entry:
        release, resolved = grub.next_boots
        reason = f"grubenv next_entry {grub.next_entry}"
        if not resolved:
            reason += f" {_UNNAMED}"
        return NextBoot(release or None, reason)
    if grub.present:
        return NextBoot(grub.boots or None, grub.boots_reason)
    if kernels:
        newest = max(kernels, key=lambda kernel: age(kernel.release))
        return NextBoot(newest.release, "no GRUB: the newest kernel that is installed")
    return NextBoot(None, "no GRUB and no kernel in /boot")


def entry_of(grub: Grub, release: str) -> str | None:
    """The id path of grub.cfg that boots exactly this kernel, whatever else is installed; None if
    there is none: the first entry of the menu is of the newest kernel, whichever that is."""
    for path, booted in grub.entries:
        if booted == release and release in path.rpartition(">")[2]:
            return path
    return None
