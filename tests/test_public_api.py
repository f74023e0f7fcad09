"""The public API is what tests/public_api.txt says: names, arguments with their order and defaults, and the command line."""

import difflib
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="a part of the API is for transformers")
import api_listing


def test_the_public_api_is_the_one_of_the_file():
    listed, found = (
        text.splitlines() for text in (api_listing.FILE.read_text(encoding="utf-8"), api_listing.listing())
    )
    changes = difflib.unified_diff(listed, found, "tests/public_api.txt", "the code", n=0, lineterm="")
    assert listed == found, (
        "The public API changed, which users depend on. If that is intended, say so in CHANGELOG.md and run "
        "`python tests/api_listing.py`. A removed name or argument, another order or default needs a new major version.\n"
        + "\n".join(changes)
    )


def test_the_listing_has_functions_methods_properties_metrics_and_options():
    lines = api_listing.listing().splitlines()
    for line in (
        "nc1(features: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor",
        "class NeuralCollapse(",
        "    plot_depth(self) -> Figure",
        "    per_class",
        "    classmethod read(cls, path: str | Path) -> History",
        "nc4: weight, samples",
        "lightning-nc measure --device = cpu",
    ):
        assert any(found.startswith(line) for found in lines), line
    assert not any("0x" in line for line in lines)  # no address of an object, which differs from run to run


def test_the_project_that_is_checked_against_an_installed_package_uses_every_public_name():
    projects = (Path(__file__).parent / "downstream").glob("*project.py")
    used = set(re.findall(r"\w+", "".join(file.read_text(encoding="utf-8") for file in projects)))
    names = set(re.findall(r"^(?:class )?(\w+)(?=\(|$)", api_listing.listing(), re.MULTILINE))
    assert len(names) > 60
    assert names - used == {"draw", "has_depth", "legend_below"}  # for the figures of the examples
