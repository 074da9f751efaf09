"""Decides whether a swarm is worth its start, how large its pieces are, and who is alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

#: Starting a swarm costs some seconds a host, and 8 MB once; below this much, rsync is as quick.
WORTH_BYTES = 64 << 20

#: What hashes are made of, in bytes (BEP 52).
BLOCK = 16 << 10
#: Sizes of pieces, as BitTorrent allows them: powers of two.
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


def cheapest_first(ciphers: str) -> str:
    """The same ciphers, `a,b,c` as ssh lists them, with AES-GCM before all others.

    Every x86 and ARM server does AES in hardware: ssh's own first choice, chacha20-poly1305,
    takes two to three times the CPU time there. None is offered that was not before.
    """
    return ",".join(sorted(ciphers.split(","), key=lambda name: "-gcm" not in name))


def alone(tried: Mapping[str, Mapping[str, bool | None]], name: str) -> bool:
    """Whether a host has others and neither reaches any of them nor is reached by one.

    `tried` has every host that takes part: the others it knows of, and whether it reached them,
    None while that is open.
    """
    others = tried.keys() - {name}
    ways = [tried[name].get(other) for other in others]
    ways += [tried[other].get(name) for other in others]
    return bool(others) and all(way is False for way in ways)


def piece_root(data: bytes, leaves: int) -> bytes:
    """The hash of a piece: the root of the tree over its blocks, filled up to so many leaves.

    0 leaves are as many as a file of one piece needs.
    """
    hashes = [hashlib.sha256(data[at : at + BLOCK]).digest() for at in range(0, len(data), BLOCK)]
    return _tree(hashes, leaves or _power(len(hashes)), bytes(32))


def root(pieces: Sequence[bytes], size: int) -> bytes:
    """The hash of a file, from those of its pieces of `size` bytes."""
    filler = bytes(32)
    for _ in range((size // BLOCK).bit_length() - 1):
        filler = hashlib.sha256(filler * 2).digest()
    return _tree(list(pieces), _power(len(pieces)), filler)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _tree(hashes: list[bytes], leaves: int, filler: bytes) -> bytes:
    """The root of a binary tree over the hashes; leaves that are missing are `filler`."""
    while leaves > 1:
        if len(hashes) % 2:
            hashes.append(filler)
        pairs = zip(hashes[::2], hashes[1::2], strict=True)
        hashes = [hashlib.sha256(left + right).digest() for left, right in pairs]
        filler = hashlib.sha256(filler * 2).digest()
        leaves //= 2
    return hashes[0]
