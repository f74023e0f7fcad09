"""The report says what the rows hold, in words and figures, and stays one safe file whatever the names are."""

import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from report_runs import PAPER, collapsing

from lightning_nc import History
from lightning_nc.__main__ import main
from lightning_nc.report import report, write_report
from lightning_nc.report.series import number
from lightning_nc.report.words import cautions, summary
from lightning_nc.scenes import Scene

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & \"'`"


@pytest.fixture(scope="module")
def run():
    return collapsing(24, layers=("layer1", "layer2"))


@pytest.fixture(scope="module")
def page(run):
    return report({"a run": run})


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        self.open.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


def drawn(text):
    """What the script of a page draws."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def without_plotly(text):
    return re.sub(r'(id="plotly">).*?(</script>)', r"\1\2", text, flags=re.DOTALL)


def rows(values, **others):
    """A history of one metric at the classifier's input."""
    return History(
        rows=[{"stage": "train", "epoch": epoch, "nc/nc1": value, **others} for epoch, value in enumerate(values)]
    )


# ------------------------------------------------------------------------------------------------------------ words


def test_the_summary_names_the_frame_and_how_far_each_metric_went(run):
    found = summary(run)
    first, last = run[0], run[-1]
    start, end = first["nc/nc2_etf_centered"], last["nc/nc2_etf_centered"]
    assert found["Which geometry"] == [
        f"The class means are nearest to a simplex ETF: `nc2_etf_centered` fell from {start:.3g} at epoch 0 to {end:.3g} at "
        f"epoch 23, by a factor of {start / end:.2g}."
    ]
    assert (
        f"`nc1` fell from {first['nc/nc1']:.3g} at epoch 0 to {last['nc/nc1']:.3g} at epoch 23" in found["How far"][0]
    )
    assert "`nc3_centered`" in found["How far"][1]
    fell = 1 - last["nc/nc1"] / run[17]["nc/nc1"]
    assert found["How far"][-1] == f"`nc1` was still falling: {100 * fell:.0f} % lower than at epoch 17."
    assert found["Measured"] == ["The training data, in 24 epochs from 0 to 23."]


def test_the_summary_gives_nc1_by_depth_and_where_it_rises(run):
    depths = [run[-1][f"nc/{name}nc1"] for name in ("layer1/", "layer2/", "")]
    text = "layer1 {:.3g}, layer2 {:.3g}, classifier input {:.3g}.".format(*depths)
    assert summary(run)["At which depth"] == [
        f"`nc1` by depth, at the end: {text} It does not increase from layer to layer."
    ]
    rising = History(rows=[{"epoch": 0, "nc/a/nc1": 1.0, "nc/b/nc1": 2.0, "nc/nc1": 1.5}])
    assert summary(rising)["At which depth"] == [
        "`nc1` by depth, at the end: a 1, b 2, classifier input 1.5. It rises at b."
    ]
    assert summary(rows([1.0]))["At which depth"][0].startswith("One depth alone was measured, classifier input")


def test_the_effective_depth_is_that_of_the_last_epoch_that_has_one():
    values = [{"nc/effective_depth": depth} for depth in (3.0, 2.0, math.nan)]
    history = History(
        rows=[
            {"epoch": epoch, "nc/a/ncc_error": 0.5, "nc/b/ncc_error": 0.0, "nc/ncc_error": 0.0, **value}
            for epoch, value in enumerate(values)
        ]
    )
    assert summary(history)["At which depth"][0].startswith("The effective depth is 2 of 3 at epoch 1:")


def test_a_class_that_lags_is_named_with_the_class_it_is_near_to(run):
    table = {"class": [3, 5, 7, 9], "nearest": [5, 3, 9, 7], "nearest_cdnv": [0.5, 0.1, 0.1, math.nan]}
    history = History.from_state({"history": list(run), "per_class": table})
    assert summary(history)["Which classes lag"] == [
        "Class 3 (nearest class 5, 0.5): `nearest_cdnv` is more than twice the median of the classes, 0.1."
    ]
    even = History.from_state({"history": list(run), "per_class": {**table, "nearest_cdnv": [0.11, 0.1, 0.1, 0.1]}})
    assert summary(even)["Which classes lag"] == [
        "No class lags. The largest `nearest_cdnv` is 0.11 (class 3, nearest class 5); the median is 0.1."
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nc2_of", "nearest to an orthogonal frame: `nc2_of`"),
        ("none", "No frame is near: class means of the same lengths in random directions can be as close."),
        (None, "Which frame is nearest is in the checkpoint of the run, which was not found."),
    ],
)
def test_which_geometry_follows_the_rows(run, name, text):
    others = [{key: value for key, value in row.items() if key != "geometry"} for row in run]
    history = History(rows=[{**row, **({} if name is None else {"geometry": name})} for row in others])
    assert text in summary(history)["Which geometry"][0]


def test_a_metric_that_rises_stays_or_dips_is_said_so():
    assert "rose from 1 at epoch 0 to 2 at epoch 1, by a factor of 2." in summary(rows([1.0, 2.0]))["How far"][0]
    assert "hardly changed: 1 at epoch 0, 1.01 at epoch 1." in summary(rows([1.0, 1.01]))["How far"][0]
    assert "Its least was 0.1 at epoch 1." in summary(rows([1.0, 0.1, 0.5]))["How far"][0]
    assert "`nc1` is not a number at epoch 1." in summary(rows([1.0, math.nan]))["How far"][0]
    assert "no longer falling: 1 at epoch 7, 1 at the end." in summary(rows([2.0] + [1.0] * 9))["How far"][-1]
    assert "hardly changed: 0 at epoch 0, 0 at epoch 1." in summary(rows([0.0, 0.0]))["How far"][0]


def test_a_metric_of_a_layer_is_said_to_be_of_that_layer():
    history = History(rows=[{"epoch": 0, "layer1/nc1": 2.0, "layer2/nc1": 0.5}])
    assert summary(history)["How far"] == ["NC1, within-class variability of layer2: `nc1` is 0.5 at epoch 0."]


def test_the_nearest_frame_is_that_of_the_dataloader_that_the_words_are_about():
    history = History()
    for prefix, near, far, frame in (("val", 0.1, 0.9, "nc2_of"), ("val_1", 0.9, 0.1, "nc2_etf_centered")):
        values = {f"nc/{prefix}/nc2_of": near, f"nc/{prefix}/nc2_etf_centered": far}
        history.append(values, epoch=0, step=len(history), stage="validate", geometry=frame)
    assert "nearest to an orthogonal frame: `nc2_of` is 0.1" in summary(history)["Which geometry"][0]


def test_a_checkpoint_that_is_older_than_the_log_is_said_so(run):
    history = History(rows=run)
    history.scenes, history.about = run.scenes[:5], run.about
    assert "The checkpoint of the run ends at epoch 4, before the curves" in " ".join(cautions(history))


def test_layers_in_the_order_of_a_loggers_file_are_said_to_be_so(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,nc/blocks/nc1,nc/nc1,nc/stem/nc1\n0,1,2,3\n1,1,1,1\n")
    assert "Layers stand in the order of their names" in " ".join(cautions(History.read(file)))


def test_a_loss_is_drawn_beside_layers_without_the_classifiers_input():
    history = History(rows=[{"epoch": 0, "layer1/nc1": 2.0, "layer2/nc1": 0.5, "train_loss": 1.5}])
    page = report({"a run": history})
    (loss,) = (trace for figure in drawn(page)["figures"].values() for trace in figure["data"] if trace["y"] == [1.5])
    assert loss["meta"] == [0, -1, 0]
    assert '<button type="button" value="2"' not in page


def test_nothing_is_doubted_where_there_is_no_reason(run):
    assert cautions(run) == []


@pytest.mark.parametrize(
    ("history", "text"),
    [
        (rows([1.0]), "One epoch alone was measured"),
        (
            rows([1.0, 0.5], partial=True),
            "Epochs 0 and 1 were measured after training was resumed in the middle, so only in part.",
        ),
        (
            rows([1.0, 0.5], weights="swapped"),
            "Epochs 0 and 1 were measured with other weights than those of the last step",
        ),
        (History(rows=[*rows([1.0, 0.5]), *rows([0.9])]), "Epoch 0 was measured twice at one step"),
        (rows([math.nan, math.nan]), "nc1 is not a number always: there the value means nothing"),
        (rows([1.0, math.inf]), "nc1 is infinite at the end"),
        (rows([1.0, math.nan, 1.0]), "nc1 is not a number in some epochs"),
        (rows([1.0, 1e-14]), "only the order of magnitude is known"),
        (rows([1.0, 0.5], train_accuracy=0.75), "Training accuracy (`accuracy`) is 0.75 at the end, not 1"),
        (
            History(rows=[{"stage": "test", "epoch": e, "nc/test/nc1": 1.0} for e in (0, 1)]),
            "here other data were measured",
        ),
    ],
)
def test_what_the_rows_cast_doubt_on_is_said_with_the_reason(history, text):
    assert [text in said for said in cautions(history)].count(True) == 1


def test_what_settings_and_classes_cast_doubt_on_is_said_with_the_reason(run):
    def doubts(about, table=None):
        state = {"history": list(run), "scenes": run.state()["scenes"], "about": about}
        return " ".join(cautions(History.from_state({**state, "per_class": table or {}})))

    assert doubts({}) == ""
    assert "Only 10 of 12 classes have samples" in doubts({"classes": "12"})
    assert "No simplex ETF exists for 10 classes in 8 dimensions" in doubts({"features": "8"})
    assert doubts({"features": "9"}) == ""
    assert 'Measured with `mode="online"`' in doubts({"mode": "online"})
    few = {"class": [0, 4], "samples": [100, 5]}
    assert (
        "Few samples in class 4: with 5 of them, the scatter around their own mean is too small by a factor of 0.8"
        in doubts({}, few)
    )


def test_accuracy_one_and_an_accuracy_in_percent_cast_no_doubt():
    assert cautions(rows([1.0, 0.5], train_accuracy=1.0)) == []
    assert cautions(rows([1.0, 0.5], train_accuracy=93.0)) == []


# ------------------------------------------------------------------------------------------------------------ figures


def test_every_value_of_the_rows_is_drawn(run, page):
    figures = drawn(page)["figures"]
    found = {}
    for figure in figures.values():
        for trace in figure["data"]:
            if trace["type"] == "scatter" and "meta" in trace:
                found[trace["name"], tuple(np.round(trace["y"][:2], 6))] = trace
    for layer, name in (("layer1/", "layer1 · train"), ("", "classifier input · train")):
        for metric in PAPER[:4]:
            values = [row[f"nc/{layer}{metric}"] for row in run]
            [trace] = [
                trace
                for (label, _), trace in found.items()
                if label == name and np.allclose(trace["y"], values, rtol=1e-5)
            ]
            assert trace["x"] == list(range(24))


def test_zeros_on_a_log_axis_are_triangles_and_negative_values_make_it_linear():
    def curve(values):
        figure = drawn(report({"a": rows(values)}))["figures"]["figure0"]
        return figure["layout"]["yaxis"]["type"], figure["data"]

    kind, (line, zero) = curve([1.0, 0.0, 0.25])
    assert (kind, line["y"], zero["x"], zero["customdata"], zero["y"]) == ("log", [1.0, 0.25], [1], ["0"], [0.25])
    kind, [line] = curve([1.0, 0.0, -0.25])
    assert (kind, line["y"]) == ("linear", [1.0, 0.0, -0.25])
    kind, [line] = curve([1.0, math.nan, math.inf])
    assert (kind, line["y"]) == ("log", [1.0, None, None])


def test_a_layer_with_the_values_of_the_classifiers_input_is_drawn_once():
    same = History(
        rows=[{"epoch": e, "nc/a/nc1": 2.0, "nc/b/nc1": 1.0 / (e + 1), "nc/nc1": 1.0 / (e + 1)} for e in (0, 1)]
    )
    figure = drawn(report({"r": same}))["figures"]["figure0"]
    assert [trace["name"] for trace in figure["data"]] == ["a · train", "b = classifier input · train"]


def test_loss_and_accuracy_have_panels_of_their_own_first():
    history = History(rows=[{"epoch": e, "nc/nc1": 1.0, "train_loss": 0.5, "val_accuracy": 0.25 * e} for e in (1, 2)])
    figures = drawn(report({"a": history}))["figures"]
    loss, accuracy, nc1 = (figures[f"figure{place}"] for place in range(3))
    assert [figure["data"][0]["y"] for figure in (loss, accuracy, nc1)] == [[0.5, 0.5], [0.25, 0.5], [1.0, 1.0]]
    assert accuracy["layout"]["yaxis"]["type"] == "linear"
    assert accuracy["data"][0]["name"] == "validate"


def test_iterations_are_called_so(tmp_path):
    (tmp_path / "ufm.csv").write_text("iteration,objective,nc1\n0,1.0,0.5\n10,0.5,0.25\n")
    history = History.read(tmp_path / "ufm.csv")
    assert summary(history)["Measured"] == ["The training data, in 2 iterations from 0 to 10."]
    assert "at iteration 10" in summary(history)["How far"][0]
    figures = drawn(report({"epoch": history}))["figures"].values()
    assert {figure["layout"]["xaxis"]["title"]["text"] for figure in figures} == {"iteration"}


def test_the_geometry_has_every_epoch_in_units_of_its_class_means(run, page):
    [moving] = drawn(page)["moving"].values()
    assert (moving["classes"], moving["axes"]) == (["class 0", "class 1", "class 2"], 2)
    assert len(moving["frames"]) == 24
    for frame, scene in zip(moving["frames"], run.scenes, strict=True):
        means = np.array(scene.means)[:, :2]
        unit = np.sqrt((means**2).sum() / 3)
        np.testing.assert_allclose(frame["means"], means / unit, atol=1e-4)
        np.testing.assert_allclose(frame["samples"][1], np.array(scene.samples[1])[:, :2] / unit, atol=1e-4)
        assert float(frame["epoch"]) == scene.epoch
    distances = np.linalg.norm(np.array(moving["corners"])[:, None] - np.array(moving["corners"]), axis=-1)
    np.testing.assert_allclose(distances[~np.eye(3, dtype=bool)], math.sqrt(3), rtol=1e-5)


def test_the_cosines_are_those_of_the_first_middle_and_last_epoch_on_one_scale(run, page):
    maps = [f["data"][0] for f in drawn(page)["figures"].values() if f["data"][0]["type"] == "heatmap"]
    assert [trace["z"] for trace in maps] == [run.scenes[place].cosines for place in (0, 12, 23)]
    assert {(trace["zmin"], trace["zmax"]) for trace in maps} == {(-1, 1)}
    assert f'<b style="left: {50 - 50 / 9:.2f}%">' in page


def test_depth_has_a_curve_for_at_most_twelve_epochs_with_the_layers_in_order(run, page):
    lines = [
        f["data"] for f in drawn(page)["figures"].values() if f["layout"].get("xaxis", {}).get("type") == "category"
    ]
    [first] = [
        data
        for data in lines
        if data[0]["type"] == "scatter" and data[0]["customdata"][0] == f"{run[0]['nc/layer1/nc1']:.4g}"
    ]
    assert [trace["name"] for trace in first][:2] == ["epoch 0", "epoch 2"]
    assert len(first) == 12
    assert first[-1]["x"] == ["layer1", "layer2", "classifier input"]
    np.testing.assert_allclose(
        first[-1]["y"], [run[-1][f"nc/{layer}nc1"] for layer in ("layer1/", "layer2/", "")], rtol=1e-5
    )


def test_several_runs_share_the_curves_and_have_sections_of_their_own(run):
    other = collapsing(6, layers=("layer1", "layer2"), classes=4, chosen=(0, 1, 2, 3))
    text = report({"first": run, "second": other})
    names = [trace["name"] for trace in drawn(text)["figures"]["figure0"]["data"]]
    assert names == [
        f"{run} · {layer} · train" for run in ("first", "second") for layer in ("layer1", "layer2", "classifier input")
    ]
    assert [moving["axes"] for moving in drawn(text)["moving"].values()] == [2, 3]
    assert text.count("<h3>Summary</h3>") == text.count("<h3>Classes</h3>") == 2


# ------------------------------------------------------------------------------------------------------------ the file


def test_hostile_names_stay_text(run):
    state = run.state()
    state["history"] = [
        {key.replace("layer1", HOSTILE): value for key, value in row.items()} for row in state["history"]
    ]
    state["history"] = [{**row, f"nc/{HOSTILE.replace('/', '')}": 1.0, "geometry": HOSTILE} for row in state["history"]]
    state["about"] = {HOSTILE: HOSTILE}
    state["per_class"] = {
        "class": [HOSTILE],
        HOSTILE: [0.5],
        "nearest": [HOSTILE],
        "samples": [4],
        "nearest_cdnv": [0.1],
    }
    text = report({HOSTILE: History.from_state(state), "b" + HOSTILE: History.from_state(state)})
    found = Tags(without_plotly(text))
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert not {tag for tag, _ in found.tags} & {"img", "iframe", "link"}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert HOSTILE in found.words
    names = [trace["name"] for figure in drawn(text)["figures"].values() for trace in figure["data"] if "name" in trace]
    assert not [name for name in names if "<" in name or ">" in name]  # plotly.js reads tags in the names of curves


def test_nothing_is_loaded_from_elsewhere(page):
    own = without_plotly(page)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!#)|url\(|@import|https?:|fetch\(|import\(""", own)
    policy = next(attributes["content"] for tag, attributes in Tags(own).tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none';")


@pytest.mark.slow
def test_a_long_run_is_a_small_file(tmp_path):
    path = write_report({"long": collapsing(200)}, tmp_path / "new" / "long.html")
    assert path.stat().st_size < 8e6
    assert "<title>Neural collapse</title>" in path.read_text(encoding="utf-8")


def test_the_page_fits_a_phone_and_says_what_is_to_be_seen(page):
    found = Tags(without_plotly(page))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    plots = [attributes for tag, attributes in found.tags if attributes.get("class") == "plot"]
    assert all(attributes["aria-label"] and attributes["role"] == "img" for attributes in plots)
    assert len(plots) == len(drawn(page)["figures"]) + len(drawn(page)["moving"])
    assert [tag for tag, _ in found.tags].count("figcaption") == 5


def test_a_log_without_its_checkpoint_says_what_to_pass_and_how_samples_are_kept():
    words = report({"a": rows([1.0, 0.5])})
    for missing in ("samples", "cosines", "table of the classes"):
        assert f"The log has no {missing}. Pass the directory that also holds the checkpoint." in words
    assert "geometry=(0, 1, 2)" in words
    history = rows([1.0, 0.5])
    history.scenes = [Scene(0, 1, "train", 1, [0], [[1.0]], [], [], [], [])]
    words = report({"a": history})
    assert "The run has no samples." in words
    assert "The run has no cosines." in words


def cells(page, caption):
    """The names and the texts of the first table before a caption."""
    before = without_plotly(page).split(caption)[0].rpartition("<table>")[2]
    names = re.findall("<th .*?<button.*?>(.*?)</button>", before)
    return names, [re.findall("<td.*?>(.*?)</td>", row) for row in re.findall("<tr>(<td.*?)</tr>", before)]


def test_the_least_separated_class_is_on_top_of_the_table(run):
    table = {"class": [3, 5, 7], "samples": [9, 9, 9], "nearest": [5, 3, 5], "nearest_cdnv": [0.1, math.nan, 0.5]}
    page = report({"a": History.from_state({**run.state(), "per_class": table})})
    names, found = cells(page, "<figcaption>The classes")
    assert names == ["class", "nearest_cdnv", "nearest", "samples"]
    assert [row[:2] for row in found] == [["7", "0.5"], ["3", "0.1"], ["5", "not a number"]]
    assert '<th scope="col" aria-sort=descending><button type="button">nearest_cdnv' in page


def test_several_runs_begin_with_a_row_of_last_values_for_each(run):
    layer = History(rows=[{"epoch": epoch, "nc/early/nc1": 2.0, "nc/late/nc1": 0.5} for epoch in (0, 1)])
    page = report({"first": run, "second": rows([1.0, 0.5]), "third": layer})
    names, found = cells(page, "<figcaption>Each metric at the deepest measured layer")
    assert names == ["run", "layer", "epoch", *PAPER]
    expected = ["first", "classifier input", "23", *(number(run[-1][f"nc/{name}"], 4) for name in PAPER)]
    assert found == [
        expected,
        ["second", "classifier input", "1", "0.5", "", "", "", "", ""],
        ["third", "late", "1", "0.5", "", "", "", "", ""],
    ]
    assert page.index("Last values of all runs") < page.index("Curves of all runs") < page.index("<h3>Summary")
    assert "Last values of all runs" not in report({"a": run})


def test_numbers_are_short():
    assert [number(value) for value in (0.123456, 4.05e-5, 1234567.0, math.nan, -math.inf)] == [
        "0.123", "4.05e-5", "1.23e6", "not a number", "infinite",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the command


def test_the_command_writes_the_report_of_runs(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("epoch,nc/nc1\n0,0.5\n1,0.25\n")
    out = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b" / "metrics.csv"), "-o", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [f"{tmp_path / 'a'}: 2 measurements", f"{tmp_path / 'b' / 'metrics.csv'}: 2 measurements"]
    assert re.fullmatch(rf"{out}: 2 runs, \d\.\d MB", said[2])
    assert str(tmp_path / "a") in out.read_text(encoding="utf-8")
    assert main(["report", str(tmp_path / "a"), "-o", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()


def test_what_goes_wrong_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.csv").write_text("epoch,nc/nc1\n0,0.5\n")

    def refused(*arguments):
        assert main(["report", *map(str, arguments)]) == 1
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert "is given twice; pass each run once" in refused(tmp_path, tmp_path / ".." / tmp_path.name)
    assert "a checkpoint (.ckpt) or trainer_state.json" in refused(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert 'a report needs plotly: pip install "lightning-neural-collapse[report]"' in refused(tmp_path)


@pytest.mark.parametrize("name", ["metrics.csv", "last.ckpt", "trainer_state.json", "events.out.tfevents.1.host.2.0"])
def test_the_command_does_not_write_over_a_log_or_a_checkpoint(tmp_path, capsys, name):
    (tmp_path / "metrics.csv").write_text("epoch,nc/nc1\n0,0.5\n")
    out = tmp_path / name
    before = out.read_bytes() if out.exists() else None
    assert main(["report", str(tmp_path / "metrics.csv"), "-o", str(out)]) == 1
    assert capsys.readouterr().err == f"lightning-nc: --out must end in .html or be a directory, got {out}\n"
    assert (out.read_bytes() if out.exists() else None) == before


def test_a_report_without_a_metric_is_refused():
    with pytest.raises(ValueError, match="needs 'epoch' and a metric such as 'nc1' or 'nc/nc1'"):
        report({"empty": History()})
    with pytest.raises(ValueError, match="pass at least one run"):
        report({})
