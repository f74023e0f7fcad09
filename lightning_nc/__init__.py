"""Measure neural collapse: torchmetrics metrics, plain functions and a Lightning callback."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_nc.callback import NeuralCollapseCallback
    from lightning_nc.history import History
    from lightning_nc.measuring.evaluation import measure
    from lightning_nc.measuring.extraction import extract_features
    from lightning_nc.metrics import NC1, NC2, NC3, NC4, NeuralCollapse
    from lightning_nc.regression import NeuralRegressionCollapse
    from lightning_nc.schedule import log_spaced
    from lightning_nc.simplex_etf import SimplexETF

__all__ = [
    "NC1",
    "NC2",
    "NC3",
    "NC4",
    "History",
    "NeuralCollapse",
    "NeuralCollapseCallback",
    "NeuralRegressionCollapse",
    "SimplexETF",
    "extract_features",
    "log_spaced",
    "measure",
]

__version__ = "0.1.0"

_MODULES = {
    "NeuralCollapseCallback": "callback",
    "History": "history",
    "measure": "measuring.evaluation",
    "extract_features": "measuring.extraction",
    **dict.fromkeys(("NC1", "NC2", "NC3", "NC4", "NeuralCollapse"), "metrics"),
    "NeuralRegressionCollapse": "regression",
    "log_spaced": "schedule",
    "SimplexETF": "simplex_etf",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a name or a module of the package when it is first used: the functions and ``--help`` need no Lightning."""
        path = f"{__name__}.{_MODULES.get(name, name)}"
        try:
            module = import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        return getattr(module, name) if name in _MODULES else module

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
