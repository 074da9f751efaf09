"""Proves that the demo works: asks it a question whose answer is known."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet import ROOT
from gpufleet.demo import operations
from gpufleet.demo.plan import PICTURE, addresses, pack, processes, secret
from gpufleet.errors import FleetError
from gpufleet.upstream import operations as pages
from gpufleet.weights import operations as weights
from gpufleet.weights.plan import folder, version
from tasks import current, gpus, weight_files


@deploy("health")
def health() -> None:
    """Ask the demo about the catalogue's picture, on the host itself."""
    settings, model = current()
    try:
        count = processes(settings, gpus(settings))
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    question = model.health
    files, _ = weight_files(settings, model)
    here = folder(settings.root, version(settings.model_id, files))
    picture = None
    if question.picture is not None:
        picture = here / question.picture
    elif model.needs_picture:
        app = pack(ROOT / "files" / "demo" / "modeldemo")
        picture = settings.root / "app" / app.digest / PICTURE
    allowed = secret(settings) if settings.demo.auth_file else ""
    if settings.runtime == "upstream":
        # Without a GPU it is not upstream's model that answers: its page is all there is to ask.
        pages.answers(
            name="Ask upstream's page",
            address=addresses(settings, count)[0],
            picture=str(picture) if settings.accelerator == "cuda" else None,
            question=question.question,
            expected=question.answer,
            timeout=settings.health.timeout,
            users=allowed,
        )
    else:
        operations.answers(
            name="Ask the demo",
            addresses=addresses(settings, count),
            model=settings.model_id,
            picture=str(picture) if picture else None,
            question=question.question,
            expected=question.answer,
            timeout=settings.health.timeout,
            users=allowed,
        )
    # Only now: had it not answered, the files before would still be wanted.
    weights.pruned(
        name="Remove older weights",
        root=str(settings.root),
        model=settings.model_id,
        files=files,
        keep=settings.weights.keep,
    )
