"""Runs a merge in a process that has torch, and hands on what it says."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Callable

from gpufleet import ROOT
from gpufleet.errors import FleetError, UsageError
from gpufleet.weights.merge.engine import Job, Progress, Result
from gpufleet.weights.merge.environment import Python


def merge(job: Job, python: Python, report: Callable[[Progress], None]) -> Result:
    """Merge, and say how it went. The process ends with this one, however this one ends.

    Raises FleetError, one line.
    """
    given = {key: str(value) for key, value in dataclasses.asdict(job).items()}
    numbers = {"shard_bytes": job.shard_bytes, "memory": job.memory, "threads": job.threads}
    told = json.dumps({**given, **numbers, "version": job.version})
    path = os.pathsep.join([str(ROOT), *python.path])
    with subprocess.Popen(
        [python.executable, "-m", "gpufleet.weights.merge", told],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                said = json.loads(line)
                if "done" in said:
                    report(Progress(**said))
                elif "error" in said:
                    raise (UsageError if said["usage"] else FleetError)(said["error"])
                else:
                    return Result(**said)
            why = process.stderr.read().strip().splitlines()
        finally:
            process.stdin.close()
        code = process.wait()
    raise FleetError(f"the merge ended early ({_ended(code, why)}): merge again: it goes on")


def _ended(code: int, lines: list[str]) -> str:
    if code == -signal.SIGKILL:
        return "killed, perhaps for want of memory"
    return lines[-1][:200] if lines else f"exit code {code}"
