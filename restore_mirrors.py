"""Puts back the package sources that mirrors replaced: fleet mirrors restore -i inventory/NAME.py

Without the fleet command: pyinfra inventory/NAME.py restore_mirrors.py
"""

from pyinfra.api import deploy

from gpufleet.managed import operations as managed
from gpufleet.mirrors import verify
from gpufleet.run.only import selected
from tasks import current, mirror_files, warn


@deploy("mirrors")
def restore() -> None:
    """Every file of mirror configuration, byte for byte as it was before gpufleet wrote it."""
    settings, _ = current()
    sites = {settings.mirrors.site, *settings.mirrors.pinned.values()} - {"official"}
    managed.switched(
        name="Put back what the mirrors' files replaced",
        wanted=(),
        gone=mirror_files().written,
        check=verify.forgetting(str(settings.root)),
    )
    if sites:
        again = "set mirrors.site to official to keep it so"
        warn("mirrors", f"the next apply writes {', '.join(sorted(sites))} again; {again}")


if selected("mirrors"):
    restore()
