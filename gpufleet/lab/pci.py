"""PCI devices of any kind for a virtual machine: they can be found and bound, and do nothing else.

QEMU has no device whose vendor can be chosen, but lets another process be a device
(x-pci-proxy-dev): it forwards what the guest reads and writes in its configuration space over a
socket. This file is that process and the start of QEMU beside it; it runs by itself:

    pci.py VENDOR:DEVICE:CLASS… -- qemu-system-x86_64 …
"""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

_DEVICE = re.compile(r"([0-9a-f]{4}):([0-9a-f]{4}):([0-9a-f]{4})")
# QEMU's include/hw/remote/mpqemu-link.h: command, padding, size of what follows.
_HEADER = struct.Struct("<i4xQ")
# Its PciConfDataMsg: offset, value, length; and the answer.
_ACCESS = struct.Struct("<IIi")
_VALUE = struct.Struct("<Q")
# What a guest may write of a device without memory or interrupts: command, cache line, line.
_WRITABLE = {0x04, 0x05, 0x0C, 0x3C}


class _Command(IntEnum):
    ANSWER = 1
    WRITE = 2
    READ = 3
    BAR_WRITE = 4
    BAR_READ = 5
    RESET = 7


@dataclass(frozen=True)
class Device:
    """A device as ``lspci -n`` shows it."""

    vendor: int
    device: int
    kind: int
    """Class and subclass: 0x0302 is a 3D controller, which a data centre's GPU is."""

    @classmethod
    def parse(cls, text: str) -> Device:
        """From ``10de:20b5:0302``; ValueError where it is not one."""
        match = _DEVICE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no VENDOR:DEVICE:CLASS of four hex digits each")
        return cls(*(int(part, 16) for part in match.groups()))

    def configuration(self) -> bytearray:
        """Its configuration space, 256 bytes (PCI Local Bus Specification 3.0, 6.1)."""
        space = bytearray(256)
        struct.pack_into("<HH", space, 0x00, self.vendor, self.device)
        space[0x08] = 0xA1
        struct.pack_into("<H", space, 0x0A, self.kind)
        struct.pack_into("<HH", space, 0x2C, self.vendor, self.device)
        return space


def answer(space: bytearray, command: int, body: bytes) -> bytes | None:
    """What the device says to a message of QEMU's, None where it waits for no answer."""
    value = 0
    if command in (_Command.READ, _Command.WRITE):
        at, given, length = _ACCESS.unpack_from(body)
        if command == _Command.READ:
            value = int.from_bytes(space[at : at + length], "little")
        else:
            for place, byte in enumerate(given.to_bytes(4, "little")[:length], at):
                if place in _WRITABLE:
                    space[place] = byte
    elif command not in (_Command.BAR_READ, _Command.BAR_WRITE, _Command.RESET):
        return None
    return _HEADER.pack(_Command.ANSWER, _VALUE.size) + _VALUE.pack(value)


def serve(devices: Sequence[tuple[socket.socket, Device]]) -> None:
    """Be these devices until QEMU has ended."""
    spaces = {connection: device.configuration() for connection, device in devices}
    while spaces:
        for connection in select.select(list(spaces), [], [])[0]:
            try:
                command, size = _HEADER.unpack(_receive(connection, _HEADER.size))
                said = answer(spaces[connection], command, _receive(connection, size))
                if said is not None:
                    connection.sendall(said)
            except (EOFError, OSError):
                del spaces[connection]


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise EOFError
        received += part
    return received


def main(arguments: Sequence[str]) -> None:
    """Become QEMU, with a process beside it that is the devices."""
    split = list(arguments).index("--")
    devices, command = arguments[:split], list(arguments[split + 1 :])
    pairs = [socket.socketpair() for _ in devices]
    if os.fork() == 0:
        # Holds nothing open that the starter waits for, nor QEMU's ends.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        for _, theirs in pairs:
            theirs.close()
        ours = [connection for connection, _ in pairs]
        serve(list(zip(ours, map(Device.parse, devices), strict=True)))
        os._exit(0)
    for number, (ours_end, theirs) in enumerate(pairs):
        ours_end.close()
        os.set_inheritable(theirs.fileno(), True)
        command += ["-device", f"x-pci-proxy-dev,id=given{number},fd={theirs.fileno()}"]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
