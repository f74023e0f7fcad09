"""Tables that benchmarks print, and that ``--write`` puts into the pages of the documentation."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(page: str, tables: dict[str, Callable[[], str]]) -> None:
    """Make each table and print it; with ``--write``, it takes the place of the text between its two comments in the page."""
    for name, make in tables.items():
        print(f"{page}, {name} ...", file=sys.stderr, flush=True)
        text = make()
        print(f"\n{text}", flush=True)
        if "--write" in sys.argv:
            put(DOCS / page, name, text)


def put(file: Path, name: str, text: str) -> None:
    """Put a text between ``<!-- name -->`` and ``<!-- end of name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page, found = re.subn(
        rf"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: f"{begin}\n\n{text}\n\n{end}",
        file.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if found != 1:
        raise ValueError(f"{file.name} must have {begin} and {end} once, found {found}")
    file.write_text(page, encoding="utf-8")
