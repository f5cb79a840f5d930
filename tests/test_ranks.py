"""What two gloo ranks see of each other, and FSDP2; benchmarks/ranks.py has all models."""

import random
from functools import partial

import hosts
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from adapter_contract import seeded, views
from hosts import wrap_learned as wrap
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from test_learner import build
from torch.nn.parallel import DistributedDataParallel

from logo_plugin import Affinity, LoGoLoss, info_nce

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch < 2.6
    fully_shard = None


def objective(rank, **options):
    torch.manual_seed(10 + rank)
    pred, target, proj = torch.randn(2, 6, 16), torch.randn(2, 6, 16), torch.randn(2, 6, 16, requires_grad=True)
    criterion = seeded(LoGoLoss, affinity=seeded(Affinity, dim=16), **options)
    return criterion(global_pred=pred, local_pred=proj * 2, global_target=target, local_proj=proj)


def simclr(rank, gather):
    model = seeded(lambda: wrap(hosts.SimCLR(partial(NTXentLoss, gather_distributed=gather))))
    torch.manual_seed(rank)
    model.training_step([views(rank), None], 0)
    return model.logo_terms


TERMS = {
    "cosine": objective,
    "InfoNCE in the batch": partial(objective, similarity=info_nce, gradient_ratio=0.1),
    "SimCLR": partial(simclr, gather=False),
    "SimCLR, gathering": partial(simclr, gather=True),
}


def in_group(run, folder):
    mp.start_processes(run, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]


def join(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)


def run_terms(rank, folder):
    join(rank, folder)
    found = {name: tuple(terms(rank).detach()) for name, terms in TERMS.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_terms_see_the_images_of_one_rank(tmp_path):
    """As LoGoLoss declares: all terms, unless the similarity itself gathers; then those that it makes."""
    for rank, found in enumerate(in_group(run_terms, tmp_path)):
        for name, terms in TERMS.items():
            alone = tuple(terms(rank).detach())
            differ = [not torch.equal(a, b) for a, b in zip(found[name], alone, strict=True)]
            assert differ == [name == "SimCLR, gathering"] * 3 + [False] * 2, name


def wrapped(method):
    cls, criterion = {
        "byol": (hosts.PlainBYOL, NegativeCosineSimilarity()),
        "moco": (hosts.PlainMoCo, NTXentLoss(temperature=0.1, memory_bank_size=(64, 16))),
    }[method]
    return wrap(cls(), criterion=criterion, local_weight=0.5)


SHARDED = {
    "wrapped byol": partial(wrapped, "byol"),
    "wrapped moco": partial(wrapped, "moco"),
    "learner byol": partial(build, "byol", local_weight=0.5),
    "learner moco": partial(build, "moco", gradient_ratio=0.5),
}


def train(model, replica, rank):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i in range(3):
        if hasattr(model, "update"):
            model.update()
        torch.manual_seed(10 * rank + i)
        optimizer.zero_grad()
        replica(views(2 * i + rank)).backward()
        optimizer.step()


def run_sharded(rank, folder):
    join(rank, folder)
    found = {}
    for name, make in SHARDED.items():
        reference, model = seeded(make), seeded(make)
        train(reference, DistributedDataParallel(reference, broadcast_buffers=False), rank)
        for part in model.children():
            part = getattr(part, "affinity", part)
            if any(True for _ in part.parameters()):
                fully_shard(part)
        train(model, fully_shard(model), rank)
        mine = {key: p.full_tensor() for key, p in model.named_parameters()}
        found[name] = mine, {key: p.detach() for key, p in reference.named_parameters()}
    whole = fully_shard(seeded(SHARDED["learner byol"]))
    try:
        found["whole"] = float(whole(views(rank)))
    except RuntimeError as error:
        found["whole"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(fully_shard is None, reason="FSDP2 has been public since torch 2.6")
def test_fsdp2_trains_as_ddp_does(tmp_path):
    """Sharded by parts, and all of them; a learner whose target would never move is refused."""
    for found in in_group(run_sharded, tmp_path):
        assert "Shard the parts first" in found.pop("whole")
        for name, (mine, expected) in found.items():
            assert mine.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(mine[key], value, msg=f"{name}: {key}")


class Synced(torch.nn.Module):
    """Centred over all ranks: each call is a collective, as SyncBatchNorm's is, which needs GPUs."""

    def forward(self, x):
        return x - torch.distributed.nn.functional.all_reduce(x.mean(0)) / dist.get_world_size()


class Sampled(hosts.PlainSimSiam):
    """Rank 0 draws a picture to log."""

    def __init__(self):
        super().__init__()
        self.projection_head = torch.nn.Sequential(self.projection_head, Synced())

    def forward(self, x):
        if not dist.get_rank():
            self.picture = x[random.randrange(len(x))]
        return super().forward(x)


class Dead(hosts.PlainSimCLR):
    """Dropout hides the predictions, and a black image, whose row is zero, is on one rank only."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
        relu, dropout = torch.nn.ReLU(), torch.nn.Dropout(0.1)
        self.projection_head = torch.nn.Sequential(torch.nn.Linear(48, 16, bias=False), relu, dropout)

    def host_loss(self, criterion, x0, x1):
        a, b = (torch.nn.functional.normalize(self(x), dim=1) for x in (x0, x1))
        return 0.5 * (criterion(a, b.detach()) + criterion(b, a.detach()))


class Alternates(hosts.PlainSimSiam):
    """Each second step is of another loss."""

    steps = 0

    def host_loss(self, criterion, x0, x1):
        self.steps += 1
        if self.steps % 2:
            return super().host_loss(criterion, x0, x1)
        return sum((self(x)[1] ** 2).mean() for x in (x0, x1))


class Moves(hosts.PlainBYOL):
    def forward(self, x):
        self.update()
        return super().forward(x)


def stepping(cls, criterion, **options):
    model = cls()
    model.criterion = criterion
    return wrap(model, step=hosts.own_step, local_weight=0.5, **options)


def static():
    model = hosts.PlainSimSiam()
    model.prediction_head = DistributedDataParallel(model.prediction_head, static_graph=True)
    return wrap(model, criterion=NegativeCosineSimilarity(), gradient_ratio=0.1)


gathering = partial(NTXentLoss, gather_distributed=True)
TOGETHER = {
    "a gathering criterion": lambda: wrap(hosts.PlainSimCLR(), criterion=gathering(temperature=0.1), local_weight=0.5),
    "random on one rank": partial(stepping, Sampled, NegativeCosineSimilarity()),
    "a dead row on one rank": partial(stepping, Dead, gathering(), online="forward"),
    "a step without LoGo": partial(stepping, Alternates, NegativeCosineSimilarity(), local_predictor=True),
}
REFUSED = {
    "takes the first one for that of backward": static,
    "moves parameters that nothing trains": partial(stepping, Moves, NegativeCosineSimilarity()),
}


def run_together(rank, folder):
    join(rank, folder)
    found = {}
    for name, make in TOGETHER.items():
        model = seeded(make)
        replica, optimizer = DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(3):
            crops = views(2 * i + rank)
            if rank:
                for view in crops:
                    view[0] = 0
            optimizer.zero_grad()
            replica(crops).backward()
            optimizer.step()
        found[name] = {key: p.detach() for key, p in model.named_parameters()}
    for message, make in REFUSED.items():
        try:
            found[message] = seeded(make)(views(rank))
        except RuntimeError as error:
            found[message] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_go_the_same_way(tmp_path):
    """Whatever each sees of its own data: else collectives would meet others, and training would hang."""
    first, second = in_group(run_together, tmp_path)
    for name in TOGETHER:
        for key, value in first[name].items():
            torch.testing.assert_close(value, second[name][key], rtol=0, atol=0, msg=f"{name}: {key}")
    for message in REFUSED:
        assert message in first[message]
        assert message in second[message]
