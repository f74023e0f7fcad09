"""Batches that a dataloader may give by mistake: inputs, labels and whole batches of other kinds, and what they mean."""

import math

import numpy as np
import reference
import torch
from conftest import clusters
from hypothesis import strategies as st
from torch import nn

X, Y = clusters(3, 12, 6, 0.5)
SIZE = 10  # of a batch; the last one has 6 samples


def _some(rows, value):
    return torch.where(
        torch.arange(rows.numel()).reshape(rows.shape) % 7 == 0, torch.tensor(value, dtype=rows.dtype), rows
    )


INPUTS = {
    "nan": lambda x: _some(x, math.nan),
    "infinite": lambda x: _some(x, math.inf),
    "huge": lambda x: 1e30 * x,
    "no sample": lambda x: x[:0],
    "0-d": lambda x: x[0, 0],
    "1-d": lambda x: x[0],
    "3-d": lambda x: x[:, None],
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "a text": lambda x: "text",
    "None": lambda x: None,
    "a list": list,
    "lists": lambda x: x.tolist(),
    "NumPy": lambda x: x.numpy(),
    "a dict": lambda x: {"x": x},
    "one sample less": lambda x: x[:-1],
    "one feature less": lambda x: x[:, :-1],
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed in memory": lambda x: x.T.contiguous().T,
}
LABELS = {
    "negative": lambda y: y - 1,
    "ignored in part": lambda y: _some(y, -100),
    "ignored": lambda y: torch.full_like(y, -100),
    "out of range": lambda y: y + 1,
    "huge": lambda y: y + 2**62,
    "whole floats": lambda y: y.float(),
    "fractions": lambda y: y + 0.5,
    "nan": lambda y: y * math.nan,
    "infinite": lambda y: y / 0,
    "bool": lambda y: y > 0,
    "one-hot": lambda y: nn.functional.one_hot(y, 3),
    "one-hot floats": lambda y: nn.functional.one_hot(y, 3).float(),
    "one-hot, too wide": lambda y: nn.functional.one_hot(y, 5),
    "soft": lambda y: 0.9 * nn.functional.one_hot(y, 3) + 0.1 / 3,
    "zeros (B, K)": lambda y: torch.zeros(len(y), 3),
    "several classes": lambda y: torch.ones(len(y), 3, dtype=torch.long),
    "a column": lambda y: y[:, None],
    "a row": lambda y: y[None],
    "0-d": lambda y: y[0],
    "no label": lambda y: y[:0],
    "one label less": lambda y: y[:-1],
    "uint8": lambda y: y.to(torch.uint8),
    "int32": lambda y: y.int(),
    "uint16": lambda y: y.to(torch.uint16),
    "texts": lambda y: ["a"] * len(y),
    "None": lambda y: None,
    "a list": lambda y: y.tolist(),
    "NumPy": lambda y: y.numpy(),
    "sparse": lambda y: y.to_sparse(),
    "complex": lambda y: y.to(torch.complex64),
    "a dict": lambda y: {"a": y},
    "one class": torch.zeros_like,
    "two classes": lambda y: y.clamp(max=1),
}
BATCHES = {
    "None": lambda x, y: None,
    "inputs alone": lambda x, y: (x,),
    "three items": lambda x, y: (x, y, y),
    "no item": lambda x, y: (),
    "a tensor": lambda x, y: x,
    "a text": lambda x, y: "xy",
    "a number": lambda x, y: 5,
    "a dict": lambda x, y: {"input": x, "labels": y},
    "a dict without labels": lambda x, y: {"input": x, "z": y},
    "nested": lambda x, y: ((x, y),),
    "in the other order": lambda x, y: (y, x),
    "an iterator": lambda x, y: iter((x, y)),
    "a set": lambda x, y: {1, 2},
    "Nones": lambda x, y: (None, None),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def cases():
    """Which batches of four are strange, and how: the names of an input, of labels and of a kind of batch, "" for the usual."""

    def names(table):
        return st.sampled_from(["", *table])

    which = st.sampled_from([(0,), (1,), (3,), (1, 2), (0, 1, 2, 3)])
    return st.tuples(which, names(INPUTS), names(LABELS), st.one_of(st.just(""), names(BATCHES)))


def batches_of(case):
    """The batches of a case."""
    which, inputs, labels, kind = case
    found = []
    for place in range(4):
        rows = slice(SIZE * place, SIZE * (place + 1))
        x, y = X[rows].clone(), Y[rows].clone()
        if place in which:
            x = INPUTS[inputs](x) if inputs else x
            y = LABELS[labels](y) if labels else y
        found.append(BATCHES[kind](x, y) if kind and place in which else (x, y))
    return found


def true_nc1(features, batches):
    """NC1 by the float64 reference, where a batch has one plain meaning: nan if there is none, None if it has no such meaning.

    Features of more dimensions are those of a single position, and one-hot rows are indices.
    """
    rows, target = [], []
    for batch in batches:
        x, y, *_ = batch.values() if isinstance(batch, dict) else batch
        x = x.detach().to_dense() if x.layout != torch.strided else x.detach()
        y = y.argmax(dim=1) if y.dim() == 2 and y.shape[1] == 3 else y.flatten()
        with torch.no_grad():
            rows.append(features(x.float().reshape(len(x), -1)).double())
        target.append(y.long())
    rows, target = torch.cat(rows), torch.cat(target)
    if len(rows) != len(target):
        return None
    rows, target = rows[target != -100].numpy(), target[target != -100].numpy()
    if len(np.unique(target)) < 2 or not np.isfinite(rows).all():
        return math.nan
    return reference.nc1_by_axes(rows, target)


def is_own(error):
    """Whether the package raised an error itself: the last frame of its traceback is in the package."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return "lightning_nc" in trace.tb_frame.f_code.co_filename


def is_of_model(error):
    """Whether the model raised an error: a frame of its traceback is in its first layer."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith("nn/modules/linear.py"):
            return True
        trace = trace.tb_next
    return False
