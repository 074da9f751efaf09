"""Merging: the tensors are FastChat's bit for bit, memory is bounded, and no kill spoils it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

ROOT = Path(__file__).parents[2]
PICO = ROOT / "files" / "weights" / "pico"
sys.path.insert(0, str(ROOT))

from gpufleet.errors import FleetError, UsageError  # noqa: E402
from gpufleet.weights.merge import checkpoint, engine  # noqa: E402
from gpufleet.weights.merge.engine import Job, prepare, run  # noqa: E402

Tensors = dict[str, torch.Tensor]
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


def read(folder: Path) -> Tensors:
    """Every tensor of a folder, as torch and safetensors read it; the index must agree."""
    found: Tensors = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".bin":
            assert zipfile.ZipFile(file).testzip() is None  # every checksum is right
            part = torch.load(file, weights_only=True)
        elif file.suffix == ".safetensors":
            part = load_file(file)
        else:
            continue
        found |= part
        for index in folder.glob("*.index.json"):
            where = json.loads(index.read_text())["weight_map"]
            assert {where[name] for name in part} == {file.name}
    return found


def assert_same(one: Tensors, other: Tensors) -> None:
    """Same names, dtypes, shapes and bits."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype == torch.float16
        assert torch.equal(value.view(torch.int16), other[name].view(torch.int16)), name


@dataclass(frozen=True)
class Pair:
    """Base and delta on the disk, and what FastChat makes of them."""

    base: Path
    delta: Path
    right: Tensors

    def merge(self, output: Path, **how: Any) -> engine.Result:
        return run(prepare(Job(self.base, self.delta, output, **how)), lambda progress: None)


def small_files(folder: Path, rows: int, hidden: int, layers: int) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(PICO / "vicuna-pico-delta" / name, folder)
    config = json.loads((PICO / "llama-pico-base" / "config.json").read_text())
    config |= {"vocab_size": rows, "hidden_size": hidden, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))


def write(folder: Path, tensors: Tensors, files: int, form: str = "bin") -> None:
    """A folder of `files` shards and an index; its tokenizer is pico's."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    stem = "pytorch_model" if form == "bin" else "model"
    names, where = list(tensors), {}
    for number in range(files):
        part = {name: tensors[name] for name in names[number::files]}
        file = f"{stem}-{number:05}-of-{files:05}.{form}"
        if form == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps(index))
    width = tensors[BY_TOKEN[0]].shape
    layers = sum(name.endswith("q_proj.weight") for name in names)
    small_files(folder, *width, layers)


def llama(rows: int, hidden: int = 72, layers: int = 2) -> LlamaForCausalLM:
    """A random LLaMA of odd sizes: no tensor but a few ends with a page of memory."""
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=52,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def by_fastchat(base: LlamaForCausalLM, delta: LlamaForCausalLM) -> Tensors:
    """FastChat's apply_delta, 0.1.10 where the vocabularies differ by one, else 0.2.36, on its own
    class and in its order: to float16, resize, rows of zero, add."""
    start, added = base.config.vocab_size, delta.config.vocab_size - base.config.vocab_size
    base, delta = base.half(), delta.half()
    if added:
        base.resize_token_embeddings(start + added, mean_resizing=False)
        base.get_input_embeddings().weight.data[-added:] = 0
        base.get_output_embeddings().weight.data[-added:] = 0
    changes = delta.state_dict()
    for name, parameter in base.state_dict().items():
        parameter.data += changes[name]
    return {name: value.clone() for name, value in base.state_dict().items()}


def pair(folder: Path, added: int, dtype: torch.dtype = torch.float16, form: str = "bin") -> Pair:
    """A random pair in 3 and 2 shards, `added` rows apart."""
    torch.manual_seed(added)
    base, delta = llama(300), llama(300 + added)
    for model in (base, delta):
        model.to(dtype)
    sides = [{name: v.clone() for name, v in side.state_dict().items()} for side in (base, delta)]
    # As the first conversions have it; nobody reads it.
    sides[0]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(9)
    write(folder / "base", sides[0], 3, form)
    write(folder / "delta", sides[1], 2, form)
    return Pair(folder / "base", folder / "delta", by_fastchat(base, delta))


@pytest.fixture(scope="module", params=[0, 1], ids=["v1.1", "v0"])
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("pair"), request.param)


class TestTheTensors:
    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    @pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
    def test_are_those_of_fastchat_bit_for_bit(
        self, version: Pair, tmp_path: Path, form: Any, shard_bytes: int
    ):
        result = version.merge(tmp_path / "out", form=form, shard_bytes=shard_bytes, memory=1)
        assert_same(read(tmp_path / "out"), version.right)
        assert (result.state, result.dropped) == ("merged", 1)
        shards = len(list((tmp_path / "out").glob(f"*.{form}")))
        assert shards == 1 if shard_bytes == 1 << 30 else shards > 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    def test_are_the_same_from_other_floats(self, tmp_path: Path, dtype: torch.dtype, form: str):
        made = pair(tmp_path, 1, dtype, form)
        made.merge(tmp_path / "out")
        assert_same(read(tmp_path / "out"), made.right)

    def test_of_a_negative_zero_in_the_added_row_are_positive(self, tmp_path: Path):
        made = pair(tmp_path / "a", 1)
        delta = read(made.delta)
        delta[BY_TOKEN[0]][-1] = -0.0
        write(tmp_path / "delta", delta, 2)
        Pair(made.base, tmp_path / "delta", {}).merge(tmp_path / "out")
        row = read(tmp_path / "out")[BY_TOKEN[0]][-1]
        assert row.view(torch.int16).eq(0).all()

    def test_of_pico_are_those_in_the_checkout(self, tmp_path: Path):
        pico = Pair(
            PICO / "llama-pico-base", PICO / "vicuna-pico-delta", read(PICO / "vicuna-pico")
        )
        result = pico.merge(tmp_path / "out", version="v0")
        assert_same(read(tmp_path / "out"), pico.right)
        assert (result.rows, result.tensors) == (641, 30)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            ours, theirs = (
                json.loads((side / name).read_text())
                for side in (tmp_path / "out", PICO / "vicuna-pico")
            )
            assert ours == theirs
        model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
        assert_same(dict(model.state_dict()), pico.right)


def test_every_user_may_read_the_output_and_nothing_is_left_beside_it(
    version: Pair, tmp_path: Path
):
    before = os.umask(0o077)
    try:
        version.merge(tmp_path / "out", form="bin", shard_bytes=60_000)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    files = list((tmp_path / "out").iterdir())
    assert len(files) > 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


@pytest.mark.parametrize("there", [True, False])
def test_an_output_may_be_a_link_to_an_empty_folder_or_to_none(
    version: Pair, tmp_path: Path, there: bool
):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "vicuna").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "vicuna")
    version.merge(tmp_path / "out")
    assert_same(read(tmp_path / "disk" / "vicuna"), version.right)
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["vicuna"]


def test_an_output_may_be_the_folder_that_one_is_in(
    version: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    version.merge(Path())
    assert_same(read(tmp_path / "out"), version.right)


def test_a_merge_by_name_notes_what_it_made_in_the_place_of_what_was_there(tmp_path: Path):
    store, own = tmp_path / "store", tmp_path / "own.yaml"
    for name in ("llama-pico-base", "vicuna-pico-delta"):
        shutil.copytree(PICO / name, store / name)
    own.write_text(
        "{schema: 1, title: own, kind: llama, folder: own, hidden_size: 128, vocabulary: 641,\n"
        " made: {base: llama-pico-base, delta: vicuna-pico-delta, version: v0},\n"
        " include: ['*.bin', '*.safetensors', '*.json', tokenizer.model],\n"
        " evidence: {source: this test, seen: '2026-11-22', state: verified}}\n"
    )

    def fleet(command: str, *options: str) -> dict[str, Any]:
        words = [str(ROOT / "fleet"), "weights", command, str(own), "--store", str(store)]
        done = subprocess.run([*words, "--json", *options], capture_output=True, check=False)
        assert done.stderr == b""
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    assert fleet("merge", "--format", "bin")["learnt"] == 7
    shutil.rmtree(store / "own")
    assert fleet("merge")["learnt"] == 7
    verified = fleet("verify")
    assert (verified["exit_code"], verified["bytes_read"]) == (0, 0)


def test_the_same_merge_again_does_nothing_and_another_is_refused(version: Pair, tmp_path: Path):
    version.merge(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert version.merge(tmp_path / "out").state == "there"
    with pytest.raises(UsageError, match="not of this merge: remove it"):
        version.merge(tmp_path / "out", form="bin")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"less")
    with pytest.raises(UsageError, match="not of this merge"):
        version.merge(tmp_path / "out")
    assert {path.name for path in before} == {path.name for path in (tmp_path / "out").iterdir()}


def test_an_input_that_changes_meanwhile_makes_no_output(version: Pair, tmp_path: Path):
    shutil.copytree(version.delta, tmp_path / "delta")
    ready = prepare(Job(version.base, tmp_path / "delta", tmp_path / "out"))
    changed = tmp_path / "delta" / "tokenizer.model"
    changed.write_bytes(b"another")
    with pytest.raises(FleetError, match=r"tokenizer\.model changed during the merge: merge again"):
        run(ready, lambda progress: None)
    assert not (tmp_path / "out").exists()


def start(made: Pair, output: Path, **how: Any) -> subprocess.Popen[str]:
    """A merge in a process of its own."""
    job = {"base": str(made.base), "delta": str(made.delta), "output": str(output), **how}
    return subprocess.Popen(
        [sys.executable, "-m", "gpufleet.weights.merge", json.dumps(job)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def last(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a merge says in the end."""
    assert process.stdout is not None
    said = process.stdout.read()
    process.wait(timeout=60)
    return dict(json.loads(said.splitlines()[-1]))


@pytest.fixture
def no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("no_temporary_folder")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_merge_uses_no_temporary_folder(tmp_path: Path, form: str):
    pico = Pair(PICO / "llama-pico-base", PICO / "vicuna-pico-delta", read(PICO / "vicuna-pico"))
    process = start(pico, tmp_path / "out", form=form)
    assert last(process)["state"] == "merged"
    assert process.returncode == 0
    assert_same(read(tmp_path / "out"), pico.right)


def test_a_merge_ends_with_whoever_started_it(version: Pair, tmp_path: Path):
    process = start(version, tmp_path / "out")
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 1


class TestAKill:
    """Forks of this process merge, so that a kill costs no new import of torch."""

    KILLS = 40

    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    def test_at_any_moment_leaves_what_the_next_merge_goes_on_from(self, tmp_path: Path, form: Any):
        chance = random.Random(form)
        made = big(tmp_path, layers=6)
        output, kept, killed = tmp_path / "out", 0, 0
        how = {"form": form, "shard_bytes": 2_000_000, "memory": 1 << 20}
        took = self._seconds(made, tmp_path / "first", how)
        while killed < self.KILLS // 2:
            child = self._fork(made, output, how)
            time.sleep(chance.uniform(0, took))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                killed += 1
                # Half an output is never there: the folder has its name, or is not there.
                assert not output.exists() or read(output).keys() == made.right.keys()
            if output.exists():
                assert_same(read(output), made.right)
                shutil.rmtree(output)
            elif chance.random() < 0.4:
                kept = max(kept, made.merge(output, **how).kept)
                assert_same(read(output), made.right)
                shutil.rmtree(output)
        assert kept > 0
        made.merge(output, **how)
        assert_same(read(output), made.right)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "first", "out"]

    def _seconds(self, made: Pair, output: Path, how: dict[str, Any]) -> float:
        began = time.monotonic()
        made.merge(output, **how)
        return time.monotonic() - began

    def _fork(self, made: Pair, output: Path, how: dict[str, Any]) -> int:
        child = os.fork()
        if child == 0:
            try:
                made.merge(output, **how)
            finally:
                os._exit(0)
        return child

    def test_is_made_good_where_what_it_left_is_damaged(self, tmp_path: Path):
        made = big(tmp_path, layers=4)
        ready = prepare(Job(made.base, made.delta, tmp_path / "out"))

        class Stop(Exception):
            pass

        def stop(progress: engine.Progress) -> None:
            if progress.done == progress.of:
                raise Stop

        with pytest.raises(Stop):
            run(ready, stop)
        (shard,) = (tmp_path / ".out.merging").glob("*.safetensors")
        with shard.open("r+b") as stream:  # as after a loss of power
            stream.seek(shard.stat().st_size // 2)
            stream.write(bytes(4096))
        result = run(ready, lambda progress: None)
        assert 0 < result.kept < result.bytes
        assert_same(read(tmp_path / "out"), made.right)


def big(folder: Path, layers: int, hidden: int = 256, rows: int = 1000) -> Pair:
    """A pair of 7 × hidden² numbers a layer, which are quick to make."""
    torch.manual_seed(0)
    noise = torch.randn(hidden * max(hidden, rows)).half()
    square = [f"self_attn.{part}_proj" for part in "qkvo"]
    square += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    shapes = dict.fromkeys(BY_TOKEN, (rows, hidden))
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": (hidden, hidden) for name in square}
    sides: list[Tensors] = []
    for scale in (1.0, 0.01):
        values = noise.roll(len(sides)) * scale
        sides.append({n: values[: x * y].view(x, y).clone() for n, (x, y) in shapes.items()})
    write(folder / "base", sides[0], 3)
    write(folder / "delta", sides[1], 2)
    right = {name: value + sides[1][name] for name, value in sides[0].items()}
    return Pair(folder / "base", folder / "delta", right)


_MEASURED = """
import json, sys, threading, time
import torch
from pathlib import Path
from gpufleet.weights.merge.engine import Job, prepare, run

def resident():
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return [int(lines[key].split()[0]) for key in ("RssAnon", "VmRSS")]

before, most, end = resident(), [0, 0], threading.Event()
def watch():
    while not end.wait(0.02):
        most[:] = map(max, most, resident())
thread = threading.Thread(target=watch)
thread.start()
base, delta, output = map(Path, sys.argv[1:4])
for form in ("safetensors", "bin"):
    run(prepare(Job(base, delta, output / form, form=form)), lambda progress: None)
end.set()
thread.join()
print(json.dumps([most[0] - before[0], most[1]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_fraction_of_the_model(tmp_path: Path):
    made = big(tmp_path, layers=20, hidden=1024, rows=4000)
    said = subprocess.check_output(
        [sys.executable, "-c", _MEASURED, made.base, made.delta, tmp_path / "out"],
        cwd=ROOT,
        text=True,
    )
    anonymous, resident = json.loads(said)
    assert anonymous < 60_000  # KiB, over torch; the model has 300 MB
    assert resident < 400_000


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk, which needs root"
)
class TestADiskThatIsTooSmall:
    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "small"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", "size=40m"]
        subprocess.run(["mount", *options, "tmpfs", folder], check=True)
        yield folder
        subprocess.run(["umount", folder], check=True)

    def test_is_refused_before_a_byte_is_written(self, small: Path, tmp_path: Path):
        made = big(tmp_path, layers=14, hidden=512)
        with pytest.raises(UsageError, match=r"small has .* MB free, the merged model takes"):
            made.merge(small / "out")
        assert list(small.iterdir()) == []

    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    def test_that_fills_meanwhile_leaves_a_merge_to_go_on_with(
        self, small: Path, tmp_path: Path, form: Any
    ):
        made = big(tmp_path, layers=6, hidden=512)
        ready = prepare(Job(made.base, made.delta, small / "out", form=form, shard_bytes=4 << 20))
        other = small / "other"

        def fill(progress: engine.Progress) -> None:
            if not other.exists():
                other.write_bytes(bytes(shutil.disk_usage(small).free - 8192))

        with pytest.raises(FleetError, match=r"small is full: make room and merge again"):
            run(ready, fill)
        assert not (small / "out").exists()
        other.unlink()
        assert run(ready, lambda progress: None).kept > 0
        assert_same(read(small / "out"), made.right)


def test_two_merges_of_one_output_never_meet(version: Pair, tmp_path: Path):
    from gpufleet.weights.merge import staging

    with staging.alone(tmp_path / "out"), pytest.raises(UsageError, match="another merge"):
        version.merge(tmp_path / "out")


def test_torch_and_the_own_reader_see_the_same_tensors(version: Pair):
    for path in version.base.glob("*.bin"):
        for name, value in torch.load(path, weights_only=True).items():
            stored = checkpoint.tensors_of(path)[name]
            data = path.read_bytes()[stored.offset : stored.offset + stored.bytes]
            assert stored.shape == tuple(value.shape)
            assert data == bytes(value.contiguous().untyped_storage())
