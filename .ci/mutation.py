"""Mutation testing of the formulas: change the code in one place at a time and see whether a test fails.

python .ci/mutation.py [--again] [--budget SECONDS] [FILE ...]

The mutations are those of mutmut and a few more, for code with tensors. mutmut itself leaves out what stands outside of
functions, such as the rows of METRICS, and decorated functions. Here all tests are collected once. Each mutant then takes the
place of the code in a fork of that process, so that one that a test kills costs milliseconds. It is tested by the tests that
reach its lines, first those that killed its neighbors, then fast ones and those that reach little else. What became of each
mutant is kept in .mutation/results.json; `--again` tests only those that were not killed and are not listed.

Exit status 1 if a mutant survives that docs/mutation.md does not list.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import inspect
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
import types
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import coverage
import hypothesis
import libcst as cst
import libcst.matchers as m
import pytest
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".mutation" / "results.json"
REACHED = RESULTS.with_name("reached.json")
PACKAGE = ROOT / "lightning_nc"
NAMES = ("theory", "moments", "metrics", "comparison", "mergeable", "regression", "regression_moments")
FILES = [*sorted((PACKAGE / "functional").glob("[!_]*.py")), *(PACKAGE / f"{name}.py" for name in NAMES)]
TESTS = (
    "functional",
    "moments",
    "theory",
    "metrics",
    "conventions",
    "geometry",
    "certainty",
    "comparison",
    "projection",
)
TESTS += ("regression", "variability", "simplex_etf", "table", "collapse")
SECONDS = 10  # that a mutant may take beyond five times what its tests take
QUICK = 0.1  # seconds that a test may take which is run for every mutant of what runs on import
GIGABYTES = 2  # that a mutant may allocate beyond what there is


@functools.cache
def compiled(file: str) -> types.CodeType:
    """The code of a file as it is."""
    return compile((ROOT / file).read_text(), str(ROOT / file), "exec")


@dataclass
class Mutant:
    """One change, and what became of it: killed, survived, timeout, or untested where no test reaches its lines."""

    file: str
    place: str
    line: int
    before: str
    after: str
    start: int
    end: int
    lines: tuple[int, int]
    status: str = ""
    killer: str = ""

    @functools.cached_property
    def key(self) -> str:
        """How docs/mutation.md names it: by the lines as the mutation leaves them."""
        text = self.source()
        first, last = (text.count("\n", 0, offset) for offset in (self.start, self.start + len(self.after)))
        lines = " ".join(" ".join(text.split("\n")[first : last + 1]).split())
        return f"`{self.place}`: `{lines}`" if self.after != "pass" else f"`{self.place}`: without `{self.before}`"

    def source(self) -> str:
        """The text of the file with the mutation."""
        text = (ROOT / self.file).read_text()
        return text[: self.start] + self.after + text[self.end :]

    def codes(self) -> list[types.CodeType]:
        """The code of the file without and with the mutation."""
        return [compiled(self.file), compile(self.source(), str(ROOT / self.file), "exec")]


# ---------------------------------------------------------------------------------------------------- making mutants


def drop_call(node: cst.Call) -> Iterator[cst.BaseExpression]:
    """x.f(...) → x."""
    if isinstance(node.func, cst.Attribute) and not m.matches(node.func.value, m.Name("torch") | m.Name("math")):
        yield node.func.value


def drop_transpose(node: cst.Attribute) -> Iterator[cst.BaseExpression]:
    """x.T → x."""
    if node.attr.value == "T":
        yield node.value


OTHER_EXTREME = {"min": "max", "amin": "amax", "argmin": "argmax", "any": "all", "minimum": "maximum"}
OTHER_EXTREME |= {other: name for name, other in OTHER_EXTREME.items()} | {"sum": "mean", "mean": "sum"}


def other_extreme(node: cst.Attribute | cst.Name) -> Iterator[cst.CSTNode]:
    """The least for the largest, all for any, the mean for the sum."""
    name = node.attr.value if isinstance(node, cst.Attribute) else node.value
    if name in OTHER_EXTREME:
        other = cst.Name(OTHER_EXTREME[name])
        yield node.with_changes(attr=other) if isinstance(node, cst.Attribute) else other


def negate(node: cst.If | cst.IfExp) -> Iterator[cst.CSTNode]:
    """If not, for if."""
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def drop_statement(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    """Nothing, for a call whose result is not used, or for raise."""
    if m.matches(node.body[0], m.Expr(m.Call()) | m.Raise()):
        yield node.with_changes(body=[cst.Pass()], leading_lines=[], trailing_whitespace=cst.TrailingWhitespace())


def words(node: cst.SimpleString) -> Iterator[cst.CSTNode]:
    """A name or a key; what has a space is for people."""
    if " " not in node.value and '"""' not in node.value:
        yield node.with_changes(value=node.value[:-1] + "XX" + node.value[-1])


def drop_keyword(node: cst.Call) -> Iterator[cst.CSTNode]:
    """The default in the place of an argument that is given by name."""
    for i, argument in enumerate(node.args):
        if argument.keyword is not None and argument.keyword.value not in ("device", "strict"):
            yield node.with_changes(args=[*node.args[:i], *node.args[i + 1 :]])


# What puts None in the place of something only raises, and strings are mostly for people.
LEFT_OUT = ("operator_string", "operator_assignment", "operator_arg_removal", "operator_lambda")
OPERATORS: list[tuple[type, Callable[[Any], Any]]] = [
    *((kind, operator) for kind, operator in mutation_operators if operator.__name__ not in LEFT_OUT),
    (cst.Call, drop_keyword),
    (cst.Call, drop_call),
    (cst.Attribute, drop_transpose),
    (cst.Attribute, other_extreme),
    (cst.If, negate),
    (cst.IfExp, negate),
    (cst.SimpleStatementLine, drop_statement),
    (cst.SimpleString, words),
]
# What only people read, where memory lies or on which device, and what is not run.
SKIPPED = (
    m.Annotation()
    | m.Import()
    | m.ImportFrom()
    | m.Assert()
    | m.Raise()
    | m.Call(func=m.Attribute(m.Name("warnings"), m.Name("warn")))
    | m.Call(func=m.Name("tqdm"))
    | m.Arg(keyword=m.Name("device") | m.Name("strict"))
    | m.Assign(targets=[m.AssignTarget(m.Name("__all__"))])
    | m.FormattedString()
)


class Mutator(cst.CSTVisitor):
    """Collects the mutants of a file."""

    METADATA_DEPENDENCIES = (PositionProvider, ParentNodeProvider)

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.text, self.mutants = path, path.read_text(), list[Mutant]()
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Apply the operators to the node; whether to go on with its children."""
        if m.matches(node, SKIPPED):
            return False
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                for mutated in operator(node):
                    self.add(node, mutated)
        return True

    def span(self, node: cst.CSTNode) -> tuple[int, int, int, int]:
        """Where the text of the node starts and ends, as offsets and as lines."""
        position = self.get_metadata(PositionProvider, node)
        first, last = position.start, position.end
        return (
            self.starts[first.line - 1] + first.column,
            self.starts[last.line - 1] + last.column,
            first.line,
            last.line,
        )

    def add(self, node: cst.CSTNode, mutated: cst.CSTNode) -> None:
        """Add a mutant unless it is the same text or no Python."""
        if isinstance(node, cst.BaseNumber) and node.evaluated_value == mutated.evaluated_value:
            return  # 1e90 and 1e90 + 1
        start, end, line, _ = self.span(node)
        # The parentheses of a node lie outside of its span.
        bare = {"lpar": [], "rpar": []} if hasattr(mutated, "lpar") and getattr(node, "lpar", ()) else {}
        after = cst.Module([]).code_for_node(mutated.with_changes(**bare)).strip()
        before = self.text[start:end]
        after = " " * before.startswith(" ") + after
        place, lines = self.surroundings(node)
        if after.split() == before.split() or (place, before, after, start) in {
            (old.place, old.before, old.after, old.start) for old in self.mutants[-20:]
        }:
            return
        mutant = Mutant(str(self.path.relative_to(ROOT)), place, line, before, after, start, end, lines)
        try:
            compile(mutant.source(), mutant.file, "exec")
        except SyntaxError:
            return
        self.mutants.append(mutant)

    def surroundings(self, node: cst.CSTNode) -> tuple[str, tuple[int, int]]:
        """The name of the function, or of the value outside of functions, and the lines that a test must reach."""
        names, lines, current = [], None, node
        while not isinstance(current, cst.Module):
            if lines is None and isinstance(current, cst.BaseStatement | cst.SimpleStatementLine | cst.Lambda):
                _, _, first, last = self.span(current)
                body = getattr(current, "body", None)
                if isinstance(body, cst.IndentedBlock):
                    last = max(first, self.span(body.body[0])[2] - 1)
                lines = first, last
            if isinstance(current, cst.FunctionDef | cst.ClassDef):
                names.append(current.name.value)
            elif not names and isinstance(current, cst.Assign | cst.AnnAssign):
                target = current.target if isinstance(current, cst.AnnAssign) else current.targets[0].target
                if isinstance(
                    self.get_metadata(ParentNodeProvider, self.get_metadata(ParentNodeProvider, current)), cst.Module
                ):
                    names.append(cst.Module([]).code_for_node(target))
            current = self.get_metadata(ParentNodeProvider, current)
        return ".".join([self.path.stem, *reversed(names)]), lines or (0, 0)


def mutants_of(path: Path) -> list[Mutant]:
    """The mutants of a file."""
    mutator = Mutator(path)
    MetadataWrapper(cst.parse_module(mutator.text), unsafe_skip_copy=True).visit(mutator)
    return mutator.mutants


# --------------------------------------------------------------------------------------------------- putting them in place


Changes = list[tuple[types.CodeType, types.CodeType]] | None


def functions_by_code() -> dict[Any, list[types.FunctionType]]:
    """All functions of the package that exist."""
    found = defaultdict(list)
    for value in gc.get_objects():
        if isinstance(value, types.FunctionType) and value.__code__.co_filename.startswith(str(PACKAGE)):
            found[_identity(value.__code__)].append(value)
    return found


def _identity(code: types.CodeType) -> Any:
    return code.co_filename, code.co_qualname, code.co_firstlineno, tuple(code.co_positions())


def replacements(old: types.CodeType, new: types.CodeType) -> Changes:
    """Code of functions that changed. None if something changed that runs on import."""
    codes = [[const for const in code.co_consts if isinstance(const, types.CodeType)] for code in (old, new)]
    if old.co_flags & 2:  # a function
        found = [] if old == new else [(old, new)]
        return found + [
            pair for pair in zip(*codes, strict=False) if len(codes[0]) == len(codes[1]) and pair[0] != pair[1]
        ]
    at_import = [
        (code.co_code, code.co_names, [const for const in code.co_consts if not isinstance(const, types.CodeType)])
        for code in (old, new)
    ]
    if at_import[0] != at_import[1] or len(codes[0]) != len(codes[1]):
        return None
    found = []
    for pair in zip(*codes, strict=True):
        inner = replacements(*pair)
        if inner is None:
            return None
        found += inner
    return found


def put_in_place(mutant: Mutant, changed: Changes, functions: dict[Any, list[types.FunctionType]]) -> None:
    """Make the package that is imported run the mutant."""
    if changed is None or not all(functions.get(_identity(code)) for code, _ in changed):
        import_again(mutant, mutant.codes()[1])
        return
    for code, other in changed:
        for function in functions[_identity(code)]:
            function.__code__ = other


def import_again(mutant: Mutant, code: types.CodeType) -> None:
    """Give the functions, classes and values of the module what the mutant gives them when it is imported."""
    name = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = sys.modules[name]
    fresh = types.ModuleType(name)
    fresh.__dict__.update(__file__=module.__file__, __package__=module.__package__)
    sys.modules[name] = fresh  # where dataclasses look for their annotations
    exec(code, fresh.__dict__)
    sys.modules[name] = module
    for key, value in list(vars(fresh).items()):
        renew(vars(module), key, value, name)
    for row in set(vars(module)) - set(vars(fresh)):
        if not row.startswith("__"):
            delattr(module, row)
    if name != "lightning_nc.functional":  # where the table is put together
        functional = sys.modules["lightning_nc.functional"]
        functional.METRICS.clear()
        exec(Path(str(functional.__file__)).read_text(), vars(functional))


def renew(scope: Any, key: str, value: Any, module: str) -> None:
    """Set a name in the module, in modules that have imported it, and within functions and classes."""
    old = scope.get(key)
    if isinstance(value, staticmethod | classmethod):
        old, value = getattr(old, "__func__", None), value.__func__
    if isinstance(value, types.FunctionType) and isinstance(old, types.FunctionType) and value.__module__ == module:
        old, value = map(inspect.unwrap, (old, value))  # such as from torch.no_grad()
        if old.__code__ != value.__code__:
            old.__code__ = value.__code__
        old.__defaults__, old.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
    elif isinstance(value, type) and value.__module__ == module and isinstance(old, type):
        for name, part in list(vars(value).items()):
            if isinstance(part, types.FunctionType | staticmethod | classmethod):
                renew(vars(old), name, part, module)
            elif name in vars(old) and isinstance(part, int | float | str | tuple | dict | None) and name[:2] != "__":
                setattr(old, name, part)
    elif isinstance(value, dict) and isinstance(old, dict) and key[:2] != "__":
        if key != "METRICS":
            old.clear()
            old.update(value)
    elif isinstance(value, int | float | str | tuple | list | None) and key[:2] != "__":
        for other in [each for name, each in sys.modules.items() if name.startswith("lightning_nc")]:
            if key in vars(other) and vars(other)[key] is old:
                setattr(other, key, value)


# ------------------------------------------------------------------------------------------------------- testing them


def in_fork(seconds: float, work: Callable[[], str | None]) -> tuple[str, str]:
    """``killed`` and by what, ``survived`` where the work returns None, or ``timeout``."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + GIGABYTES * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        try:
            killer = work()
        except BaseException as error:
            killer = type(error).__name__
        os.write(writing, (killer or "").encode())
        os._exit(1 if killer else 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        killer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (
        "timeout" if status == -signal.SIGALRM else "survived" if status == 0 else "killed",
        killer or f"exit {status}",
    )


def failing(items: list[pytest.Item]) -> str | None:
    """The first of the tests that fails."""
    from _pytest.config import parse_warning_filter
    from _pytest.runner import runtestprotocol

    for item, following in zip(items, [*items[1:], None], strict=True):
        with warnings.catch_warnings():
            for text in (text for mark in item.iter_markers("filterwarnings") for text in mark.args):
                warnings.filterwarnings(*parse_warning_filter(text, escape=False))
            if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
                return item.nodeid
    return None


class Run:
    """A pytest plugin: runs all tests once, then those that reach it for each mutant."""

    def __init__(self, mutants: list[Mutant], budget: float, killers: list[str], save: Callable[[], None]) -> None:
        self.mutants, self.budget, self.all_kills, self.save = mutants, budget, Counter(killers), save
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, int] = {}
        self.kills: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run all mutants, those that act on import last."""
        items = {item.nodeid: item for item in session.items}
        reached = self.clean_run(items)
        functions, started = functions_by_code(), time.monotonic()
        gc.freeze()
        changes = [replacements(*mutant.codes()) for mutant in self.mutants]
        in_order = sorted(zip(self.mutants, changes, strict=True), key=lambda pair: pair[1] is None)
        for number, (mutant, changed) in enumerate(in_order, 1):
            if not reached[mutant.file, mutant.lines[0]]:  # a function that is called on import, or in other processes
                changed = None
            chosen = self.choose(mutant, changed, reached)

            def work(mutant: Mutant = mutant, changed: Changes = changed, chosen: list[str] = chosen) -> str | None:
                put_in_place(mutant, changed, functions)
                return failing([items[name] for name in chosen])

            limit = SECONDS + 5 * sum(self.seconds[name] for name in chosen)
            mutant.status, mutant.killer = in_fork(limit, work) if chosen else ("untested", "")
            for kills in (self.kills[mutant.place], self.all_kills):
                kills[mutant.killer] += mutant.status == "killed"
            if mutant.status != "killed":
                print(mutant.status, f"{mutant.file}:{mutant.line}", mutant.key, file=sys.__stderr__, flush=True)
            if number % 50 == 0 or number == len(in_order):
                self.save()
                done = f"{number}/{len(in_order)} {time.monotonic() - started:.0f} s"
                print(done, file=sys.__stderr__, flush=True)
        return True

    def choose(self, mutant: Mutant, changed: Changes, reached: dict[tuple[str, int], set[str]]) -> list[str]:
        """The names of the tests that may kill a mutant, the most promising first."""
        lines = range(mutant.lines[0], mutant.lines[1] + 1)
        names = set[str]().union(*(reached[mutant.file, line] for line in lines)) & self.seconds.keys()
        if not names or "rank" in mutant.place or "merge" in mutant.place:  # reached in processes of their own
            names = names | {name for name in self.seconds if "ranks" in name}
        if changed is None:  # who reads what is computed on import is not known
            names = names | {name for name, seconds in self.seconds.items() if seconds < QUICK}
        kills = self.kills[mutant.place]
        proven = sorted(names, key=lambda name: (-kills[name], self.seconds[name] / (1 + self.all_kills[name])))
        # Tests mirror the files of the package, and what reaches little else tests that.
        own = f"test_{Path(mutant.file).stem}.py"
        special = sorted(names, key=lambda name: (own not in name, self.lines[name]))
        ordered = list(dict.fromkeys(itertools.chain.from_iterable(zip(proven, special, strict=True))))
        total = itertools.accumulate(self.seconds[name] for name in ordered)
        return [name for name, seconds in zip(ordered, total, strict=True) if seconds < self.budget]

    def clean_run(self, items: dict[str, pytest.Item]) -> dict[tuple[str, int], set[str]]:
        """The tests that reach each line. Those of files that have not changed since the last run need not run again."""
        package = sha(*FILES)
        kept = json.loads(REACHED.read_text()) if REACHED.exists() else {}
        known = {key: found for key, found in kept.items() if key.startswith(package)}
        watch = coverage.Coverage(data_file=None, include=[str(PACKAGE / "*")], config_file=False)
        reached = defaultdict(set)
        for name, item in items.items():
            key = f"{package} {sha(item.path)} {name}"
            if key not in known:
                watch.erase()
                started = time.perf_counter()
                with watch.collect():
                    if failing([item]):
                        raise RuntimeError(f"{name} fails without a mutant")
                data = watch.get_data()
                lines = {str(Path(file).relative_to(ROOT)): data.lines(file) for file in data.measured_files()}
                known[key] = time.perf_counter() - started, lines
            self.seconds[name], self.lines[name] = known[key][0], sum(map(len, known[key][1].values()))
            for file, numbers in known[key][1].items():
                for line in numbers:
                    reached[file, line].add(name)
        REACHED.write_text(json.dumps(known))
        return reached


def sha(*paths: Path) -> str:
    """A short digest of files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def tests() -> list[str]:
    """The arguments of pytest."""
    names = [f"tests/test_{name}.py" for name in TESTS if (ROOT / "tests" / f"test_{name}.py").exists()]
    quiet = ["-o", "addopts=", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "-s", "-W", "ignore"]
    quiet += ["--tb=native", "--assert=plain"]  # nobody reads why a mutant fails
    return [*quiet, "-m", "not slow and not browser", "-k", "not real_processes", *names]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument(
        "--again", action="store_true", help="only mutants that have not been killed yet and are not listed"
    )
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds that the tests of one mutant may take")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # before an installed copy
    RESULTS.parent.mkdir(exist_ok=True)
    rows = {tuple(row["key"]): row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    files = [path.resolve() for path in arguments.files] or FILES
    mutants = [mutant for path in files for mutant in mutants_of(path)]
    if arguments.again:
        dead = {key for key, row in rows.items() if row["status"] == "killed"}
        mutants = [mutant for mutant in mutants if (mutant.file, mutant.key) not in dead and not is_listed(mutant)]
    replaced = set() if arguments.again else {str(path.relative_to(ROOT)) for path in files}
    rows = {key: row for key, row in rows.items() if key[0] not in replaced}

    def save() -> None:
        done = {(mutant.file, mutant.key): mutant for mutant in mutants if mutant.status}
        found = rows | {key: {"key": key, **asdict(mutant)} for key, mutant in done.items()}
        RESULTS.write_text(json.dumps(list(found.values()), indent=1))

    killers = [row["killer"] for row in rows.values() if row["status"] == "killed"]
    started = time.monotonic()
    hypothesis.settings.register_profile(
        "mutation", database=None, derandomize=True, phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate)
    )
    hypothesis.settings.load_profile("mutation")
    if pytest.main(tests(), plugins=[Run(mutants, arguments.budget, killers, save)]):
        raise SystemExit("the tests do not pass without a mutant")
    return report(mutants, time.monotonic() - started)


@functools.cache
def listed() -> list[str]:
    """The mutants that docs/mutation.md lists, each one a line that may end in ``…``."""
    page = ROOT / "docs" / "mutation.md"
    lines = page.read_text().splitlines() if page.exists() else []
    return [line.removeprefix("- ").removesuffix("`") for line in lines if line.startswith("- `")]


def is_listed(mutant: Mutant) -> bool:
    """Whether docs/mutation.md gives the reason why the mutant survives."""
    key = mutant.key.removesuffix("`")
    return any(key.startswith(line[:-1]) if line.endswith("…") else key == line for line in listed())


def report(mutants: list[Mutant], seconds: float) -> int:
    """Print what survives and is not listed."""
    alive = [mutant for mutant in mutants if mutant.status in ("survived", "untested")]
    unknown = [mutant for mutant in alive if not is_listed(mutant)]
    for mutant in unknown:
        print(f"{mutant.status} {mutant.file}:{mutant.line} {mutant.key}")
    counts = Counter(mutant.status for mutant in mutants)
    print(f"{len(mutants)} mutants in {seconds:.0f} s: {dict(counts)}; {len(unknown)} not in docs/mutation.md")
    return bool(unknown)


if __name__ == "__main__":
    sys.exit(main())
