"""Run in two processes by test_distributed.py: each part trains or measures, and each rank saves what it saw.

python distributed.py {ddp,nodes,sharded} FOLDER
"""

import copy
import sys
from collections import Counter
from pathlib import Path

import torch
from conftest import ClassifierInputs, clusters
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from versions import fully_shard

from lightning_nc import NeuralCollapseCallback, NeuralRegressionCollapse, SimplexETF, extract_features, measure
from lightning_nc.measuring import collector, distributed
from lightning_nc.measuring.distributed import all_max, all_raise, broadcast_buffers, check_same_shapes, is_sharded

TRAIN = TensorDataset(*clusters(3, 17, 6, 0.5))  # 51 samples, which two ranks cannot share evenly
OTHER = TensorDataset(*clusters(3, 7, 6, 0.7, seed=1))
LAYERS = ["net.0", "net.1", "net.2", "net.4"]
COLLECTIVES = ("all_reduce", "broadcast", "barrier", "reduce", "gather", "scatter", "reduce_scatter", "all_to_all")
COLLECTIVES += ("all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast_object_list", "gather_object")


class Classifier(LightningModule):
    def __init__(self, norm=True):
        super().__init__()
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(0.2)
        self.net = nn.Sequential(*layers, nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(callbacks, model=None, val=None, data=TRAIN, **kwargs):
    defaults = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 2, "num_sanity_val_steps": 0}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(callbacks=callbacks, **{**defaults, **quiet, **kwargs})
    seed_everything(3, verbose=False)
    model = model or Classifier()
    trainer.fit(model, DataLoader(data, 8, shuffle=True), DataLoader(OTHER, 4) if val is True else val)
    return trainer, model


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def every_stage():
    callback = NeuralCollapseCallback(LAYERS, stages=("train", "validate", "test"), strict=True)
    trainer, model = fit([callback], val=True)
    state = state_of(model)
    first = [[tensor.clone() for tensor in model.state_dict().values()]]
    torch.distributed.broadcast_object_list(first, src=0)
    model.load_state_dict(dict(zip(state, first[0], strict=True)))  # as from a checkpoint
    sampler = DistributedSampler(OTHER, 2, torch.distributed.get_rank(), shuffle=True)
    trainer.test(model, DataLoader(OTHER, 4, sampler=sampler), verbose=False)
    return {"history": callback.history, "state": state}


def exact():
    callback = NeuralCollapseCallback(LAYERS, strict=True, geometry=(0, 1, 2))
    _, model = fit([callback])
    return {"history": callback.history, "state": state_of(model), "scenes": callback.history.scenes}


def online():
    callback, independent = NeuralCollapseCallback(mode="online", strict=True), ClassifierInputs()
    _, model = fit([callback, independent])
    features = torch.cat(independent.rows), torch.cat(independent.target)
    return {"history": callback.history, "features": features, "state": state_of(model)}


def gives_up(callback, *args, **kwargs):
    trainer, _ = fit([callback], *args, **kwargs)
    return {"history": callback.history, "steps": trainer.global_step}


def one_gives_up():
    rank = torch.distributed.get_rank()
    return gives_up(NeuralCollapseCallback(target_fn=lambda batch: batch[1] + 9 * rank))


def one_gives_up_midway():
    """The last batch of the second rank holds one sample."""
    rank = torch.distributed.get_rank()
    labels = lambda batch: batch[1] if rank == 0 or len(batch[1]) > 1 else batch[1] + 0.5  # noqa: E731
    return gives_up(NeuralCollapseCallback(target_fn=labels))


class Gathering(Classifier):
    """Without a forward of its own, so that its validation step is run, which has a collective."""

    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.all_gather(self.net(batch[0]).mean(dim=0))


def uneven():
    """Nine samples and eight: two batches on one rank and one on the other."""
    callback = NeuralCollapseCallback(strict=True)
    trainer, _ = fit([callback], Gathering(norm=False), data=TensorDataset(*(part[:17] for part in TRAIN.tensors)))
    return {"history": callback.history, "steps": trainer.global_step}


class Caching(Classifier):
    """A buffer that is no part of a checkpoint, as long as what a rank has seen."""

    def __init__(self):
        super().__init__(norm=False)
        self.register_buffer("cache", torch.zeros(4), persistent=False)

    def training_step(self, batch, batch_idx):
        self.cache = torch.zeros(5 + 3 * self.global_rank)
        return super().training_step(batch, batch_idx)


class Some(IterableDataset):
    """Batches for the first rank alone."""

    def __iter__(self):
        yield from () if torch.distributed.get_rank() else OTHER


def other_caches():
    return gives_up(NeuralCollapseCallback(strict=True), Caching())


def validates_alone():
    callback = NeuralCollapseCallback(stages=("train", "validate"))
    return gives_up(callback, Classifier(norm=False), val=DataLoader(Some(), 4))


def one_fails_in_its_forward():
    def forward_fn(module, batch):
        if torch.distributed.get_rank() == 1 and not module.training and len(batch[1]) == 1:
            raise RuntimeError("in the forward of one")
        return module(batch[0])

    return gives_up(NeuralCollapseCallback(classifier="net.4", forward_fn=forward_fn))


def other_width():
    rank = torch.distributed.get_rank()
    return gives_up(NeuralCollapseCallback([("net.0", "net.4")[rank]]))


def collectives():
    """How many there are in a training of one step and a measurement, by number of samples and layers."""
    calls = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    original = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
    counts = {}
    for copies in (1, 3):
        data = TensorDataset(*(torch.cat([part] * copies) for part in TRAIN.tensors))
        measured = NeuralCollapseCallback(LAYERS, strict=True, dataloader=DataLoader(data, 8))
        for name, function in original.items():
            setattr(torch.distributed, name, counted(name, function))
        calls.clear()
        fit([measured], max_steps=1)
        counts[copies] = sum(calls.values())
        vars(torch.distributed).update(original)
    return counts


def wide():
    limit, collector.SCATTER_LIMIT = collector.SCATTER_LIMIT, 0
    callback = NeuralCollapseCallback(LAYERS, strict=True)
    _, model = fit([callback])
    collector.SCATTER_LIMIT = limit
    return {"history": callback.history, "state": state_of(model)}


class Sharded(Classifier):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for module in (self.net[0], self.net[4], self.net):
            fully_shard(module, mesh=mesh)


def model_parallel():
    callback = NeuralCollapseCallback(LAYERS, strict=True)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    _, model = fit([callback], Sharded(), strategy=strategy)
    cut = [name for name, part in model.named_parameters() if hasattr(part, "full_tensor")]
    whole = {name: getattr(part, "full_tensor", lambda part=part: part)() for name, part in model.state_dict().items()}
    return {"history": callback.history, "state": whole, "cut": cut}


def plain():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 9), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.Linear(9, 7), nn.ReLU()), nn.Linear(7, 3))


def with_fixed_head(model):
    model[2] = SimplexETF(7, 3)
    return model


def fixed_head():
    """The weight that a rank drew, what is left of it in DDP, and the values of sharded models with one weight."""
    own = SimplexETF(7, 3, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    together = DistributedDataParallel(nn.Sequential(nn.Linear(7, 7), copy.deepcopy(own)))
    values = [sharded(lambda model, wrap=wrap: wrap(with_fixed_head(model))) for wrap in sharding()]
    return {"own": own.weight, "together": together.module[1].weight, "values": values}


def regression_of(rows, **arguments):
    """A metric of regression that has seen these rows of the training data."""
    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    metric = NeuralRegressionCollapse(2, 6, weight, **arguments)
    features = TRAIN.tensors[0][rows]
    metric.update(features, features[:, :2] + 0.1 * features[:, 2:4])
    return metric


def regression():
    """The values of all ranks: each has a share of the rows, or the second has all."""
    rank = torch.distributed.get_rank()
    shared = regression_of(slice(rank, None, 2))
    values = [shared.compute()]
    assert shared.count < len(TRAIN)  # after compute the state is the rank's own again
    alone = regression_of(slice(None), sync_on_compute=False)
    if rank == 0:
        alone.reset()
    alone.merge_over_ranks()
    return {"values": [*values, alone.compute()], "late": error_of(alone.update, *TRAIN.tensors)}


def extracted():
    """What all ranks get, what this rank gets of its own data, and what is left if one has no sample to keep."""
    model, rank = DistributedDataParallel(plain()), torch.distributed.get_rank()
    padded = DataLoader(TRAIN, 8, sampler=DistributedSampler(TRAIN, 2, rank, shuffle=True))
    own = extract_features(model, share_of(TRAIN), sync=False, progress=False)
    ignored = [(rows, target.where(torch.tensor(rank == 0), -100)) for rows, target in share_of(TRAIN)]
    return {
        "all": tuple(extract_features(model, padded, layers=["module.0"], progress=False)),
        "shares": tuple(extract_features(model, share_of(TRAIN), progress=False)),
        "own": tuple(own),
        "first alone": tuple(
            extract_features(model.bfloat16(), [(r.bfloat16(), t) for r, t in ignored], progress=False)
        ),
    }


def share_of(data):
    """Batches of six samples; the ranks have 6 and 3 batches."""
    rows, target = data.tensors
    share = slice(0, 35) if torch.distributed.get_rank() == 0 else slice(35, None)
    return list(zip(rows[share].split(6), target[share].split(6), strict=True))


def sharded(wrap):
    """The values of a model whose parameters are sharded."""
    return measure(wrap(plain()), share_of(TRAIN), layers=["0", "1.0"], progress=False)


def measured_in_a_loop():
    """A model in DDP and a loader with a DistributedSampler, which pads; the values of all ranks and of this one."""
    model = DistributedDataParallel(plain())
    rank = torch.distributed.get_rank()
    padded = DataLoader(TRAIN, 8, sampler=DistributedSampler(TRAIN, 2, rank, shuffle=True))
    own = measure(model, share_of(TRAIN), sync=False, progress=False)
    return {"all": measure(model, padded, progress=False), "own": own}


def everything(rank, ranks):
    """All metrics of float64 data, a share on each rank, with samples that are kept and with a second pass."""
    model = plain().double()

    def share(data):
        rows, target = data.tensors
        own = slice(rank * len(rows) // ranks, (rank + 1) * len(rows) // ranks)
        return list(zip(rows[own].double().split(6), target[own].split(6), strict=True))

    other = {"reference": share(OTHER), "ood_dataloader": share(OTHER)}
    both = {**other, "baseline": True, "intervals": 0.9}
    results = {}
    for name, arguments in {"kept": both, "second pass": {**both, "feature_budget": 0}, "own means": {}}.items():
        found = measure(model, share(TRAIN), layers=["0"], metrics="all", progress=False, **arguments)
        results[name] = {**found}, found.geometry, found.per_class, found.baseline, found.intervals
    return results


def measured_by_the_first_rank_alone():
    """What it raises, and the values when all ranks measure afterward, more than once."""
    rank, patience = torch.distributed.get_rank(), distributed.PATIENCE
    distributed.PATIENCE = 1
    error = error_of(measure, plain(), share_of(TRAIN)) if rank == 0 else None
    distributed.PATIENCE = patience
    torch.distributed.barrier()  # in which the second rank waits meanwhile
    return {"error": error, "values": [measure(plain(), share_of(TRAIN), progress=False) for _ in range(4)]}


def fsdp(model, use_orig_params=True):
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def fsdp2(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module)
    return fully_shard(model)


def sharding():
    """What shards a model in this release of torch."""
    return [fsdp, fsdp2] if fully_shard else [fsdp]


def error_of(function, *args):
    """The kind and the message of what is raised; None if nothing is."""
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


class Buffers(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.register_buffer("own", torch.full((2,), float(rank)))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("none", None)
        self.register_buffer("cache", torch.full((2 + rank,), float(rank)), persistent=False)


def steps():
    """The collective steps, one by one."""
    rank, cpu = torch.distributed.get_rank(), torch.device("cpu")
    model = Buffers(rank)
    broadcast_buffers(model, cpu)
    return {
        "largest": all_max(-3.5 + rank, cpu),
        "no error": error_of(all_raise, None, cpu),
        "error of rank 1": error_of(all_raise, KeyError("mine") if rank else None, cpu),
        "same shapes": error_of(check_same_shapes, {"": 6, "body": 9}, cpu),
        "other shapes": error_of(check_same_shapes, {"": 6 + rank}, cpu),
        "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
    }


def main(part, folder):
    results = {}
    if part == "ddp":
        failing = (one_gives_up, one_gives_up_midway, one_fails_in_its_forward, other_width)
        for function in (
            exact,
            every_stage,
            online,
            uneven,
            other_caches,
            validates_alone,
            *failing,
            collectives,
            wide,
            *([model_parallel] if fully_shard else []),
        ):
            results[function.__name__] = function()
    if part == "nodes":
        callback = NeuralCollapseCallback(LAYERS, strict=True)
        trainer, model = fit([callback], num_nodes=2, devices=1)
        assert (trainer.num_nodes, trainer.world_size) == (2, 2)
        results = {"history": callback.history, "state": state_of(model)}
    if part == "everything":
        torch.distributed.init_process_group("gloo")
        results["everything"] = everything(torch.distributed.get_rank(), torch.distributed.get_world_size())
    if part == "sharded":
        import huggingface_ranks  # which takes a while, and the other parts do without

        torch.distributed.init_process_group("gloo")
        results["steps"] = steps()
        results["everything"] = everything(torch.distributed.get_rank(), torch.distributed.get_world_size())
        results["is sharded"] = [is_sharded(wrap(plain())) for wrap in (DistributedDataParallel, *sharding())]
        results["FSDP, flat parameters"] = sharded(lambda model: fsdp(model, False))
        results["FSDP, original parameters"] = sharded(fsdp)
        if fully_shard:
            results["FSDP2"] = sharded(fsdp2)
        results["fixed head"] = fixed_head()
        results["regression"] = regression()
        results["extracted"] = extracted()
        results["loop"] = measured_in_a_loop()
        results["alone"] = measured_by_the_first_rank_alone()
        results["huggingface"] = huggingface_ranks.results(folder)
    torch.save(results, Path(folder) / f"{part}{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
