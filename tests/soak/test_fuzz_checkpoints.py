"""Damaged, foreign and hostile checkpoints: one line with their name; nothing in them runs, and checksums hold."""

import io
import json
import math
import pickle
import struct
import warnings
import zipfile
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from conftest import Classifier, fit, loader
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from lightning_nc import History, NeuralCollapseCallback, measure
from lightning_nc.__main__ import main
from soak.damage import damaged, damages

MODEL = ["--model", "conftest:Classifier", "--data", "conftest:loader"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Bytes by name of what a training leaves, and its history."""
    folder = tmp_path_factory.mktemp("saved")
    callback = NeuralCollapseCallback(geometry=(0, 1, 2))
    _, model = fit(folder, [callback, ModelCheckpoint(folder, filename="a", every_n_epochs=1, save_top_k=-1)])
    state = model.state_dict()
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "weights.safetensors")
    rows = [{"epoch": epoch, "step": epoch, "nc/nc1": 0.5**epoch} for epoch in range(20)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    last = max(folder.glob("a*.ckpt"), key=lambda file: file.stat().st_mtime)
    names = ("zip.pt", "legacy.pt", "weights.safetensors", "trainer_state.json")
    return (
        {"a.ckpt": last.read_bytes(), **{name: (folder / name).read_bytes() for name in names}},
        callback.history,
        model,
    )


def run(*arguments):
    with redirect_stderr(io.StringIO()) as error, redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = main([str(argument) for argument in arguments])
    return status, error.getvalue()


def rows_of(file):
    """The rows of a file; None if it is refused, by its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return History.read(file)
    except (ValueError, OSError) as error:
        message = str(error)
        assert str(file) in message
        return None


def check_measure(file):
    """The rows of ``lightning-nc measure``; None if it says in a line with the name why there are none."""
    out = file.with_name("out.csv")
    out.unlink(missing_ok=True)
    status, said = run("measure", file, *MODEL, "-o", out)
    if status:
        assert f"lightning-nc: {file}: " in said
        assert not out.exists()
        return None
    return History(out)


def test_a_damaged_checkpoint_is_refused_by_name_or_read_as_it_was(budget, saved, tmp_path):
    files, history, model = saved
    value = measure(model, loader(False), progress=False)["nc1"]

    def check(drawn):
        name, steps = drawn
        data = damaged(files[name], steps)
        budget.tally.add("fuzzed checkpoints", data)
        file = tmp_path / name
        file.write_bytes(data)
        if name in ("a.ckpt", "trainer_state.json") and (rows := rows_of(file)) is not None and name == "a.ckpt":
            assert list(rows) == list(history)[: len(rows)]
        if name != "trainer_state.json" and (found := check_measure(file)) and name in ("a.ckpt", "zip.pt"):
            assert found[-1]["nc/nc1"] == pytest.approx(value, rel=1e-12)  # the format has checksums

    budget.check(check, st.tuples(st.sampled_from([*["a.ckpt", "zip.pt"] * 2, *files]), damages()))


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def zipped(contents):
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def tensors(header, body=bytes(8)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def bomb():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data.pkl", b"0" * 50_000_000)
    return file.getvalue()


WEIGHTS = Classifier().state_dict()
FILES = {
    "empty.ckpt": b"",
    "zeros.ckpt": bytes(4096),
    "text.ckpt": b"<html>404</html>" * 90,
    "hdf5.ckpt": b"\x89HDF\r\n\x1a\n" + bytes(2000),
    "bomb.ckpt": bomb(),
    "list.ckpt": zipped([1, 2]),
    "number.ckpt": zipped(5),
    "none.pt": zipped(None),
    "tensor.pt": zipped(torch.ones(3)),
    "texts.ckpt": zipped({"state_dict": {"a": "x"}}),
    "shapes.pt": zipped({name: value[:1] if value.dim() else value for name, value in WEIGHTS.items()}),
    "names.pt": zipped({f"{name}x": value for name, value in WEIGHTS.items()}),
    "two.pt": zipped({"state_dict": WEIGHTS, "model": WEIGHTS}),
    "meta.pt": zipped({name: value.to("meta") for name, value in WEIGHTS.items()}),
    "sparse.pt": zipped({name: value.to_sparse() if value.dim() == 2 else value for name, value in WEIGHTS.items()}),
    "empty.safetensors": b"",
    "negative.safetensors": tensors(entry(offsets=(0, -8))),
    "large.safetensors": struct.pack("<Q", 2**60) + b"{}",
    "lies.safetensors": tensors(entry(shape=(10**9, 10**9))),
    "dtype.safetensors": tensors(entry(dtype="X")),
    "short.safetensors": tensors(entry(shape=(20,), offsets=(0, 80))),
    "json.safetensors": tensors(b"{{{"),
    "deep.safetensors": tensors(b"[" * 100_000),
    "none.safetensors": tensors({}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_of_the_model_is_refused_by_name(tmp_path, tally, name):
    tally.add("faults", ("file", name))
    file = tmp_path / name
    file.write_bytes(FILES[name])
    assert check_measure(file) is None
    if file.suffix == ".ckpt":
        assert rows_of(file) is None


@pytest.mark.parametrize("kind", ["zip", "pickle", "legacy", "inside", "weights"])
def test_nothing_in_a_checkpoint_is_run(tmp_path, tally, kind):
    tally.add("faults", ("hostile", kind))
    file, mark = tmp_path / "a.ckpt", tmp_path / "mark"
    hostile = Touches(mark)
    contents = {"zip": hostile, "inside": {"state_dict": WEIGHTS, "callbacks": {"NeuralCollapse": hostile}}}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(hostile))
    elif kind == "legacy":
        torch.save(hostile, file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(zipped(contents.get(kind, {"state_dict": {**WEIGHTS, "net.0.weight": hostile}})))
    assert check_measure(file) is None
    assert rows_of(file) is None
    for command, out in (("plot", "out.png"), ("report", "out.html")):
        assert run(command, file, "-o", tmp_path / out)[0] == 1
        assert not (tmp_path / out).exists()
    assert not mark.exists()


values = st.one_of(
    st.none(),
    st.integers(-1, 3),
    st.just(10**400),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=3),
)


def test_parts_of_a_history_of_any_form_are_left_out_or_refused_and_never_a_traceback(budget, saved, tmp_path):
    state = saved[1].state()
    contents = {"state_dict": WEIGHTS, "pytorch-lightning_version": "2.6.0"}
    scene, row = json.loads(state["scenes"][0]), state["history"][0]

    def change(whole):
        """The dict with one entry more, less or of another value."""
        names = st.sampled_from([*whole, "other"])
        return st.tuples(names, st.one_of(values, st.just(KeyError))).map(
            lambda pair: {name: value for name, value in {**whole, pair[0]: pair[1]}.items() if value is not KeyError}
        )

    parts = st.one_of(
        change(row).map(lambda found: {**state, "history": [found]}),
        change(scene).map(lambda found: {**state, "scenes": [json.dumps(found)]}),
        change(state["per_class"]).map(lambda found: {**state, "per_class": found}),
        change(state["about"]).map(lambda found: {**state, "about": found}),
        change(state),
    )

    def check(drawn):
        budget.tally.add("fuzzed checkpoints", drawn)
        file = tmp_path / "a.ckpt"
        torch.save({**contents, "callbacks": {"NeuralCollapseCallback": drawn}}, file)
        rows = rows_of(file)
        assert rows is None or all(math.isfinite(row["epoch"]) for row in rows)
        for command, out in (("plot", "out.png"), ("report", "out.html")):
            status, said = run(command, file, "-o", tmp_path / out)
            assert status == 0 or str(file) in said

    budget.check(check, parts)
