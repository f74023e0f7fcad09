"""Tests in environments of their own; `nox --list` names them. uv creates the environments where it is installed.

`UV_TORCH_BACKEND=cpu` makes uv take the CPU builds of torch, which are a tenth of the size.
"""

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["tests-oldest", "tests-newest"]

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run_quick_tests(session: nox.Session, *constraints: str) -> None:
    """Install the package with everything that the tests use, and run what `make test` runs."""
    session.install("--editable", ".[test,zoo]", *constraints)
    session.run("python", "-m", "pytest", "-m", "not slow and not browser", *session.posargs, env=ONE_THREAD)


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
    """Run the tests with the newest releases, on the other versions of Python."""
    run_quick_tests(session, "--upgrade")
