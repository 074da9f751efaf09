"""Throwaway fleets: full Debian or Ubuntu hosts on this machine, to try a deploy on."""

from gpufleet.lab.labs import Host, Lab, down, labs, load, strays, up
from gpufleet.lab.machine import Progress
from gpufleet.lab.state import names

__all__ = ["Host", "Lab", "Progress", "down", "labs", "load", "names", "strays", "up"]
