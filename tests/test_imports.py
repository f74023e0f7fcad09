"""Imports run downward only, and optional packages are loaded where they are needed."""

import ast
from pathlib import Path

import lightning_nc

PACKAGE = Path(lightning_nc.__file__).parent

# A module imports only from floors that stand before its own. CONTRIBUTING.md shows the same house as a picture.
FLOORS = [
    {"moments", "keys", "theory", "simplex_etf", "versions", "extras"},
    {"comparison", "schedule", "mergeable", "regression_moments"},
    {"functional.pairs", "functional.projection", "functional.regression"},
    {"functional.table"},
    {"functional.variability", "functional.frames", "functional.angles", "functional.samples", "functional.spectrum"},
    {"functional.alignment", "functional.geometry", "functional.weights"},
    {"functional.__init__"},
    {"metrics", "certainty", "regression"},
    {"measuring.hooks", "measuring.loaders", "measuring.distributed"},
    {"measuring.layout", "measuring.batches", "measuring.snapshot"},
    {"measuring.labels"},
    {"measuring.classifier", "measuring.trial"},
    {"measuring.probe", "measuring.kept", "measuring.classes"},
    {"measuring.collector"},
    {"measuring.measurement", "measuring.held_out"},
    {"measuring.evaluation"},
    {"measuring.loops", "measuring.extraction"},
    {"runs", "trainers", "scenes"},
    {"plotting.style", "checkpoints"},
    {"plotting.curves", "specs", "saved"},
    {"plotting.panels", "plotting.overlay", "plotting.depth", "plotting.classes", "plotting.geometry"},
    {"plotting.__init__"},
    {"history"},
    {"loggers", "sweep"},
    {"report.series"},
    {"report.figures", "report.words"},
    {"report.geometry", "report.parts"},
    {"report.page"},
    {"report.__init__"},
    {"results"},
    {"callback", "huggingface"},
    {"__init__", "measuring.__init__", "__main__"},
]
OPTIONAL = {
    "matplotlib",
    "imageio_ffmpeg",
    "wandb",
    "tensorboard",
    "torchvision",
    "timm",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "plotly",
    "PIL",
    "sklearn",
}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def for_types_alone(node):
    """Whether this is ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(module, nested=True):
    """What a module imports, by full name; with ``nested=False`` only what is imported together with it."""
    found, nodes = set(), list(ast.parse(MODULES[module].read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif nested or not (for_types_alone(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))
    return found


def own(names):
    """The modules of the package among imported names."""
    short = {name.removeprefix("lightning_nc.") for name in names if name.startswith("lightning_nc.")}
    return short & MODULES.keys()


def loaded_with(module):
    """Names of everything that is imported, directly or through the package's own modules, together with a module."""
    names, waiting, seen = set(), [module], set()
    while waiting:
        if (current := waiting.pop()) not in seen:
            seen.add(current)
            names |= imports(current, nested=False)
            waiting += own(imports(current, nested=False))
    return names


def test_every_module_has_its_floor():
    placed = [module for floor in FLOORS for module in floor]
    assert sorted(placed) == sorted(MODULES)


def test_imports_run_downward_only():
    floor_of = {module: number for number, floor in enumerate(FLOORS) for module in floor}
    upward = {
        (module, other) for module in MODULES for other in own(imports(module)) if floor_of[other] >= floor_of[module]
    }
    assert upward == set()


def test_the_check_sees_imports_inside_functions_and_of_names():
    assert {"history", "runs"} <= own(imports("__main__"))
    assert "measuring.hooks" in own(imports("measuring.probe"))
    assert own(imports("__main__", nested=False)) == set()


def test_measuring_and_the_metrics_know_no_trainer():
    last = next(number for number, floor in enumerate(FLOORS) if "measuring.evaluation" in floor)
    ground = [module for floor in FLOORS[: last + 1] for module in floor]
    assert "metrics" in ground
    for module in ground:
        for name in imports(module):
            assert not name.startswith(("lightning.pytorch", "pytorch_lightning")), (module, name)
            assert name not in ("lightning.Trainer", "lightning.LightningModule", "lightning.Callback"), (module, name)


def test_no_optional_package_is_imported_together_with_the_package_or_the_reader_of_runs():
    for module in (
        "callback",
        "measuring.extraction",
        "regression",
        "__main__",
        "runs",
        "history",
        "loggers",
        "theory",
    ):
        assert {name.split(".")[0] for name in loaded_with(module)}.isdisjoint(OPTIONAL), module
    assert "matplotlib" in {name.split(".")[0] for name in loaded_with("plotting.panels")}
    assert {name.split(".")[0] for name in loaded_with("huggingface")} & OPTIONAL == {"transformers"}
