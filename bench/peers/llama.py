"""Writes a random LLaMA and a delta to it, as they are distributed: .bin shards and an index.

usage: llama.py FOLDER SIZE VERSION     (needs torch; SIZE of SIZES, VERSION v0 or v1.1)

FOLDER/base is in shards of about 400 MB, FOLDER/delta in shards of 1 GB. The tokenizer is pico's,
so a v0 pair has pico's 640 rows: FastChat sizes the base by its tokenizer.
"""

import json
import sys
from pathlib import Path

import torch

PICO = Path(__file__).resolve().parents[2] / "files" / "weights" / "pico"
#: Width, width of the MLP, layers: 0.36, 1 and 3 GB with 32,000 rows.
SIZES = {"0.36": (1024, 2752, 9), "1": (2048, 5504, 7), "3": (2560, 6912, 17), "tiny": (64, 96, 2)}
ROWS = {"v0": (640, 641), "v1.1": (32000, 32000)}


def tensors(width, mlp, layers, rows, scale):
    """Names and tensors in the order of the layers."""

    def new(*shape):
        return (torch.randn(*shape) * scale).half()

    yield "model.embed_tokens.weight", new(rows, width)
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            yield f"{layer}.self_attn.{name}_proj.weight", new(width, width)
        yield f"{layer}.mlp.gate_proj.weight", new(mlp, width)
        yield f"{layer}.mlp.up_proj.weight", new(mlp, width)
        yield f"{layer}.mlp.down_proj.weight", new(width, mlp)
        yield f"{layer}.input_layernorm.weight", new(width)
        yield f"{layer}.post_attention_layernorm.weight", new(width)
        yield f"{layer}.self_attn.rotary_emb.inv_freq", torch.ones(width // 8)
    yield "model.norm.weight", new(width)
    yield "lm_head.weight", new(rows, width)


def write(folder, size, rows, scale, shard_bytes, small):
    """One side of a pair."""
    folder.mkdir(parents=True)
    width, mlp, layers = SIZES[size]
    where, part, parts, total = {}, {}, 0, 0

    def flush():
        nonlocal part, parts
        parts += 1
        file = f"pytorch_model-{parts:05}.bin"
        torch.save(part, folder / file)
        where.update(dict.fromkeys(part, file))
        part = {}

    for name, value in tensors(width, mlp, layers, rows, scale):
        if part and sum(each.nbytes for each in part.values()) + value.nbytes > shard_bytes:
            flush()
        part[name] = value
        total += value.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))
    config = json.loads((PICO / small / "config.json").read_text())
    config |= {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 8, "vocab_size": rows}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config |= {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # The delta's, for both: FastChat cannot read the tokenizer_config of LLaMA's first conversions.
    for name in ("generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((PICO / "vicuna-pico-delta" / name).read_bytes())
    special = PICO / "vicuna-pico-delta" / "special_tokens_map.json"
    (folder / special.name).write_bytes(special.read_bytes())


def main():
    folder, size, version = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.manual_seed(0)
    base, delta = ROWS[version]
    write(folder / "base", size, base, 0.05, 400_000_000, "llama-pico-base")
    write(folder / "delta", size, delta, 0.002, 1_000_000_000, "vicuna-pico-delta")


if __name__ == "__main__":
    main()
