"""Training with the callback equals training without it, bit for bit; docs/bit_identity.md is the table of what was tried."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "bit_identity.md"
HEAD = """# Training is left as it was

Weights, optimizer state, the samples and augmentations of every step, random streams and training flags after two epochs
with `NeuralCollapseCallback`, compared with those of a run without it, bit for bit: batch normalisation, dropout, momentum,
random augmentation, and a validation loop that logs. `python -m pytest tests/test_bit_identity.py` writes this page.

"""


def run(out, *options):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if options else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, TESTS / "bit_identity.py", out, *options]
    finished = subprocess.run(command, timeout=600, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return {tuple(row[:3]): row[3] for row in json.loads(out.read_text())}


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
