"""Print a version's part of CHANGELOG.md, if a tag names the version in the code: python .ci/release_notes.py v0.1.0."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def release_notes(tag: str, code: str, changelog: str) -> str:
    """The part of the changelog that a release shows.

    Raises:
        ValueError: if the tag is not "v" and the version, or the changelog has no dated part of that version with text in it.
    """
    found = re.search(r'^__version__ = "(.+)"$', code, re.MULTILINE)
    version = found[1] if found else ""
    if tag != f"v{version}":
        raise ValueError(f"the tag must be v{version}, the version in lightning_nc/__init__.py; got {tag}")
    heading, _, rest = changelog.partition(f"\n## {version} - ")[2].partition("\n")
    notes = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", heading) or not notes:
        raise ValueError(
            f"CHANGELOG.md needs a part that begins with '## {version} - ' and the date, such as 2026-01-31; got {heading!r}"
        )
    return notes


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("lightning_nc/__init__.py", "CHANGELOG.md")]
    try:
        print(release_notes(sys.argv[1], *texts))
    except ValueError as error:
        sys.exit(f"release_notes.py: {error}")
