"""The example that draws the pictures of the gallery."""

import sys
from pathlib import Path

import pytest
from conftest import is_picture

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import gallery

ROOT = Path(__file__).parents[1]

PICTURES = {f"{name}.png" for name in (*gallery.FIGURES, "overlay")} | {"collapse.gif"}


def test_the_page_shows_every_picture():
    page = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    drawn = {file.name for file in (ROOT / "docs/images/gallery").iterdir()}
    assert drawn == PICTURES | {"report.png"}
    assert all(f"(images/gallery/{name})" in page for name in drawn)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command_draws_every_picture_and_leaves_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gallery.main(["--epochs", "2", "--out", "pictures"])
    assert [file.name for file in tmp_path.iterdir()] == ["pictures"]
    drawn = {file.name for file in Path("pictures").iterdir()}
    assert PICTURES <= drawn <= PICTURES | {"report.png"}
    assert all(is_picture(Path("pictures") / name) for name in drawn)
