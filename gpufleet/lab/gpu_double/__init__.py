"""The GPU double: what a host with GPUs shows of them, for a lab host that has none.

A double, never more: `nvidia-smi` replays a recording, PCI devices and module files are text in
folders that are mounted over the host's own. Driver packages, DKMS builds and kernels are real.
"""
