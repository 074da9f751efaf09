"""Kernel releases: their order, and what the flavours of one share."""

from __future__ import annotations

import re
from functools import cmp_to_key


def abi(release: str) -> str:
    """What flavours of one kernel share: 6.8.0-40 of 6.8.0-40-generic, 6.1.0-56 of
    6.1.0-56-cloud-amd64, 6.12.38+deb13 of 6.12.38+deb13-amd64."""
    parts = release.split("-")
    count = next((n for n, part in enumerate(parts) if not part[:1].isdigit()), len(parts))
    return "-".join(parts[: max(count, 1)])


def _version_order(one: str, other: str) -> int:
    """dpkg's order of versions (deb-version(7)): <0, 0 or >0."""
    split = re.compile(r"([0-9]+)")
    ours, theirs = split.split(one), split.split(other)
    for place in range(max(len(ours), len(theirs))):
        a = ours[place] if place < len(ours) else ""
        b = theirs[place] if place < len(theirs) else ""
        if place % 2:
            order = int(a or 0) - int(b or 0)
        else:
            order = 0
            for index in range(max(len(a), len(b))):
                order = order or _weight(a[index : index + 1]) - _weight(b[index : index + 1])
        if order:
            return order
    return 0


def _weight(character: str) -> int:
    if character == "~":
        return -1
    if not character:
        return 0
    return ord(character) + (0 if character.isalpha() else 256)


#: Sorts kernel releases from old to new, as dpkg sorts versions.
age = cmp_to_key(_version_order)
