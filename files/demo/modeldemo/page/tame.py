"""Keeps gradio from fetching, and from naming in its page, what lies on other hosts."""

from __future__ import annotations

import logging
import re
import sys
from types import SimpleNamespace

import gradio as gr
from gradio import processing_utils, queueing, routes
from jinja2 import ChoiceLoader, DictLoader

log = logging.getLogger("modeldemo")

TAG = "{% set tag = 'zh-CN' if request.scope.root_path.endswith('/zh') else 'en' %}"
FOLLOW = '<script>Object.defineProperty(navigator, "language", {value: "{{ tag }}"});</script>'


async def _refuse(url: str, cache_dir: str) -> str:
    reason = "this server fetches no addresses; upload the picture itself"
    raise gr.Error(reason, print_exception=False)


def _print_exc() -> None:
    error = sys.exc_info()[1]
    log.warning("page: %s: %s", type(error).__name__, " ".join(str(error).split())[:300])
    log.debug("where it failed", exc_info=error)


def tame() -> None:
    """Replace what gradio, mounted in an application, does not let its callers choose."""
    # It prints the stack of every call that fails, those of crafted requests too.
    for module in (queueing, routes):
        vars(module)["traceback"] = SimpleNamespace(print_exc=_print_exc)
    # A crafted request may hold an address in place of an upload.
    processing_utils.async_ssrf_protected_download = _refuse
    templates = routes.templates.env
    assert templates.loader
    index, _, _ = templates.loader.get_source(templates, "frontend/index.html")
    index = re.sub(r'<meta\s+(property|name)="(og|twitter):[^>]*>', "", index)
    # Browsers fetch it without the password.
    index = re.sub(r'<link\s+rel="manifest"[^>]*>', "", index)
    # Its own texts follow the browser's language; here they follow the page's.
    index = re.sub(r'<html\s+lang="en"', '<html lang="{{ tag }}"', index, count=1)
    index = index.replace("<head>", f"<head>{FOLLOW}", 1)
    index = TAG + index
    templates.loader = ChoiceLoader([DictLoader({"frontend/index.html": index}), templates.loader])
