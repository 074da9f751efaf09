"""Chooses where Hugging Face is asked: by an option, the environment or an inventory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import platformdirs

from gpufleet import ROOT, settings
from gpufleet.catalog import Mirrors, Service, mirrors
from gpufleet.errors import FleetError, UsageError
from gpufleet.mirrors.choice import Choice, candidates, decide
from gpufleet.mirrors.plan import AptSources
from gpufleet.mirrors.probe import SECONDS, Host, digests, due, plan, read
from gpufleet.weights.fetch.hubs import HUGGINGFACE, MODELSCOPE, Endpoints


def endpoints(
    mirror: str | None,
    inventory: settings.Mirrors | None,
    environment: Mapping[str, str] = os.environ,
) -> Endpoints:
    """Where the hubs are: `mirror` wins over HF_ENDPOINT, that over the inventory's settings.

    Raises UsageError for a mirror that is not there or has no Hugging Face, and for a variable
    that is no address.
    """
    modelscope = _address("MODELSCOPE_ENDPOINT", environment) or MODELSCOPE
    if mirror == "official":
        return Endpoints(HUGGINGFACE, modelscope, "--mirror says so")
    if mirror is not None:
        known = inventory or settings.Mirrors()
        return _of(_named(mirror, known), modelscope)
    if given := _address("HF_ENDPOINT", environment):
        return Endpoints(given, modelscope, "HF_ENDPOINT says so")
    if inventory is None:
        return Endpoints(HUGGINGFACE, modelscope, "no mirror is set")
    found = _of(_chosen(inventory, mirrors()), modelscope)
    asked = inventory.pinned.get("hf", inventory.site) != "auto"
    return replace(found, named=asked or found.huggingface == HUGGINGFACE)


def _address(variable: str, environment: Mapping[str, str]) -> str:
    """The address that a variable of the environment holds, empty if it is not set."""
    given = environment.get(variable, "").strip().rstrip("/")
    if given and not re.match(r"https?://[^/\s]", given):
        raise UsageError(f"{variable} is no address: begin it with https://, or unset it")
    return given


def _of(chosen: Choice, modelscope: str) -> Endpoints:
    address = chosen.hf_environment().get("HF_ENDPOINT", HUGGINGFACE)
    return Endpoints(address, modelscope, chosen.picks["hf"].why)


def _named(site: str, known: settings.Mirrors) -> Choice:
    wanted = known.model_copy(update={"pinned": {"hf": site}})
    try:
        return decide(wanted, mirrors())
    except UsageError as error:
        raise UsageError(str(error).replace("setting mirrors.pinned.hf", "--mirror")) from None


def _chosen(wanted: settings.Mirrors, catalogue: Mirrors) -> Choice:
    """The choice of the settings; `auto` goes by what this machine sees."""
    # This machine is in no cloud, whatever the hosts are in.
    own = wanted.model_copy(update={"provider": ""})
    if own.pinned.get("hf", own.site) != "auto":
        return decide(own, catalogue)
    sites = candidates(own, catalogue)
    about = Host(AptSources("", "", {}, ()))
    kept_at = platformdirs.user_cache_path("gpufleet") / "probed.json"
    kept = read(_text(kept_at))
    asked_of: dict[Service, str] = {"hf": digests(sites, about).get("hf", "")}
    if due(kept, asked_of, time.time(), own.ttl_hours):
        asked = json.loads(plan(sites, about, services=["hf"]))
        kept = read(_probe({**asked, "cache": str(kept_at)}))
    return decide(own, catalogue, kept.found)


def _probe(asked: Mapping[str, object]) -> str:
    """The answer of the very script that hosts run."""
    script = ROOT / "gpufleet" / "mirrors" / "on_host.py"
    command = [sys.executable, str(script), json.dumps(asked)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS + 30
        )
    except subprocess.TimeoutExpired:
        line = "the mirror sites gave no answer in time: name one with --mirror"
        raise FleetError(line) from None
    return done.stdout


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return ""
