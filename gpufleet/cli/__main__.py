"""Lets `python -m gpufleet.cli` be the fleet command."""

from gpufleet.cli import main

main()
