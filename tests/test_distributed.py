"""Two processes measure what one measures: DDP, several nodes, sharded parameters; and the collective steps.

The processes run tests/distributed.py; each of its parts once, for all tests here.
"""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import distributed
import pytest
import reference
import torch
from conftest import free_port
from distributed import LAYERS, OTHER, TRAIN, Classifier
from torch import nn
from torch.utils.data import DataLoader
from versions import needs_fsdp2

from lightning_nc import measure
from lightning_nc.measuring.distributed import all_raise, is_sharded

SCRIPT = Path(distributed.__file__)


@functools.cache
def run(part):
    """What each of the two ranks saved, and what they wrote to stderr."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    launchers = {
        "ddp": [[sys.executable]],  # Lightning itself starts the second process
        "sharded": [[*launcher, "--nproc-per-node=2", "--master-port", str(free_port())]],
        "nodes": [],
    }
    endpoint = f"127.0.0.1:{free_port()}"
    for node in range(2):
        where = [f"--node-rank={node}", "--rdzv-endpoint", endpoint]
        launchers["nodes"].append([*launcher, "--nnodes=2", "--nproc-per-node=1", *where])
    with tempfile.TemporaryDirectory() as folder:
        # transformers 4 leaves the precision of the last TrainingArguments in a variable of the environment.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
        environment = {**inherited, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*start, SCRIPT, part, folder], env=environment, stderr=subprocess.PIPE, text=True)
            for start in launchers[part]
        ]
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert not any(process.returncode for process in processes), errors
        ranks = [torch.load(Path(folder, f"{part}{rank}.pt"), weights_only=False) for rank in range(2)]
    return ranks, "".join(errors)


def check_everything(ranks):
    alone = distributed.everything(0, 1)
    assert {name.rsplit("/")[-1] for name in alone["own means"][0]} >= {
        "nc4",
        "ncc_error",
        "nc1_cdnv_directional",
        "nc3",
    }
    for found in ranks:
        for name, (values, geometry, table, baseline, intervals) in found.items():
            assert values == pytest.approx(alone[name][0], rel=1e-12, abs=1e-12, nan_ok=True), name
            assert geometry.nearest == alone[name][1].nearest
            assert geometry.distances == pytest.approx(alone[name][1].distances, rel=1e-12)
            for column, entries in table.items():
                assert entries == pytest.approx(alone[name][2][column], rel=1e-12)
            assert (baseline is None) == (intervals is None) == (name == "own means")
        # The order of the samples differs, and with it the permutation; both looks at them take the same.
        assert found["kept"][3]["permuted"] == pytest.approx(
            found["second pass"][3]["permuted"], rel=1e-12, nan_ok=True
        )
        for name, ends in found["kept"][4].items():
            assert ends == pytest.approx(found["second pass"][4][name], rel=1e-9, nan_ok=True)


def test_two_processes_give_what_one_gives_of_all_metrics():
    check_everything([rank["everything"] for rank in run("sharded")[0]])


@pytest.mark.slow
def test_three_processes_give_what_one_gives_of_all_metrics(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "--master-port", str(free_port())]
    subprocess.run([*launcher, SCRIPT, "everything", tmp_path], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    check_everything(
        [torch.load(tmp_path / f"everything{rank}.pt", weights_only=False)["everything"] for rank in range(3)]
    )


def model_with(state):
    model = Classifier()
    model.load_state_dict(state)
    return model


def check_as_one_process(row, state, data=TRAIN, prefix="nc", rel=1e-6):
    """One process, one batch, the weights of the first rank."""
    values = measure(model_with(state), DataLoader(data, len(data)), layers=LAYERS, progress=False)
    assert len(values) == 6 + 4 * len(LAYERS)
    assert {f"{prefix}/{name}": row[f"{prefix}/{name}"] for name in values} == pytest.approx(
        {f"{prefix}/{name}": value for name, value in values.items()}, rel=rel
    )


# ------------------------------------------------------------------------------------------------------ collective steps


def steps():
    return [rank["steps"] for rank in run("sharded")[0]]


def test_the_largest_value_of_all_ranks_is_known_to_all():
    assert [rank["largest"] for rank in steps()] == [-2.5, -2.5]


def test_if_one_rank_fails_all_raise_and_the_others_are_told():
    first, second = steps()
    assert first["no error"] is second["no error"] is None
    assert second["error of rank 1"] == ("KeyError", "'mine'")
    assert first["error of rank 1"] == (
        "RuntimeError",
        "another rank could not measure its part; the message of that rank says why",
    )


def test_a_single_process_raises_its_own_error_without_any_collective():
    assert all_raise(None, None) is None
    with pytest.raises(KeyError, match="mine"):
        all_raise(KeyError("mine"), None)


def test_shapes_that_differ_between_ranks_raise_on_all_of_them():
    for rank in steps():
        assert rank["same shapes"] is None
        assert rank["other shapes"][0] == "ValueError"
        assert "differ between ranks" in rank["other shapes"][1]


def test_all_ranks_get_the_buffers_of_the_first_but_for_those_outside_of_a_checkpoint():
    first, second = (rank["buffers"] for rank in steps())
    assert first == {"own": [0, 0], "empty": [], "cache": [0, 0]}
    assert second == {"own": [0, 0], "empty": [], "cache": [1, 1, 1]}


def test_only_fsdp_shards_a_model():
    for rank in run("sharded")[0]:
        assert rank["is sharded"] == [False, *[True] * len(distributed.sharding())]
    assert not is_sharded(nn.Linear(6, 3))


def test_a_rank_that_measures_alone_says_so_after_a_while_and_later_measurements_work():
    first, second = (rank["alone"] for rank in run("sharded")[0])
    kind, message = first["error"]
    assert kind == "RuntimeError"
    assert message.startswith(
        "measure on rank 0 has waited 1 s for rank 1 of 2: in a process group all ranks must call"
    )
    assert "pass sync=False" in message
    one = measure(distributed.plain(), DataLoader(TRAIN, 51), progress=False)
    for values in first["values"] + second["values"]:
        assert values == pytest.approx(one, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- whole trainings


def test_all_ranks_keep_the_same_samples_of_both_for_pictures():
    first, second = (rank["exact"] for rank in run("ddp")[0])
    assert first["scenes"] == second["scenes"]
    rows, target = TRAIN.tensors
    with torch.no_grad():
        features = model_with(first["state"]).eval().net[:4](rows).double()
    means = torch.stack([features[target == label].mean(dim=0) for label in range(3)])
    centered, scene = means - means.mean(dim=0), first["scenes"][-1]
    assert [len(kept) for kept in scene.samples] == [int((target == label).sum()) for label in range(3)]  # all of them
    for label, kept in enumerate(scene.samples):
        products = torch.tensor(kept).double() @ torch.tensor(scene.means).double().T
        expected = (features[target == label] - means.mean(dim=0)) @ centered.T
        torch.testing.assert_close(products.sort(dim=0).values, expected.sort(dim=0).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "part", ["exact", "every_stage", "online", "uneven", "wide", pytest.param("model_parallel", marks=needs_fsdp2)]
)
def test_both_ranks_have_the_same_history(part):
    first, second = run("ddp")[0]
    assert first[part]["history"] == second[part]["history"]


@pytest.mark.parametrize("part", ["exact", "wide"])
def test_every_sample_is_measured_once_with_the_buffers_of_the_first_rank(part):
    first, second = (rank[part] for rank in run("ddp")[0])
    assert not torch.allclose(first["state"]["net.1.running_mean"], second["state"]["net.1.running_mean"], rtol=1e-3)
    check_as_one_process(first["history"][-1], first["state"])


def test_features_too_wide_take_a_second_pass_and_the_message_appears_once():
    assert run("ddp")[1].count("takes a second pass") == 1


@pytest.mark.parametrize(
    ("stage", "prefix", "data"), [("train", "nc", TRAIN), ("validate", "nc/val", OTHER), ("test", "nc/test", OTHER)]
)
def test_a_stage_is_measured_without_the_samples_that_pad_a_rank(stage, prefix, data):
    part = run("ddp")[0][0]["every_stage"]
    row = [row for row in part["history"] if row["stage"] == stage][-1]
    check_as_one_process(row, part["state"], data, prefix)


def test_online_mode_measures_what_both_ranks_were_trained_on():
    parts = [rank["online"] for rank in run("ddp")[0]]
    rows, target = (torch.cat([part["features"][i] for part in parts]) for i in range(2))
    assert len(rows) == 52  # the sampler repeats one of the 51
    head = model_with(parts[0]["state"]).net[4]
    weight, bias = (part.detach().double().numpy() for part in (head.weight, head.bias))
    expected = reference.all_metrics(rows.double().numpy(), target.numpy(), weight, bias)
    for key, value in parts[0]["history"][-1].items():
        if key.startswith("nc/"):
            assert value == pytest.approx(expected[key.removeprefix("nc/")], rel=1e-6)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("one_gives_up", "labels must lie in [0, 3)"),
        ("one_gives_up_midway", "labels must be whole numbers, got"),
        ("one_fails_in_its_forward", "in the forward of one"),
        ("other_width", "the measured layers or their widths differ between ranks"),
    ],
)
def test_no_rank_waits_for_one_that_cannot_measure(part, reason):
    (first, _), errors = run("ddp")
    assert first[part] == {"history": [], "steps": 8}
    assert reason in errors  # which the second rank alone may know


@pytest.mark.parametrize("part", ["other_caches", "validates_alone"])
def test_ranks_that_differ_in_a_cache_or_in_validation_batches_stop_nothing(part):
    (first, second), errors = run("ddp")
    assert first[part] == second[part]
    assert first[part]["steps"] == 8
    assert [row["stage"] for row in first[part]["history"]] == ["train", "train"]
    assert "no batch came to this rank" in errors


def test_the_number_of_collectives_does_not_grow_with_the_number_of_samples():
    for rank in run("ddp")[0]:
        assert rank["collectives"][1] == rank["collectives"][3] > 0


@needs_fsdp2
def test_lightnings_sharded_models_are_measured_too():
    part = run("ddp")[0][0]["model_parallel"]
    assert {"net.0.weight", "net.4.weight"} <= set(part["cut"])
    check_as_one_process(part["history"][-1], part["state"], rel=1e-5)


def test_measure_in_a_process_group_gives_all_ranks_the_values_of_all_unless_told_otherwise():
    first, second = (rank["loop"] for rank in run("sharded")[0])
    model = distributed.plain()
    assert (
        first["all"] == second["all"] == pytest.approx(measure(model, DataLoader(TRAIN, 51), progress=False), rel=1e-6)
    )
    parts = [(part[:35], part[35:]) for part in TRAIN.tensors]
    for rank, own in enumerate((first["own"], second["own"])):
        alone = measure(model, [(parts[0][rank], parts[1][rank])], progress=False)
        assert own == pytest.approx(alone, rel=1e-6)
    assert first["own"]["nc1"] != pytest.approx(second["own"]["nc1"], rel=1e-2)


def test_two_nodes_measure_what_one_process_measures():
    first, second = run("nodes")[0]
    assert first["history"] == second["history"]
    check_as_one_process(first["history"][-1], first["state"])


@pytest.mark.parametrize(
    "kind", ["FSDP, flat parameters", "FSDP, original parameters", pytest.param("FSDP2", marks=needs_fsdp2)]
)
def test_a_model_whose_parameters_are_sharded_gives_the_values_of_the_whole_one(kind):
    first, second = (rank[kind] for rank in run("sharded")[0])
    values = measure(distributed.plain(), DataLoader(TRAIN, 51), layers=["0", "1.0"], progress=False)
    assert {"nc1", "nc3", "0/nc1", "1.0/nc2_of"} < values.keys()
    assert first == second == pytest.approx(values, rel=1e-5)


def test_all_ranks_have_the_same_fixed_head_and_measure_it_in_a_sharded_model():
    first, second = (rank["fixed head"] for rank in run("sharded")[0])
    assert not first["own"].equal(second["own"])
    assert first["together"].equal(first["own"])
    assert second["together"].equal(first["own"])
    model = distributed.with_fixed_head(distributed.plain())
    values = measure(model, DataLoader(TRAIN, 51), layers=["0", "1.0"], progress=False)
    assert "nc3_centered" in values
    assert first["values"] == second["values"] == [pytest.approx(values, rel=1e-5)] * len(distributed.sharding())


def test_the_metrics_of_regression_are_those_of_all_ranks():
    first, second = (rank["regression"] for rank in run("sharded")[0])
    truth = distributed.regression_of(slice(None)).compute()
    assert list(truth) == ["nrc1", "nrc2", "nrc3"]
    for values in (*first["values"], *second["values"]):
        torch.testing.assert_close(values, truth, rtol=1e-10, atol=0)
    assert "before the next update" in first["late"][1]


def test_all_ranks_get_the_features_of_all_in_the_order_of_the_ranks():
    first, second = (rank["extracted"] for rank in run("sharded")[0])
    model, (rows, target) = distributed.plain(), TRAIN.tensors
    with torch.no_grad():
        features = model[:2](rows)
    turns = torch.cat([torch.arange(rank, len(rows), 2) for rank in range(2)])  # how a sampler deals the samples
    for ranks in (first, second):
        found, labels = ranks["all"]
        assert list(found) == ["classifier input", "module.0"]
        torch.testing.assert_close(found["classifier input"], features[turns])
        torch.testing.assert_close(found["module.0"], model[0](rows[turns]).detach())
        assert labels.equal(target[turns])
        found, labels = ranks["shares"]
        torch.testing.assert_close(found["classifier input"], features)
        assert labels.equal(target)
        found, labels = ranks["first alone"]
        assert labels.equal(target[:35])
        assert found["classifier input"].dtype == torch.bfloat16
        torch.testing.assert_close(found["classifier input"].float(), features[:35], rtol=0.05, atol=0.05)
    for rank, part in ((first, slice(35)), (second, slice(35, None))):
        torch.testing.assert_close(rank["own"][0]["classifier input"], features[part])
        assert rank["own"][1].equal(target[part])
