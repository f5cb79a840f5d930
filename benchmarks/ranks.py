"""Two gloo ranks on the CPU: what each term sees of the other rank, whether ranks stay equal, DDP and FSDP2.

    python benchmarks/ranks.py          # Linux; about 3 minutes of CPU time
    SOLO_LEARN_ROOT=... python benchmarks/ranks.py --only solo
    python benchmarks/ranks.py --only stable     # where stable-pretraining is installed

For each model of the adapters' contract (tests/adapter_contract.py) on each rank, solo-learn's methods on a ResNet of
two stages:

- the terms of two forwards in the process group against those of the same rank alone, in a process without a group.
  "rank": equal, the term sees the images of its own rank only; "gathered": it depends on the other rank's in the first
  forward already. Else a memory bank brought them, "rank 0's" if only DDP's broadcast of buffers does so;
- 10 steps of DistributedDataParallel, unused parameters forbidden: are all parameters, and those of the affinity, equal
  on both ranks to the last bit?
- the same 10 steps with FSDP2 (`fully_shard` on the parts, then on the whole): the largest difference of a parameter
  from DistributedDataParallel's without broadcast of buffers, which FSDP2 has not. A LightningModule's training_step
  runs in the forward of a module here, as in Lightning's own DDP.
"""

import argparse
import functools
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightly.loss import BarlowTwinsLoss, DCLLoss, NTXentLoss, TiCoLoss, VICRegLoss
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import hosts
import test_learner
import test_lightly
from adapter_contract import views
from hosts import wrap_learned as wrap

STEPS = 10
TERMS = ("global_global", "local_global", "local_local", "affinity")


def gathering(cls, criterion, **options):
    return wrap(cls(criterion), **options)


def gathering_moco(**options):
    model = hosts.MoCo()
    model.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(64, 16), gather_distributed=True)
    return wrap(model, **options)


def gathering_tico(**options):
    model = hosts.TiCo()
    model.criterion = TiCoLoss(gather_distributed=True)
    return wrap(model, **options)


def gathered_loss(cls):
    return functools.partial(cls, gather_distributed=True)


def cases():
    found = test_lightly.CONTRACT | {f"learner {name}": case for name, case in test_learner.CASES.items()}
    losses = {"simclr": NTXentLoss, "barlow twins": BarlowTwinsLoss, "benchmark vicreg": VICRegLoss, "dcl": DCLLoss}
    builds = {name: functools.partial(gathering, hosts.SimCLR, gathered_loss(loss)) for name, loss in losses.items()}
    for name, build in (builds | {"moco": gathering_moco, "tico": gathering_tico}).items():
        found[f"{name}, gather_distributed"] = replace(found[name], build=build)
    if os.environ.get("SOLO_LEARN_ROOT"):
        import test_solo

        found |= {f"solo-learn {name}": case for name, case in test_solo.SMALL.items()}
    if importlib.util.find_spec("stable_pretraining"):
        import methods_stable

        stable = methods_stable.CASES | {"nnclr": methods_stable.case("nnclr", filled=16)}
        found |= {f"stable-pretraining {name}": case for name, case in stable.items()}
    return found


class Step(nn.Module):
    def __init__(self, case, model):
        super().__init__()
        self.case, self.model = case, model

    def forward(self, crops):
        return self.case.loss(self.model, crops)


def make(case):
    torch.manual_seed(0)
    model = case.build(local_weight=0.5)
    return model, case.optimizer(model)


def terms_of(model):
    terms = model.logo_terms if hasattr(model, "logo_terms") else model.terms
    return [float(getattr(terms, name)) for name in TERMS]


def first_terms(case, rank, broadcast=True):
    """Of two forwards without an optimizer's step: the second shows what came by a memory bank."""
    model, _ = make(case)
    replica = Step(case, model)
    if dist.is_initialized():
        replica = DistributedDataParallel(replica, broadcast_buffers=broadcast)
    found = []
    for i in range(2):
        torch.manual_seed(i)
        replica(views(2 * i + rank))
        found.append(terms_of(model))
    return found


def train(replica, optimizer, rank):
    for i in range(STEPS):
        torch.manual_seed(100 * rank + i)
        optimizer.zero_grad()
        replica(views(2 * i + rank)).backward()
        optimizer.step()


def equal_on_ranks(tensors):
    mine = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    return torch.equal(*both)


def fsdp(case, rank):
    reference, optimizer = make(case)
    train(DistributedDataParallel(Step(case, reference), broadcast_buffers=False), optimizer, rank)
    model, _ = make(case)
    for name, part in model.named_children():
        part = getattr(part, "affinity", part)  # LoGoLoss has no forward that is called, its affinity has
        for wrapper in part.modules():  # stable-pretraining's TeacherStudentWrapper calls its two, not itself
            if hasattr(wrapper, "student") and hasattr(wrapper, "teacher"):
                fully_shard(wrapper.student)
                fully_shard(wrapper.teacher)
        # Nor has lightly's online classifier: its parameters belong to the whole.
        if name != "online_classifier" and any(True for _ in part.parameters()):
            fully_shard(part)
    replica = fully_shard(Step(case, model))
    train(replica, case.optimizer(model), rank)
    differences = [
        (mine.full_tensor() - other).abs().max()
        for mine, other in zip(model.parameters(), reference.parameters(), strict=True)
    ]
    return float(max(differences))


def run(rank, folder, chosen):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    alone = {name: first_terms(case, rank) for name, case in chosen.items()}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, case in chosen.items():
        terms = {"alone": alone[name], "DDP": first_terms(case, rank), "quiet": first_terms(case, rank, False)}
        model, optimizer = make(case)
        train(DistributedDataParallel(Step(case, model)), optimizer, rank)
        affinity = case.affinity(model)
        ddp = [equal_on_ranks(model.parameters()), equal_on_ranks(affinity.parameters())]
        try:
            sharded = f"{fsdp(case, rank):.1e}"
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:
            sharded = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        result = terms | {"equal": ddp, "fsdp": sharded}
        torch.save(result, f"{folder}/{name}{rank}.pt")
        dist.barrier()
        if rank == 0:
            report(folder, name)
    dist.destroy_process_group()


def report(folder, name):
    both = [torch.load(f"{folder}/{name}{rank}.pt") for rank in (0, 1)]
    cells = []
    for k in range(len(TERMS)):
        first, second = (all(r["DDP"][i][k] == r["alone"][i][k] for r in both) for i in (0, 1))
        quiet = all(r["quiet"][1][k] == r["alone"][1][k] for r in both)
        bank = "rank; bank rank 0's" if quiet else "rank; bank of all ranks"
        cells.append("gathered" if not first else "rank" if second else bank)
    yes = ["equal" if equal else "DIFFER" for equal in both[0]["equal"]]
    print(f"| {' | '.join([name, *cells, *yes, both[0]['fsdp']])} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name holds this")
    only = parser.parse_args().only
    chosen = {name: case for name, case in cases().items() if only in name}
    print(f"torch {torch.__version__}, two gloo ranks of 6 images, {STEPS} steps\n")
    head = ["model", *TERMS, "parameters of ranks", "affinity of ranks", "FSDP2 against DDP"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run, (folder, chosen), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
