"""Training with the callback equals training without it, bit for bit.

The full matrix is slow; it writes docs/bit_identity_table.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bit_identity import LOADERS, MODES, is_identical, train

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "bit_identity_table.md"
HEAD = """# Runs with and without the callback

Each row compares a run with `NeuralCollapseCallback` with the same run without it, bit for bit; see
[Training is unchanged](bit_identity.md). `python -m pytest tests/test_bit_identity.py` writes this page.

"""


@pytest.mark.parametrize(
    "loader", ["in order", "shuffled", "generator of its own", "two workers", "two workers that persist"]
)
@pytest.mark.parametrize("validation", [False, True])
def test_an_extra_pass_leaves_training_bit_identical(loader, validation):
    plain = train(LOADERS[loader], "32-true", None, validation)
    assert is_identical(plain, train(LOADERS[loader], "32-true", {"layers": ["net.0"]}, validation))


@pytest.mark.parametrize(
    ("loader", "precision", "arguments"),
    [
        ("sampler with a generator", "32-true", MODES["online"]),
        ("shuffled", "32-true", {"stages": ("train", "validate"), "mode": "online"}),
        ("weighted sampler", "bf16-mixed", MODES["online"]),
        ("subset sampler", "bf16-true", MODES["exact and validation"]),
        ("iterable data set", "bf16-mixed", MODES["exact, with layers"]),
        ("shuffled, last batch dropped", "bf16-true", MODES["exact"]),
    ],
)
def test_every_mode_leaves_training_bit_identical(loader, precision, arguments):
    assert is_identical(train(LOADERS[loader], precision, None), train(LOADERS[loader], precision, arguments))


def test_a_difference_would_be_noticed():
    plain = train(LOADERS["shuffled"], "32-true", None)
    assert not is_identical(plain, train(LOADERS["shuffled"], "32-true", None, validation=False))
    assert not is_identical(plain, train(LOADERS["in order"], "32-true", None))


def run(out, *options):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if options else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, TESTS / "bit_identity.py", out, *options]
    finished = subprocess.run(command, timeout=600, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return {tuple(row[:3]): row[3] for row in json.loads(out.read_text())}


@pytest.mark.slow
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path):
    one, two = run(tmp_path / "one.json"), run(tmp_path / "two.json", "--two")
    words = {True: "identical", False: "DIFFERENT", None: ""}
    lines = ["| loader | precision | callback | 1 process | 2 processes |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(key)} | {words[same]} | {words[two.get(key)]} |" for key, same in one.items()]
    TABLE.write_text(HEAD + "\n".join(lines) + "\n")
    assert [key for key, same in one.items() if not same] == []
    assert [key for key, same in two.items() if not same] == []
    assert len(one) >= 100
    assert len(two) >= 80
