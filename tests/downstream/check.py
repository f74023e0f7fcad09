"""Type-check the project of this folder, strictly, against the package that a Python has installed, and run it with that Python.

    python tests/downstream/check.py path/to/python

This Python needs mypy, the other one the package, not as an editable install. The part for transformers is left out if it is
not installed there.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".mypy_cache" / "downstream"
WHERE = "import lightning_nc; print(lightning_nc.__file__)"
RUN = "import sys, pathlib, {0}; {0}.main(pathlib.Path(sys.argv[1]))"


def check(python: str) -> None:
    """Raises CalledProcessError if a type is wrong or the project fails."""
    with tempfile.TemporaryDirectory() as folder:
        found = subprocess.run([python, "-c", WHERE], cwd=folder, check=True, capture_output=True, text=True).stdout
        if "site-packages" not in found:
            raise SystemExit(f"{python} must have the package installed from its wheel; it imports {found.strip()}")
        projects = ["project"]
        if subprocess.run([python, "-c", "import transformers, accelerate"], capture_output=True).returncode == 0:
            projects.append("transformers_project")
        files = [shutil.copy(HERE / f"{project}.py", folder) for project in projects]
        options = ["--strict", "--python-executable", python, "--cache-dir", str(CACHE)]
        subprocess.run([sys.executable, "-m", "mypy", *options, *files], cwd=folder, check=True)
        for project in projects:
            subprocess.run([python, "-W", "ignore", "-c", RUN.format(project), folder], cwd=folder, check=True)


if __name__ == "__main__":
    check(str(Path(sys.argv[1]).absolute()))  # not resolved: an environment's Python is a link
