"""Merges in a process of its own, which has torch: `python -m gpufleet.weights.merge JOB`.

JOB is a JSON object of Job's fields. Says a JSON line now and then, {"done": B, "of": B, "kept":
B}, and as the last one either the fields of Result or {"error": LINE, "usage": true|false}. Ends
when its standard input does, so that it never outlives who started it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from gpufleet.errors import FleetError, UsageError
from gpufleet.weights.merge.engine import Job, Progress, prepare, run


def main() -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches who started this, too
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    given: dict[str, Any] = json.loads(sys.argv[1])
    given |= {key: Path(given[key]) for key in ("base", "delta", "output")}
    try:
        result = run(prepare(Job(**given)), _report)
    except FleetError as error:
        _say({"error": str(error), "usage": isinstance(error, UsageError)})
        return error.exit_code
    _say(dataclasses.asdict(result))
    return 0


def _report(progress: Progress) -> None:
    _say(dataclasses.asdict(progress))


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _end_with_the_parent() -> None:
    while os.read(0, 1 << 12):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
