"""The bounds of a soak, and what it counts: ``make soak ARGS="--examples 200 --minutes 20"``.

A test that draws takes the fixture ``budget``: all of them share the time, and each draws at most ``--examples`` cases. A test
of a fixed list takes ``tally`` alone. Helpers are imported as ``from soak.name import ...``, those of ``tests/`` as usual.
"""

import time
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.stateful import run_state_machine_as_test

from soak.ranks import Ranks

CHUNK = 20  # cases that hypothesis draws before it is asked again whether time is left


def pytest_addoption(parser):
    group = parser.getgroup("soak")
    group.addoption("--examples", type=int, default=60, help="the most cases that a test draws (default: 60)")
    group.addoption("--minutes", type=float, default=10, help="when tests stop drawing cases, in all (default: 10)")
    group.addoption("--shrink", action="store_true", help="look for a smaller case that fails, up to five minutes more")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "tests/soak" in item.path.as_posix():
            item.add_marker("soak")


class Tally:
    """Distinct things that were tried, by kind, and what differed."""

    def __init__(self):
        self.seen = defaultdict(set)

    def add(self, kind, thing):
        """Count ``thing`` once. Kinds: "combinations", "faults", "differences", or any other."""
        self.seen[kind].add(repr(thing))


class Budget:
    """The count and the time that a test may draw cases for."""

    def __init__(self, tally, examples, seconds, shrink=False):
        self.tally, self.examples, self.end = tally, examples, time.monotonic() + seconds
        self.phases = [Phase.reuse, Phase.generate, *[Phase.shrink] * shrink]

    def check(self, function, case):
        """Call ``function`` on what the strategy ``case`` draws."""
        self._draw(lambda chosen: chosen(given(case)(function))(), CHUNK)

    def run(self, machine, steps=12):
        """Run a ``RuleBasedStateMachine``, at most ``steps`` rules each time."""
        self._draw(lambda chosen: run_state_machine_as_test(machine, settings=chosen), CHUNK // 2, steps)

    def _draw(self, draw, chunk, steps=50):
        drawn = 0
        while drawn < self.examples and time.monotonic() < self.end:
            count = min(chunk, self.examples - drawn)
            drawn += count
            draw(
                settings(
                    max_examples=count,
                    stateful_step_count=steps,
                    deadline=None,
                    phases=self.phases,
                    print_blob=True,
                    suppress_health_check=list(HealthCheck),
                )
            )


@pytest.fixture(scope="session")
def tally(request):
    request.config.soak_tally = Tally()
    return request.config.soak_tally


@pytest.fixture(scope="session")
def _end(request):
    return time.monotonic() + 60 * request.config.getoption("--minutes", 10)


@pytest.fixture
def budget(request, tally, _end):
    """An equal share of what is left of the time."""
    drawing = [item for item in request.session.items if "budget" in item.fixturenames]
    left = drawing[drawing.index(request.node) :]
    seconds = max(0.0, _end - time.monotonic()) / len(left)
    return Budget(
        tally, request.config.getoption("--examples", 60), seconds, request.config.getoption("--shrink", False)
    )


@pytest.fixture(scope="session")
def ranks():
    """Two processes in a process group, which start with the first call."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    tally = getattr(item.config, "soak_tally", None)
    if tally is not None and report.when == "call" and report.failed:
        tally.add("differences", item.nodeid)
    return report


def pytest_terminal_summary(terminalreporter, config):
    tally = getattr(config, "soak_tally", None)
    if tally is not None:
        terminalreporter.section("soak")
        for kind in dict.fromkeys(["combinations", *tally.seen, "differences"]):
            terminalreporter.line(f"{kind}: {len(tally.seen[kind])}")
