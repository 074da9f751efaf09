"""Environments that conda makes: the catalogue's, a user's own, and whether a host runs them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpufleet import catalog
from gpufleet.catalog import ReadyEnvironment, Site
from gpufleet.errors import FleetError
from gpufleet.mirrors.choice import Choice, Pick
from gpufleet.python_env import conda
from gpufleet.python_env.plan import lock_for
from gpufleet.settings import PythonEnv, Settings

NAMES = list(catalog.environments().environments)


def settings(**python_env: Any) -> Settings:
    return Settings.model_validate({"python_env": python_env})


class TestTheCatalogue:
    def test_has_the_environments_that_people_made_by_hand(self):
        assert NAMES == ["modern", "upstream-2023", "upstream-2024", "torch2", "starchat"]
        old = conda.recipe("upstream-2023", "cpu")
        assert old.python == "3.9"
        assert {"torch==1.12.1+cu113", "transformers==4.28.0"} <= set(old.pip)
        assert old.alone == ("fschat==0.1.10",)
        assert conda.recipe("torch2", "cpu").torch.startswith("torch==2.0.0+cu118\n")

    def test_the_demos_is_its_lock_hash_for_hash(self):
        demo = conda.recipe("modern", "cpu")
        assert demo.lock == lock_for("cpu")
        assert f"python{demo.python}" == demo.lock.python
        assert demo.pip == ()

    @pytest.mark.parametrize("name", NAMES)
    def test_every_file_for_conda_has_names_only_and_is_what_was_meant(self, name: str):
        recipe = conda.recipe(name, "cpu")
        said = yaml.safe_load(recipe.environment_yml)
        assert said == {
            "channels": list(recipe.channels),
            "dependencies": [f"python={recipe.python}", *recipe.conda],
        }
        assert conda.lint(said) == []
        assert "://" not in recipe.environment_yml

    @pytest.mark.parametrize("name", NAMES[1:])
    def test_torch_is_built_for_the_cuda_that_its_row_says(self, name: str):
        recipe = conda.recipe(name, "cpu")
        tag = "cu" + str(recipe.cuda).replace(".", "")
        assert len(recipe.torch.splitlines()) == 3
        assert all(line.endswith(f"+{tag}") for line in recipe.torch.splitlines())
        assert "+" not in recipe.requirements
        assert len(recipe.requirements.splitlines()) + 3 == len(recipe.pip)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"cuda": "11.8"}, "is not built for CUDA 11.8"),
            ({"cuda": None}, "cuda and driver belong together"),
            ({"lock": "files/demo/{accelerator}.lock"}, "either pip or lock"),
            ({"pip": ["torch>=1"]}, "pip"),
            ({"channels": ["https://example.org/conda-forge"]}, "channels"),
            ({"conda": ["pip", "--yes"]}, "conda"),
            ({"cudaa": "11.3"}, "cudaa"),
        ],
    )
    def test_a_row_that_does_not_hold_together_is_refused(self, change: dict[str, Any], said: str):
        row = yaml.safe_load((catalog.CATALOG / "environments.yaml").read_text("utf-8"))
        row = row["environments"]["starchat"]
        ReadyEnvironment.model_validate(row)
        with pytest.raises(ValueError, match=re.escape(said)):
            ReadyEnvironment.model_validate({**row, **change})

    def test_digests_differ_where_anything_differs(self):
        base = conda.recipe("starchat", "cpu")
        changed = [{"python": "3.11"}, {"pip": base.pip[1:]}, {"alone": ("a==1",)}]
        changed += [{"channels": ("bioconda",)}, {"conda": ("pip", "git")}]
        digests = {replace(base, **change).digest for change in changed} | {base.digest}
        assert len(digests) == 6
        assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)


class TestAUsersOwnFile:
    def read(self, folder: Path, text: str) -> conda.Recipe:
        path = folder / "own.yml"
        path.write_text(text)
        return conda.recipe(str(path), "cpu")

    def problem(self, folder: Path, text: str) -> str:
        with pytest.raises(FleetError) as error:
            self.read(folder, text)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_tells_no_password_of_an_address(self, tmp_path: Path):
        secret = "https://u:secret@c.example.org/s"
        said = self.problem(
            tmp_path,
            f"channels: [{secret}]\ndependencies:\n- python=3.10\n- {secret}::numpy\n"
            f"- pip:\n  - --index-url {secret}\n",
        )
        assert said.count("https://c.example.org/s") == 3
        assert "secret" not in said

    def test_is_taken_in_its_two_parts(self, tmp_path: Path):
        recipe = self.read(
            tmp_path,
            "name: x\nchannels: [conda-forge, bioconda]\ndependencies:\n- python=3.10\n- git>=2\n"
            "- pip:\n  - torch==2.0.0+cu118\n  - timm\n",
        )
        assert (recipe.name, recipe.python) == ("own", "3.10")
        assert recipe.conda == ("git>=2", "pip")
        assert recipe.pip == ("torch==2.0.0+cu118", "timm")
        assert (recipe.requirements, recipe.torch) == ("timm\n", "torch==2.0.0+cu118\n")
        assert recipe.cuda == "11.8"

    @pytest.mark.parametrize(
        ("channels", "dependencies", "expected"),
        [
            ("[https://example.org/conda-forge]", "[python=3.10]", "channel https://example.org/c"),
            ("[/srv/channel]", "[python=3.10]", "channel /srv/channel passes the mirror by"),
            ("[conda-forge, nodefaults]", "[python=3.10]", "nodefaults"),
            ("[]", "[python=3.10]", "no channels"),
            ("[conda-forge]", "[pip]", "no version of python"),
            ("[conda-forge]", "[python>=3.8]", "no version of python"),
            ("[conda-forge]", "[python=3.10, {pip: [-i https://x/simple]}]", "-i https://x/simple"),
            ("[c]", "[python=3.10, {pip: [--extra-index-url https://x]}]", "--extra-index-url"),
            ("[c]", "[python=3.10, {pip: [--index-url=https://x]}]", "--index-url=https://x"),
            ("[c]", "[python=3.10, {pip: [-r more.txt]}]", "-r more.txt is not taken over"),
            ("[c]", "[python=3.10, {conda: [x]}]", "neither a package nor a list for pip"),
            ("[c]", "[python=3.10, 'https://x::git']", "https://x::git passes the mirror by"),
        ],
    )
    def test_what_passes_the_mirror_by_is_refused(
        self, tmp_path: Path, channels: str, dependencies: str, expected: str
    ):
        text = f"channels: {channels}\ndependencies: {dependencies}\n"
        assert expected in self.problem(tmp_path, text)

    def test_all_of_it_is_said_at_once(self, tmp_path: Path):
        text = "channels: [http://x/y, nodefaults]\ndependencies: [git, {pip: [-i http://x]}]\n"
        message = self.problem(tmp_path, text)
        assert [
            word for word in ("http://x/y", "nodefaults", "-i http", "python") if word in message
        ]
        assert message.count(";") >= 3

    @pytest.mark.parametrize("text", ["a: [", "[]", "dependencies: 1", "", "\x00"])
    def test_what_is_no_such_file_is_said(self, tmp_path: Path, text: str):
        assert "own.yml" in self.problem(tmp_path, text)

    @pytest.mark.parametrize(
        ("name", "said"), [("torch2.yml", "rename the file"), ("a b.yml", "letters, digits")]
    )
    def test_its_name_must_be_one_that_an_environment_can_have(
        self, tmp_path: Path, name: str, said: str
    ):
        own = tmp_path / name
        own.write_text("channels: [conda-forge]\ndependencies: [python=3.10]\n")
        with pytest.raises(FleetError, match=said):
            conda.recipe(str(own), "cpu")

    def test_a_file_that_is_not_there_is_said(self, tmp_path: Path):
        with pytest.raises(FleetError, match="No such file"):
            conda.recipe(str(tmp_path / "none.yml"), "cpu")

    def test_a_name_that_is_not_there_lists_those_that_are(self):
        with pytest.raises(FleetError, match=r"no environment 'torch3'; choose one of: modern, up"):
            conda.recipe("torch3", "cpu")


class TestWhatAHostGets:
    def test_the_demos_comes_first_and_once(self):
        assert [one.name for one in conda.recipes(settings())] == ["modern"]
        made = conda.recipes(settings(environment="torch2"))
        assert [one.name for one in made] == ["modern", "torch2"]
        assert conda.digests(settings(environment="torch2"))[0] == conda.digests(settings())[0]

    def test_uv_makes_the_demos_alone_and_under_the_name_it_always_had(self):
        assert conda.digests(settings(manager="uv")) == (lock_for("cpu").digest,)
        with pytest.raises(FleetError, match=r"set python_env\.manager to miniconda or miniforge"):
            conda.recipes(settings(manager="uv", environment="torch2"))

    def test_login_shells_get_only_what_is_asked_for(self):
        assert conda.profile_files(settings()) == ([], sorted(conda.SHELL_FILES))
        wanted, unwanted = conda.profile_files(settings(shell_init=True, cuda_toolkit="11.8"))
        assert [file.path for file in wanted] == list(conda.SHELL_FILES)
        assert unwanted == []
        profile, cuda, libraries = (file.content for file in wanted)
        assert ". /opt/minigpt4/conda/etc/profile.d/conda.sh" in profile
        assert "PATH=/usr/local/cuda-11.8/bin:$PATH" in cuda
        assert libraries.endswith("/usr/local/cuda-11.8/lib64\n")

    def test_those_files_are_what_a_shell_can_read(self, sh):
        for file in conda.profile_files(settings(shell_init=True, cuda_toolkit="11.8"))[0][:2]:
            done = sh(f"set -eu; {file.content}\necho $PATH")
            assert (done.returncode, done.stderr) == (0, "")


def pinned(kind: Any, site: Site) -> Choice:
    return Choice({kind: Pick(kind, site, "pinned", "")})


class TestTheInstaller:
    OWN = Site.model_validate(
        {"hosts": ["10.1.2.3:80"], "scheme": "http", "services": {"miniconda": {"dir": "/m/"}}}
    )

    def test_comes_from_the_chosen_site_under_the_catalogues_name_and_checksum(self):
        row = catalog.environments().installers.miniconda
        found = conda.installer(PythonEnv(), pinned("miniconda", self.OWN), catalog.mirrors())
        assert found == conda.Installer(
            "miniconda", row.sha256, None, (f"http://10.1.2.3:80/m/{row.file}",)
        )

    def test_comes_from_any_site_that_lists_it_where_none_is_chosen(self):
        """It is the same bytes: the checksum says so. One site of each failure domain is tried."""
        found = conda.installer(PythonEnv(), Choice({}), catalog.mirrors())
        sites = catalog.mirrors().sites.values()
        domains = {site.domain for site in sites if site.listed("miniconda")}
        assert len(found.urls) == len(domains) >= 2
        assert all(url.startswith("https://") for url in found.urls)

    def test_what_was_measured_has_fallbacks_and_what_was_pinned_has_none(self):
        for policy, expected in (("measured", 2), ("pinned", 1)):
            pick = Pick("miniconda", self.OWN, policy, "", ("nju", "official"))
            found = conda.installer(PythonEnv(), Choice({"miniconda": pick}), catalog.mirrors())
            assert len(found.urls) == expected
            assert found.urls[0].startswith("http://10.1.2.3:80/m/")

    def test_a_file_of_this_machine_is_relayed(self, tmp_path: Path):
        own = tmp_path / "Miniconda3.sh"
        own.write_bytes(b"x")
        checksum = hashlib.sha256(b"x").hexdigest()
        chosen = PythonEnv(installer=str(own), installer_sha256=checksum)
        found = conda.installer(chosen, Choice({}), catalog.mirrors())
        assert found == conda.Installer("miniconda", checksum, own, ())

    def test_is_never_unchecked(self, tmp_path: Path):
        for name in ("Miniconda3-latest-Linux-x86_64.sh", str(tmp_path / "x.sh")):
            with pytest.raises(FleetError, match=r"set python_env\.installer_sha256"):
                conda.check_installer(PythonEnv(installer=name), catalog.mirrors())

    def test_a_file_that_is_not_there_is_said(self, tmp_path: Path):
        chosen = PythonEnv(installer=str(tmp_path / "none.sh"), installer_sha256="0" * 64)
        with pytest.raises(FleetError, match=r"no file .*none\.sh on this machine"):
            conda.check_installer(chosen, catalog.mirrors())


def test_torch_comes_from_the_chosen_site_or_the_settings_index_with_its_tag():
    chosen = PythonEnv()
    assert conda.torch_options(chosen, Choice({}), "cu118") == (
        "--index-url",
        chosen.torch_index.removesuffix("/cpu") + "/cu118",
    )
    aliyun = catalog.mirrors().sites["aliyun"]
    option, url = conda.torch_options(chosen, pinned("torch", aliyun), "cu113")
    assert option == "--find-links"
    assert "/cu113" in url


class TestPairs:
    def found(self, name: str, driver: str | None, *gpus: str) -> list[str]:
        return conda.pair_findings([conda.recipe(name, "cpu")], driver, gpus, catalog.drivers())

    def test_the_demos_own_on_cuda_needs_a_driver_and_a_gpu_of_its_cuda(self):
        made = [conda.recipe("modern", "cuda")]
        known = catalog.drivers()
        (line,) = conda.pair_findings(made, "535.183.01", ["0x20b5"], known)
        assert "torch for CUDA 13.0, which needs driver 580 or newer" in line
        assert conda.pair_findings(made, "580.65.06", ["0x20b5"], known) == []
        (line,) = conda.pair_findings(made, "580.65.06", ["0x1db6"], known)
        assert "no code for the Volta GPU" in line

    def test_a_driver_that_this_run_brings_is_judged_by_its_cuda(self):
        made = [conda.recipe("modern", "cuda")]
        known = catalog.drivers()
        assert conda.pair_findings(made, "535.183.01", [], known, to_come="13.0") == []
        (line,) = conda.pair_findings(made, "580.65.06", [], known, to_come="12.2")
        assert "driver.cuda is 12.2: set driver.cuda to 13.0" in line

    def test_a_driver_that_is_too_old_is_named_with_what_to_do(self):
        (line,) = self.found("torch2", "440.33.01", "0x20b5")
        assert "needs driver 450.80.02 or newer, and this host has 440.33.01" in line
        assert "driver.cuda" in line
        assert "\n" not in line

    @pytest.mark.parametrize("driver", ["450.80.02", "470.82.01", "580.65.06"])
    def test_a_newer_driver_runs_an_older_cuda(self, driver: str):
        assert self.found("torch2", driver, "0x20b5") == []

    def test_a_gpu_that_came_after_torch_was_built_is_named(self):
        (line,) = self.found("upstream-2023", "535.54.03", "0x2330")
        assert "no code for the Hopper GPU" in line
        assert self.found("torch2", "535.54.03", "0x2330") == []
        (line,) = self.found("torch2", "580.65.06", "0x2901")
        assert "Blackwell" in line

    def test_without_a_driver_yet_or_without_cuda_there_is_nothing_to_say(self):
        assert self.found("torch2", None) == self.found("torch2", "") == []
        assert self.found("modern", "390.1", "0x2901") == []
