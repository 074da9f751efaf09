"""A small repository that is run like Vision-CAIR's MiniGPT-4: the same arguments, the same keys of
its YAML file, the same files that it looks for at start, the same page; and no model."""

from __future__ import annotations

import subprocess
from pathlib import Path

DEMO = '''\
"""Says how large a picture is, and needs all that upstream's demo needs to start."""

import argparse
import os

import gradio as gr
import yaml
from double.answer import describe

parser = argparse.ArgumentParser()
parser.add_argument("--cfg-path", required=True)
parser.add_argument("--gpu-id", type=int, default=0)
parser.add_argument("--options", nargs="+")
args = parser.parse_args()

with open(args.cfg_path) as file:
    model = yaml.safe_load(file)["model"]
model.update(option.removeprefix("model.").split("=", 1) for option in args.options or ())
needed = [
    model["ckpt"],
    model["q_former_model"],
    os.path.join(model["llama_model"], "config.json"),
    os.path.join(os.environ["TORCH_HOME"], "hub", "checkpoints", "eva_vit_g.pth"),
    os.path.join("bert-base-uncased", "vocab.txt"),
]
for path in needed:
    if not os.path.isfile(path):
        raise SystemExit(f"would download {path}")

MESSAGES = int(gr.__version__.split(".")[0]) > 3


def upload(picture, text, state):
    return gr.update() if hasattr(gr, "update") else picture, text, [picture]


def ask(text, chat, state):
    if MESSAGES:
        return "", chat + [{"role": "user", "content": text}], state
    return "", chat + [[text, None]], state


def answer(chat, state, beams, temperature):
    """Word by word, as upstream's later page has it."""
    said = ""
    for word in describe(model, state[0]).split(" "):
        said = f"{said} {word}".strip()
        if MESSAGES:
            yield chat + [{"role": "assistant", "content": said}], state
        else:
            chat[-1][1] = said
            yield chat, state


with gr.Blocks() as demo:
    picture = gr.Image(type="pil")
    start = gr.Button("Upload & Start Chat")
    beams = gr.Slider(minimum=1, maximum=10, value=1, step=1, label="beams")
    temperature = gr.Slider(minimum=0.1, maximum=2.0, value=1.0, step=0.1, label="temperature")
    state = gr.State()
    chat = gr.Chatbot()
    text = gr.Textbox()
    start.click(upload, [picture, text, state], [picture, text, state])
    text.submit(ask, [text, chat, state], [text, chat, state]).then(
        answer, [chat, state, beams, temperature], [chat, state]
    )

demo.launch(share=True, enable_queue=True)
'''

ANSWER = """\
def describe(model, picture):
    return f"{model['arch']} sees {picture.width} by {picture.height} pixels"
"""

FILES = {
    "demo.py": DEMO,
    "double/__init__.py": "",
    "double/answer.py": ANSWER,
    "README.md": "Another double.\n",
    ".gitignore": "*.log\n",
}


def write(folder: Path, demo: str = DEMO) -> None:
    """The repository's files as they are now, with this demo.py."""
    for name, text in {**FILES, "demo.py": demo}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def surroundings(home: Path, weights: Path) -> Path:
    """What it looks for at start, empty: its working directory and its weights; its YAML file."""
    paths = {
        "ckpt": weights / "projection.pth",
        "q_former_model": weights / "qformer.pth",
        "llama_model": weights / "llama",
    }
    (weights / "llama").mkdir(parents=True)
    (home / "hub" / "checkpoints").mkdir(parents=True)
    (home / "bert-base-uncased").mkdir()
    for path in (
        paths["ckpt"],
        paths["q_former_model"],
        paths["llama_model"] / "config.json",
        home / "hub" / "checkpoints" / "eva_vit_g.pth",
        home / "bert-base-uncased" / "vocab.txt",
    ):
        path.touch()
    config = weights / "upstream.yaml"
    lines = [f"  {key}: {path}" for key, path in paths.items()]
    config.write_text("\n".join(["model:", "  arch: mini_gpt4", *lines, ""]))
    return config


def git(folder: Path, *words: str) -> str:
    """Run git in a folder; what it printed."""
    identity = ("-c", "user.name=double", "-c", "user.email=double@example.net")
    done = subprocess.run(
        ["git", *identity, "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def repository(folder: Path) -> str:
    """Make the repository, with a history of two commits; the hash of the last one."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    for message in ("before", "now"):
        write(folder, "" if message == "before" else DEMO)
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", message)
    return git(folder, "rev-parse", "HEAD")
