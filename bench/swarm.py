"""One push of a file to the hosts of a lab, timed: by swarm, by rsync to all of them at once, or
by the plainest relay there is: sockets from one host to the next, no ssh, no hash, no resume.

usage: .venv/bin/python bench/swarm.py swarm|rsync|relay LAB FILE     (prints JSON)
"""

from __future__ import annotations

import hashlib
import json
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from gpufleet import lab
from gpufleet.catalog import WeightFile
from gpufleet.weights.swarm.client import Member, Swarm

STAGING = "/opt/minigpt4/incoming/bench"
#: A host of the relay: what comes is written and sent on. `sys.argv`: the file, the next host.
RELAY = """
import os, socket, sys
path, after = sys.argv[1:]
os.makedirs(os.path.dirname(path), exist_ok=True)
listener = socket.create_server(("", 5001))
print("ready", flush=True)
before, buffer = listener.accept()[0], bytearray(1 << 20)
onward = socket.create_connection((after, 5001)) if after else None
with open(path, "wb", buffering=0) as stream:
    while size := before.recv_into(buffer):
        if onward:
            onward.sendall(memoryview(buffer)[:size])
        stream.write(memoryview(buffer)[:size])
"""


def by_swarm(fleet: lab.Lab, path: Path, sha256: str) -> dict[str, float]:
    """From nothing but ssh to every host having the file."""
    file = WeightFile(path=path.name, bytes=path.stat().st_size, sha256=sha256)
    ended: dict[str, str] = {}
    began = time.monotonic()
    first: list[float] = []

    def follow(host: lab.Host) -> None:
        ssh = tuple(fleet.ssh_command(host.name))
        swarm.join(Member(host.name, ssh, False, host.address, STAGING, (file.path,)))
        for progress in swarm.follow(host.name):
            if progress.state == "sending":
                first.append(time.monotonic() - began)
            ended[host.name] = f"{progress.state} {progress.why}".strip()

    with Swarm([(file, path)]) as swarm:
        threads = [threading.Thread(target=follow, args=(host,)) for host in fleet.hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        uploaded = swarm.uploaded
    assert set(ended.values()) == {"done"}, ended
    return {"seconds": seconds, "first host ready, s": min(first), "uploaded": uploaded}


def by_rsync(fleet: lab.Lab, path: Path) -> dict[str, float]:
    """The same with rsync, to all hosts at once."""
    began = time.monotonic()
    children = []
    for host in fleet.hosts:
        *ssh, address = fleet.ssh_command(host.name)
        place = f"{address}:{STAGING}/"
        making = ["--rsync-path", f"mkdir -p {STAGING} && rsync"]
        command = ["rsync", "-t", "--whole-file", *making, "-e", shlex.join(ssh), str(path), place]
        children.append(subprocess.Popen(command))
    assert [child.wait() for child in children] == [0] * len(children)
    seconds = time.monotonic() - began
    return {"seconds": seconds, "uploaded": float(path.stat().st_size * len(children))}


def by_relay(fleet: lab.Lab, path: Path) -> dict[str, float]:
    """From the first byte to every host having the file; it is listening when that begins."""
    children = []
    for host, after in zip(fleet.hosts, [*(h.address for h in fleet.hosts[1:]), ""], strict=True):
        command = shlex.join(["python3", "-c", RELAY, f"{STAGING}/{path.name}", after])
        ssh = fleet.ssh_command(host.name, command)
        children.append(subprocess.Popen(ssh, stdout=subprocess.PIPE, text=True))
    assert all(child.stdout and child.stdout.readline() == "ready\n" for child in children)
    began = time.monotonic()
    with socket.create_connection((fleet.hosts[0].address, 5001)) as first, path.open("rb") as file:
        sent = first.sendfile(file)
    assert [child.wait() for child in children] == [0] * len(children)
    return {"seconds": time.monotonic() - began, "uploaded": float(sent)}


def main() -> None:
    """Empty the hosts, push, and see that every host has the file."""
    way, name, path = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    fleet = lab.load(name)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for host in fleet.hosts:
        # apt's rsync comes once, before anything is timed; what was there is gone from the disk.
        rsync = (
            "command -v rsync >/dev/null || (apt-get -qq update && apt-get -qq install -y rsync)"
        )
        ready = f"rm -rf {STAGING}; sync; {rsync if way == 'rsync' else ':'}"
        done = fleet.run(host.name, f"({ready}) >/dev/null 2>&1")
        assert done.returncode == 0, done.stderr
    if way == "swarm":
        seen = by_swarm(fleet, path, sha256)
    else:
        seen = {"rsync": by_rsync, "relay": by_relay}[way](fleet, path)
    for host in fleet.hosts:
        said = fleet.run(host.name, f"sha256sum < {STAGING}/{path.name}").stdout
        assert said.split()[0] == sha256, host.name
        fleet.run(host.name, f"rm -rf {STAGING}")
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
