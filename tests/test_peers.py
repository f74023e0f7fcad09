"""benchmarks/peers.py: other ways of computing NC1 and CDNV give what ours give where they should, and the truth is exact."""

import re
import sys
from pathlib import Path

import mpmath
import pytest
import reference
import torch
from conftest import clusters

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import peers

ROOT = Path(__file__).parents[1]
EXACT = ("ours", "float64")


def data(dtype=torch.float32):
    rows, target = clusters(5, 20, 12, 0.3, dtype=dtype)
    return rows, target, peers.batches_of(rows, target)


# nc-toolbox needs float64 features, see the page
@pytest.mark.parametrize("name", sorted(peers.NC1.keys() - {"nc-toolbox"}))
def test_every_way_of_computing_nc1_gives_ours_on_plain_features(name):
    rows, target, batches = data()
    expected = reference.nc1(rows.numpy(), target.numpy())
    assert peers.NC1[name](batches, 5) == pytest.approx(expected, rel=1e-12 if name.endswith(EXACT) else 1e-5)


@pytest.mark.parametrize("name", peers.CDNV)
def test_every_way_of_computing_cdnv_gives_ours_on_plain_features(name):
    rows, target, batches = data()
    expected = peers.true_cdnv(rows.double().numpy(), target.numpy())
    assert peers.CDNV[name](batches, 5) == pytest.approx(expected, rel=1e-12 if name.endswith(EXACT) else 1e-5)


def exact_nc1(rows, target):
    """With 50 digits: with M = A C for a C of full rank, pinv(M'M) = C' (CC')^-1 (A'A)^-1 (CC')^-1 C."""
    with mpmath.workdps(50):
        rows = mpmath.matrix(rows.double().tolist())
        classes, d = int(target.max()) + 1, rows.cols
        counts = target.bincount().tolist()
        means, within = mpmath.zeros(classes, d), mpmath.zeros(d, d)
        for i, k in enumerate(target.tolist()):
            means[k, :] += rows[i, :] / counts[k]
        for i, k in enumerate(target.tolist()):
            deviation = rows[i, :] - means[k, :]
            within += deviation.T * deviation / len(target)
        contrasts = mpmath.matrix([[means[k, j] - means[classes - 1, j] for j in range(d)] for k in range(classes - 1)])
        size = classes - 1  # M = A C, where A subtracts the mean: A'A = I - 11'/K
        inner = mpmath.eye(size) - mpmath.ones(size, size) / classes
        middle = (contrasts * contrasts.T) ** -1
        product = inner**-1 * middle * contrasts * within * contrasts.T * middle
        return float(mpmath.fsum(product[i, i] for i in range(size)))


@pytest.mark.parametrize("noise", [0.3, 1e-6])
@pytest.mark.parametrize("strength", [1, 1e-4])
def test_the_truth_of_the_comparison_agrees_with_50_digits(noise, strength):
    rows, target = clusters(4, 6, 5, noise)
    rows[:, 0] = strength * rows[:, 0] + 1
    assert reference.nc1_by_axes(rows.numpy(), target.numpy()) == pytest.approx(exact_nc1(rows, target), rel=1e-9)


def tables(page):
    """The text of each table that ``python benchmarks/costs.py --write`` puts into a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return {
        name: body.strip() for name, body in re.findall(r"<!-- (.+?) -->\n(.*?)<!-- end of \1 -->", text, re.DOTALL)
    }


def test_the_pages_have_the_tables_of_the_benchmarks():
    source = (ROOT / "benchmarks/costs.py").read_text(encoding="utf-8")
    assert tables("costs.md").keys() == {*re.findall(r'"(\w+)": \w', source)}
    assert tables("peers.md").keys() == peers.TABLES.keys()
    for page in ("costs.md", "peers.md"):
        for name, body in tables(page).items():
            assert body.startswith("One thread of" if name == "machine" else "| "), (page, name)


def test_the_table_of_errors_has_every_implementation_and_kind_of_features():
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in tables("peers.md")["errors of NC1"].splitlines()
    )
    assert head[2:] == peers.columns(peers.NC1)
    assert [row[0] for row in rows] == [*peers.kinds()]
