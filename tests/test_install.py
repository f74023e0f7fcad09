"""What an installation brings: versions, what an import loads, and each extra alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import lightning_nc

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

# The packages of the extras. None of them comes with the plain install.
OPTIONAL = "torchvision sklearn matplotlib jsonargparse PIL wandb plotly imageio_ffmpeg transformers accelerate "
OPTIONAL += "safetensors timm peft"


def run(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # this package, whatever the current directory is
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


# ------------------------------------------------------------------------------------------------------------- versions


def test_the_lower_bounds_are_the_oldest_releases_that_are_tested():
    bounds = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', PROJECT.partition("\ntest = ")[0]))
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / ".ci/oldest.txt").read_text(), re.MULTILINE))
    assert {"torch", "lightning", "torchmetrics", "transformers"} <= bounds.keys()
    for name, bound in bounds.items():
        assert Version(oldest[name]) == Version(bound), name


def test_every_python_that_the_package_names_is_tested():
    named = re.findall(r"Python :: (3\.\d+)", PROJECT)
    assert named[0] == re.search(r'requires-python = ">=(.+)"', PROJECT)[1]
    assert {*named} <= {*re.findall(r'"(3\.\d+)"', (ROOT / "noxfile.py").read_text())}


# ------------------------------------------------------------------------------------------------------ what is imported

IMPORTS = """
import sys
import lightning.pytorch, torchmetrics  # which load what they find
before = {*sys.modules}
from lightning_nc import *
import lightning_nc.loggers, lightning_nc.regression, lightning_nc.runs, lightning_nc.sweep, lightning_nc.theory
loaded = {name.partition(".")[0] for name in {*sys.modules} - before} - {*sys.stdlib_module_names}
print(*loaded)
"""


def test_the_package_loads_nothing_beside_torch_lightning_and_torchmetrics():
    assert run(IMPORTS).stdout.split() == ["lightning_nc"]


HELP = """
import sys
from lightning_nc.__main__ import main
try:
    main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules
import lightning_nc.functional
assert {"torchmetrics", "lightning"}.isdisjoint(sys.modules)
"""


def test_help_loads_no_torch_and_the_formulas_no_lightning():
    found = run(HELP)
    assert found.returncode == 0, found.stderr
    assert "report" in found.stdout


def test_a_name_of_the_package_is_there_when_it_is_first_used_and_others_are_not():
    for name in lightning_nc.__all__:
        assert getattr(lightning_nc, name).__name__ == name
        assert name in dir(lightning_nc)
    assert lightning_nc.functional.nc1 is sys.modules["lightning_nc.functional"].nc1
    with pytest.raises(AttributeError, match="module 'lightning_nc' has no attribute 'NC9'"):
        getattr(lightning_nc, "NC9")  # noqa: B009


# ------------------------------------------------------------------------------------------------------ the plain install

PLAIN = """
import sys
sys.path.insert(0, "tests")
import lightning.pytorch, torchmetrics  # which load what they find
loaded = [name for name in sys.modules if name.partition(".")[0] in sys.argv[1].split()]
sys.modules.update(dict.fromkeys([*sys.argv[1].split(), *loaded]))  # from now on an import of them raises
import uses
uses.main("plain")
"""


def test_the_plain_install_works_and_what_needs_more_says_how_to_install_it():
    """``make package`` runs this and the use of each extra where nothing else is installed."""
    found = run(PLAIN, OPTIONAL)
    assert found.returncode == 0, found.stderr
