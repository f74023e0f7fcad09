"""Trainings of every kind: the measured values are those of an independent computation, and training is the same to the bit.

The two halves of a check: the run with the callback equals the run without it, bit for bit; and every row of the history equals
the float64 reference on features that plain hooks collect, with the weights that the run without the callback had then.
"""

import contextlib

import numpy as np
import torch
from hypothesis import assume, reject
from torch.utils.data import DataLoader, Subset

from lightning_nc.functional import METRICS as TABLE
from lightning_nc.functional.table import check_metrics
from lightning_nc.keys import STAGES
from lightning_nc.measuring.loaders import measurement_loader
from lightning_nc.schedule import is_due
from soak import oracle
from soak.cases import METRICS, SCHEDULES, Stream, cases, rows_of, unpacked
from soak.runs import Task, difference, run

COMPARED = (
    *("ended", "finished", "trained", "seen", "states", "weights", "optimizer", "random", "loader", "modes", "log"),
    *("shown", "hooks", "checkpoint", "random after test", "earlier"),
)


def test_a_training_of_any_kind_is_measured_rightly_and_is_the_same_without_the_callback(budget, tmp_path_factory):
    def check(case):
        folder = tmp_path_factory.mktemp("run")
        try:
            plain = [run(case, "plain", folder / "plain")]
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            reject()  # batch norm refuses a batch of one sample
        measured = [run(case, "measured", folder / "measured")]
        witness = [run(case, "witness", folder / "witness")] if needs_witness(case) else None
        hold(case, plain, measured, witness, budget.tally)

    budget.check(check, cases())


def test_two_processes_of_any_kind_measure_what_the_oracle_gives_and_train_the_same(budget, tmp_path_factory, ranks):
    def check(case):
        folder = tmp_path_factory.mktemp("run")
        try:
            plain = ranks.call(run, case, "plain", folder / "plain")
        except RuntimeError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            reject()
        measured = ranks.call(run, case, "measured", folder / "measured")
        witness = ranks.call(run, case, "witness", folder / "witness") if needs_witness(case) else None
        hold(case, plain, measured, witness, budget.tally)
        budget.tally.add("combinations in two processes", case)

    budget.check(check, cases(ranks=2))


def needs_witness(case):
    return case.mode == "online" and "train" in case.stages


def hold(case, plain, measured, witness, tally):
    """Compare what the ranks of a plain and of a measured run left behind, and the measured values with the oracle."""
    assume(plain[0]["states"])  # a loader that drops its only batch trains nothing
    for one, other in zip(plain, measured, strict=True):
        found = difference(bare(case, one), bare(case, other))
        assert found is None, (found, case)
    for other in measured[1:]:
        assert difference(measured[0]["histories"], other["histories"]) is None
    for number, history in enumerate(measured[0]["histories"]):
        check_schedule(case, plain[0], history, number)
        names = check_metrics(METRICS[case.second if number else case.metrics])
        for row in history:
            check_row(case, plain, witness, history, row, names, number, tally)
    check_pictures(case, plain, measured[0])
    tally.add("combinations", case)


def check_pictures(case, plain, found):
    """The chosen classes in the coordinates of pictures: as many samples, and class means as far apart, as in the features."""
    rows = [row for row in found["histories"][0] if row["stage"] == "train"]
    if case.geometry is None:
        assert not any(scene.chosen for scene in found["scenes"])
    if case.geometry is None or not rows:
        return
    assert [(scene.epoch, scene.step) for scene in found["scenes"]] == [(row["epoch"], row["step"]) for row in rows]
    for scene, row in zip(found["scenes"], rows, strict=True):
        features, target = exact_features(case, plain, row)[""]
        chosen = [features[target == label].double() for label in scene.chosen]
        assert list(map(len, scene.samples)) == [min(len(part), 40) for part in chosen]
        if chosen:  # else the class means are the same but for rounding
            own = torch.cdist(*[torch.stack([part.mean(0) for part in chosen])] * 2)
            drawn = torch.cdist(*[torch.tensor(scene.means).double()] * 2)
            assert torch.allclose(drawn, own, rtol=0, atol=1e-4 * float(own.max()))  # they have six digits
    kept = target[target != case.ignore_index]
    assert found["tables"][0]["samples"] == kept.bincount()[kept.unique()].tolist()


def bare(case, found):
    """What both runs must have in common: all but what a run with the callback alone has."""
    kept = {name: found.get(name) for name in COMPARED}
    # torch's own encoder layer takes a path of other rounding in evaluation mode if a module in it has a hook; see the limits.
    if "net.encoder" in case.layers and (case.mode == "online" or case.stages != ("train",)):
        kept["log"] = [
            (step, {k: v for k, v in row.items() if not k.startswith(("val", "test"))}) for step, row in kept["log"]
        ]
        kept["shown"] = {name: value for name, value in kept["shown"].items() if name.startswith("train")}
    if kept["earlier"] is not None:
        kept["earlier"] = bare(case, kept["earlier"])
    return kept


# --------------------------------------------------------------------------------------------------------- which epochs


def check_schedule(case, plain, history, number):
    """The epochs that were measured are those of the schedule, each once."""
    ends = [*plain.get("earlier", {}).get("finished", []), *plain["finished"]]
    last = max((epoch for epoch, _ in plain["finished"]), default=None)
    if last is None:
        return
    every = 1 if number else SCHEDULES[case.every]
    due = [epoch for epoch, _ in dict(ends).items() if is_due(every, epoch, epoch == last)]
    rows = [row["epoch"] for row in history if row["stage"] == "train"]
    assert len({(row["stage"], row["epoch"], row["step"], *sorted(row)) for row in history}) == len(history)
    if "train" not in case.stages:
        assert not rows
        return
    if case.mode == "online" and case.stop == ("stop", last + 1) and not is_due(every, last, last + 1 == case.epochs):
        due.remove(last)  # nobody knew that it was the last one, and the last epoch is not measured afterward
    if case.stop[0] == "max_steps":  # with accumulated gradients an earlier epoch may seem to be the last one
        assert set(due) <= set(rows)
    else:
        assert sorted(set(rows)) == sorted(set(due)), (rows, due, case)


# ------------------------------------------------------------------------------------------------- the oracle of a row


def check_row(case, plain, witness, history, row, names, number, tally):
    """Every value of a row is that of the independent computation."""
    layers = () if number else case.layers
    values = {}
    loaders = {key.split("/")[1].rpartition("_")[2] for key in row if row["stage"] != "train" and key.startswith("nc/")}
    for loader in sorted(int(text) if text.isdecimal() else 0 for text in loaders) or [0]:
        if row["stage"] == "train" and case.mode == "online":
            features = online_features(case, witness, row)
        elif row["stage"] == "train":
            features = exact_features(case, plain, row)
        else:
            features = held_out_features(case, plain, row, loader)
        values |= expected_of(case, plain, history, row, features, layers, names, loader)
    missing = [key for key in values if key not in row and not key.endswith("_train_means")]
    assert not missing, (missing, row)
    found = oracle.differences(row, values)
    assert found == {}, (found, row, case)
    tally.seen["values"] |= {
        (case, number, row["stage"], row["epoch"], row["step"], key) for key in values.keys() & row.keys()
    }
    known = sum(key.startswith("nc/") for key in row)
    tally.seen["values without a clear truth"] |= {(case, number, row["epoch"], n) for n in range(known - len(values))}


def expected_of(case, plain, history, row, features, layers, names, loader):
    """By key: value and tolerances."""
    head = STAGES[row["stage"]] + (f"_{loader}" if loader else "")
    state = state_of(plain, row)
    weight, bias = parts_of(case, state)
    found = {}
    for layer in ("", *layers):
        own = (weight, bias) if not layer else (None, None)
        rows, target = features[layer]
        kept = target != case.ignore_index
        rows, target = rows[kept], target[kept]
        wanted = [name for name in names if not layer or not set(TABLE[name].needs) & {"weight", "bias"}]
        entries = oracle.expected(rows, target, *own)
        if row["stage"] == "train" and case.mode == "online" and not fits(case):
            wanted = [name for name in wanted if not TABLE[name].samples]
        if row["stage"] != "train":
            compared = [name for name in wanted if TABLE[name].samples]
            entries = {name: entry for name, entry in entries.items() if name not in compared}
            entries |= around_training(case, plain, history, row, rows, target, layer, own)
            wanted = [*wanted, *(name + "_train_means" for name in wanted)]
        prefix = f"{head}/{layer}/" if layer else f"{head}/"
        # A row also holds the distances of the class means to the frames that exist.
        found |= {prefix + name: entry for name, entry in entries.items() if name in wanted or prefix + name in row}
    return found


def around_training(case, plain, history, row, rows, target, layer, parts):
    """Held-out samples around the training means, if the training data were measured with the same weights, else what stands."""
    exact = case.mode == "exact" and "train" in case.stages
    place = row["epoch"], row["step"]
    trained = [other for other in history if other["stage"] == "train" and (other["epoch"], other["step"]) == place]
    if not (exact and trained):
        own = oracle.expected(rows, target, *parts)
        named = ("nc4", "ncc_error", "nc1_cdnv_directional")
        return {} if exact else {name: own[name] for name in named if name in own and fits(case)}
    features, labels = exact_features(case, plain, row)[layer]
    kept = labels != case.ignore_index
    features, labels = features[kept].double().numpy(), labels[kept].numpy()
    centers = np.full((case.classes, features.shape[1]), np.nan)
    for label in np.unique(labels):
        centers[label] = features[labels == label].mean(0)
    return oracle.around(rows, target, centers, *parts)


def fits(case):
    """Whether running loops keep the samples; they have no second pass."""
    return case.budget > 1e6


# ------------------------------------------------------------------------------------------------------------- features


def state_of(plain, row):
    """The weights of that epoch and step, and the buffers of rank 0."""
    return plain[0]["states"][row["epoch"], row["step"]]


def parts_of(case, state):
    """The weight and the bias of the classifier, of two rows for one output."""
    weight, bias = (state[f"{case.kind.head}.{name}"].double().numpy() for name in ("weight", "bias"))
    weight = weight.reshape(len(weight), -1)
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]), np.concatenate([-bias, bias])
    return weight, bias


def collected(case, state, batches):
    """Features by layer and the labels of batches, in evaluation mode, by plain hooks."""
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(case.precision, torch.float32)
    model = Task(case).to(dtype)
    model.load_state_dict(state)
    model.eval()
    calls, steps = {}, []
    keep = lambda name, tensor: calls.update({name: tensor.clone()})  # noqa: E731
    for name in case.layers:
        model.get_submodule(name).register_forward_hook(lambda m, args, output, name=name: keep(name, output))
    model.get_submodule(case.kind.head).register_forward_pre_hook(lambda m, args: keep("", args[0]))
    mixed = torch.autocast("cpu", torch.bfloat16) if case.precision == "bf16-mixed" else contextlib.nullcontext()
    for batch in batches:
        inputs, labels = unpacked(batch)
        with torch.no_grad(), mixed:
            model(inputs.to(dtype) if inputs.is_floating_point() else inputs)
        steps.append((dict(calls), labels))
    return steps


def joined(case, steps):
    """By layer: the rows of all steps and their class indices."""
    target = torch.cat([indices_of(case, labels) for _, labels in steps])
    kind = case.kind
    found = {}
    for layer in ("", *case.layers):
        axes = kind.into if not layer else kind.layers[layer]
        found[layer] = torch.cat([rows_of(calls[layer], axes, case.places) for calls, _ in steps]), target
    return found


def indices_of(case, labels):
    if case.labels.startswith("one-hot"):
        return labels.argmax(1)
    return labels.long().flatten()


def merged(parts):
    """The features of all ranks together."""
    return {
        layer: tuple(torch.cat([part[layer][number] for part in parts]) for number in range(2)) for layer in parts[0]
    }


def exact_features(case, plain, row):
    """What the exact pass must see: every sample that training can draw, once, with the buffers of rank 0."""
    state, data = state_of(plain, row), case.dataset(case.samples, case.seed)
    trained = {**plain[0].get("earlier", {}).get("trained", {}), **plain[0]["trained"]}
    if case.loader == "stream":
        loader = DataLoader(Stream(data), case.batch_size, num_workers=case.workers)
        batches = [batch for number, batch in enumerate(loader) if number < trained[row["epoch"]]]
        return joined(case, collected(case, state, batches * case.ranks))
    parts = []
    for rank in range(case.ranks):
        indices, batch_size = measured_indices(case, rank)
        parts.append(joined(case, collected(case, state, DataLoader(Subset(data, indices), batch_size))))
    return merged(parts)


def measured_indices(case, rank):
    """The samples of a rank, and the size of its batches."""
    batch_size = 7 if case.loader == "sevens" else case.batch_size
    everything = case.trained_on()
    drawn = case.samples if case.loader == "weighted" else len(everything)
    share, count = -(-drawn // case.ranks), len(everything)
    drops = case.drop_last and case.loader != "sevens"
    if case.limit is not None and case.limit < (share // batch_size if drops else -(-share // batch_size)):
        count = case.limit * batch_size * case.ranks  # else the epoch has all samples but those that are dropped
    # With several ranks Lightning shuffles the training data of a loader that does not.
    if count < len(everything) and (case.loader != "in order" or case.ranks > 1):
        # A random choice, always the same: the number is documented, and which ones only the package knows.
        training = DataLoader(Subset(range(case.samples), everything), batch_size, shuffle=True)
        loader = measurement_loader(training, case.limit, rank, case.ranks)[0]
        chosen = [everything[index] for index in loader.sampler]
        assert len(chosen) == len(set(chosen)) == len(range(rank, count, case.ranks))
        assert set(chosen) <= set(everything)
        return chosen, batch_size
    return everything[:count][rank :: case.ranks], batch_size


def online_features(case, witness, row):
    """What the training steps of the epoch computed, on all ranks."""
    return merged([joined(case, found["steps"][row["epoch"], row["step"]]) for found in witness])


def held_out_features(case, plain, row, loader):
    """Each rank's samples, without those that pad the last one."""
    count = case.validation[loader]
    data = case.dataset(count, case.seed + 7 + loader)
    padded = [*range(count), *range(-count % case.ranks)]
    state = (
        plain[0]["weights"] if row["stage"] == "test" else state_of(plain, row)
    )  # Lightning gives all ranks those of rank 0
    parts = []
    for rank in range(case.ranks):
        steps = collected(case, state, DataLoader(Subset(data, padded[rank :: case.ranks]), case.batch_size))
        own = len(range(rank, count, case.ranks)) * (1 if not case.places else unpacked(data[0])[1].numel())
        parts.append({layer: (rows[:own], target[:own]) for layer, (rows, target) in joined(case, steps).items()})
    return merged(parts)
