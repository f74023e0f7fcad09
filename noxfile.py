"""Tests in environments of their own; `nox --list` names them, and `nox -s tests-oldest` runs one.

uv makes the environments where it is installed. UV_TORCH_BACKEND=cpu lets it take the CPU builds of torch, which are small.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["tests-oldest", "tests-newest"]

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
EXTRAS = ["plain", "examples", "wandb", "report", "huggingface", "zoo", "docs"]


def run_quick_tests(session: nox.Session, *constraints: str) -> None:
    """Install the package with everything that the tests use, and run what `make test` runs."""
    session.install("--editable", ".[test,zoo]", *constraints)
    session.run(
        "python", "-m", "pytest", "-m", "not slow and not browser and not soak", *session.posargs, env=ONE_THREAD
    )


@nox.session(name="tests-oldest", python="3.10")
def tests_oldest(session: nox.Session) -> None:
    """Run the tests with the oldest supported release of every dependency."""
    run_quick_tests(session, "--constraint", ".ci/oldest.txt")


@nox.session(name="tests-newest", python="3.13")
def tests_newest(session: nox.Session) -> None:
    """Run the tests with the newest release of every dependency."""
    run_quick_tests(session, "--upgrade")


@nox.session(python=["3.11", "3.12", "3.14"])
def tests(session: nox.Session) -> None:
    """Run the tests with the newest releases on another Python."""
    run_quick_tests(session, "--upgrade")


@nox.session(python="3.12")
@nox.parametrize("extra", EXTRAS, ids=EXTRAS)
def extras(session: nox.Session, extra: str) -> None:
    """Install the wheel with one extra alone, and use it outside of the checkout."""
    folder = Path(session.create_tmp()).resolve()
    session.run("uv", "build", "--quiet", "--wheel", "--clear", "--out-dir", str(folder), external=True)
    (wheel,) = folder.glob("*.whl")
    session.install(str(wheel) if extra == "plain" else f"{wheel}[{extra}]")
    session.run("uv", "pip", "check", external=True)
    session.run("python", "-I", "tests/uses.py", extra, env=ONE_THREAD)
