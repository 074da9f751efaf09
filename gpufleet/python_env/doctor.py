"""Finds what is wrong with a host's Python environments: cause, evidence, mend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gpufleet.driver.doctor import Finding, Severity
from gpufleet.python_env.conda import Recipe
from gpufleet.settings import Settings


@dataclass
class Seen:
    """One environment as it lies on a host."""

    digest: str
    whole: bool = False
    python: bool = False
    interpreter: str = ""
    """What bin/python leads to, where that is not there."""
    packages: dict[str, str] = field(default_factory=dict)
    """Name -> version."""
    torch_cuda: str | None = None
    """The CUDA that torch is built with, empty for none; None without torch."""
    libraries: tuple[str, ...] = ()
    """bitsandbytes' own, such as libbitsandbytes_cuda118.so."""


def read(lines: Iterable[str]) -> tuple[Seen, ...]:
    """Read the InsideEnvironments fact's lines: `environment` and what follows about it."""
    found: list[Seen] = []
    for line in lines:
        key, _, value = line.partition("\t")
        if key == "environment":
            found.append(Seen(value))
            continue
        one = found[-1]
        if key == "whole":
            one.whole = True
        elif key == "python":
            one.python = True
        elif key == "gone":
            one.interpreter = value
        elif key == "torch":
            one.torch_cuda = value
        elif key == "library":
            one.libraries += (value,)
        elif match := re.fullmatch(r"(.+)-([^-]+)\.dist-info", value):
            one.packages[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return tuple(found)


def findings(
    seen: Sequence[Seen],
    settings: Settings,
    wanted: Sequence[str],
    made: Sequence[Recipe],
    *,
    gpu: bool,
    apply: str,
) -> tuple[Finding, ...]:
    """Everything that is wrong with the environments that a host shall have.

    `wanted` are their digests, the demo's first; `made` those that conda makes of it; `gpu` says
    whether the host has an NVIDIA GPU; `apply` is the command that applies to this host.
    """
    there = {one.digest: one for one in seen}
    recipes = {one.digest: one for one in made}
    found: list[Finding] = []
    for digest in wanted:
        severity: Severity = "error" if digest == wanted[0] else "warning"
        path = f"{settings.root}/envs/{digest}"
        recipe, one = recipes.get(digest), there.get(digest)
        name = recipe.name if recipe else "of the demo"
        again = f"{apply} --only python_env"
        if one is None and not seen:
            continue  # nothing was ever deployed here
        if one is None:
            text = f"environment {name} is not there"
            found.append(Finding("env-missing", severity, text, f"no {path}", again))
        elif not one.python:
            text = f"environment {name} has no interpreter: what it was made with is gone"
            evidence = f"{path}/bin/python leads to {one.interpreter}"
            found.append(Finding("env-no-python", severity, text, evidence, again))
        elif not one.whole:
            text = f"environment {name} is half made"
            found.append(Finding("env-half", severity, text, f"no {path}/.whole", again))
        else:
            anew = f"on the host: rm {path}/.whole; then {again}"
            cuda = gpu and (settings.accelerator == "cuda" or bool(recipe and recipe.cuda))
            found += _inside(one, recipe, severity, path, cuda, anew)
    return tuple(found)


def _inside(
    one: Seen, recipe: Recipe | None, severity: Severity, path: str, cuda: bool, anew: str
) -> Iterable[Finding]:
    """What is wrong with the packages of a whole environment on a host that uses CUDA or not."""
    listed = {re.split(r"[=<>!~;\[ ]", line)[0] for line in recipe.pip} if recipe else set()

    def missing(package: str, cause: str) -> Finding:
        has = f"{path} has no {package}"
        # What its own list lacks, making it again does not bring.
        mend = anew
        if recipe is not None and recipe.own and package not in listed:
            mend = f"add {package} to the pip list of {recipe.name}, then apply"
        return Finding(f"no-{package}", severity, cause, has, mend)

    if cuda and one.torch_cuda == "":
        version = one.packages.get("torch", "?")
        text = "torch is built without CUDA, and this host has a GPU"
        yield Finding("torch-cpu", severity, text, f"torch {version} in {path}", anew)
    # StarChat's tokenizer does without: the catalogue's lists know.
    needed = recipe is None or recipe.own or recipe.lock is not None or "sentencepiece" in listed
    if needed and "transformers" in one.packages and "sentencepiece" not in one.packages:
        yield missing("sentencepiece", "LLaMA's tokenizer cannot be loaded without sentencepiece")
    eight_bit = "bitsandbytes" in one.packages
    # The demo's own application puts bitsandbytes' layers in for itself, without accelerate.
    listing = recipe is not None and recipe.lock is None
    if ((eight_bit and listing) or "accelerate" in listed) and "accelerate" not in one.packages:
        yield missing("accelerate", "models in 8 bit and device_map need accelerate")
    if eight_bit and cuda and one.torch_cuda:
        tag = "cuda" + one.torch_cuda.replace(".", "")
        having = [name for name in one.libraries if tag in name]
        if not having:
            text = (
                f"bitsandbytes has no library for CUDA {one.torch_cuda}, which torch is built with"
            )
            others = ", ".join(sorted(one.libraries)) or "none at all"
            mend = f"a bitsandbytes that has one, such as 0.41.1, in the environment's list; {anew}"
            yield Finding("bitsandbytes-cpu", severity, text, f"it has {others}", mend)
