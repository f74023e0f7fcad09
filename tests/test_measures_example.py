"""The example that draws a picture of each family of metrics."""

import sys
from pathlib import Path

import pytest
from conftest import is_picture

from lightning_nc.functional import METRICS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import measures

ROOT = Path(__file__).parents[1]

NAMES = {name.strip("*") for panels in measures.FAMILIES.values() for _, names in panels for name in names.split()}


@pytest.mark.filterwarnings("ignore")
def test_the_command_draws_a_picture_of_each_family(tmp_path):
    measures.main(["--epochs", "2", "--out", str(tmp_path)])
    assert {file.name for file in tmp_path.iterdir()} == {f"measures-{family}.png" for family in measures.FAMILIES}
    assert all(is_picture(file) for file in tmp_path.iterdir())


def test_the_page_of_metrics_shows_every_picture_and_none_is_large():
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    for family in measures.FAMILIES:
        assert f"(images/measures-{family}.png)" in page
        assert (ROOT / f"docs/images/measures-{family}.png").stat().st_size < 60_000


def test_the_pictures_show_the_metrics_that_one_run_of_balanced_data_can_show():
    other_data_or_counts = {"nc2_seli", "nc2_weight_seli", "nc3_seli", "nc2_orthoplex", "minority_cosine"}
    scale = {"bias_collapse", "gnc2_riesz", "nc2_of_centered"}
    opt_in = {name for name, spec in METRICS.items() if spec.opt_in}
    assert set(METRICS) - opt_in - other_data_or_counts - scale == NAMES
