"""The public API as text. ``python tests/api_listing.py`` writes it into tests/public_api.txt, which a test compares."""

import argparse
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

from lightning.pytorch import Callback
from transformers import TrainerCallback

import lightning_nc
from lightning_nc import __main__, functional, huggingface, plotting, runs, theory
from lightning_nc.functional.geometry import Geometry
from lightning_nc.measuring.extraction import Features
from lightning_nc.measuring.measurement import Measurement

FILE = Path(__file__).with_name("public_api.txt")
FRAMEWORKS = (Callback, TrainerCallback)
HOOKS = {*dir(Callback), *dir(TrainerCallback)}  # their names and signatures are the framework's
PUBLIC_BASES = {lightning_nc.NeuralCollapse, theory.Minimum}
WITH_ATTRIBUTES = {lightning_nc.History, lightning_nc.NeuralCollapseCallback, huggingface.NeuralCollapseCallback}


def listing() -> str:
    """Every public name with its signature, the table of metrics, and the command line."""
    own_theory = [name for name, value in vars(theory).items() if getattr(value, "__module__", "") == theory.__name__]
    rooms = {
        lightning_nc: lightning_nc.__all__,
        huggingface: huggingface.__all__,
        functional: functional.__all__,
        theory: sorted(name for name in own_theory if not name.startswith("_")),
        plotting: plotting.__all__,
        runs: ["read_run"],
    }
    lines = []
    for room, names in rooms.items():
        lines += ["", f"# {room.__name__}"]
        for name in names:
            lines += described(name, getattr(room, name))
    lines += ["", "# what functions return"]
    for kind in (Measurement, Features, Geometry):
        lines += described(kind.__name__, kind)
    lines += [
        "",
        "# lightning_nc.functional.METRICS",
        *metrics(),
        "",
        "# command line",
        *options("lightning-nc", parser()),
    ]
    return "\n".join(lines[1:]) + "\n"


def described(name: str, value: object) -> Iterator[str]:
    """A line for a function, or one for a class and one for each of its public members."""
    if inspect.isclass(value):
        yield from members(name, value)
    elif inspect.isfunction(value):
        yield name + signature(value)
    else:
        yield name


def members(name: str, kind: type) -> Iterator[str]:
    """A class and its public members. Those that come from another package, or from a listed base, are left out."""
    base = next((base for base in kind.__mro__[1:] if base in PUBLIC_BASES), object)
    yield f"class {name}{signature(kind)}" + (f", a {base.__name__}" if base is not object else "")
    found = dict.fromkeys(vars(kind()), None) if kind in WITH_ATTRIBUTES else {}
    for own in reversed([own for own in kind.__mro__ if own.__module__.startswith("lightning_nc")]):
        found |= dict.fromkeys(inspect.get_annotations(own)) | vars(own)
    for member, value in sorted(found.items()):
        inherited = base is not object and getattr(base, member, None) is getattr(kind, member, None)
        if member.startswith("_") or inherited or (issubclass(kind, FRAMEWORKS) and member in HOOKS):
            continue
        if isinstance(value, classmethod | staticmethod):
            yield f"    {type(value).__name__} {member}{signature(value.__func__)}"
        else:
            yield f"    {member}{signature(value) if inspect.isfunction(value) else ''}"


class Verbatim(str):
    """An annotation that is printed without quotes."""

    __repr__ = str.__str__


def signature(function: Callable) -> str:
    """As ``inspect`` prints it, with annotations as they are written; a line for each argument of a long one. Nothing for a class
    without ``__init__``.
    """
    try:
        found = inspect.signature(function)
    except ValueError:
        return ""

    def written(annotation: object) -> object:
        text = getattr(annotation, "__forward_arg__", annotation)
        return Verbatim(text) if isinstance(text, str) else text

    parameters = [entry.replace(annotation=written(entry.annotation)) for entry in found.parameters.values()]
    text = str(found.replace(parameters=parameters, return_annotation=written(found.return_annotation)))
    text = re.sub("<function .*?>", "<function>", text.replace("MetricSpec.<lambda>", "lambda"))
    if len(text) > 100:
        text = re.sub(rf", (?=\**({'|'.join(found.parameters)}):)", ",\n        ", text)
    return text


def metrics() -> Iterator[str]:
    """Each name that ``metrics=`` takes, and what it needs; rows that a user added are left out."""
    for name, spec in functional.METRICS.items():
        if spec.family == functional.MetricSpec._field_defaults["family"]:
            continue
        needs = [*spec.needs, *["samples"] * spec.samples, *["opt-in"] * spec.opt_in]
        yield f"{name}: {', '.join(needs) or 'features'}"


def parser() -> argparse.ArgumentParser:
    """The parser that the command line makes."""
    with patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=StopIteration) as parse:
        try:
            __main__.main([])
        except StopIteration:
            return parse.call_args.args[0]
    raise AssertionError("main() parses no arguments")


def options(command: str, of: argparse.ArgumentParser) -> Iterator[str]:
    """A line for each option and argument, with its default, of a command and the commands below it."""
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options(f"{command} {name}", below)
        elif action.dest != "help":
            default = "" if action.default in (None, argparse.SUPPRESS, False) else f" = {action.default}"
            several = " ..." if action.nargs == "+" else " [...]" if action.nargs == "?" else ""
            yield f"{command} {', '.join(action.option_strings) or action.metavar}{several}{default}"


if __name__ == "__main__":
    FILE.write_text(listing(), encoding="utf-8")
