"""Decides which state of upstream's own code a host runs, and every file and value it is given."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from shlex import quote

from gpufleet import ROOT, catalog, render
from gpufleet.catalog import MiniGPT4, Model, UpstreamVersion
from gpufleet.demo.plan import UNIT, Answer, digest, secret
from gpufleet.errors import FleetError
from gpufleet.managed.plan import ManagedFile
from gpufleet.settings import Settings

#: What every state of the code in the catalogue serves: its sizes are fixed in the code.
MODELS = ("minigpt4-vicuna-7b", "minigpt4-vicuna-13b")


@dataclass(frozen=True)
class Code:
    """A state of upstream's code."""

    commit: str
    arch: str
    model_type: str
    environment: str
    address: str
    """What git fetches it from where this machine has no copy."""
    known: bool
    """Whether the catalogue knows the commit; of others only the person who chose it does."""


def _row(settings: Settings) -> UpstreamVersion:
    name, known = settings.upstream.version, catalog.upstream().versions
    if name not in known:
        raise FleetError(
            f"setting upstream.version: no version {name!r} of upstream's code; choose one of: "
            f"{', '.join(known)}, and upstream.commit for any other commit"
        )
    return known[name]


def code(settings: Settings) -> Code:
    """What the settings choose. Raises FleetError for a version that is not in the catalogue."""
    wanted, row = settings.upstream, _row(settings)
    commit = wanted.commit or row.commit
    return Code(
        commit,
        row.arch,
        row.model_type,
        wanted.environment or row.environment,
        wanted.git or catalog.upstream().repository,
        commit == row.commit,
    )


def home(root: PurePosixPath) -> PurePosixPath:
    """The folder that demo.py runs in: all that it would download lies there."""
    return root / "upstream-home"


def checkout(root: PurePosixPath | str, commit: str) -> PurePosixPath:
    """Where a commit of the code lies, whole and as it was committed."""
    return PurePosixPath(root) / "upstream" / commit


def parts(model: Model) -> MiniGPT4:
    """Which file plays which part. Raises FleetError for what is no MiniGPT-4."""
    if model.minigpt4 is None:
        raise FleetError(
            f"runtime upstream serves MiniGPT-4 only, not {model.title}: set runtime to modern"
        )
    return model.minigpt4


def precision(settings: Settings, model: Model) -> str:
    """What the language model is loaded in: upstream's code knows fp16 and 8bit."""
    asked = settings.demo.precision
    chosen = parts(model).precision if asked == "auto" else asked
    return "fp16" if chosen == "auto" else chosen


def files(settings: Settings, model: Model, weights: PurePosixPath) -> tuple[ManagedFile, ...]:
    """upstream.yaml, which wins over the model's YAML file in upstream's code, parsed back.

    `weights` is the folder on the host that the model's files are in.

    Raises FleetError if a value did not survive the template.
    """
    has, chosen = parts(model), code(settings)
    wanted = {
        "arch": chosen.arch,
        "model_type": chosen.model_type,
        "low_resource": precision(settings, model) == "8bit",
        "llama_model": str(weights / has.llama_dir),
        "q_former_model": str(weights / has.qformer_file),
        "ckpt": str(weights / has.projection_file),
    }
    text, back = render.checked_yaml(
        "upstream.yaml.j2", title=model.title, model=wanted, image_size=has.image_size
    )
    for key, value in wanted.items():
        if back["model"].get(key) != value:
            raise FleetError(f"templates: {key} became {back['model'].get(key)!r}, not {value!r}")
    return (ManagedFile(str(settings.root / "config" / "upstream.yaml"), text),)


#: What transformers needs of bert-base-uncased: the Q-Former's sizes, and a tokenizer that the code
#: makes and never asks (no text goes through the Q-Former of MiniGPT-4).
_BERT = {
    "config.json": {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 30522,
    },
    "tokenizer_config.json": {"do_lower_case": True, "model_max_length": 512},
}
_BERT_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def kept(root: PurePosixPath) -> list[ManagedFile]:
    """The launcher, and what stands where the code would download: bert-base-uncased."""
    folder = home(root)
    texts = {name: json.dumps(said, indent=2) + "\n" for name, said in _BERT.items()}
    texts["vocab.txt"] = "".join(f"{token}\n" for token in _BERT_VOCABULARY)
    bert = [ManagedFile(str(folder / "bert-base-uncased" / n), t) for n, t in texts.items()]
    return [ManagedFile(str(folder / "launch.py"), program("launch.py")), *bert]


def program(name: str) -> str:
    """The text of one of files/upstream."""
    return (ROOT / "files" / "upstream" / name).read_text("utf-8")


def links(root: PurePosixPath, model: Model, weights: PurePosixPath) -> dict[str, str]:
    """Link -> target: where torch's hub would have downloaded the vision tower to."""
    place = home(root) / "hub" / "checkpoints" / "eva_vit_g.pth"
    return {str(place): str(weights / parts(model).vit_file)}


def unit(
    settings: Settings,
    *,
    environment: str,
    head: str,
    weights: str,
    config: Sequence[ManagedFile],
) -> tuple[ManagedFile, str]:
    """The service's unit file and its revision, as demo.plan.unit has it.

    `head` is the commit that git has checked out; `environment` a digest, `weights` a version.
    """
    root, chosen = settings.root, code(settings)
    own = {
        "--checkout": checkout(root, chosen.commit),
        "--server-name": settings.demo.bind,
        "--server-port": settings.demo.port,
        "--max-waiting": settings.demo.queue,
        "--model-id": settings.model_id,
    }
    launcher = [str(home(root) / "launch.py")]
    launcher += [word for name, value in own.items() for word in (name, str(value))]
    words = ["--", "--cfg-path", config[0].path, "--gpu-id", "0"]
    if settings.upstream.options:
        words += ["--options", *(f"{k}={v}" for k, v in settings.upstream.options.items())]
    toolkit = settings.python_env.cuda_toolkit
    allowed = secret(settings) if settings.demo.auth_file else None

    def rendered(revision: str) -> str:
        return render.text(
            "upstream.service.j2",
            model=settings.model_id,
            root=root,
            home=home(root),
            user=settings.user,
            python=root / "envs" / environment / "bin" / "python",
            launcher=_words(launcher),
            arguments=_words(words),
            revision=revision,
            start_timeout=settings.demo.start_timeout,
            memory_max=settings.demo.memory_max,
            cache="minigpt4-demo",
            accelerator=settings.accelerator,
            loopback=settings.demo.bind.is_loopback,
            secret=allowed,
            cuda_libraries=f"/usr/local/cuda-{toolkit}/lib64" if toolkit else None,
        )

    read = [file.content for file in (*config, *kept(root))]
    revision = digest(rendered(""), head, weights, *read)
    text = rendered(revision)
    path = f"/etc/systemd/system/{UNIT}"
    return ManagedFile(path, text, validate="systemd-analyze verify {}"), revision


def _words(words: Iterable[str]) -> str:
    # % and $ are systemd's own: specifiers and variables
    return " ".join(quote(word).replace("%", "%%").replace("$", "$$") for word in words)


@dataclass(frozen=True)
class Checkout:
    """A checkout on a host."""

    head: str
    """The commit that git has there, empty where there is none."""
    wrong: str = ""
    """The first thing that is not as committed, or that others than root may write."""


def parse(lines: Iterable[str]) -> dict[str, Checkout]:
    """Read the Checkouts fact's lines: commit by name, what git has, what is wrong; by tabs."""
    found = {}
    for line in lines:
        name, head, wrong = line.split("\t", 2)
        found[name] = Checkout(head, wrong)
    return found


def parse_answer(lines: Iterable[str]) -> Answer:
    """Read what files/upstream/ask.py printed."""
    text = "\n".join(lines)
    try:
        said = json.loads(text)
        return Answer(said.get("answer"), str(said.get("error", "")))
    except (ValueError, AttributeError):
        return Answer(None, " ".join(text.split())[:200] or "nothing answered")


def linked(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    """The links that are missing or lead elsewhere."""
    return [link for link, to in wanted.items() if found.get(link) != to]


def findings(settings: Settings, model: Model) -> list[str]:
    """What keeps upstream's code from serving this model as the settings want it, a line each."""
    if settings.runtime != "upstream":
        return []
    try:
        chosen, wanted = code(settings), precision(settings, model)
    except FleetError as error:
        return [str(error)]
    found = []
    if chosen.known and settings.model_id not in MODELS:
        found.append(
            f"runtime upstream has its sizes in its code and serves {' and '.join(MODELS)}, not "
            f"{settings.model_id}: set model to one of them, or runtime to modern"
        )
    if chosen.known and settings.accelerator != "cuda":
        found.append(
            "runtime upstream needs a GPU: its demo.py moves the model to cuda:0; set accelerator "
            "to cuda, or runtime to modern"
        )
    if wanted not in ("fp16", "8bit"):
        found.append(
            f"precision {wanted}: upstream's code knows fp16 and 8bit only; set demo.precision to "
            "one of them, or runtime to modern"
        )
    elif chosen.known and wanted == "8bit" and settings.python_env.cuda_toolkit is None:
        cuda = catalog.environments().environments[_row(settings).environment].cuda
        found.append(
            f"8bit on runtime upstream: bitsandbytes looks for a libcudart of its own, and torch's "
            f"is not it: set python_env.cuda_toolkit to {cuda}, or demo.precision to fp16"
        )
    if settings.demo.processes > 1:
        found.append(
            f"demo.processes {settings.demo.processes}: runtime upstream runs one process, on the "
            "first GPU; set it to 0 or 1, or runtime to modern"
        )
    return found
