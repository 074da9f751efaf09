"""gpufleet takes bare GPU servers to a running model demo, over SSH, from a laptop."""

from pathlib import Path

__version__ = "0.1.0"

#: The checkout: deploy.py, inventory/, catalog/, templates/ and files/ lie here.
ROOT = Path(__file__).resolve().parent.parent
