"""How scripts find a host's NVIDIA GPUs."""

from __future__ import annotations

#: POSIX sh: `say gpu DEVICE` for every device of vendor 10de that is a display controller (PCI
#: class 03), where `say` prints a key and a value.
NVIDIA_GPUS = r"""
for f in /sys/bus/pci/devices/*/vendor; do
  [ -r "$f" ] && [ "$(cat "$f")" = 0x10de ] || continue
  c=$(cat "${f%vendor}class"); case $c in 0x03*) say gpu "$(cat "${f%vendor}device")";; esac
done
"""
