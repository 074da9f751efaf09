"""fleet weights: what models are made of: what is there, fetch it, merge it, bring it to hosts."""

from __future__ import annotations

import typer

from gpufleet.cli.weights import fetch, list_, merge, push, verify

app = typer.Typer(
    help="The models' files: what is there, and bringing them here and to the hosts.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def weights() -> None:
    """The models' files: what is there, and bringing them here and to the hosts."""


app.command("list")(list_.list_sets)
app.command("verify")(verify.verify)
app.command("fetch")(fetch.fetch)
app.command("merge")(merge.merge)
app.command("push")(push.push)
