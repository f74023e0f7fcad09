"""The samples of a dataloader, each once and in order, without touching the dataloader itself."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from conftest import Normalized, clusters
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from versions import since

from lightning_nc import measure
from lightning_nc.measuring.loaders import (
    has_own_iteration,
    is_distributed,
    measurement_loader,
    own_samples,
    rank_of,
    unprepared,
    warn_if_moved,
)

DATA = TensorDataset(torch.arange(51.0).unsqueeze(1), torch.arange(51) % 3)


class EndsEarly(Dataset):
    def __len__(self):
        return 51

    def __getitem__(self, index):
        if index == 20:
            raise StopIteration
        return DATA[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_ends_before_its_length_is_refused_instead_of_measured_in_part(workers):
    loader = DataLoader(EndsEarly(), 8, num_workers=workers)
    with pytest.raises(RuntimeError, match="the data ended after 2 of 7 batches: the data set EndsEarly"):
        measure(nn.Linear(1, 3), loader, progress=False)


def visited(loader, **kwargs):
    batches, _ = measurement_loader(loader, **kwargs)
    return [int(value) for rows, _ in batches for value in rows]


class Stream(IterableDataset):
    def __iter__(self):
        yield from DATA


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, 8),
        DataLoader(DATA, 8, shuffle=True, drop_last=True),
        DataLoader(DATA, 8, shuffle=True, num_workers=2, persistent_workers=True),
        DataLoader(DATA, 8, sampler=WeightedRandomSampler([1.0] * 51, 20)),
        DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, drop_last=True)),
        DataLoader(Stream(), 8),
    ],
    ids=["sequential", "shuffled", "workers", "weighted", "batch sampler", "stream"],
)
def test_every_sample_is_visited_once_and_in_order(loader):
    assert visited(loader) == list(range(51))


def test_samples_outside_of_a_subset_are_not_visited():
    assert visited(DataLoader(DATA, 8, sampler=SubsetRandomSampler([40, 3, 9]))) == [3, 9, 40]
    assert visited(DataLoader(Subset(DATA, [5, 4]), 8, shuffle=True)) == [5, 4]
    half = torch.arange(51) % 2
    assert visited(DataLoader(DATA, 8, sampler=WeightedRandomSampler(half.double(), 20))) == list(range(1, 51, 2))


def test_a_sampler_over_a_part_of_the_data_gives_that_part():
    assert visited(DataLoader(DATA, 8, sampler=SequentialSampler(range(20)))) == list(range(20))
    assert visited(DataLoader(DATA, 8, sampler=RandomSampler(range(20)))) == list(range(20))
    with pytest.raises(LookupError, match="pass batch_sampler="):
        visited(DataLoader(DATA, batch_size=None, sampler=BatchSampler(RandomSampler(DATA), 8, False)))


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield from reversed(range(20))


class Epochs(Endless):
    def __len__(self):
        return 20


class Half(RandomSampler):
    def __iter__(self):
        return iter(range(0, 51, 2))

    def __len__(self):
        return 26


class Repeated(BatchSampler):
    def __iter__(self):
        while True:
            yield from super().__iter__()


def test_what_a_batch_sampler_draws_from_is_what_is_measured():
    fold = SubsetRandomSampler(range(10, 30))
    assert visited(DataLoader(DATA, batch_sampler=BatchSampler(fold, 8, False))) == list(range(10, 30))
    chosen = visited(DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, False)), max_batches=2)
    assert chosen != sorted(chosen)
    assert visited(DataLoader(DATA, 8, sampler=Half(DATA))) == list(range(0, 51, 2))


def test_samplers_without_an_end_are_followed_for_an_epoch():
    assert visited(DataLoader(DATA, 8, sampler=Epochs())) == list(range(20))
    assert visited(DataLoader(DATA, batch_sampler=Repeated(SequentialSampler(DATA), 8, False))) == list(range(51))
    assert len(visited(DataLoader(DATA, 5, sampler=Endless()), max_batches=2)) == 10
    with pytest.raises(LookupError, match="Endless of the training data has no length"):
        visited(DataLoader(DATA, 8, sampler=Endless()))


def test_a_loader_with_its_own_iteration_is_not_copied():
    with pytest.raises(LookupError, match=r"a Normalized that makes batches in a way of its own.*pass dataloader="):
        visited(Normalized(DATA, 8))
    assert has_own_iteration(Normalized(DATA, 8))
    assert not has_own_iteration(DataLoader(DATA, 8))


def test_ranks_share_the_samples_without_padding():
    shards = [visited(DataLoader(DATA, 8), rank=rank, world_size=4) for rank in range(4)]
    assert sorted(sample for shard in shards for sample in shard) == list(range(51))


def test_a_limit_takes_the_same_random_choice_from_a_shuffled_loader_that_ranks_share():
    alone = visited(DataLoader(DATA, 5, shuffle=True), max_batches=4)
    loaders = [DataLoader(DATA, 5, sampler=DistributedSampler(DATA, 2, rank)) for rank in range(2)]
    shares = [visited(loader, max_batches=2, rank=rank, world_size=2) for rank, loader in enumerate(loaders)]
    assert shares == [alone[::2], alone[1::2]]
    in_order = DataLoader(DATA, 5, sampler=DistributedSampler(DATA, 2, 0, shuffle=False))
    assert visited(in_order, max_batches=2, world_size=2) == list(range(0, 20, 2))


def test_a_limit_takes_a_fixed_random_choice():
    loader = DataLoader(DATA, 8, shuffle=True)
    chosen = visited(loader, max_batches=2)
    assert len(set(chosen)) == 16
    assert chosen == visited(loader, max_batches=2)
    assert chosen != sorted(chosen)


def test_a_limit_takes_a_random_choice_of_what_a_batch_sampler_of_ones_own_draws():
    class Own(BatchSampler):
        pass

    own = DataLoader(DATA, batch_sampler=Own(RandomSampler(DATA), 8, False))
    assert visited(own, max_batches=2) == visited(DataLoader(DATA, 8, shuffle=True), max_batches=2)


def test_a_loader_that_cannot_be_copied_is_refused():
    with pytest.raises(LookupError, match="pass dataloader="):
        measurement_loader({"a": DataLoader(DATA), "b": DataLoader(DATA)})


def test_measuring_leaves_the_generator_of_the_loader_where_it_was():
    rows, target = clusters(4, 30, 8, 0.5)
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    measure(
        nn.Linear(8, 4), DataLoader(TensorDataset(rows, target), 7, shuffle=True, generator=generator), progress=False
    )
    assert torch.equal(generator.get_state(), before)


def test_a_data_set_is_no_loader():
    data = torch.utils.data.TensorDataset(torch.randn(8, 6), torch.arange(8) % 4)
    with pytest.raises(ValueError, match=r"got the data set TensorDataset; write DataLoader"):
        measure(nn.Linear(6, 4), data, progress=False)


def test_a_sampler_for_several_ranks_says_which_rank_this_is_and_how_many_samples_are_its_own():
    plain = DataLoader(DATA, 8)
    assert not is_distributed(plain)
    assert (rank_of(plain), own_samples(plain, 0)) == ((0, 1), None)
    loaders = [DataLoader(DATA, 8, sampler=DistributedSampler(DATA, 4, rank)) for rank in range(4)]
    assert all(map(is_distributed, loaders))
    assert [rank_of(loader) for loader in loaders] == [(rank, 4) for rank in range(4)]
    assert [own_samples(loader, 0) for loader in loaders] == [13, 13, 13, 12]  # of 51, without the one that pads
    dropping = DataLoader(DATA, 8, sampler=DistributedSampler(DATA, 4, 0, drop_last=True))
    assert own_samples(dropping, 0) is None
    batches = list(DATA.tensors[0].split(17))  # the second of two ranks repeats a batch of the first
    whole = [DataLoader(batches, batch_size=None, sampler=DistributedSampler(batches, 2, rank)) for rank in range(2)]
    assert [[own_samples(loader, batch) for batch in range(2)] for loader in whole] == [[None, None], [None, 0]]


def test_a_cursor_of_the_data_set_that_moves_is_pointed_out():
    class Cursor(Dataset):
        position, name = 0, "a"

        def __init__(self):
            self.position = 3

    data, said = Cursor(), []
    holder = type("Loader", (), {"dataset": data})()
    with warn_if_moved(holder, lambda topic, message: said.append(message)):
        data.name = "b"
    assert said == []
    with warn_if_moved(holder, lambda topic, message: said.append(message)):
        data.position += 1
    assert len(said) == 1
    assert "measuring moved position of the data set Cursor" in said[0]
    assert "pass dataloader=" in said[0]


# ------------------------------------------------------------------------------------- loaders of Accelerate and Fabric

KINDS = {
    "sequential": {"batch_size": 8},
    "shuffled": {"batch_size": 8, "shuffle": True, "drop_last": True},
    "batch sampler": {"batch_sampler": Repeated(SubsetRandomSampler(range(51)), 8, False)},
    "by length": {"batch_size": 8, "sampler": LengthGroupedSampler(8, lengths=[n % 7 for n in range(51)])},
    "larger than the data": {"batch_size": 64},
}
OPTIONS = {"shared": {}, "split": {"split_batches": True}, "uneven": {"even_batches": False}}


def prepared(rank=0, world_size=4, data=DATA, options=(), **kwargs):
    """What ``accelerator.prepare`` makes of a DataLoader on one of several ranks."""
    loader = DataLoader(data, **kwargs)
    return prepare_data_loader(
        loader, num_processes=world_size, process_index=rank, use_seedable_sampler=True, **dict(options)
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_ranks_of_accelerate_visit_every_sample_once_and_none_that_fills_a_batch(kind, options):
    loaders = [prepared(rank, options=options, **kind) for rank in range(4)]
    assert [rank_of(loader) for loader in loaders] == [(rank, 4) for rank in range(4)]
    shards = [visited(loader, rank=rank, world_size=4) for rank, loader in enumerate(loaders)]
    assert sorted(sample for shard in shards for sample in shard) == list(range(51))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_prepared_loader_gives_the_same_batches_whether_it_is_measured_or_not(world_size):
    def two_epochs(measured):
        torch.manual_seed(1)
        loader = prepared(1 % world_size, world_size, batch_size=8, shuffle=True)
        seen = []
        for _ in range(2):
            seen += [rows.flatten().tolist() for rows, _ in loader]
            if measured:
                measure(nn.Linear(1, 3).requires_grad_(False), loader, progress=False)
            torch.randn(3)
        return seen, loader.iteration

    torch.manual_seed(0)
    alone, again = two_epochs(False), two_epochs(True)
    assert alone == again
    assert alone[0] != sorted(alone[0])


def test_the_balanced_batches_of_transformers_are_shared_out_without_those_that_fill_the_last_step():
    lengths = [n % 7 + 1 for n in range(49)]  # one sample is left over for the last step, and each rank gets it
    data = Subset(DATA, range(49))
    balanced = since("transformers 5", "transformers.trainer_pt_utils", "BatchRebalanceSampler")
    shards = []
    for rank in range(2):
        sampler = balanced(lengths, 8, 2, 1, rank=rank, drop_last=False)
        loader = prepare_data_loader(DataLoader(data, batch_sampler=sampler), num_processes=1)
        assert rank_of(loader) == (rank, 2)
        shards.append(visited(loader, rank=rank, world_size=2))
    assert sorted(shards[0] + shards[1]) == list(range(49))


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (prepared(world_size=1, batch_size=8, data=Stream(), options={"put_on_device": True}), "hands them out"),
        (prepared(batch_size=8, options={"put_on_device": True, "dispatch_batches": True}), "hands them out"),
        (prepared(batch_size=8, data=Stream()), "repeats its start"),
        (skip_first_batches(prepared(batch_size=8), 2), "skips the first batches"),
        (skip_first_batches(DataLoader(DATA, 8), 2), "skips the first batches"),
        (skip_first_batches(prepared(world_size=1, batch_size=8, data=Stream()), 2), "skips the first batches"),
    ],
    ids=["stream", "dispatched", "shared stream", "skipping", "plain skipping", "skipping in a stream"],
)
def test_a_loader_of_accelerate_that_hides_which_samples_are_its_own_is_refused(loader, reason):
    with pytest.raises(LookupError, match=rf"{reason}.*pass dataloader=, the DataLoader as it was before"):
        measure(nn.Linear(1, 3), loader, progress=False)


def test_a_stream_that_one_process_reads_is_measured():
    assert visited(prepared(world_size=1, batch_size=8, data=Stream())) == list(range(51))


def test_a_loader_of_fabric_is_copied_and_keeps_its_count_of_epochs():
    fabric = Fabric(accelerator="cpu", devices=1)
    plain = DataLoader(DATA, 8, sampler=DistributedSampler(DATA, 2, 1, seed=3))
    loader = fabric.setup_dataloaders(plain, use_distributed_sampler=False)
    assert unprepared(loader) is plain
    measure(nn.Linear(1, 3), loader, progress=False)
    seen = [rows.flatten().tolist() for rows, _ in loader]
    again = fabric.setup_dataloaders(plain, use_distributed_sampler=False)
    assert seen == [rows.flatten().tolist() for rows, _ in again]
