"""Proves that the demo works: asks it a question whose answer is known."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError, deploy

from gpufleet.demo import operations
from gpufleet.demo.plan import address
from gpufleet.errors import FleetError
from tasks import current


@deploy("health")
def health() -> None:
    """Ask the demo about the catalogue's picture, on the host itself."""
    settings, model = current()
    try:
        question = model.question
    except FleetError as error:
        raise DeployError(f"{host.name}: {error}") from None
    operations.answers(
        name="Ask the demo",
        address=address(settings),
        model=settings.model,
        picture=f"{settings.root}/weights/{settings.model}/{question.picture}",
        question=question.question,
        expected=question.answer,
        timeout=settings.health.timeout,
    )
