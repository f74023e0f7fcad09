"""Measure neural collapse: torchmetrics metrics, plain functions and a Lightning callback."""

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
