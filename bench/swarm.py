"""One push of a file to the hosts of a lab, timed: by swarm, or by rsync to all of them at once.

usage: .venv/bin/python bench/swarm.py swarm|rsync LAB FILE     (prints JSON)
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

from gpufleet import lab
from gpufleet.catalog import WeightFile
from gpufleet.weights.swarm.client import Member, Swarm

STAGING = "/opt/minigpt4/incoming/bench"


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
    seen = by_swarm(fleet, path, sha256) if way == "swarm" else by_rsync(fleet, path)
    for host in fleet.hosts:
        said = fleet.run(host.name, f"sha256sum < {STAGING}/{path.name}").stdout
        assert said.split()[0] == sha256, host.name
        fleet.run(host.name, f"rm -rf {STAGING}")
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
