#!/usr/bin/env python3
"""Measure MiniGPT-4 of full size with random weights on one GPU, beside transformers' generate.

usage: bench/gpu.py [--size SIZE]... [--precision PRECISION]... [--folder DIR] [--output FILE]

Runs alone on the GPU's machine, in the demo's environment (cuda.lock). By default 7b and 13b, each
in fp16, 8bit and 4bit; a size's files (16 and 29 GB) are written into a temporary folder below DIR
and removed after it. Random weights compute as long as trained ones.
`--size pico --device cpu --precision fp32` runs the same anywhere in a minute.

What is measured, each the median of some runs:
load           seconds; GPU memory afterwards; the most host memory meanwhile, anonymous and whole
picture        encoding one picture
first          until the first token of a question about a new picture
second         the same for the next question about it; beside upstream's scheme, which encodes the
               picture and reads the whole conversation again
answer         tokens a second of one greedy answer, the reading of the question included; beside
               generate of the same LLaMA in transformers with its dynamic and its static cache (the
               latter compiled on a GPU), and how many of the tokens are the same
beams          tokens a second of an answer by five beams
"""

from __future__ import annotations

import argparse
import gc
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


def measure(settings: Settings, device: str, tokens: int, repeat: int) -> dict[str, Any]:
    """Load one precision and measure all of it."""
    seen: dict[str, Any] = {}
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

    def ask(conversation: Conversation, count: int, beams: int = 1) -> int:
        sampling = Sampling(temperature=0, max_new_tokens=count, num_beams=beams)
        return sum(piece.new_tokens for piece in engine.stream(conversation, sampling))

    @torch.inference_mode()
    def encode() -> None:
        engine._picture(picture(next(numbers)))

    seen["picture, ms"] = 1000 * seconds(device, encode, repeat)
    seen["first token, ms"] = 1000 * seconds(
        device, lambda: ask(about(picture(next(numbers))), 1), repeat
    )
    # A second question after an answer of some hundred tokens.
    image, said = picture(next(numbers)), "the red circle is left of the blue square. " * 12
    first, second = about(image), about(image, Turn("assistant", said), Turn("user", SECOND))
    third = about(image, Turn("assistant", said), Turn("user", "And the smallest?"))
    turns = iter([second, third] * (repeat + 1))
    ask(second, 1)
    seen["second question's tokens"] = next(
        engine.stream(second, Sampling(max_new_tokens=1))
    ).prompt_tokens
    kept = 1000 * seconds(device, lambda: ask(next(turns), 1), repeat)

    @torch.inference_mode()
    def upstream() -> None:
        engine._pictures.clear()
        parts, pictures = engine._context(second, 1)
        context = engine._embedded(parts, pictures)
        int(model.llama(inputs_embeds=context, logits_to_keep=1).logits[0, -1].argmax())

    again = 1000 * seconds(device, upstream, repeat)
    seen |= {"second question, first token, ms": kept, "upstream's scheme, ms": again}
    seen["upstream's scheme, times ours"] = again / kept

    parts, pictures = engine._context(first, tokens)
    context = engine._embedded(parts, pictures)
    ids: list[int] = []
    note = engine._decoder.note

    def answer() -> None:
        ids.clear()
        engine._decoder.forget()
        assert ask(first, tokens) == tokens

    def plain(**options: Any) -> float:
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

    engine._decoder.note = lambda token: (ids.append(token), note(token))[1]  # type: ignore[method-assign]
    seen["answer, tokens/s"] = tokens / seconds(device, answer, repeat)
    seen["tokens"] = tokens
    seen["generate, dynamic cache, tokens/s"] = plain()
    fastest = seen["generate, dynamic cache, tokens/s"]
    if settings.precision not in ("8bit", "4bit"):
        seen["generate, static cache, tokens/s"] = plain(cache_implementation="static")
        fastest = max(fastest, seen["generate, static cache, tokens/s"])
    seen["answer, times the fastest generate"] = seen["answer, tokens/s"] / fastest
    few = max(8, tokens // 4)
    seen["answer by 5 beams, tokens/s"] = few / seconds(
        device, lambda: ask(first, few, beams=5), max(1, repeat // 2)
    )
    if device == "cuda":
        seen["GPU memory at most, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return seen


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
    for size in given.size or ["7b", "13b"]:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            settings = write(Path(folder, size), size, given.device)
            for precision in given.precision or ["fp16", "8bit", "4bit"]:
                one = Settings(**{**vars(settings), "precision": precision})
                try:
                    seen = measure(one, given.device, given.tokens, given.repeat)
                except torch.OutOfMemoryError as error:
                    seen = {"failed": str(error).splitlines()[0]}
                result["seen"][f"{size} {precision}"] = seen
                print(size, precision, json.dumps(seen, ensure_ascii=False), flush=True)
                # After each: a machine that is taken away leaves what was measured.
                given.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
                gc.collect()
                if given.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
