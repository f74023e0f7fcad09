"""The command ``lightning-nc``: what it draws, and one clear line for everything that goes wrong."""

import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import full_disk, is_picture

import lightning_nc
from lightning_nc import History
from lightning_nc.__main__ import main


@pytest.fixture
def run(tmp_path):
    """Writes a run into a folder of the given name, as CSVLogger does."""

    def write(name, header="epoch,nc/nc1,nc/nc2_of,nc/nc3", values="0.5,0.4,0.3"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("\n".join([header, *(f"{epoch},{values}" for epoch in range(6)), ""]))
        return folder

    return write


@pytest.fixture
def refused(capsys):
    """Runs the command; asserts status 1 and a single line of error, which is returned."""

    def call(*arguments):
        assert main(["plot", *map(str, arguments)]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("lightning-nc: ")
        assert output.err.count("\n") == 1
        return output.err

    return call


def test_one_run_or_several_are_drawn_and_counted(run, tmp_path, capsys):
    a, b, out = run("a"), run("b"), tmp_path / "both.png"
    assert main(["plot", str(a), str(b / "metrics.csv"), "-k", "3", "-o", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{a / 'metrics.csv'}: 6 measurements", f"{b / 'metrics.csv'}: 6 measurements", f"{out}: 2 runs"]
    assert is_picture(out)
    assert main(["plot", str(a), "-o", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: 1 run"


def test_the_picture_goes_to_a_folder_that_exists_or_gets_the_suffix_of_a_picture(run, tmp_path):
    (tmp_path / "folder").mkdir()
    assert main(["plot", str(run("a")), "-o", str(tmp_path / "folder")]) == 0
    assert is_picture(tmp_path / "folder" / "neural_collapse.png")
    assert main(["plot", str(tmp_path / "a"), "-o", str(tmp_path / "plain")]) == 0
    assert is_picture(tmp_path / "plain.png")


def test_keys_as_measure_returns_them_are_drawn(run, tmp_path):
    folder = run("a", "epoch,stage,nc1,layer3/nc1", "test,0.5,0.4")
    assert main(["plot", str(folder), "-o", str(tmp_path / "a.png")]) == 0
    assert is_picture(tmp_path / "a.png")


def test_the_file_of_a_history_is_drawn(tmp_path, capsys):
    history = History(tmp_path / "nc.csv")
    for epoch in range(3):
        history.append({"nc1": 0.5**epoch}, epoch=epoch)
        history.append({"nc1": 0.8**epoch}, epoch=epoch, stage="test")
    assert main(["plot", str(history.path), "-o", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{history.path}: 6 measurements"
    assert is_picture(tmp_path / "a.png")


def test_runs_are_drawn_over_each_other_by_label_layer_and_group(run, tmp_path, capsys):
    runs = [str(run(name, "epoch,nc/nc1,nc/layer3/nc1", "0.5,0.4")) for name in ("a-seed0", "a-seed1", "b")]
    out = tmp_path / "o.png"
    for options in (
        ["--labels", "x", "y", "z"],
        ["--group"],
        ["--labels", "x", "x", "z", "--group"],
        ["--layer", "layer3"],
    ):
        assert main(["plot", *runs, "--overlay", "-o", str(out), *options]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{out}: 3 runs"
        assert is_picture(out)


def test_the_seeds_of_a_table_of_the_ufm_example_are_runs(tmp_path, capsys):
    lines = [f"{seed},{100 * i},{0.5 / (i + 1)},{0.1 + seed},1.0" for seed in range(3) for i in range(4)]
    (tmp_path / "figure4-seeds.csv").write_text("\n".join(["seed,iteration,objective,nc1,nc1_h1", *lines, ""]))
    assert (
        main(["plot", str(tmp_path / "figure4-seeds.csv"), "--overlay", "--group", "-o", str(tmp_path / "a.png")]) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'a.png'}: 3 runs"


def test_a_checkpoint_without_a_log_is_drawn(tmp_path):
    history = History()
    for epoch in range(3):
        history.append({"nc1": 0.5**epoch}, epoch=epoch)
    torch.save(
        {
            "pytorch-lightning_version": "2.6.0",
            "state_dict": {"weight": torch.zeros(1)},
            "callbacks": {"NeuralCollapseCallback": history.state()},
        },
        tmp_path / "last.ckpt",
    )
    assert main(["plot", str(tmp_path), "-o", str(tmp_path / "a.png")]) == 0
    assert is_picture(tmp_path / "a.png")


def test_options_that_do_not_fit_are_one_line(run, refused):
    a, b = run("a"), run("b")
    assert "no metric 'x' was measured; measured were nc1, nc2_of, nc3" in refused(a, "--metrics", "nc1", "x")
    assert "did you mean 'nc2_of'" in refused(a, "--metrics", "nc2_off")
    assert "--labels must name each of the 2 runs, got 1" in refused(a, b, "--labels", "x")
    assert "--labels must differ" in refused(a, b, "--labels", "x", "x")
    assert "pass --overlay too" in refused(a, b, "--group")
    assert "no two runs have the same label" in refused(a, b, "--overlay", "--group")
    assert "group must be a regular expression, got '*': nothing to repeat" in refused(
        a, b, "--overlay", "--group", "*"
    )


def test_dollar_signs_in_paths_layers_and_metrics_are_no_formulas(run, tmp_path):
    runs = [run(name, r"epoch,nc/$\frac$/nc1,nc/$\frac$,nc/nc3") for name in (r"$\frac$", r"b$\frac$")]
    assert main(["plot", *map(str, runs), "-o", str(tmp_path / "a.png")]) == 0
    assert is_picture(tmp_path / "a.png")


@pytest.mark.parametrize("command", [["plot"], ["plot", "--overlay"], ["report"]])
@pytest.mark.parametrize(
    ("header", "values", "message"),
    [
        ("stage,epoch,nc/nc1", "Train,0,0.5", "stage must be one of train, validate, test, got 'Train'"),
        ("epoch,nc/nc1,nc1", "0,0.5,0.5", "a row has a metric twice"),
        ("epoch,nc/nc1_permuted", "0,0.5", "nothing to plot in 1 rows"),
    ],
)
def test_a_run_without_curves_is_refused_with_its_name_and_nothing_is_left(
    tmp_path, capsys, command, header, values, message
):
    (tmp_path / "a.csv").write_text(f"{header}\n{values}\n")
    (tmp_path / "b.csv").write_text("epoch,nc/nc1\n0,0.5\n")
    name, *options = command
    out = tmp_path / "out.html"
    assert main([name, str(tmp_path / "b.csv"), str(tmp_path / "a.csv"), *options, "-o", str(out)]) == 1
    assert f"lightning-nc: {tmp_path / 'a.csv'}: {message}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(("command", "out"), [("plot", "nc.png"), ("report", "nc.html")])
def test_on_a_full_disk_the_old_file_stays_and_nothing_partial_is_left(run, tmp_path, capsys, command, out):
    folder = run("a")
    (tmp_path / out).write_text("the old one")
    with full_disk(2000):
        status = main([command, str(folder), "-o", str(tmp_path / out)])
    assert status == 1
    assert re.search(rf"lightning-nc: .*File too large.*{out}", capsys.readouterr().err)
    assert (tmp_path / out).read_text() == "the old one"
    assert {path.name for path in tmp_path.iterdir()} == {"a", out}


def test_values_at_the_ends_of_the_floats_are_drawn_and_described(run, tmp_path):
    folder = run("a", values="1e-320,1e308,0.3")
    with (folder / "metrics.csv").open("a") as file:
        file.write("6,1e308,1e-320,inf\n")
    assert main(["plot", str(folder), "-o", str(tmp_path / "a.png")]) == 0
    assert main(["report", str(folder), "-o", str(tmp_path / "a.html")]) == 0


def test_the_same_run_twice_is_refused(run, refused, tmp_path):
    a, b = run("a"), run("b")
    for other in (a, a / "metrics.csv", b / ".." / "a"):
        assert f"{a} and {other} are the same run; pass each run once" in refused(a, b, other)


def test_a_csv_without_metrics_says_what_it_has_and_what_is_needed(run, refused):
    message = refused(run("a", "epoch,loss,accuracy,lr"))
    assert "found the columns ['epoch', 'loss', 'accuracy', 'lr']" in message
    assert "needs a column 'epoch' and a metric such as 'nc/nc1' or 'layer3/nc1'" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epoch,nc/nc1\ninf,1\n", "epoch must be a finite number"),
        (b"epoch,nc/nc1\nnan,1\n", "epoch must be a finite number"),
        (b"", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n\xff", "not a CSV file in UTF-8"),
        (b'epoch,"lo\nss"\n0,1\n', "needs a column"),
        (b"epoch,nc/nc1\n0,x\ny\n", "must be a number"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_with_its_name(refused, tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    said = refused(tmp_path / "a.csv")
    assert message in said
    assert str(tmp_path / "a.csv") in said


def test_a_path_without_a_run_is_one_line_that_names_the_logs(refused, tmp_path):
    for name in ("none", "of two\nlines"):
        assert "metrics.csv, events.out.tfevents*, run-*.wandb" in refused(tmp_path / name)


def test_an_output_that_cannot_be_written_is_one_line(run, refused, tmp_path):
    a = run("a")
    assert "xyz" in refused(a, "-o", tmp_path / "a.xyz")
    assert "No such file or directory" in refused(a, "-o", tmp_path / "none" / "a.png")
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(a, "-o", tmp_path / "file" / "a.png")


def test_a_file_that_may_not_be_read_is_one_line(run, refused, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert f"Permission denied: '{run('a') / 'metrics.csv'}'" in refused(run("b").parent / "a")


def test_a_package_that_is_missing_is_named_with_the_remedy(run, refused, monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_nc.plotting", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "a figure needs matplotlib: pip install matplotlib" in refused(run("a"))


@pytest.mark.parametrize("number", ["1", "-3", "ten", "2.5", ""])
def test_a_number_of_classes_that_is_no_whole_number_of_at_least_two_is_refused(run, capsys, number):
    with pytest.raises(SystemExit):
        main(["plot", str(run("a")), f"-k{number}" if number else "-k="])
    assert "--num-classes: must be a whole number of at least 2, got " in capsys.readouterr().err


def test_the_version_lists_what_a_report_of_a_defect_needs(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    said = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["lightning-neural-collapse"] == lightning_nc.__version__
    assert said["torch"] == version("torch")
    assert said["Python"] == platform.python_version()
    assert {"lightning", "torchmetrics", "numpy", "platform"} <= said.keys()
