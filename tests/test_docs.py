"""The documentation is true of the code: its examples run, the tests and the messages that it names exist."""

import ast
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import clusters, is_picture
from PIL import Image

from lightning_nc import History
from lightning_nc.__main__ import main
from lightning_nc.functional import METRICS
from lightning_nc.functional.table import evaluate
from lightning_nc.moments import ClassDeviations
from lightning_nc.runs import metrics_of

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("page", "code"),
    [
        (page, code)
        for page in ("README.md", "docs/costs.md", "docs/regression.md", "docs/wandb.md")
        for code in blocks(page)
    ],
)
def test_the_examples_of_the_readme_and_of_the_pages_about_costs_regression_and_wandb_run(
    page, code, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


@pytest.mark.filterwarnings("ignore")
def test_the_examples_of_the_page_about_loops_run_one_after_another(tmp_path, monkeypatch):
    for package in ("timm", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code in blocks("docs/loops.md"):
        exec(compile(code, "docs/loops.md", "exec"), names)
    own, checkpoints, features, timm, accelerate = (
        History.read(f"{name}.csv") for name in ("nc", "checkpoints", "features", "timm", "accelerate")
    )
    assert [(row["stage"], row["epoch"]) for row in own] == [
        (stage, epoch) for epoch in range(10) for stage in ("train", "test")
    ]
    assert checkpoints == own[::2]  # the same model on the same data
    for measured, computed in zip(checkpoints, features, strict=True):
        assert metrics_of(computed) == pytest.approx(metrics_of(measured), rel=1e-4)
    assert [len(history) for history in (timm, accelerate)] == [3, 10]
    assert is_picture("nc.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("code", "rows"), list(zip(blocks("docs/huggingface.md")[1:], (10, 2), strict=True)))
def test_the_examples_of_the_page_about_transformers_run(code, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(compile(code, "docs/huggingface.md", "exec"), names)
    assert len(names["callback"].history) == rows


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_and_the_commands_of_the_tutorial_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    names = {"__name__": "__main__"}
    for kind, code in re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL):
        if kind == "python":
            quick = code.replace("max_epochs=30", "max_epochs=3").replace("range(30)", "range(2)")
            exec(compile(quick, "docs/tutorial.md", "exec"), names)
        elif code.startswith("lightning-nc"):
            assert main(shlex.split(code)[1:]) == 0
    assert {"nc/nc1", "nc/body.3/nc1"} <= set(names["callback"].history[-1])
    assert all(is_picture(f"{name}.png") for name in ("panels", "depth", "geometry", "classes", "compare"))
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("collapse.gif", "report.html"))


NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_valid_has_no_outputs_and_first_installs_what_is_missing(file):
    notebook = json.loads(file.read_text(encoding="utf-8"))
    pytest.importorskip("nbformat").validate(notebook)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    first, *others = ["".join(cell["source"]) for cell in cells]
    assert 'find_spec("lightning_nc") is None:\n    %pip install -q "lightning-neural-collapse[' in first
    assert "%matplotlib inline" in first
    for code in others:
        ast.parse(code)  # nothing but Python, which a script may take over


def test_the_notebooks_are_in_the_pages():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 4
    assert all(f"\nnotebooks/{file.stem}\n" in index for file in NOTEBOOKS)


def test_every_picture_of_a_page_exists_says_what_it_shows_and_is_small():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for words, name in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text(encoding="utf-8")):
            picture = page.parent / name
            with Image.open(picture) as image:
                assert min(image.size) > 200, name
            assert len(words) > 5, name
            assert picture.stat().st_size < (1_500_000 if picture.suffix == ".gif" else 500_000), name


def test_the_tests_that_the_page_how_we_know_names_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/how_we_know.md").read_text(encoding="utf-8")))
    found = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(named) > 50
    assert named <= found, sorted(named - found)


def messages():
    """The string literals of the package, with ... where a value is inserted."""
    texts = []
    for file in (ROOT / "lightning_nc").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_in_the_table_of_remedies_are_those_of_the_code():
    page = (ROOT / "docs/callback.md").read_text(encoding="utf-8")
    table = page.partition("## Warnings and remedies")[2].partition("## Limits")[0]
    rows = [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("| ")]
    said = [message for row in rows if row != "The message says" for message in row.split(";")]
    text = messages()
    unknown = [m for m in said if not all(piece.strip(" ,") in text for piece in m.split("...") if piece.strip(" ,"))]
    assert len(said) > 50
    assert not unknown


def rows_of_metrics():
    """Name, formula, range, value at collapse, needs and source of each metric on the page of metrics."""
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    tables = [
        table for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE) if table.startswith("| Name | Formula |")
    ]
    rows = [line.strip("|").split("|") for table in tables for line in table.splitlines()[2:]]
    return {name.strip(" `"): [cell.strip(" `") for cell in cells] for name, *cells in rows}


def number(text, classes):
    """An expression of the page, such as √(K − 1), for K classes."""
    text = re.sub(r"√(\d)", r"sqrt(\1)", text).replace("√(", "sqrt(").replace("−", "-").replace("∞", "inf")
    return eval(text.replace("log 2", "log(2)"), {**vars(math), "K": classes, "d": 9})


def test_the_page_of_metrics_has_a_row_for_each_of_them_that_agrees_with_the_table():
    rows = rows_of_metrics()
    assert set(rows) == set(METRICS)
    words = {"weight": "W", "bias": "b", "ood": "other data"}
    for name, (_, _, collapse, needs, _) in rows.items():
        spec = METRICS[name]
        needed = [words[need] for need in spec.needs] + ["samples"] * spec.samples + ["opt-in"] * spec.opt_in
        assert needs.split(", ") == (needed or [""]), name
        for classes in (4, 10):
            assert number(collapse, classes) == pytest.approx(spec.value_at_collapse(classes, 9)), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("classes", [3, 6, 8, 16])
def test_the_values_of_random_data_lie_in_the_ranges_of_the_page(classes):
    for seed in range(5):
        rows, target = clusters(classes, 7, 9, 0.4 * seed, seed=seed, dtype=torch.float64)
        rows, target = rows[classes + 1 :].relu(), target[classes + 1 :]  # unequal counts
        weight, bias = torch.randn(classes, 9).double(), torch.randn(classes).double()
        moments = ClassDeviations.of(rows, target, classes)
        for name, value in evaluate([*METRICS], moments, weight, bias, ood_mean=rows[::3].mean(0)).items():
            low, high = rows_of_metrics()[name][1][1:-1].split(", ")
            low, high = number(low, classes), number(high, classes)
            assert value.isnan() or low - 1e-9 <= value.item() <= high + 1e-9, name
