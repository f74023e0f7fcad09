"""Print a version's part of CHANGELOG.md, if a tag names the version in the code: python .ci/release_notes.py v0.1.0."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def release_notes(tag: str, code: str, changelog: str, repository: str = "") -> str:
    """The part of the changelog that a release shows.

    Args:
        tag: "v" and the version.
        code: the text of lightning_nc/__init__.py.
        changelog: the text of CHANGELOG.md.
        repository: its address. Links to files of the repository get it, since they lead nowhere on the page of a release.

    Raises:
        ValueError: if the tag is not "v" and the version, if that is a development version, or if the changelog has no dated part
            of that version with text in it.
    """
    found = re.search(r'^__version__ = "(.+)"$', code, re.MULTILINE)
    version = found[1] if found else ""
    if tag != f"v{version}":
        raise ValueError(f"the tag must be v{version}, the version in lightning_nc/__init__.py; got {tag}")
    if "dev" in version:
        raise ValueError(f"{version} is a development version; set __version__ to the version that is released")
    heading, _, rest = changelog.partition(f"\n## {version} - ")[2].partition("\n")
    notes = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", heading) or not notes:
        raise ValueError(
            f"CHANGELOG.md needs a part that begins with '## {version} - ' and the date, such as 2026-01-31; got {heading!r}"
        )
    return re.sub(r"\]\((?!https?:)", f"]({repository}/blob/{tag}/", notes) if repository else notes


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("lightning_nc/__init__.py", "CHANGELOG.md")]
    host, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    try:
        print(release_notes(sys.argv[1], *texts, repository=f"{host}/{name}" if name else ""))
    except ValueError as error:
        sys.exit(f"release_notes.py: {error}")
