"""Reads labels from a question, and writes the answer that says how well each of them fits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ..engine import BadRequest

MAX_LABELS = 1000  # ImageNet's, and a bound of what one question may cost

ALONE = "One label has nothing to be compared with; give several, one a line, to get percentages."
_LINE = re.compile(r"(?P<share>\d+\.\d\d)% (?P<label>.+) \(cosine (?P<cosine>-?\d\.\d{4})\)")
_ALONE = re.compile(r"(?P<share>)(?P<label>.+) \(cosine (?P<cosine>-?\d\.\d{4})\)")


@dataclass(frozen=True)
class Score:
    """How well a label fits the picture."""

    label: str
    cosine: float
    """Of the angle between the picture's vector and the label's, -1 to 1."""
    share: float | None
    """Probability among the labels given, 0 to 1; None for a label without others."""


def read(text: str) -> list[str]:
    """One label a line; a single line is divided at its commas. Each label counts once.

    Raises BadRequest for none and for more than MAX_LABELS.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        lines = [part.strip() for part in re.split("[,，、]", lines[0]) if part.strip()]
    labels = list(dict.fromkeys(lines))
    if not labels:
        raise BadRequest("messages: no label; write one a line, such as: a photo of a cat")
    if len(labels) > MAX_LABELS:
        raise BadRequest(f"messages: {len(labels)} labels, the limit is {MAX_LABELS}; send fewer")
    return labels


def write(scores: list[Score]) -> str:
    """A line for each label, the best first: `97.29% a photo of a cat (cosine 0.2710)`.

    A label without others gets no percentage, for it could only be 100, and a line that says so.
    """
    lines = [
        ("" if s.share is None else f"{s.share:.2%} ") + f"{s.label} (cosine {s.cosine:.4f})"
        for s in _best_first(scores)
    ]
    return "\n".join(lines if len(scores) > 1 else [*lines, ALONE])


def write_json(scores: list[Score]) -> str:
    """The same as one JSON object, for programs: {"labels": [{"label", "probability", "cosine"}]}.

    A label without others has the probability null.
    """
    found = [
        {"label": s.label, "probability": s.share, "cosine": s.cosine} for s in _best_first(scores)
    ]
    return json.dumps({"labels": found}, ensure_ascii=False)


def _best_first(scores: list[Score]) -> list[Score]:
    return sorted(scores, key=lambda score: -score.cosine)


def parse(answer: str) -> list[Score]:
    """Read what `write` wrote, for the page."""
    line_of = _ALONE if answer.endswith(ALONE) else _LINE
    found = (line_of.fullmatch(line) for line in answer.splitlines())
    return [
        Score(m["label"], float(m["cosine"]), float(m["share"]) / 100 if m["share"] else None)
        for m in found
        if m
    ]
