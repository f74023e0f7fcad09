"""Pieces of a report as HTML: figures, words, buttons, the table of the classes, settings. All names are escaped here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lightning_nc.history import History
from lightning_nc.report.series import number
from lightning_nc.report.words import cautions, summary

__all__ = [
    "buttons",
    "classes",
    "details",
    "dot",
    "figure",
    "grid",
    "heading",
    "plot",
    "scale",
    "settings",
    "table",
    "text_of",
    "words",
]

_CODE, _AS_CODE = re.compile("`([^`]*)`"), r"<code>\1</code>"
_COLUMNS = {
    "nearest_cdnv": "variance within the class over the squared distance to the nearest class, smaller is better separated",
    "nearest": "the class whose mean is nearest",
    "nc1_trace_share": "share of the scatter within classes",
    "mean_norm": "norm of the centered class mean",
    "weight_cosine": "cosine of the mean with its row of the weight",
}


def text_of(tag: str, sentences: Iterable[str]) -> str:
    """Plain sentences as HTML, each in a tag; backticks are code."""
    return "".join(f"<{tag}>{_CODE.sub(_AS_CODE, escape(sentence))}</{tag}>" for sentence in sentences)


def heading(level: int, text: str) -> str:
    """A heading, in which backticks are code."""
    return text_of(f"h{level}", [text])


def figure(inside: str, caption: str, attributes: str = "") -> str:
    """A figure with a caption in plain text."""
    return f"<figure{attributes}>{inside}{text_of('figcaption', [caption])}</figure>"


def plot(name: str, label: str) -> str:
    """The place that the script fills; the label is read to those who do not see it."""
    return f'<div class="plot" id="{name}" role="img" aria-label="{escape(label)}"></div>'


def grid(panels: Sequence[str], kind: str = "") -> str:
    """Panels beside each other, as many as the width holds."""
    return f'<div class="grid {kind}">{"".join(panels)}</div>'


def details(panels: Sequence[str]) -> str:
    """Further panels behind a click."""
    count = f"{len(panels)} more metric{'s' * (len(panels) > 1)}"
    return f"<details><summary>{count}</summary>{grid(panels)}</details>" if panels else ""


def scale(colors: Sequence[str], ends: Sequence[str], mark: float | None = None) -> str:
    """A scale of colors with the texts of its ends and middle, and a mark at a share of its width.

    A color is a pair, of light pages and of dark ones.
    """
    pairs = [color.split("/") for color in colors]
    light, dark = (", ".join(pair[mode] for pair in pairs) for mode in (0, -1))
    style = f"--light: linear-gradient(90deg, {light}); --dark: linear-gradient(90deg, {dark})"
    line = "" if mark is None else f'<b style="left: {100 * mark:.2f}%"></b>'
    texts = "".join(f"<span>{escape(text)}</span>" for text in ends)
    return f'<div class="scale" style="{style}">{line}</div><div class="ends">{texts}</div>'


def dot(color: str) -> str:
    """A spot of a color, which is a pair."""
    light, dark = color.split("/")
    return f'<span class="swatch" style="--light: {light}; --dark: {dark}"></span>'


def buttons(group: str, entries: Mapping[str, str], one: bool = False) -> str:
    """Buttons that show and hide curves, by name with their marks. With ``one``, only one is pressed: first the last."""
    found = []
    for place, (name, mark) in enumerate(entries.items()):
        pressed = "true" if not one or place == len(entries) - 1 else "false"
        found.append(f'<button type="button" value="{place}" aria-pressed="{pressed}">{mark}{escape(name)}</button>')
    kind = f'data-group="{group}"{" data-one" * one}'
    return f"<fieldset {kind}><legend>{group.capitalize()}</legend>{''.join(found)}</fieldset>"


def words(history: History) -> str:
    """The summary, and which results may be unreliable."""
    terms = [f"<dt>{question}</dt>{text_of('dd', found)}" for question, found in summary(history).items()]
    doubts = text_of("li", cautions(history))
    none = "<p>None of the checks found anything.</p>"
    return (
        f"<h3>Summary</h3><dl>{''.join(terms)}</dl><h3>Check before you trust this</h3>"
        f"{f'<ul class=caution>{doubts}</ul>' if doubts else none}"
    )


def table(columns: Mapping[str, Sequence[Any]], sorted_by: str = "") -> str:
    """A table; a click on the name of a column sorts by it. At first it is sorted by one of them, the largest on top."""
    heads = [
        f'<th scope="col"{" aria-sort=descending" * (name == sorted_by)}><button type="button">{escape(name)}</button></th>'
        for name in columns
    ]
    rows = ["".join(map(_cell, row)) for row in zip(*columns.values(), strict=False)]
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>"
    )


def classes(columns: Mapping[str, Sequence[Any]]) -> str:
    """The table of the classes, least separated first."""
    by = "nearest_cdnv"
    names = list(dict.fromkeys(name for name in ("class", by, "nearest", *columns) if name in columns))
    places = list(range(len(columns["class"])))
    if by in columns:
        places = sorted(places, key=lambda at: -columns[by][at] if math.isfinite(columns[by][at]) else math.inf)
    inside = table({name: [columns[name][at] for at in places] for name in names}, by)
    legend = "; ".join(f"`{name}`: {text}" for name, text in _COLUMNS.items() if name in columns)
    caption = "The classes as they were measured last, least separated first. A click on the name of a column sorts."
    return figure(inside, f"{caption} {legend}." if legend else caption)


def _cell(value: Any) -> str:
    key = value if isinstance(value, int | float) and math.isfinite(value) else ""
    text = number(value, 4) if isinstance(value, float) else "" if value is None else str(value)
    return f'<td data-value="{key}">{escape(text)}</td>'


def settings(about: Mapping[str, Any]) -> str:
    """Settings and versions."""
    cells = [(escape(str(name)), escape(str(value))) for name, value in about.items()]
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in cells)
    return f'<h3>Settings and versions</h3><div class="wide"><table class="about"><tbody>{rows}</tbody></table></div>'
