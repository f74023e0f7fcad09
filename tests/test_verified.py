"""docs/verified.md: the example worked out by hand, and the tests and tolerances that the page names."""

import ast
import functools
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import metric_value
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import NeuralCollapse, NeuralRegressionCollapse, functional, measure
from lightning_nc.functional import METRICS
from lightning_nc.functional.geometry import nearest_frame, random_directions
from lightning_nc.moments import ClassDeviations

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/verified.md").read_text(encoding="utf-8")


def tables():
    """By its first column title: the rows of a table of the page, each a list of cells."""
    found = {}
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        title, _, *rows = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in table.splitlines()]
        found.setdefault(title[0], []).extend(rows)
    return found


def number(text):
    """The value of an expression of the page, such as √(2 − 20 / √204)."""
    text = re.sub(r"√(\d+)", r"sqrt(\1)", text.strip("`")).replace("√(", "sqrt(")
    text = re.sub(r"(\d|\)) ?(?=\(|sqrt|log)", r"\1*", text.replace("−", "-").replace("²", "**2"))
    return float(eval(text, {"sqrt": math.sqrt, "log": math.log}))


# -------------------------------------------------------------------------------------------- the example of the page


def example():
    """Features, labels, weight and bias; a rhombus at height 2, samples 1.2 away from their class mean along each axis."""
    means = torch.tensor([[2.0, 0, 2], [0, 1, 2], [-2, 0, 2], [0, -1, 2]], dtype=torch.float64)
    steps = 1.2 * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    rows = [means[k] + steps.repeat(2 if k % 2 == 0 else 1, 1) for k in range(4)]
    target = torch.arange(4).repeat_interleave(torch.tensor([12, 6, 12, 6]))
    weight = torch.tensor([[2.0, 0, 1], [0, 1, 3], [-2, 0, 1], [0, -1, 3]], dtype=torch.float64)
    return torch.cat(rows), target, weight, torch.tensor([1.0, -2, 0, -6], dtype=torch.float64)


OTHER = torch.tensor([[1.0, 0, 1]], dtype=torch.float64)  # features of no class
WORKED = {name.strip("`"): number(value) for name, value, *_ in tables()["Metric"]}


def test_every_metric_has_a_value_worked_out_by_hand():
    assert set(WORKED) == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_the_functions_give_the_values_worked_out_by_hand(name):
    rows, target, weight, bias = example()
    if name == "nc2_orthoplex":  # four classes have one in two dimensions
        rows = rows[:, :2]
    value = functional.nc5(rows, target, OTHER) if name == "nc5" else metric_value(name, rows, target, weight, bias)
    assert value.item() == pytest.approx(WORKED[name], rel=1e-12, abs=1e-14)


def test_the_metric_gives_the_values_worked_out_by_hand_batch_by_batch():
    rows, target, weight, bias = example()
    names = [name for name in METRICS if name not in ("nc2_orthoplex", "nc5")]
    metric = NeuralCollapse(4, 3, weight, bias, metrics=names)
    for part in torch.randperm(36).split(7):
        metric.update(rows[part], target[part])
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx({name: WORKED[name] for name in names}, rel=1e-12)


def test_measure_gives_the_values_worked_out_by_hand_of_a_model_and_other_data():
    rows, target, weight, bias = example()
    head = nn.Linear(3, 4).double()
    head.load_state_dict({"weight": weight, "bias": bias})
    names = [name for name in METRICS if name != "nc2_orthoplex"]
    loader = DataLoader(TensorDataset(rows, target), 5, shuffle=True)
    other = DataLoader(TensorDataset(OTHER.repeat(4, 1)), 3)
    found = measure(nn.Sequential(nn.Identity(), head), loader, metrics=names, ood_dataloader=other, progress=False)
    assert found == pytest.approx({name: WORKED[name] for name in names}, rel=1e-12)
    table = found.per_class
    assert table["samples"] == [12, 6, 12, 6]
    assert table["nc1_trace_share"] == pytest.approx([1 / 3, 1 / 6, 1 / 3, 1 / 6], rel=1e-12)
    assert table["mean_norm"] == pytest.approx([2, 1, 2, 1], rel=1e-12)
    cosines = [2 / math.sqrt(5), 1 / math.sqrt(10)]
    assert table["weight_cosine"] == pytest.approx([*cosines, *cosines], rel=1e-12)
    assert (table["nearest"][1], table["nearest"][3]) == (3, 1)
    assert table["nearest_cdnv"] == pytest.approx([1.44 / 5, 1.44 / 4, 1.44 / 5, 1.44 / 4], rel=1e-12)
    distances = {name: WORKED[name] for name in ("nc2_etf_centered", "nc2_seli")}
    assert found.geometry.distances == pytest.approx(distances, rel=1e-12)


def test_regression_gives_the_values_worked_out_by_hand():
    # Residuals out of the plane of the first two axes: 1/5, 1/5, 1/2, 1/2; out of the span of W: 1/10, 1/10, 0, 1.
    rows = torch.tensor([[2.0, 0, 1], [-2, 0, 1], [0, 1, 1], [0, -1, 1]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 3], [1, -3], [-1, 3], [-1, -3]], dtype=torch.float64)
    weight = torch.tensor(
        [[1.0, 0, 0], [0, 1, 1]], dtype=torch.float64
    )  # WW' = diag(1, 2), root of covariance diag(1, 3)
    metric = NeuralRegressionCollapse(2, 3, weight)
    for part in torch.randperm(4).split(3):
        metric.update(rows[part], targets[part])
    expected = {"nrc1": 7 / 20, "nrc2": 3 / 10, "nrc3": 2 - 14 / math.sqrt(50)}
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------ numbers beside the metrics


class Absolute(nn.Module):
    def forward(self, x):
        return x.abs()


def test_the_effective_depth_is_the_one_worked_out_by_hand():
    for errors, depth in (
        ([0.6, 0.2, 0.005, 0.0], 3),
        ([0.6, 0.01, 0.0], 2),
        ([0.1, 0.3, 0.2], 1),
        ([0.0], 1),
        ([0.5, 0.02], 2),
    ):
        assert functional.effective_depth(errors) == depth
    assert functional.effective_depth([0.5, 0.25, 0.0], tolerance=0.25) == 2
    assert math.isnan(functional.effective_depth([0.5, math.nan, 0.0]))
    # The class means are -1 and 1/3: two samples of six are nearer to the other one. Without their signs, none is.
    points = torch.tensor([[-3.0], [-3], [3], [-1], [1], [1]])
    loader = DataLoader(TensorDataset(points, torch.tensor([0, 0, 0, 1, 1, 1])), 4)
    model = nn.Sequential(nn.Identity(), Absolute(), nn.Identity(), nn.Linear(1, 2))
    found = measure(model, loader, layers=["0", "1"], metrics="ncc_error", progress=False)
    expected = {"0/ncc_error": 1 / 3, "1/ncc_error": 0.0, "ncc_error": 0.0, "effective_depth": 2.0}
    assert found == pytest.approx(expected)


def test_random_directions_have_the_values_that_large_dimensions_give_in_closed_form():
    # For Gaussian rows, E tr G = K d and E ||G||^2 = K d (d + K + 1), and both vary little around these. The widest of the
    # values, nc2_equinorm, varies by 1.8 % over 8 draws.
    K, d = 200, 400
    rows, centered = K * d / math.sqrt(K * d * (d + K + 1)), math.sqrt(d / (d + K))
    expected = {
        "nc2_of": math.sqrt(2 - 2 * rows / math.sqrt(K)),
        "nc2_etf_centered": math.sqrt(2 - 2 * centered),
        "nc2_weight": math.sqrt(2 - 2 * math.sqrt((K - 1) * d / (K * (d + K + 1)))),
        "nc2_equiangular": 1 / math.sqrt(d),
        "nc2_equinorm": 1 / math.sqrt(2 * d),
        "nc3": math.sqrt(2),
        "nc3_cosine": 1.0,
        "nc0": 1 / math.sqrt(K),
    }
    found = random_directions(tuple(expected), K, d)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0.05), name


def test_the_chance_of_a_geometry_is_that_of_unit_vectors_in_closed_form():
    K, d = 60, 400  # <u_i, u_j>^2 is 1/d on average
    target = torch.arange(K).repeat(2)
    rows = torch.randn(K, d, dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True)
    found = nearest_frame(ClassDeviations.of(rows[target], target, K))
    assert found.chance["nc2_of"] == pytest.approx(math.sqrt(2 - 2 / math.sqrt(1 + (K - 1) / d)), rel=1e-2)
    assert found.distances["nc2_of"] == pytest.approx(found.chance["nc2_of"], rel=0.05)
    assert found.nearest is None


def test_permuted_labels_give_the_ratio_of_traces_that_chance_gives():
    # Of the total scatter, chance puts (K - 1) / (N - 1) between the classes: the expectation of an analysis of variance.
    K, each, d = 5, 60, 200
    rows, target = torch.randn(K * each, d) + torch.eye(K, d).repeat(each, 1) * 4, torch.arange(K).repeat(each)
    loader = DataLoader(TensorDataset(rows, target), 50)
    model = nn.Sequential(nn.Identity(), nn.Linear(d, K))
    found = measure(model, loader, metrics="nc1_trace", baseline=True, progress=False)
    assert found.baseline["permuted"]["nc1_trace"] == pytest.approx((K * each - K) / (K - 1), rel=0.2)
    assert found["nc1_trace"] < 20


# ------------------------------------------------------------------------------------------------ the tables of the page


@functools.cache
def numbers():
    """By test: the numbers in its source, in its decorators, and in the functions of its file that it calls."""
    found = {}
    for file in (ROOT / "tests").rglob("test_*.py"):
        nodes = {node.name: node for node in ast.parse(file.read_text(encoding="utf-8")).body if hasattr(node, "name")}
        for name in [name for name in nodes if name.startswith("test_")]:
            called = {part.id for part in ast.walk(nodes[name]) if isinstance(part, ast.Name)} & nodes.keys()
            parts = [
                part for each in (name, *called) for part in ast.walk(nodes[each]) if isinstance(part, ast.Constant)
            ]
            found.setdefault(name, set()).update(part.value for part in parts if type(part.value) in (int, float))
    return found


ROWS = [row for title in ("All", "Name") for row in tables()[title]]
IN_WORDS = {"exact", "gradcheck", "torch's default", "1e-8 in `tests/soak/oracle.py`"}


def test_every_metric_and_every_number_beside_them_has_a_row():
    named = {name for row in tables()["Name"] for name in re.findall(r"`\.?([\w.]+)`", row[0])}
    assert set(METRICS) <= named, set(METRICS) - named
    beside = {name for name in functional.__all__ if name.islower()} - {
        "nc2"
    }  # the variants of nc2 have names of their own
    beside |= {"per_class", "geometry", "baseline", "intervals", "extract_features", "SimplexETF"}
    beside |= {f"theory.{name}" for name in ("plain_ufm", "extended_ufm", "attenuation")}
    assert beside <= named, beside - named


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1]}"[:60])
def test_the_test_of_a_row_exists_and_asserts_the_tolerance_that_the_row_gives(row):
    _, _, tolerance, test = row
    found = numbers()[test.strip("`")]
    assert tolerance in IN_WORDS or float(tolerance.partition(" of ")[0]) in found
