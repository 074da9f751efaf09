"""Finds what is wrong with a host's choice of mirrors: what wins over it, and what is unsafe."""

from __future__ import annotations

from gpufleet.driver.doctor import Finding
from gpufleet.mirrors.overrides import in_force, overrides
from gpufleet.mirrors.plan import AptSources


def findings(sources: AptSources) -> tuple[Finding, ...]:
    """Everything that a person should know, warnings first; nothing on a host without mirrors."""
    ours = in_force(sources)
    if not ours:
        return ()
    return tuple(
        Finding(f"mirrors-{one.code}", one.severity, one.what, one.where, one.mend)
        for one in overrides(sources, ours)
    )
