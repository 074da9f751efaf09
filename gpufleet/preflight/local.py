"""What the operator's machine itself must have for a deploy."""

from __future__ import annotations

import shutil

#: Programs that operations run on this machine, and what brings them.
PROGRAMS = {"rsync": "rsync", "ssh": "openssh-client"}


def missing_programs() -> list[str]:
    """A line for each program that this machine lacks."""
    return [
        f"this machine has no {program}: install {package}"
        for program, package in PROGRAMS.items()
        if shutil.which(program) is None
    ]
