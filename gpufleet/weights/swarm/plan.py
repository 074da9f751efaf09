"""Decides whether a swarm is worth its start, how large its pieces are, and who is alone."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

#: Starting a swarm costs some seconds a host, and 8 MB once; below this much, rsync is as quick.
WORTH_BYTES = 64 << 20

#: Sizes of pieces, as BitTorrent allows them: powers of two of at least a block (BEP 52).
SMALLEST_PIECE, LARGEST_PIECE = 1 << 18, 1 << 23
#: About so many pieces are enough that every host always has some that another lacks.
PIECES = 4096


def worth(total_bytes: int, hosts: int) -> tuple[bool, str]:
    """Whether `auto` takes the swarm for so many bytes to each of so many hosts, and why."""
    if hosts < 2:
        return False, "one host has nobody to exchange with"
    if total_bytes < WORTH_BYTES:
        return False, f"less than {WORTH_BYTES >> 20} MiB a host are sooner sent than a swarm begun"
    return True, f"{hosts} hosts exchange what this machine uploads once"


def piece_size(total_bytes: int) -> int:
    """The size of a piece, in bytes, for so many bytes in all."""
    size = SMALLEST_PIECE
    while size < LARGEST_PIECE and total_bytes > size * PIECES:
        size *= 2
    return size


def alone(reached: Mapping[str, AbstractSet[str]], name: str) -> bool:
    """Whether a host has others and neither reaches any of them nor is reached by one.

    `reached` has every host that has tried, and the hosts that it reached.
    """
    others = reached.keys() - {name}
    if name not in reached or not others:
        return False
    return not reached[name] & others and not any(name in reached[other] for other in others)
