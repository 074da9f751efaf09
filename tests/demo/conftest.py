"""Puts the demo package on the path, as it lies on a host."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "files" / "demo"))
