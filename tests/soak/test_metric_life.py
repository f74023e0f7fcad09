"""Metrics that are updated, merged, copied, converted, saved and reset in any order hold what their samples give."""

import copy
import io
import pickle
import warnings

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, rule
from torch import nn

from lightning_nc import NeuralCollapse
from lightning_nc.functional import METRICS
from lightning_nc.functional.table import check_metrics
from soak import oracle

CHOICES = ("paper", "all", "nc1", ("nc3_centered", "nc2_of"), ("nc4", "ncc_error"), ("nc1_cdnv_directional", "nc1_vci"))
TYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
PLACES = st.floats(0, 1, exclude_max=True)


class Life:
    """A metric and all samples that it has seen."""

    def __init__(self, metric, head, features=(), target=()):
        self.metric, self.head, self.features, self.target = metric, head, list(features), list(target)

    def like(self, metric, head=None):
        return Life(metric, head or self.head, self.features, self.target)


class MetricLife(RuleBasedStateMachine):
    lives = Bundle("lives")
    seen = None  # what is counted

    @initialize(
        target=lives,
        classes=st.integers(2, 6),
        features=st.integers(1, 9),
        names=st.sampled_from(CHOICES),
        seed=st.integers(0, 99),
    )
    def begin(self, classes, features, names, seed):
        torch.manual_seed(seed)
        self.classes, self.features, self.names = classes, features, names
        self.head = nn.Linear(features, classes)
        self.centers = torch.randn(classes, features, dtype=torch.float64)
        self.steps = []
        return multiple(self.fresh(), self.fresh())

    def fresh(self):
        metric = NeuralCollapse(self.classes, self.features, self.head, self.head, metrics=self.names)
        metric.persistent(True)
        return Life(metric, self.head)

    @rule(target=lives)
    def create(self):
        return self.fresh()

    def batch(self, size, dtype, offset, noise, seed):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(-1, self.classes, (size,), generator=generator)
        target[target < 0] = -100
        rows = (
            self.centers[target.clamp(min=0)] + offset + noise * torch.randn(size, self.features, generator=generator)
        )
        rows = rows.to(dtype)
        rows[target == -100] = torch.nan  # which must count nowhere
        return rows, target

    @rule(
        life=lives,
        size=st.integers(0, 40),
        dtype=st.sampled_from(TYPES),
        offset=st.sampled_from([0.0, 0.0, 5.0, 100.0]),
        noise=st.sampled_from([0.2, 1.0]),
        seed=st.integers(0, 999),
        forward=st.booleans(),
        labels=st.sampled_from([torch.int64, torch.int32, torch.int16]),
        inference=st.booleans(),
    )
    def update(self, life, size, dtype, offset, noise, seed, forward, labels, inference):
        rows, target = self.batch(size, dtype, offset, noise, seed)
        self.steps.append(("update", size, dtype, forward))
        with torch.inference_mode(inference), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (life.metric if forward else life.metric.update)(rows, target.to(labels))
        life.features.append(rows[target >= 0])
        life.target.append(target[target >= 0])

    @rule(life=lives, other=lives, by_state=st.booleans())
    def merge(self, life, other, by_state):
        if life.metric is other.metric:
            return
        self.steps.append(("merge", by_state))
        life.metric.merge_state(copy.deepcopy(other.metric.state_dict()) if by_state else other.metric)
        life.features += other.features
        life.target += other.target

    @rule(target=lives, life=lives, how=st.sampled_from(["pickle", "clone", "state", "file"]))
    def copied(self, life, how):
        self.steps.append(how)
        if how == "pickle":
            metric = pickle.loads(pickle.dumps(life.metric))
            return life.like(metric, copy.deepcopy(life.head))  # a pickle holds the weight of that moment
        if how == "clone":
            return life.like(life.metric.clone())
        other = self.fresh()
        state = life.metric.state_dict()
        if how == "file":
            buffer = io.BytesIO()
            torch.save(state, buffer)
            state = torch.load(io.BytesIO(buffer.getvalue()))
        other.metric.load_state_dict(copy.deepcopy(state))
        return life.like(other.metric, self.head)

    @rule(life=lives)
    def reset(self, life):
        self.steps.append("reset")
        life.metric.reset()
        life.features, life.target = [], []

    @rule(life=lives, name=st.sampled_from(["bfloat16", "half", "double", "float", "cpu"]))
    def convert(self, life, name):
        self.steps.append(name)
        getattr(life.metric, name)()

    @rule(seed=st.integers(0, 99))
    def train(self, seed):
        """The weight changes, as in a step of the optimizer."""
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seed)))

    @rule(life=lives)
    def compute(self, life):
        self.steps.append("compute")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = {name: float(value) for name, value in life.metric.compute().items()}
        target = torch.cat([torch.zeros(0, dtype=torch.long), *life.target])
        if len(target.unique()) < 2:
            assert all(np.isnan(value) for value in values.values())
            return
        rows = torch.cat([rows.double() for rows in life.features])
        weight, bias = (part.detach().double().numpy() for part in (life.head.weight, life.head.bias))
        assert life.metric.counts.sum() == len(target)
        assert life.metric.means.dtype == torch.float64
        if (np.linalg.norm(weight, axis=1) == 0).any():
            return
        found = oracle.differences(values, oracle.expected(rows, target, weight, bias))
        assert found == {}
        self.seen.add("sequences of a metric", (self.classes, self.features, self.names, self.steps))


def test_a_metric_holds_what_its_samples_give_whatever_happens_to_it(budget):
    MetricLife.seen = budget.tally
    budget.run(MetricLife, steps=25)


def on_ranks(plan, names):
    """A metric through rounds of updates, of which each rank has its own share, with a value of all ranks after each."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(plan[0][0])
    head, centers = nn.Linear(5, 3), torch.randn(3, 5)
    metric = NeuralCollapse(3, 5, head, head, metrics=names)
    values = []
    for seed, sizes, merge in plan:
        generator = torch.Generator().manual_seed(100 * seed + rank)
        target = torch.randint(3, (sizes[rank],), generator=generator)
        rows = centers[target] + 0.5 * torch.randn(len(target), 5, generator=generator)
        metric.update(rows, target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if merge == "compute":
                found = metric.compute()
            elif merge == "sync":  # as a checkpoint does, and then the rank's own state is back
                metric.sync()
                metric.unsync()
                found = metric.compute()
            else:
                metric.reset()
                found = {}
        values.append(({name: float(value) for name, value in found.items()}, rows, target))
    return values, head.weight.detach(), head.bias.detach()


def test_ranks_that_update_and_synchronize_in_turn_hold_the_samples_of_all(budget, ranks):
    names = st.sampled_from(CHOICES)
    sizes = st.tuples(st.integers(0, 20), st.integers(0, 20))
    rounds = st.lists(
        st.tuples(st.integers(0, 99), sizes, st.sampled_from(["compute", "sync", "reset"])), min_size=1, max_size=5
    )

    def check(case):
        results = ranks.call(on_ranks, *case)
        rows, target = [], []
        (first, weight, bias), (second, _, _) = results
        for number, step in enumerate(case[0]):
            if step[2] == "reset":
                rows, target = [], []
                continue
            for found in (first, second):
                rows.append(found[number][1])
                target.append(found[number][2])
            truth = oracle.expected(torch.cat(rows), torch.cat(target), weight.double().numpy(), bias.double().numpy())
            for found in (first, second):
                assert oracle.differences(found[number][0], truth) == {}
        budget.tally.add("sequences on two ranks", case)

    budget.check(check, st.tuples(rounds, names))


def test_the_names_cover_every_metric_of_the_table():
    """What no name of the soak reaches would be held against nothing."""
    reached = {name for choice in CHOICES for name in check_metrics(choice)}
    assert reached == {name for name, spec in METRICS.items() if not spec.opt_in}
