"""What doctor finds in Python environments, from the lines that a host's shell really prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gpufleet.driver.doctor import Finding
from gpufleet.python_env import conda, doctor
from gpufleet.python_env.facts import InsideEnvironments
from gpufleet.python_env.plan import lock_for
from gpufleet.settings import Settings

RECIPE = conda.recipe("starchat", "cpu")
DEMO = conda.recipe("modern", "cpu")


class Root:
    """A deploy's folder with environments of empty packages."""

    def __init__(self, path: Path, sh: Any) -> None:
        self.path, self.sh = path, sh

    def make(
        self,
        digest: str,
        *packages: str,
        torch_cuda: str | None = None,
        libraries: tuple[str, ...] = (),
        whole: bool = True,
        python: bool = True,
    ) -> None:
        folder = self.path / "envs" / digest
        site = folder / "lib" / "python3.10" / "site-packages"
        (folder / "bin").mkdir(parents=True)
        for package in packages:
            (site / f"{package}.dist-info").mkdir(parents=True)
        if torch_cuda is not None:
            (site / "torch").mkdir()
            said = f"'{torch_cuda}'" if torch_cuda else "None"
            text = f"__version__ = '2.0.0'\ndebug = False\ncuda: Optional[str] = {said}\n"
            (site / "torch" / "version.py").write_text(text)
        for library in libraries:
            (site / "bitsandbytes").mkdir(exist_ok=True)
            (site / "bitsandbytes" / library).touch()
        if whole:
            (folder / ".whole").write_text(f"{digest}\n")
        if python:
            (folder / "bin" / "python").touch(0o755)
        else:
            (folder / "bin" / "python").symlink_to("/usr/bin/python3.99")

    def seen(self) -> tuple[doctor.Seen, ...]:
        done = self.sh(InsideEnvironments().command(root=str(self.path)))
        assert (done.returncode, done.stderr) == (0, "")
        return InsideEnvironments().process(done.stdout.splitlines())

    def found(self, gpu: bool = True, accelerator: str = "cpu") -> dict[str, Finding]:
        chosen = {"environment": "starchat"}
        data = {"root": str(self.path), "accelerator": accelerator, "python_env": chosen}
        settings = Settings.model_validate(data)
        made = (DEMO, RECIPE)
        wanted = [one.digest for one in made]
        found = doctor.findings(self.seen(), settings, wanted, made, gpu=gpu, apply="APPLY")
        assert len({one.code for one in found}) == len(found)
        return {one.code: one for one in found}


WHOLE = ("torch-1.12.1+cu113", "transformers-4.33.0", "sentencepiece-0.2.0", "accelerate-0.22.0")
EIGHT_BIT = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda113.so", "libbitsandbytes_cuda118.so")


@pytest.fixture
def root(tmp_path: Path, sh: Any) -> Root:
    made = Root(tmp_path / "root", sh)
    made.make(DEMO.digest, "torch-2.13.0+cpu", "transformers-5", "sentencepiece-1", torch_cuda="")
    return made


def test_a_host_on_which_nothing_was_deployed_has_nothing_wrong(tmp_path: Path, sh: Any):
    assert Root(tmp_path / "none", sh).found() == {}


def test_environments_that_are_right_are_right(root: Root):
    packages = (*WHOLE, "bitsandbytes-0.41.1")
    root.make(RECIPE.digest, *packages, torch_cuda="11.3", libraries=EIGHT_BIT)
    assert root.found() == {}
    assert [one.whole for one in root.seen()] == [True, True]


def test_a_name_that_leads_to_an_environment_is_no_other_one(root: Root):
    root.make(RECIPE.digest, *WHOLE, torch_cuda="11.3")
    (root.path / "envs" / "starchat").symlink_to(RECIPE.digest)
    assert {one.digest for one in root.seen()} == {DEMO.digest, RECIPE.digest}


def test_one_that_is_missing_is_named(root: Root):
    finding = root.found()["env-missing"]
    assert finding.severity == "warning"
    assert RECIPE.digest in finding.evidence
    assert finding.mend == "APPLY --only python_env"


def test_one_that_is_half_made_is_never_judged_by_its_packages(root: Root):
    root.make(RECIPE.digest, "transformers-4", whole=False)
    assert set(root.found()) == {"env-half"}


def test_an_interpreter_that_is_gone_is_named_with_where_it_was(root: Root):
    root.make(RECIPE.digest, *WHOLE, python=False)
    assert "/usr/bin/python3.99" in root.found()["env-no-python"].evidence


def test_a_torch_without_cuda_is_wrong_only_where_there_is_a_gpu_to_use(root: Root):
    root.make(RECIPE.digest, *WHOLE, torch_cuda="")
    finding = root.found()["torch-cpu"]
    assert "1.12.1+cu113" in finding.evidence
    path = f"{root.path}/envs/{RECIPE.digest}"
    assert finding.mend == f"on the host: rm {path}/.whole; then APPLY --only python_env"
    assert root.found(gpu=False) == {}
    # The demo's own is without CUDA on purpose, until its accelerator is cuda.
    root.seen()
    assert DEMO.digest not in finding.evidence


def test_a_demo_without_cuda_on_an_accelerator_that_is_cuda_is_an_error(root: Root):
    root.make(RECIPE.digest, *WHOLE, torch_cuda="11.3")
    assert root.found(accelerator="cuda")["torch-cpu"].severity == "error"


def test_a_missing_package_of_the_catalogues_list_comes_by_making_it_again(root: Root):
    left = [one for one in WHOLE if not one.startswith("accelerate")]
    root.make(RECIPE.digest, *left, torch_cuda="11.3")
    assert root.found()["no-accelerate"].mend.endswith("then APPLY --only python_env")


def test_the_demo_without_sentencepiece_is_an_error(root: Root, tmp_path: Path):
    root.make(RECIPE.digest, "torch-1", "transformers-4", "accelerate-0", torch_cuda="11.3")
    assert root.found() == {}  # StarChat's tokenizer needs none
    next(root.path.glob(f"envs/{DEMO.digest}/lib/*/*/sentencepiece*")).rmdir()
    assert root.found()["no-sentencepiece"].severity == "error"


def test_what_a_users_own_list_lacks_has_to_get_into_the_list(tmp_path: Path, sh: Any):
    own = tmp_path / "own.yml"
    own.write_text(
        "channels: [c]\ndependencies: [python=3.9, {pip: [transformers, bitsandbytes]}]\n"
    )
    made = conda.recipe(str(own), "cpu")
    root = Root(tmp_path / "root", sh)
    root.make(made.digest, "transformers-4.28.0", "bitsandbytes-0.37.0")
    found = doctor.findings(
        root.seen(), Settings(), [made.digest], [made], gpu=False, apply="APPLY"
    )
    assert {one.code: one.mend for one in found} == {
        "no-sentencepiece": "add sentencepiece to the pip list of own, then apply",
        "no-accelerate": "add accelerate to the pip list of own, then apply",
    }


def test_a_bitsandbytes_without_torchs_cuda_is_named_with_what_it_has(root: Root):
    packages = (*WHOLE, "bitsandbytes-0.37.0")
    libraries = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda118.so")
    root.make(RECIPE.digest, *packages, torch_cuda="11.3", libraries=libraries)
    finding = root.found()["bitsandbytes-cpu"]
    assert "CUDA 11.3" in finding.cause
    assert "libbitsandbytes_cpu.so, libbitsandbytes_cuda118.so" in finding.evidence
    assert root.found(gpu=False) == {}


@pytest.mark.parametrize("by_conda", [True, False])
@pytest.mark.parametrize(("accelerator", "cuda"), [("cpu", ""), ("cuda", "13.0")])
def test_what_the_demos_own_locks_say_lacks_nothing(
    tmp_path: Path, sh: Any, accelerator: str, cuda: str, by_conda: bool
):
    lock = lock_for(accelerator)
    made = [conda.recipe("modern", accelerator)] if by_conda else []
    digest = made[0].digest if by_conda else lock.digest
    packages = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", lock.text, re.MULTILINE)
    assert len(packages) > 50
    root = Root(tmp_path / "root", sh)
    names = ["-".join(one) for one in packages]
    root.make(digest, *names, torch_cuda=cuda, libraries=("libbitsandbytes_cuda130.so",))
    settings = Settings.model_validate({"accelerator": accelerator})
    found = doctor.findings(root.seen(), settings, [digest], made, gpu=bool(cuda), apply="APPLY")
    assert found == ()
