#!/usr/bin/env python3
"""Measure MiniGPT-4 of full size with random weights on one GPU, beside transformers' generate.

usage: bench/gpu.py [--size SIZE]... [--precision PRECISION]... [--folder DIR] [--output FILE]

Runs alone on the GPU's machine, in the demo's environment (cuda.lock) or any that has torch,
transformers, sentencepiece and Pillow. By default 7b and 13b, each in fp16, 8bit and 4bit (left out
without bitsandbytes); a size's files (16 and 29 GB) are written into a temporary folder below DIR
and removed after it. Random weights compute as long as trained ones. Every figure is in FILE as
soon as it is known, so that a run which is cut off leaves what it has; what fails is named there.
`--size pico --device cpu --precision fp32` runs the same anywhere in a minute.

What is measured, each the median of some runs:
load           seconds; GPU memory afterwards; the most host memory meanwhile, anonymous and whole
picture        encoding one picture
first          until the first token of a question about a new picture
second         the same for the next question about it; beside upstream's scheme, which encodes the
               picture and reads the whole conversation again
answer         tokens a second of one greedy answer, the reading of the question included, and of a
               sampled one; beside generate of the same LLaMA in transformers with its dynamic and
               its static cache (the latter compiled on a GPU), and how many tokens are the same
beams          tokens a second of an answer by five beams
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "files" / "demo"))

import torch  # noqa: E402
from modeldemo.engine import Conversation, Sampling, Turn  # noqa: E402
from modeldemo.minigpt4 import names  # noqa: E402
from modeldemo.minigpt4.engine import MiniGPT4Engine  # noqa: E402
from modeldemo.minigpt4.model import MiniGPT4  # noqa: E402
from modeldemo.minigpt4.settings import Settings  # noqa: E402
from modeldemo.minigpt4.sizes import QFormerSizes, Sizes, VitSizes  # noqa: E402
from modeldemo.minigpt4.tokenizer import Tokenizer  # noqa: E402
from modeldemo.quantised import BITS  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.models.llama.configuration_llama import LlamaConfig  # noqa: E402

PICO = ROOT / "files" / "weights" / "pico" / "vicuna-pico" / "tokenizer.model"
#: LLaMA's width, the width of its MLP, layers, heads, rows; the picture half's sizes.
SIZES = {
    "7b": ((4096, 11008, 32, 32, 32001), Sizes()),
    "13b": ((5120, 13824, 40, 40, 32001), Sizes()),
    "pico": (
        (128, 256, 3, 4, 641),
        Sizes(VitSizes(128, 3, 4, 384, 24), QFormerSizes(96, 3, 4, 192, 2), 96, 16),
    ),
}
FIRST = "What is in this picture? Describe all of it, and say where each of the things is."
SECOND = "Which of them is the largest?"


def write(folder: Path, size: str, device: str) -> Settings:
    """The files of a random model, in the original formats, one layer a shard."""
    (width, mlp, layers, heads, rows), sizes = SIZES[size]
    torch.serialization.set_crc32_options(False)  # nothing reads it, and it takes most of the time
    llama = folder / "vicuna"
    llama.mkdir(parents=True)
    config = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "vocab_size": rows, "rms_norm_eps": 1e-6}
    config |= {"max_position_embeddings": 2048}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "tokenizer.model").write_bytes(PICO.read_bytes())
    with torch.device("meta"):
        model = MiniGPT4(sizes, LlamaConfig(**config))
    tokenizer = Tokenizer(PICO)

    def new(name: str, shape: torch.Size, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        if "norm" in name.lower() and name.endswith("weight"):
            return torch.ones(shape, dtype=dtype)
        value = torch.randn(shape, device=device, dtype=dtype) * 0.02
        if name == "lm_head.weight":  # no greedy answer ends before its time
            value[[tokenizer.eos, *(i for ids in tokenizer.separators for i in ids)]] = 0
        return value.cpu()

    where: dict[str, str] = {}
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, value in model.llama.state_dict().items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        parts.setdefault(f"pytorch_model-{layer}.bin", {})[name] = value.shape
    for file, shapes in parts.items():
        torch.save({name: new(name, shape) for name, shape in shapes.items()}, llama / file)
        where |= dict.fromkeys(shapes, file)
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    ours = model.state_dict()
    vision = model.vision.state_dict()
    vit = {t: new(t, vision[o].shape) for t, o in names.vit(sizes.vit).items()}
    for q_bias, v_bias, _ in names.vit_biases(sizes.vit):
        vit |= {bias: torch.zeros(sizes.vit.width) for bias in (q_bias, v_bias)}
    torch.save(vit, folder / "eva.pth")
    for file, wanted in (
        ("qformer.pth", names.qformer(sizes.qformer)),
        ("projection.pth", names.PROJECTION),
    ):
        whole = {t: new(t, ours[o].shape, torch.float32) for t, o in wanted.items()}
        torch.save({"model": whole}, folder / file)
    files = [folder / file for file in ("eva.pth", "qformer.pth", "projection.pth")]
    return Settings(sizes, llama, *files)


@contextmanager
def host_memory(seen: dict[str, Any]) -> Iterator[None]:
    """The most this process has of memory within, in GiB: anonymous, and mapped files with it."""
    most = dict.fromkeys(("RssAnon", "VmRSS"), 0)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            fields = dict(line.split(":", 1) for line in lines)
            for key in most:
                most[key] = max(most[key], int(fields[key].split()[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        seen["host memory anonymous, GiB"] = most["RssAnon"] / 2**20
        seen["host memory resident, GiB"] = most["VmRSS"] / 2**20


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device: str, run: Callable[[], Any], repeat: int) -> float:
    """Median seconds of a call until the GPU has done it; one more before, to warm up."""
    times = []
    for _ in range(repeat + 1):
        settle(device)
        started = time.perf_counter()
        run()
        settle(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (640, 480), (i % 256, i // 256 % 256, 90))


class Seen(dict[str, Any]):
    """Figures by name, handed on whenever there is a new one."""

    def __init__(self, told: Callable[[], object]) -> None:
        super().__init__()
        self._told = told

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._told()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Write down what fails within, and go on."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            self[f"{name} failed"] = f"{type(error).__name__}: {reason}"


def measure(settings: Settings, device: str, tokens: int, repeat: int, seen: Seen) -> None:
    """Load one precision and measure all of it; what cannot be measured is named in `seen`."""
    started = time.perf_counter()
    with host_memory(seen):
        engine = MiniGPT4Engine.load(settings, device, "random")
        settle(device)
    seen["load, s"] = time.perf_counter() - started
    if device == "cuda":
        seen["GPU memory, GiB"] = torch.cuda.memory_allocated() / 2**30
        seen["steps are CUDA graphs"] = bool(engine._decoder._graphs)
    model, numbers = engine._model, iter(range(1 << 16))

    def about(image: Image.Image, *more: Turn) -> Conversation:
        return Conversation((Turn("user", FIRST, (image,)), *more))

    def ask(conversation: Conversation, count: int, beams: int = 1, temperature: float = 0) -> int:
        sampling = Sampling(temperature, beams, count, seed=1)
        return sum(piece.new_tokens for piece in engine.stream(conversation, sampling))

    @torch.inference_mode()
    def encode() -> None:
        engine._picture(picture(next(numbers)))

    with seen.step("picture"):
        seen["picture, ms"] = 1000 * seconds(device, encode, repeat)
    with seen.step("first token"):
        new = lambda: ask(about(picture(next(numbers))), 1)  # noqa: E731
        seen["first token, ms"] = 1000 * seconds(device, new, repeat)
    # A second question after an answer of some hundred tokens.
    image, said = picture(next(numbers)), "the red circle is left of the blue square. " * 12
    first, second = about(image), about(image, Turn("assistant", said), Turn("user", SECOND))
    third = about(image, Turn("assistant", said), Turn("user", "And the smallest?"))

    @torch.inference_mode()
    def upstream() -> None:
        engine._pictures.clear()
        parts, pictures = engine._context(second, 1)
        context = engine._embedded(parts, pictures)
        int(model.llama(inputs_embeds=context, logits_to_keep=1).logits[0, -1].argmax())

    with seen.step("second question"):
        turns = iter([second, third] * (repeat + 1))
        ask(second, 1)
        pieces = engine.stream(second, Sampling(max_new_tokens=1))
        seen["second question's tokens"] = next(pieces).prompt_tokens
        kept = 1000 * seconds(device, lambda: ask(next(turns), 1), repeat)
        seen["second question, first token, ms"] = kept
        seen["upstream's scheme, ms"] = 1000 * seconds(device, upstream, repeat)
        seen["upstream's scheme, times ours"] = seen["upstream's scheme, ms"] / kept

    ids: list[int] = []
    note = engine._decoder.note
    engine._decoder.note = lambda token: (ids.append(token), note(token))[1]  # type: ignore[method-assign]

    def answer(temperature: float) -> None:
        ids.clear()
        engine._decoder.forget()
        made = ask(first, tokens, temperature=temperature)
        assert made == tokens, f"{made} of {tokens} tokens"

    def plain(**options: Any) -> float:
        parts, pictures = engine._context(first, tokens)
        context = engine._embedded(parts, pictures)

        def run() -> None:
            made = model.llama.generate(
                inputs_embeds=context,
                attention_mask=torch.ones(context.shape[:2], device=context.device),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                **options,
            )[0].tolist()
            same = [a == b for a, b in zip(made, ids, strict=False)]
            alike = [*same, False].index(False)
            seen["tokens alike before the first that differs"] = f"{alike} of {len(same)}"

        with torch.inference_mode():
            return tokens / seconds(device, run, repeat)

    with seen.step("sampled answer"):
        rate = tokens / seconds(device, lambda: answer(1.0), repeat)
        seen["answer, sampled, tokens/s"] = rate
    with seen.step("answer"):
        seen["answer, tokens/s"] = tokens / seconds(device, lambda: answer(0), repeat)
        seen["tokens"] = tokens
    fastest = 0.0
    with seen.step("generate, dynamic cache"):
        seen["generate, dynamic cache, tokens/s"] = fastest = plain()
        seen["answer, times the fastest generate"] = seen["answer, tokens/s"] / fastest
    with seen.step("5 beams"):
        few = max(8, tokens // 4)
        beams = seconds(device, lambda: ask(first, few, beams=5), max(1, repeat // 2))
        seen["answer by 5 beams, tokens/s"] = few / beams
    if device == "cuda":
        seen["GPU memory at most, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    if settings.precision not in ("8bit", "4bit"):
        # Last: compiling it takes longest, and needs a compiler.
        with seen.step("generate, static cache"):
            static = plain(cache_implementation="static")
            seen["generate, static cache, tokens/s"] = static
            seen["answer, times the fastest generate"] = seen["answer, tokens/s"] / max(
                fastest, static
            )


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"cores": os.cpu_count(), "torch": torch.__version__}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name(0)
        found["gpu memory, GiB"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        return found
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found | {"cpu": (cpu or [platform.processor()])[0], "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1].split("\n")[0])
    option = parser.add_argument
    option("--size", action="append", choices=list(SIZES))
    option("--precision", action="append", choices=["fp32", "fp16", "bf16", "8bit", "4bit"])
    option("--device", default="cuda", choices=["cuda", "cpu"])
    option("--folder", type=Path, help="where there is room for the files")
    option("--tokens", type=int, default=256)
    option("--repeat", type=int, default=5)
    option("--output", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: torch sees no GPU; run it where there is one, or with --device cpu")
    result: dict[str, Any] = {"command": " ".join(["bench/gpu.py", *sys.argv[1:]])}
    result |= {"machine": machine(given.device), "seen": {}}
    given.output.parent.mkdir(parents=True, exist_ok=True)

    def told() -> None:
        given.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")

    for size in given.size or ["7b", "13b"]:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            started = time.perf_counter()
            settings = write(Path(folder, size), size, given.device)
            print(f"{size}: written in {time.perf_counter() - started:.0f} s", flush=True)
            for precision in given.precision or ["fp16", "8bit", "4bit"]:
                seen = result["seen"][f"{size} {precision}"] = Seen(told)
                if precision in BITS and not importlib.util.find_spec("bitsandbytes"):
                    seen["left out"] = "there is no bitsandbytes here"
                else:
                    one = Settings(**{**vars(settings), "precision": precision})
                    with seen.step("load"):
                        measure(one, given.device, given.tokens, given.repeat, seen)
                print(size, precision, json.dumps(seen, ensure_ascii=False), flush=True)
                torch.compiler.reset()
                gc.collect()
                if given.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
