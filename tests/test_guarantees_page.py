"""docs/guarantees.md: every promise has a test."""

import re
from pathlib import Path

import torch

from lightning_nc import NeuralCollapse
from lightning_nc.functional import METRICS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
PROMISES = dict(re.findall(r"^\| (.+?) \| (`test_.*) \|$", PAGE, re.MULTILINE))


def test_every_row_of_the_guarantees_is_a_promise_with_its_tests():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| Promise |")]
    assert len(rows) == len(PROMISES) > 25


def test_the_tests_that_keep_the_promises_exist():
    found = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for promise, tests in PROMISES.items():
        assert set(re.findall(r"`(\w+)`", tests)) <= found, promise


def test_the_state_has_the_same_size_after_a_thousand_batches():
    names = [name for name, spec in METRICS.items() if not spec.samples and "ood" not in spec.needs]
    metric = NeuralCollapse(5, 8, torch.randn(5, 8), torch.zeros(5), metrics=names)
    sizes = []
    for count in (1, 999):
        for _ in range(count):
            metric.update(torch.randn(16, 8), torch.randint(5, (16,)))
        sizes.append({name: (state.shape, state.dtype) for name, state in metric.metric_state.items()})
    assert sizes[0] == sizes[1]
    assert metric.counts.sum() == 16_000
