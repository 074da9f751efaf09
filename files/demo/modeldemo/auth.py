"""Who may use the page and the API, where passwords are asked for."""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from modeldemo.engine import ModelDemoError

SHORTEST = 8  # characters of a password


class Users:
    """Users and their passwords, of which only keyed hashes are kept."""

    def __init__(self, passwords: Mapping[str, str]) -> None:
        self._key = secrets.token_bytes(32)
        self._users = [self._hash(f"{user}:{word}") for user, word in passwords.items()]
        self._tokens = [self._hash(word) for word in passwords.values()]

    def allows(self, authorization: str) -> bool:
        """Whether an Authorization header names a user: Basic, or Bearer with a password.

        Every user is compared in constant time, so that the time taken tells nothing.
        """
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "bearer":
            return self._among(value.strip(), self._tokens)
        if scheme.lower() != "basic":
            return False
        try:
            given = base64.b64decode(value.strip(), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return False
        return self._among(given, self._users)

    def _among(self, given: str, known: list[bytes]) -> bool:
        digest = self._hash(given)
        return sum(hmac.compare_digest(digest, one) for one in known) > 0

    def _hash(self, text: str) -> bytes:
        return hmac.digest(self._key, text.encode("utf-8", "surrogateescape"), "sha256")


def read(path: Path) -> Users:
    """Read a file of USER:PASSWORD lines; blank lines and those that begin with # say nothing.

    Raises ModelDemoError, which names file and line and never shows what the line says.
    """
    try:
        if stat.S_IMODE(path.stat().st_mode) & stat.S_IRWXO:
            raise ModelDemoError(f"{path}: every user of this host may read it; chmod 600 {path}")
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ModelDemoError(f"{path}: no UTF-8 text; write USER:PASSWORD lines") from None
    except OSError as error:
        raise ModelDemoError(f"{path}: {error.strerror}; give a file to --auth-file") from None
    passwords: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, word = line.strip().partition(":")
        if not colon or not user:
            raise ModelDemoError(f"{path} line {number}: write USER:PASSWORD")
        if len(word) < SHORTEST:
            raise ModelDemoError(
                f"{path} line {number}: the password has under {SHORTEST} characters; "
                "take a longer one"
            )
        if user in passwords:
            raise ModelDemoError(f"{path} line {number}: this user was named before")
        passwords[user] = word
    if not passwords:
        raise ModelDemoError(f"{path}: no user in it; write USER:PASSWORD lines")
    return Users(passwords)
