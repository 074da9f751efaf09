"""Upstream's own code: which state of it, how it comes to a host whole, and what it is given."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import platformdirs
import pytest
import yaml
from conftest import Shell

from gpufleet import ROOT, catalog
from gpufleet.catalog import Model
from gpufleet.config.plan import files
from gpufleet.demo.plan import Answer
from gpufleet.errors import FleetError
from gpufleet.managed.plan import ManagedFile
from gpufleet.python_env.conda import digests, recipe, recipes
from gpufleet.settings import Settings, parse
from gpufleet.shell import script
from gpufleet.upstream import relay
from gpufleet.upstream.facts import Checkouts, PageAnswer
from gpufleet.upstream.operations import _CHECK_OUT, _LINK
from gpufleet.upstream.plan import (
    MODELS,
    Checkout,
    code,
    findings,
    kept,
    linked,
    links,
    parse_answer,
    program,
    unit,
)

sys.path.append(str(ROOT / "tests" / "demo"))

import upstream_double

EMPTY = Checkout("", "")


def settings(**data: Any) -> Settings:
    return parse({"runtime": "upstream", "accelerator": "cuda", **data}, "host")


def of_7b(**data: Any) -> Settings:
    return settings(model="minigpt4-vicuna-7b", **data)


@pytest.fixture
def seven() -> Model:
    return catalog.model("minigpt4-vicuna-7b")


class TestTheState:
    def test_that_most_guides_install_is_the_default(self):
        assert code(of_7b()).commit == "22d8888ca2cf0aac862f537e7d22ef5830036808"
        assert code(of_7b()).environment == "upstream-2023"

    def test_that_came_last_has_another_name_for_the_model(self):
        last = code(of_7b(upstream={"version": "2024-09"}))
        assert last.commit == "d94738a7626ec43eba6c2cddf3cd2043f1a9689a"
        assert (last.arch, last.model_type) == ("minigpt4", "pretrain_vicuna0")

    def test_can_be_any_commit_which_the_catalogue_then_does_not_know(self):
        chosen = code(of_7b(upstream={"commit": "a" * 40, "git": "https://git.example.net/x.git"}))
        assert (chosen.commit, chosen.known) == ("a" * 40, False)
        assert chosen.address == "https://git.example.net/x.git"

    def test_that_is_not_there_is_refused_with_those_that_are(self):
        with pytest.raises(
            FleetError, match=r"choose one of: 2023-05, 2024-09, and upstream\.commit"
        ):
            code(of_7b(upstream={"version": "2022-01"}))

    @pytest.mark.parametrize("address", ["git.example.net/x", "https://u:secret@h/x", "-oProxy=x"])
    def test_comes_from_an_address_that_git_takes_without_a_password(self, address: str):
        with pytest.raises(FleetError, match=r"setting upstream\.git"):
            parse({"upstream": {"git": address}}, "host")

    def test_runs_in_its_own_environment_and_the_applications_is_not_made(self):
        assert [made.name for made in recipes(of_7b())] == ["upstream-2023"]
        assert digests(of_7b())[0] == recipe("upstream-2023", "cuda").digest

    def test_keeps_another_environment_that_was_asked_for(self):
        both = of_7b(python_env={"environment": "starchat"})
        assert [made.name for made in recipes(both)] == ["upstream-2023", "starchat"]

    def test_needs_conda_for_an_environment_of_its_time(self):
        with pytest.raises(FleetError, match="upstream-2023 needs conda"):
            recipes(of_7b(python_env={"manager": "uv"}))


class TestItsYaml:
    def test_wins_over_the_codes_own_with_every_path(self, seven: Model):
        (file,) = files(of_7b(), seven, PurePosixPath("/w"))
        said = yaml.safe_load(file.content)
        assert file.path == "/opt/minigpt4/config/upstream.yaml"
        assert said["model"] == {
            "arch": "mini_gpt4",
            "model_type": "pretrain_vicuna",
            "freeze_vit": True,
            "freeze_qformer": True,
            "max_txt_len": 160,
            "end_sym": "###",
            "low_resource": False,
            "prompt_path": "",
            "prompt_template": "###Human: {} ###Assistant: ",
            "llama_model": "/w/vicuna-7b-v0",
            "q_former_model": "/w/blip2_pretrained_flant5xxl.pth",
            "ckpt": "/w/prerained_minigpt4_7b.pth",
        }
        assert said["datasets"]["cc_sbu_align"]["vis_processor"]["train"] == {
            "name": "blip2_image_eval",
            "image_size": 224,
        }

    def test_of_the_last_state_names_what_that_has(self, seven: Model):
        (file,) = files(of_7b(upstream={"version": "2024-09"}), seven, PurePosixPath("/w"))
        said = yaml.safe_load(file.content)["model"]
        assert (said["arch"], said["model_type"]) == ("minigpt4", "pretrain_vicuna0")

    def test_says_8_bit_where_that_is_asked_for(self, seven: Model):
        (file,) = files(of_7b(demo={"precision": "8bit"}), seven, PurePosixPath("/w"))
        assert yaml.safe_load(file.content)["model"]["low_resource"] is True


class TestWhatItWouldDownload:
    def test_lies_where_it_looks(self, seven: Model):
        found = {PurePosixPath(file.path).name: file.content for file in kept(PurePosixPath("/r"))}
        assert yaml.safe_load(found["config.json"])["num_hidden_layers"] == 12
        assert "[MASK]\n" in found["vocab.txt"]
        assert all(
            file.path.startswith("/r/upstream-home/bert-base-uncased/")
            for file in kept(PurePosixPath("/r"))
            if not file.path.endswith(".py")
        )
        assert links(PurePosixPath("/r"), seven, PurePosixPath("/w")) == {
            "/r/upstream-home/hub/checkpoints/eva_vit_g.pth": "/w/eva_vit_g.pth"
        }

    def test_is_linked_anew_where_a_link_is_missing_or_leads_elsewhere(
        self, tmp_path: Path, sh: Shell
    ):
        wanted = {str(tmp_path / "a" / "x"): "/new", str(tmp_path / "y"): "/same"}
        (tmp_path / "y").symlink_to("/same")
        assert linked(wanted, {str(tmp_path / "y"): "/same"}) == [str(tmp_path / "a" / "x")]
        for to in ("/old", "/new"):
            assert sh(script(_LINK, str(tmp_path / "a" / "x"), to)).returncode == 0
        assert os.readlink(tmp_path / "a" / "x") == "/new"
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]


class TestItsUnit:
    @staticmethod
    def made(head: str = "h", weights: str = "w-1", yaml: str = "", **data: Any) -> tuple[str, str]:
        config = [ManagedFile("/opt/minigpt4/config/upstream.yaml", yaml)]
        file, revision = unit(
            of_7b(**data), environment="e" * 16, head=head, weights=weights, config=config
        )
        return file.content, revision

    def test_has_the_name_of_the_applications_so_that_one_replaces_the_other(self):
        file, _ = unit(
            of_7b(), environment="e", head="h", weights="w", config=[ManagedFile("/c", "")]
        )
        assert file.path == "/etc/systemd/system/minigpt4-demo.service"

    def test_runs_the_launcher_on_the_checkout_with_demos_own_arguments(self):
        text, _ = self.made(upstream={"options": {"run.seed": "7"}})
        (line,) = (line for line in text.splitlines() if line.startswith("ExecStart="))
        commit = code(of_7b()).commit
        assert line == (
            "ExecStart=/opt/minigpt4/envs/eeeeeeeeeeeeeeee/bin/python "
            "/opt/minigpt4/upstream-home/launch.py "
            f"--checkout /opt/minigpt4/upstream/{commit} --server-name 127.0.0.1 "
            "--server-port 7860 --max-waiting 8 --model-id minigpt4-vicuna-7b -- "
            "--cfg-path /opt/minigpt4/config/upstream.yaml --gpu-id 0 --options run.seed=7"
        )

    def test_keeps_it_offline_and_on_one_gpu(self):
        text, _ = self.made()
        for line in (
            "Environment=TORCH_HOME=/opt/minigpt4/upstream-home",
            "TRANSFORMERS_OFFLINE=1",
            "HF_HUB_OFFLINE=1",
            "CUDA_VISIBLE_DEVICES=0",
            "WorkingDirectory=/opt/minigpt4/upstream-home",
            "IPAddressDeny=any",
            "ProtectSystem=strict",
        ):
            assert line in text

    def test_gets_users_and_passwords_as_a_credential(self):
        text, _ = self.made(demo={"auth_file": "/somewhere/users"})
        assert "LoadCredential=auth:/opt/minigpt4/secrets/auth\n" in text
        assert " --auth-file ${CREDENTIALS_DIRECTORY}/auth -- --cfg-path " in text
        assert "auth" not in self.made()[0]

    def test_shows_bitsandbytes_the_toolkit_that_was_asked_for(self):
        text, _ = self.made(python_env={"cuda_toolkit": "11.3"})
        assert "LD_LIBRARY_PATH=/usr/local/cuda-11.3/lib64" in text
        assert "LD_LIBRARY_PATH" not in self.made()[0]

    def test_has_another_revision_for_other_code_weights_or_configuration(self):
        revisions = {
            self.made()[1],
            self.made(head="i")[1],
            self.made(weights="w-2")[1],
            self.made(yaml="x")[1],
            self.made(demo={"port": 7861})[1],
        }
        assert len(revisions) == 5
        assert self.made()[1] in self.made()[0]


class TestFindings:
    def test_are_none_for_a_gpu_and_a_model_that_it_has(self, seven: Model):
        assert findings(of_7b(), seven) == []

    def test_are_none_where_the_application_runs(self, seven: Model):
        assert findings(of_7b(runtime="modern", demo={"precision": "4bit"}), seven) == []

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            ({"model": "pico"}, "set model to one of them, or runtime to modern"),
            ({"model": "starchat-beta"}, "runtime upstream serves MiniGPT-4 only"),
            ({"accelerator": "cpu"}, "runtime upstream needs a GPU"),
            ({"demo": {"precision": "4bit"}}, "upstream's code knows fp16 and 8bit only"),
            ({"demo": {"precision": "8bit"}}, "set python_env.cuda_toolkit to 11.3"),
            ({"demo": {"processes": 2}}, "runs one process, on the first GPU"),
            ({"upstream": {"version": "2022-01"}}, "no version '2022-01'"),
        ],
    )
    def test_say_what_it_cannot_serve_and_what_to_set(self, data: dict[str, Any], said: str):
        chosen = of_7b(**data) if "model" not in data else settings(**data)
        (line,) = findings(chosen, catalog.model(chosen.model))
        assert said in line
        assert "\n" not in line

    def test_leave_an_own_commit_to_who_chose_it(self):
        own = settings(model="pico", accelerator="cpu", upstream={"commit": "a" * 40})
        assert findings(own, catalog.model("pico")) == []

    def test_name_models_of_the_catalogue(self):
        assert set(MODELS) <= set(catalog.names())


@dataclass
class Origin:
    """A repository on the operator's machine, and a folder that stands for a host's."""

    repository: Path
    commit: str
    root: Path
    sh: Shell

    def fetched(self, address: str | None = None) -> subprocess.CompletedProcess[str]:
        """Check out as a host does that fetches for itself."""
        url = self.repository.as_uri() if address is None else address
        return self.sh(script(_CHECK_OUT, str(self.root), self.commit, self.commit, "no", url))

    def relayed(self, source: Path, sha256: str | None = None) -> Checkout:
        """Check out as a host does that a pack was brought to; what is there then."""
        sent = relay.relayed(str(source), self.commit, sha256)
        (self.root / "incoming").mkdir(parents=True, exist_ok=True)
        (self.root / "incoming" / f"upstream-{self.commit}.pack").write_bytes(sent.pack)
        done = self.sh(script(_CHECK_OUT, str(self.root), self.commit, sent.head, "yes", "none:"))
        assert done.returncode == 0, done.stderr
        assert self.seen.head == sent.head
        return self.seen

    @property
    def seen(self) -> Checkout:
        """What the fact says of the checkout."""
        done = self.sh(Checkouts().command(root=str(self.root)))
        assert done.stderr == ""
        return Checkouts().process(done.stdout.splitlines()).get(self.commit, EMPTY)

    @property
    def place(self) -> Path:
        return self.root / "upstream" / self.commit


@pytest.fixture
def origin(tmp_path: Path, sh: Shell, monkeypatch: pytest.MonkeyPatch) -> Origin:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    repository = tmp_path / "repository"
    commit = upstream_double.repository(repository)
    return Origin(repository, commit, tmp_path / "root", sh)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="a host's files are root's")


@as_root
class TestACheckout:
    @pytest.fixture
    def whole(self, origin: Origin) -> Origin:
        assert origin.fetched().returncode == 0
        assert origin.seen == Checkout(origin.commit, "")
        return origin

    def test_has_the_commits_files_and_no_history(self, whole: Origin):
        assert (whole.place / "demo.py").read_text("utf-8") == upstream_double.DEMO
        assert upstream_double.git(whole.place, "rev-list", "--count", "HEAD") == "1"
        assert list((whole.root / "incoming").iterdir()) == []

    @pytest.mark.parametrize(
        "drift",
        [
            lambda place: (place / "demo.py").write_text("print('mine')\n"),
            lambda place: (place / "double" / "answer.py").unlink(),
            lambda place: (place / "extra.py").write_text(""),
            lambda place: (place / "run.log").write_text("ignored by git"),
            lambda place: (place / "demo.py").chmod(0o755),
            lambda place: (place / "demo.py").chmod(0o666),
            lambda place: os.chown(place / "demo.py", 1234, 1234),
            lambda place: upstream_double.git(place, "checkout", "--quiet", "--orphan", "other"),
        ],
        ids=["edited", "removed", "added", "ignored", "mode", "writable", "owner", "head"],
    )
    def test_that_drifted_is_seen_and_healed_without_the_network(
        self, whole: Origin, drift: Callable[[Path], object]
    ):
        drift(whole.place)
        assert whole.seen != Checkout(whole.commit, "")
        assert whole.fetched("https://nowhere.invalid/x.git").returncode == 0
        assert whole.seen == Checkout(whole.commit, "")

    def test_that_was_edited_back_to_its_size_and_time_is_seen(self, whole: Origin):
        path = whole.place / "demo.py"
        stat = path.stat()
        path.write_text(path.read_text("utf-8").replace("Blocks", "Blacks", 1))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert whole.seen.wrong

    def test_whose_objects_are_damaged_is_fetched_again(self, whole: Origin):
        (whole.place / "demo.py").unlink()
        for path in (whole.place / ".git" / "objects").rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                path.write_bytes(path.read_bytes()[:-30] + b"x" * 30)
        assert whole.fetched().returncode == 0
        assert whole.seen == Checkout(whole.commit, "")

    def test_that_cannot_be_had_says_what_git_said_and_what_to_set(self, origin: Origin):
        done = origin.fetched((origin.root / "none").as_uri())
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "upstream's code does not come from file://" in line
        assert "upstream.source to a copy on the laptop" in line
        assert not origin.place.exists()

    def test_of_a_commit_that_the_mirror_lacks_gets_no_name(self, origin: Origin):
        origin.commit = "b" * 40
        assert origin.fetched().returncode == 1
        assert not origin.place.exists()

    def test_comes_from_a_mirror_that_gives_branches_only(self, origin: Origin):
        first = upstream_double.git(origin.repository, "rev-parse", "HEAD~1")
        upstream_double.git(origin.repository, "config", "uploadpack.allowAnySHA1InWant", "false")
        origin.commit = first
        assert origin.fetched().returncode == 0
        assert origin.seen == Checkout(first, "")


class TestTheCopyOnThisMachine:
    @as_root
    def test_is_a_repository(self, origin: Origin):
        assert origin.relayed(origin.repository) == Checkout(origin.commit, "")
        assert upstream_double.git(origin.place, "rev-list", "--count", "HEAD") == "1"

    @as_root
    def test_is_a_bundle(self, origin: Origin, tmp_path: Path):
        bundle = tmp_path / "code.bundle"
        upstream_double.git(origin.repository, "bundle", "create", "--quiet", str(bundle), "main")
        assert origin.relayed(bundle) == Checkout(origin.commit, "")

    @pytest.fixture
    def tarball(self, origin: Origin, tmp_path: Path) -> Path:
        path = tmp_path / "code.tar.gz"
        options = ("--format=tar.gz", "--prefix=MiniGPT-4-x/", f"--output={path}")
        upstream_double.git(origin.repository, "archive", *options, origin.commit)
        return path

    @as_root
    def test_is_a_tarball(self, origin: Origin, tarball: Path):
        assert origin.relayed(tarball).wrong == ""
        tree = "HEAD^{tree}"
        assert upstream_double.git(origin.place, "rev-parse", tree) == upstream_double.git(
            origin.repository, "rev-parse", tree
        )

    def test_whose_tarball_is_of_another_commit_is_refused(self, origin: Origin, tarball: Path):
        with pytest.raises(FleetError, match=f"is of commit {origin.commit}, not {'c' * 40}"):
            relay.relayed(str(tarball), "c" * 40, None)

    def test_whose_tarball_changed_since_it_was_first_seen_is_refused(
        self, origin: Origin, tarball: Path
    ):
        relay.relayed(str(tarball), origin.commit, None)
        assert (platformdirs.user_data_path("gpufleet") / "upstream").is_dir()
        other = tarball.with_name("other.tar.gz")
        folder = tarball.parent / "changed"
        shutil.copytree(origin.repository, folder)
        (folder / "demo.py").write_text("print('changed')\n")
        with tarfile.open(other, "w:gz") as tar:
            tar.add(folder, "MiniGPT-4")
        with pytest.raises(FleetError, match=r"the first one seen of commit .* had [0-9a-f]{64}"):
            relay.relayed(str(other), origin.commit, None)

    def test_whose_tarball_has_another_sha256_than_the_setting_is_refused(
        self, origin: Origin, tarball: Path
    ):
        with pytest.raises(FleetError, match=r"setting upstream\.sha256: .* has sha256"):
            relay.relayed(str(tarball), origin.commit, "0" * 64)

    @pytest.mark.parametrize("content", [b"<html>sign in</html>", b""])
    def test_that_is_something_else_is_refused(
        self, origin: Origin, tmp_path: Path, content: bytes
    ):
        path = tmp_path / "page.tar.gz"
        path.write_bytes(content)
        with pytest.raises(FleetError, match="is no git repository, bundle or tarball: download"):
            relay.relayed(str(path), origin.commit, None)

    def test_that_was_cut_off_is_refused(self, origin: Origin, tarball: Path):
        cut = tarball.with_name("cut.tar.gz")
        cut.write_bytes(tarball.read_bytes()[:-200])
        with pytest.raises(FleetError, match=r"setting upstream\.source: .*download it again"):
            relay.relayed(str(cut), origin.commit, None)

    def test_that_lacks_the_commit_says_what_to_do(self, origin: Origin):
        with pytest.raises(FleetError, match=f"does not have commit {'d' * 40}: fetch it there"):
            relay.relayed(str(origin.repository), "d" * 40, None)

    def test_that_is_not_there_is_named(self, origin: Origin, tmp_path: Path):
        with pytest.raises(FleetError, match=r"no .*/nothing on this machine"):
            relay.relayed(str(tmp_path / "nothing"), origin.commit, None)


class TestTheAnswerOfThePage:
    @pytest.mark.parametrize(
        ("printed", "answer"),
        [
            ('{"answer": "A cat."}', Answer("A cat.")),
            ('{"error": "HTTP 500: x"}', Answer(None, "HTTP 500: x")),
            ("sh: python3: not found", Answer(None, "sh: python3: not found")),
            ("", Answer(None, "nothing answered")),
        ],
    )
    def test_is_read(self, printed: str, answer: Answer):
        assert parse_answer(printed.splitlines()) == answer

    def test_is_a_reason_where_nobody_listens(self, sh: Shell, tmp_path: Path):
        (tmp_path / "x.png").write_bytes(b"")
        command = PageAnswer().command("http://127.0.0.1:9", str(tmp_path / "x.png"), "what?", 5)
        said = PageAnswer().process(sh(command).stdout.splitlines())
        assert said.text is None
        assert "refused" in said.problem

    def test_is_asked_with_nothing_but_python(self):
        imported = {line.split()[1].split(".")[0] for line in program("ask.py").splitlines()
                    if line.startswith(("import ", "from "))}  # fmt: skip
        assert imported <= {"__future__", "base64", "json", "mimetypes", "pathlib", "sys", "time",
                            "typing", "urllib"}  # fmt: skip
