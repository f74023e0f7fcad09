"""One callback through trainings that end, break off and go on: every row is right, and a twin without it trains the same."""

import copy
import pickle
import signal
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lightning.pytorch import seed_everything

from lightning_nc import History, measure
from lightning_nc.functional.table import check_metrics
from soak.cases import METRICS, cases
from soak.runs import Recorder, Task, Witness, callbacks_of, continued, difference, newest, step_of, trainer_of
from soak.test_combinations import check_row


class CallbackLife(RuleBasedStateMachine):
    tally = None

    @initialize(case=cases())
    def begin(self, case):
        assume(case.loader != "stream")
        self.case = replace(case, stop=("none", 0), workers=0, second=None)
        self.callback, self.trainings = callbacks_of(self.case)[0], 0
        seed_everything(self.case.seed, verbose=False)
        self.model = Task(self.case)
        self.twin, self.finished = copy.deepcopy(self.model), None
        self.folder, self.steps = Path(tempfile.mkdtemp()), []
        self.forget()

    def forget(self):
        self.plain = {"states": {}, "trained": {}, "weights": {}}
        self.witness, self.epochs, self.checked = {}, 0, set()

    def run(self, stop, checkpoint):
        """Train the model with the callback and the twin without it, in the same way."""
        case = replace(self.case, epochs=self.epochs)
        ended = []
        for kind, model in (("plain", self.twin), ("measured", self.model)):
            seed_everything(case.seed, verbose=False)
            folder = self.folder / str(self.trainings) / kind
            recorder, witness = Recorder(stop, case.epochs), Witness(case)
            beside = [self.callback] if kind == "measured" else [witness]
            trainer = trainer_of(case, [*beside, recorder], folder)
            path = newest(folder) if checkpoint else None
            with planned_ends() as error:
                trainer.fit(model, case.train_loader(), case.held_out() or None, ckpt_path=path)
            ended.append((type(error[0]) if error else None, recorder.finished, model.seen, torch.get_rng_state()))
            if kind == "plain":
                self.plain["states"] = continued(self.plain["states"], recorder.states, step_of(path))
                self.plain["trained"] |= recorder.trained
                self.witness = continued(self.witness, witness.steps, step_of(path))
        self.plain["weights"] = self.twin.state_dict()
        self.finished = None if ended[0][0] else trainer
        self.steps.append((stop, checkpoint, self.epochs))
        assert difference(ended[0], ended[1]) is None

    @rule(
        epochs=st.integers(1, 3),
        stop=st.sampled_from(["none", "none", "stop", "error", "keyboard"]),
        at=st.integers(1, 9),
    )
    def train(self, epochs, stop, at):
        before = len(self.callback.previous_histories) + bool(self.callback.history)
        self.trainings += 1
        self.forget()
        self.epochs = epochs
        self.run((stop, at), False)
        assert len(self.callback.previous_histories) == before

    @precondition(lambda self: self.epochs and newest(self.folder / str(self.trainings) / "plain"))
    @rule(more=st.integers(0, 2), fresh=st.booleans(), stop=st.sampled_from(["none", "error"]), at=st.integers(1, 9))
    def resume(self, more, fresh, stop, at):
        self.epochs += more
        if fresh:
            self.callback = callbacks_of(self.case)[0]
        self.checked.clear()
        self.run((stop, at), True)

    @precondition(lambda self: self.finished is not None and self.case.validation)
    @rule(stage=st.sampled_from(["validate", "test"]))
    def evaluate(self, stage):
        self.steps.append(stage)
        before = [row for row in self.callback.history if row["stage"] == stage]
        getattr(self.finished, stage)(self.model, self.case.held_out(), verbose=False)
        after = [row for row in self.callback.history if row["stage"] == stage]
        assert len(after) - len(before) == (len(self.case.validation) if stage in self.case.stages else 0)

    @precondition(lambda self: self.case.precision in ("32-true", "64-true") and self.finished is not None)
    @rule()
    def measured_alone(self):
        """``measure`` gives what the callback gave of the same weights, to the last digits."""
        rows = [row for row in self.callback.history if row["stage"] == "train" and not row.get("weights")]
        if not rows or self.case.mode == "online" or self.case.limit or rows[-1]["step"] != self.finished.global_step:
            return
        self.steps.append("measure")
        data = self.case.train_loader()
        if self.case.precision == "64-true":
            form = data.dataset
            form.inputs = form.inputs.double() if form.inputs.is_floating_point() else form.inputs
        values = measure(
            self.model,
            data,
            layers=self.case.layers or None,
            metrics=METRICS[self.case.metrics],
            ignore_index=self.case.ignore_index,
            progress=False,
        )
        for key, value in values.items():
            np.testing.assert_allclose(value, rows[-1][f"nc/{key}"], rtol=1e-9, atol=1e-12, err_msg=key)

    @rule(how=st.sampled_from(["pickle", "copy", "state", "weights only"]))
    def saved(self, how):
        """The history is the same after it was saved and loaded."""
        self.steps.append(how)
        history = self.callback.history
        if how in ("pickle", "copy"):
            found = pickle.loads(pickle.dumps(history)) if how == "pickle" else copy.deepcopy(history)
        else:
            torch.save(self.callback.state_dict(), self.folder / "state.pt")
            found = History.from_state(torch.load(self.folder / "state.pt", weights_only=how == "weights only"))
        assert difference(list(history), list(found)) is None
        assert [scene.text for scene in found.scenes] == [scene.text for scene in history.scenes]
        assert difference(history.per_class, found.per_class) is None

    @precondition(lambda self: self.trainings % 3 == 2)
    @rule()
    def drawn(self):
        if any("nc/nc1" in row for row in self.callback.history):
            self.steps.append("plot")
            self.callback.plot()
            plt.close("all")

    @invariant()
    def nothing_is_left_behind_and_every_row_is_right(self):
        if not getattr(self, "trainings", 0):
            return
        hooks = [hook for m in self.model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
        assert hooks == []
        assert difference(self.model.state_dict(), self.twin.state_dict()) is None
        history = self.callback.history
        places = [(row["stage"], row["epoch"], row["step"]) for row in history if row["stage"] == "train"]
        assert len(set(places)) == len(places), places
        for row in history:
            witness = [{"steps": self.witness}] if self.witness else None
            place = row["stage"], row["epoch"], row["step"], *sorted(row)
            if place in self.checked or (row["epoch"], row["step"]) not in self.plain["states"]:
                continue
            names = check_metrics(METRICS[self.case.metrics])
            check_row(self.case, [self.plain], witness, history, row, names, 0, self.tally)
            self.checked.add(place)

    def teardown(self):
        if getattr(self, "steps", None):
            self.tally.add("lives of a callback", (self.case, self.steps))


@contextmanager
def planned_ends():
    """Catch what was raised by plan, and let the signal handlers be as before."""
    raised, handler = [], signal.getsignal(signal.SIGINT)
    try:
        yield raised
    except (RuntimeError, SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and "by plan" not in str(error):
            raise
        raised.append(error)
    except ValueError as error:
        assume("more than 1 value per channel" not in str(error))
        raise
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_callback_measures_rightly_through_any_course_of_trainings(budget):
    CallbackLife.tally = budget.tally
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        budget.run(CallbackLife, steps=8)
