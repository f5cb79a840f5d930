"""Models that people write: `wrap` trains them as computed by hand, or refuses them, and never trains them wrongly."""

import copy
import functools
import importlib
import itertools
import math
import random
import warnings
from collections import deque, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hosts import wrap_learned as wrap
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from lightly.models.modules import NNMemoryBankModule
from torch import nn
from torch.utils.checkpoint import checkpoint

from logo_plugin import LoGoLoss, info_nce

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def conv():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def mlp(inside, out):
    return nn.Sequential(nn.Linear(inside, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, out))


def cosine(pred, target):
    return -F.cosine_similarity(pred, target, dim=1).mean()


def batch(n=6):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(n, 3, side, side, generator=generator) for side in (24, 24, 16, 16)], torch.arange(n) % 4]


class SimSiam(pl.LightningModule):
    loss = NegativeCosineSimilarity

    def __init__(self):
        super().__init__()
        self.backbone, self.projection_head, self.prediction_head = conv(), mlp(8, 10), mlp(10, 10)
        self.criterion = self.loss()

    def both(self, x):
        z = self.projection_head(self.backbone(x).flatten(1))
        return z, self.prediction_head(z)

    def forward(self, x):
        return self.both(x)

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        return 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class OnlyParts(SimSiam):
    """Without a forward of its own."""

    forward = pl.LightningModule.forward


def by_hand(model, views, similarity=cosine, scale=1.0):
    """(the host's loss, its scale, its mean similarity, pairs, local predictions, targets, similarity)"""
    (z0, p0), (z1, p1) = map(model.both, views[:2])
    mean = (similarity(p0, z1.detach()) + similarity(p1, z0.detach())) / 2
    return scale * mean, scale, mean, 2, [model.both(view)[1] for view in views[2:]], [z0, z1], similarity


def total(host_loss, scale, mean, pairs, preds, targets, similarity):
    """Of plain multi-crop."""
    local = torch.stack([similarity(p, t.detach()) for p in preds for t in targets]).mean()
    more = len(preds) * len(targets)
    return host_loss + scale * more / (pairs + more) * (local - mean)


def check(model, hand, **options):
    """Loss and gradients of plain multi-crop, and of the host's loss alone with LoGo off."""
    views = batch()[0]
    for off in (True, False):
        host, wrapped = copy.deepcopy(model), copy.deepcopy(model)
        wrapped = wrap(wrapped, affinity=None, **({"local_global_weight": 0} if off else {}), **options)
        loss = wrapped.training_step(batch(), 0)
        expected = host.training_step([views[:2], batch()[1]], 0) if off else total(*hand(host, views))
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        parameters = dict(host.named_parameters())
        for name, parameter in wrapped.named_parameters():
            wanted = parameters[name].grad
            if parameter.grad is not None or wanted is not None:
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5, msg=name)
    return wrapped


class InPlace(SimSiam):
    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        loss = self.criterion(p0, z1.detach())
        loss += self.criterion(p1, z0.detach())
        loss /= 2
        return loss


class NoGradForward(SimSiam):
    @torch.no_grad()
    def forward(self, x):
        return self.both(x)[1]


class InferenceForward(SimSiam):
    @torch.inference_mode()
    def forward(self, x):
        return self.both(x)[1]


class TwoArguments(SimSiam):
    def forward(self, first, second):
        return self.both(first), self.both(second)


class PairLoss(nn.Module):
    """The pairs in another order than lightly's symmetric criterion has them."""

    def forward(self, first, second):
        (p0, z0), (p1, z1) = first, second
        return 0.5 * (cosine(p0, z1.detach()) + cosine(p1, z0.detach()))


class Pairs(SimSiam):
    loss = PairLoss

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        return self.criterion((p0, z0), (p1, z1))


class Centred(SimSiam):
    def both(self, x):
        z = self.projection_head(self.backbone(x).flatten(1))
        z -= z.mean(0)
        return z, self.prediction_head(z)


class Detaching(nn.Module):
    """SimSiam's D(p, z), which detaches z itself."""

    def forward(self, pred, target):
        return cosine(pred, target.detach())


class DetachingFirst(Detaching):
    def forward(self, target, pred):
        return super().forward(pred, target)


class DetachesInTheLoss(SimSiam):
    loss = Detaching

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class DetachesTheFirst(SimSiam):
    loss = DetachingFirst

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        return 0.5 * (self.criterion(z1, p0) + self.criterion(z0, p1))


class BothPairs(nn.Module):
    def forward(self, first, second):
        (z0, p0), (z1, p1) = first, second
        return 0.5 * (cosine(p0, z1) + cosine(p1, z0))


class DetachedPairs(SimSiam):
    """Of two pairs, detached by the step."""

    loss = BothPairs

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        return self.criterion((z0.detach(), p0), (z1.detach(), p1))


class Similarity(nn.Module):
    def forward(self, pred, target):
        return -cosine(pred, target)


class EachImage(SimSiam):
    """A similarity of each image's two views, of which the step makes the loss, as SimSiam's release does."""

    loss = nn.CosineSimilarity

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        return -(self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach())).mean() / 2


class EachPair(nn.Module):
    def forward(self, first, second):
        (z0, p0), (z1, p1) = first, second
        return -(F.cosine_similarity(p0, z1) + F.cosine_similarity(p1, z0)) / 2


class EachImageOfPairs(SimSiam):
    loss = EachPair

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        return self.criterion((z0.detach(), p0), (z1.detach(), p1)).mean()


class WeighsImages(EachImage):
    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        each = self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach())
        return -(each * torch.linspace(0, 1, len(each))).mean()


@pytest.mark.parametrize(
    "model",
    [
        *(InPlace, Centred, NoGradForward, InferenceForward, TwoArguments, Pairs),
        *(DetachesInTheLoss, DetachesTheFirst, DetachedPairs, EachImage, EachImageOfPairs),
    ],
)
def test_as_by_hand(model):
    torch.manual_seed(0)
    check(model(), by_hand)


def test_a_scale_in_place():
    class Scaled(SimSiam):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            loss *= 0.25
            return loss

    torch.manual_seed(0)
    check(Scaled(), lambda model, views: by_hand(model, views, scale=0.25))


def test_one_direction_in_both_orders():
    """InfoNCE from the first view to the second, and back: a local crop asks as either view does."""

    def one_way(first, second):
        logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / 0.2
        return F.cross_entropy(logits, torch.arange(len(first)))

    class OneWay(nn.Module):
        def forward(self, first, second):
            return one_way(first, second)

    class Contrastive(SimSiam):
        loss = OneWay

        def __init__(self):
            super().__init__()
            del self.prediction_head

        def forward(self, x):
            return self.projection_head(self.backbone(x).flatten(1))

        def training_step(self, batch, batch_idx):
            z0, z1 = map(self, batch[0])
            return 0.5 * (self.criterion(z0, z1) + self.criterion(z1, z0))

    class InOneOrder(Contrastive):
        def training_step(self, batch, batch_idx):
            return self.criterion(*map(self, batch[0]))

    def hand(model, views):
        z0, z1 = map(model, views[:2])
        mean = (one_way(z0, z1) + one_way(z1, z0)) / 2
        return mean, 1.0, mean, 2, [model(view) for view in views[2:]], [z0, z1], one_way

    torch.manual_seed(0)
    check(Contrastive(), hand)
    with pytest.raises(RuntimeError, match="do not play the same part"):
        wrap(InOneOrder()).training_step(batch(), 0)


@pytest.mark.parametrize("reduction", ["pairs", "sum"])
def test_a_target_that_is_given_several_times_is_one(reduction):
    """Four global crops, each predicting each other one's target."""

    class AllPairs(SimSiam):
        def training_step(self, batch, batch_idx):
            z, p = zip(*map(self.both, batch[0]), strict=True)
            pairs = list(itertools.permutations(range(len(p)), 2))
            return sum(self.criterion(p[i], z[j].detach()) for i, j in pairs) / len(pairs)

    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(6, 3, side, side, generator=generator) for side in (24,) * 4 + (16,) * 2]
    torch.manual_seed(0)
    host = AllPairs()
    wrapped = wrap(copy.deepcopy(host), affinity=None, global_crops=4, reduction=reduction)
    loss = wrapped.training_step([views, None], 0)
    z, p = zip(*map(host.both, views), strict=True)
    criterion = LoGoLoss(affinity=None, reduction=reduction)
    expected = criterion(global_pred=p[:4], global_target=[t.detach() for t in z[:4]], local_pred=p[4:]).total
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("cast", [False, True])
def test_a_loss_in_full_precision(cast):
    """Under bfloat16 the step computes its loss in float32, and so does LoGo."""
    seen = []

    class Product(nn.Module):
        def forward(self, pred, target):
            product = F.normalize(pred, dim=1) @ F.normalize(target, dim=1).T
            seen.append((pred.dtype, target.dtype, product.dtype))
            return -product.diagonal().mean()

    class Exact(SimSiam):
        loss = Product

        def training_step(self, batch, batch_idx):
            with torch.autocast("cpu", torch.bfloat16):
                (z0, p0), (z1, p1) = map(self.both, batch[0])
                if not cast:
                    return 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))
                with torch.autocast("cpu", enabled=False):
                    z0, z1, p0, p1 = (x.float() for x in (z0, z1, p0, p1))
                    return 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))

    model = wrap(Exact(), affinity=None)
    with torch.autocast("cpu", torch.bfloat16):
        model.training_step(batch(), 0)
    assert len(seen) > 2
    assert set(seen) == {(torch.float32,) * 3 if cast else (torch.bfloat16,) * 3}


class Margin(nn.Module):
    def forward(self, pred, target, margin):
        return F.relu(1 - F.cosine_similarity(pred, target) - margin).mean()


def test_another_argument_in_each_call():
    class Margins(SimSiam):
        loss = Margin

        def training_step(self, batch, batch_idx):
            (z0, p0), (z1, p1) = map(self.both, batch[0])
            return 0.5 * (self.criterion(p0, z1.detach(), margin=0.1) + self.criterion(p1, z0.detach(), margin=0.5))

    def hand(model, views):
        (z0, p0), (z1, p1) = map(model.both, views[:2])
        of, margins = Margin(), {id(z1): 0.1, id(z0): 0.5}
        mean = (of(p0, z1.detach(), 0.1) + of(p1, z0.detach(), 0.5)) / 2
        preds = [model.both(view)[1] for view in views[2:]]
        local = torch.stack([of(p, z.detach(), margins[id(z)]) for p in preds for z in (z1, z0)]).mean()
        return mean, 1.0, mean, 2, preds, [z1, z0], lambda *_: local

    torch.manual_seed(0)
    check(Margins(), hand)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.projector = conv(), mlp(8, 10)

    def forward(self, x):
        return self.projector(self.backbone(x).flatten(1))


def test_a_teacher_before_the_student():
    """In the first step both are the same, so nothing that they give tells them apart."""

    class TeacherFirst(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.teacher = Network()
            self.student = copy.deepcopy(self.teacher)
            self.teacher.requires_grad_(False)
            self.criterion = NegativeCosineSimilarity()

        def forward(self, x):
            return self.student(x)

        def training_step(self, batch, batch_idx):
            x0, x1 = batch[0]
            first = self.criterion(self.student(x0), self.teacher(x1))
            return 0.5 * (first + self.criterion(self.student(x1), self.teacher(x0)))

    def hand(model, views):
        p0, p1 = map(model.student, views[:2])
        t0, t1 = map(model.teacher, views[:2])
        mean = (cosine(p0, t1) + cosine(p1, t0)) / 2
        return mean, 1.0, mean, 2, [model.student(view) for view in views[2:]], [t0, t1], cosine

    torch.manual_seed(0)
    check(TeacherFirst(), hand)


class Dequeued(nn.Module):
    def __init__(self):
        super().__init__()
        self.queue = deque([F.normalize(torch.randn(6, 10), dim=1)], maxlen=3)

    def forward(self, query, key):
        negatives = torch.cat(list(self.queue))
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        self.queue.append(key.detach())
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ negatives.T], 1) / 0.2
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


class CentredByDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = {"centre": torch.zeros(10)}

    def forward(self, pred, target):
        centre = self.kept["centre"]
        self.kept["centre"] = 0.9 * centre + 0.1 * target.detach().mean(0)
        return cosine(pred - centre, target - centre)


class CentredByParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(10), requires_grad=False)

    def forward(self, pred, target):
        value = cosine(pred - self.centre, target - self.centre)
        self.centre.data = 0.9 * self.centre.data + 0.1 * target.detach().mean(0)
        return value


class Nearest(nn.Module):
    """lightly's NNMemoryBankModule gives one tensor, not the two of a memory bank of negatives."""

    def __init__(self):
        super().__init__()
        self.memory_bank = NNMemoryBankModule(size=(32, 10))

    def forward(self, pred, target):
        return cosine(pred, self.memory_bank(target.detach(), update=True))


class Fifo:
    def __init__(self):
        self.kept = torch.zeros(0, 10)

    def push(self, x):
        self.kept = torch.cat([x.detach(), self.kept])[:12]


class QueueOfItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.fifo = Fifo()

    def forward(self, pred, target):
        value = cosine(pred, target) + 0.1 * self.fifo.kept.sum()
        self.fifo.push(target)
        return value


class CentredByArray(nn.Module):
    def __init__(self):
        super().__init__()
        self.centre = np.zeros(10, "float32")

    def forward(self, pred, target):
        value = cosine(pred - torch.from_numpy(self.centre.copy()), target)
        self.centre *= 0.9
        self.centre += 0.1 * target.detach().mean(0).numpy()
        return value


class SetByTheStep(nn.Module):
    weight = 1.0

    def forward(self, pred, target):
        return self.weight * cosine(pred, target)


@pytest.mark.parametrize(
    "criterion", [Dequeued, CentredByDict, CentredByParameter, Nearest, QueueOfItsOwn, CentredByArray]
)
def test_what_a_criterion_keeps_is_as_without_logo(criterion):
    torch.manual_seed(0)
    host = SimSiam()
    host.criterion = criterion()
    wrapped = wrap(copy.deepcopy(host), affinity=None, local_global_weight=0)
    views, labels = batch()
    for _ in range(3):
        expected = host.training_step([views[:2], labels], 0)
        torch.testing.assert_close(wrapped.training_step(batch(), 0), expected)


class OwnQueue(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(10, 18), dim=0))

    def forward(self, query, key):
        query, key = F.normalize(query, dim=1), F.normalize(key.detach(), dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone()], 1) / 0.2
        self.queue = torch.cat([key.T, self.queue], 1)[:, :18]
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


class BankInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.nce = NTXentLoss(temperature=0.2, memory_bank_size=(18, 10))

    def forward(self, query, key):
        return self.nce(query, key)

    @property
    def queue(self):
        return self.nce.memory_bank.bank.T


@pytest.mark.parametrize("criterion", [OwnQueue, BankInside])
def test_no_target_is_among_its_negatives(criterion):
    """A local crop meets the queue as it was before the step, as the step's own prediction does."""

    class MoCo(SimSiam):
        loss = criterion

        def training_step(self, batch, batch_idx):
            (z0, _), (z1, _) = map(self.both, batch[0])
            return self.criterion(z0, z1.detach())

    torch.manual_seed(0)
    host = MoCo()
    wrapped = wrap(copy.deepcopy(host), affinity=None)
    for _ in range(2):
        queue = wrapped.criterion.queue.clone()
        wrapped.training_step(batch(), 0)
        target, *local = (host.both(view)[0] for view in batch()[0][1:])
        expected = torch.stack([info_nce(z, target, queue=queue, temperature=0.2) for z in local]).mean()
        torch.testing.assert_close(wrapped.logo_terms.local_global, expected.detach())


@pytest.mark.parametrize("owner", ["criterion", "model"])
def test_a_queue_that_the_step_writes_to(owner):
    """After the criterion's call, as in MoCo's release: that of a model is refused, with a cure that works."""

    class Reads(nn.Module):
        def __init__(self, queue):
            super().__init__()
            self.register_buffer("queue", queue if owner == "criterion" else None)
            self.read = lambda: queue if self.queue is None else self.queue

        def forward(self, query, key):
            return info_nce(query, key, queue=self.read().clone(), temperature=0.2)

    class MoCo(SimSiam):
        def __init__(self):
            super().__init__()
            self.register_buffer("queue", F.normalize(torch.randn(10, 18), dim=0))
            self.criterion = Reads(self.queue)

        def training_step(self, batch, batch_idx):
            (z0, _), (z1, _) = map(self.both, batch[0])
            loss = self.criterion(z0, z1.detach())
            self.criterion.read()[:, :6] = F.normalize(z1.detach(), dim=1).T
            return loss

    torch.manual_seed(0)
    model = wrap(MoCo(), affinity=None)
    queue, target = model.queue.clone(), model.both(batch()[0][1])[0].detach()
    local = [model.both(view)[0].detach() for view in batch()[0][2:]]
    if owner == "model":
        with pytest.raises(
            RuntimeError, match=r"Reads of MoCo gave .* in the step and gives .* buffer of the criterion"
        ):
            model.training_step(batch(), 0)
        return
    model.training_step(batch(), 0)
    expected = torch.stack([info_nce(z, target, queue=queue, temperature=0.2) for z in local]).mean()
    torch.testing.assert_close(model.logo_terms.local_global, expected)


def test_a_memory_bank_that_gives_neighbours():
    """And no negatives: local crops are pulled to the neighbours of before the step, whatever the bank is called."""

    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bank", F.normalize(torch.randn(18, 10), dim=1))

        def forward(self, x):
            near = self.bank[(F.normalize(x, dim=1) @ self.bank.T).argmax(1)].clone()
            self.bank[:6] = F.normalize(x, dim=1)
            return near

    class Neighbours(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory_bank = Bank()

        def forward(self, pred, target):
            return cosine(pred, self.memory_bank(target))

    class NNSiam(SimSiam):
        loss = Neighbours

    torch.manual_seed(0)
    model = wrap(NNSiam(), affinity=None)
    before, (views, _) = copy.deepcopy(model.criterion), batch()
    targets, preds = [model.both(x)[0].detach() for x in views[:2]], [model.both(x)[1].detach() for x in views[2:]]
    model.training_step(batch(), 0)
    expected = torch.stack([copy.deepcopy(before)(p, t) for p in preds for t in targets]).mean()
    torch.testing.assert_close(model.logo_terms.local_global, expected)


def test_a_number_that_the_step_sets():
    class Weighed(SimSiam):
        loss = SetByTheStep

        def training_step(self, batch, batch_idx):
            self.criterion.weight = 0.25
            return super().training_step(batch, batch_idx)

    def quarter(pred, target):
        return 0.25 * cosine(pred, target)

    torch.manual_seed(0)
    check(Weighed(), lambda model, views: by_hand(model, views, quarter))


@pytest.mark.parametrize("weigh", [lambda loss: 0.0 * loss, lambda loss: F.relu(loss - 10)], ids=["ramp", "hinge"])
def test_a_loss_that_does_not_count_yet(weigh):
    class Ramp(SimSiam):
        def training_step(self, batch, batch_idx):
            return weigh(super().training_step(batch, batch_idx)) + self.both(batch[0][0])[0].pow(2).mean()

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="trains its projector by more than the criterion"):
        check(Ramp(), lambda model, views: (model.both(views[0])[0].pow(2).mean(), 0.0, *by_hand(model, views)[2:]))


def test_a_prediction_that_comes_from_elsewhere_later():
    """Epochs without the predictor, then with it: what local crops are given follows."""

    class Switch(SimSiam):
        warm_up = True

        def training_step(self, batch, batch_idx):
            (z0, p0), (z1, p1) = map(self.both, batch[0])
            p0, p1 = (z0, z1) if self.warm_up else (p0, p1)
            return 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))

    torch.manual_seed(0)
    host = Switch()
    wrapped = wrap(copy.deepcopy(host), affinity=None)
    wrapped.training_step(batch(), 0)
    wrapped.warm_up = False
    loss = wrapped.training_step(batch(), 0)
    torch.testing.assert_close(loss, total(*by_hand(host, batch()[0])))


def test_an_epoch_of_another_loss():
    class Other(SimSiam):
        other = False

        def training_step(self, batch, batch_idx):
            if self.other:
                return self.both(batch[0][0])[0].pow(2).mean()
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    model = wrap(Other())
    model.training_step(batch(), 0)
    model.other = True
    with pytest.warns(UserWarning, match="this step did not call NegativeCosineSimilarity of Other, .* without LoGo"):
        loss = model.training_step(batch(), 0)
    torch.testing.assert_close(loss, model.both(batch()[0][0])[0].pow(2).mean())


class NormalisedFeatures(OnlyParts):
    def both(self, x):
        z = self.projection_head(F.normalize(self.backbone(x).flatten(1), dim=1))
        return z, self.prediction_head(z)


class Rectified(OnlyParts):
    def both(self, x):
        z = self.projection_head(self.backbone(x).flatten(1))
        return z, self.prediction_head(F.relu(z))


class Prepared(SimSiam):
    def training_step(self, batch, batch_idx):
        return super().training_step([[x.sign() * x.abs().sqrt() for x in batch[0]], *batch[1:]], batch_idx)


class Shuffled(SimSiam):
    def training_step(self, batch, batch_idx):
        return super().training_step([[x[[3, 4, 5, 0, 1, 2]] for x in batch[0]], *batch[1:]], batch_idx)


class Detached(OnlyParts):
    def both(self, x):
        z = self.projection_head(self.backbone(x).flatten(1).detach())
        return z, self.prediction_head(z)


class Rotated(SimSiam):
    """With more images in the projector's batch, after which BatchNorm cannot be compared."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        rotated = self.both(torch.cat([x.rot90(k, (2, 3)) for x in batch[0] for k in range(4)]))[0]
        return loss + 0.1 * rotated.pow(2).mean()


def dropping(model):
    """With random numbers, whose outputs cannot be compared."""

    class Dropping(model):
        def __init__(self):
            super().__init__()
            self.projection_head = nn.Sequential(*mlp(8, 10), nn.Dropout(0.1))

    return Dropping


class PreparedRotated(Prepared, Rotated):
    pass


class DetachedRotated(Rotated):
    def both(self, x):
        z = self.projection_head(self.backbone(x).flatten(1).detach())
        return z, self.prediction_head(z)

    forward = pl.LightningModule.forward


class PreparedInPlace(SimSiam):
    def training_step(self, batch, batch_idx):
        for x in batch[0]:
            x.mul_(0.5)
        return super().training_step(batch, batch_idx)


class PreparedInTheList(SimSiam):
    def training_step(self, batch, batch_idx):
        batch[0][:] = [x.sign() * x.abs().sqrt() for x in batch[0]]
        return super().training_step(batch, batch_idx)


class PreparedOne(SimSiam):
    def training_step(self, batch, batch_idx):
        x0, x1 = batch[0]
        return super().training_step([[x0, x1.sign() * x1.abs().sqrt()], *batch[1:]], batch_idx)


class Neck(OnlyParts):
    """A trained layer between backbone and projector, which no method of the model runs."""

    def __init__(self):
        super().__init__()
        self.neck = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())

    def both(self, x):
        z = self.projection_head(self.neck(self.backbone(x).flatten(1)))
        return z, self.prediction_head(z)


class ForwardPastTheNeck(Neck):
    def forward(self, x):
        z = self.projection_head(self.backbone(x).flatten(1))
        return z, self.prediction_head(z)


class ForwardPastTheNorm(NormalisedFeatures):
    """Its forward, for inference, leaves out what the step does between backbone and projector."""

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(1)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = conv()

    def forward(self, pixel_values):
        return self.layers(pixel_values)


class OtherName(SimSiam):
    """Its backbone has another name, and is given the images by keyword."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        del self.backbone

    def both(self, x):
        z = self.projection_head(self.encoder(pixel_values=x).flatten(1))
        return z, self.prediction_head(z)


class PreparedOtherName(OtherName, Prepared):
    pass


class PreparedOneOtherName(OtherName, PreparedOne):
    pass


class Mixed(SimSiam):
    """Un-Mix (https://arxiv.org/abs/2003.05438): the prediction of two mixed images has the targets of both."""

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        pm = self.both(0.7 * batch[0][0] + 0.3 * batch[0][0].flip(0))[1]
        mixed = 0.7 * self.criterion(pm, z1.detach()) + 0.3 * self.criterion(pm, z1.detach().flip(0))
        return 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach())) + mixed


class MoreImages(SimSiam):
    """Those of a second data set."""

    def training_step(self, batch, batch_idx):
        others = [x.flip(3).roll(1, 0) for x in batch[0]]
        return super().training_step(batch, batch_idx) + super().training_step([others], batch_idx)


class Contrast(nn.Module):
    def forward(self, first, second):
        return F.cross_entropy(F.normalize(first, dim=1) @ F.normalize(second, dim=1).T, torch.arange(len(first)))


class TwoLosses(SimSiam):
    def __init__(self):
        super().__init__()
        self.contrast = Contrast()

    def training_step(self, batch, batch_idx):
        z0, z1 = (self.both(x)[0] for x in batch[0])
        return 0.1 * super().training_step(batch, batch_idx) + self.contrast(z0, z1)


class Scaled(SimSiam):
    """By what is 1 at first, so that predictions are the predictor's."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        p0, p1 = p0 * self.gamma, p1 * self.gamma
        return 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))


class InOneCall(SimSiam):
    def training_step(self, batch, batch_idx):
        z, p = self.both(torch.cat(batch[0]))
        return self.criterion(p, z.roll(len(z) // 2, 0).detach())


class Residual(SimSiam):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.prediction_head[-1].weight)
        nn.init.zeros_(self.prediction_head[-1].bias)

    def both(self, x):
        z = self.projection_head(self.backbone(x).flatten(1))
        return z, z + self.prediction_head(z)


class Subtracted(SimSiam):
    def training_step(self, batch, batch_idx):
        (_, p0), (z1, _) = map(self.both, batch[0])
        return self.criterion(p0, z1.detach()) - 0.3 * self.criterion(p0, z1.detach().roll(1, 0))


class Overwritten(SimSiam):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.randn(6, 10))

    def training_step(self, batch, batch_idx):
        (z0, _), (_, p1) = map(self.both, batch[0])
        loss = self.criterion(p1, self.last)
        self.last.copy_(z0.detach())
        return loss


class Reentrant(SimSiam):
    def forward(self, x):
        return checkpoint(lambda x: self.both(x)[1], x.detach().requires_grad_(True), use_reentrant=True)

    def training_step(self, batch, batch_idx):
        p0, p1 = map(self.forward, batch[0])
        z0, z1 = (self.both(x)[0].detach() for x in batch[0])
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class ListLoss(nn.Module):
    def forward(self, students, teachers):
        return 0.5 * (cosine(students[0], teachers[1].detach()) + cosine(students[1], teachers[0].detach()))


class Lists(SimSiam):
    loss = ListLoss

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        return self.criterion([p0, p1], [z0, z1])


class Smoothed(NTXentLoss):
    def __init__(self):
        super().__init__(temperature=0.2, memory_bank_size=(32, 10))

    def forward(self, query, key):
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        key, negatives = self.memory_bank(key, update=query.requires_grad)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ negatives.to(query)], 1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long), label_smoothing=0.3)


class Bank(SimSiam):
    loss = Smoothed


class LearnedLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.predictor = nn.Linear(10, 10)

    def forward(self, z0, z1):
        first, second = self.predictor(z0), self.predictor(z1)
        return 0.5 * (cosine(first, z1.detach()) + cosine(second, z0.detach()))


class PredictsInTheLoss(SimSiam):
    loss = LearnedLoss

    def training_step(self, batch, batch_idx):
        return self.criterion(*(self.both(x)[0] for x in batch[0]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NormalisedFeatures, "gives the criterion something else for global crops than backbone, projector"),
        (Rectified, "gives the criterion something else for global crops than backbone, projector"),
        (Prepared, "What the step itself does to images"),
        (Shuffled, "What the step itself does to images"),
        (dropping(Prepared), "gives the backbone other images .* What the step itself does to images"),
        (dropping(Shuffled), "gives the backbone other images .* What the step itself does to images"),
        (PreparedRotated, "gives the backbone other images .* What the step itself does to images"),
        (PreparedInPlace, "changes the images of global crops in place"),
        (PreparedInTheList, "What the step itself does to images"),
        (PreparedOne, "gives the backbone other images .* What the step itself does to images"),
        (Scaled, "local crops would not go through gamma of Scaled"),
        (Neck, "gives the criterion something else for global crops than backbone, projector"),
        (
            dropping(Rectified),
            "gives prediction_head something else than the output of projection_head, unlike backbone",
        ),
        (
            dropping(NormalisedFeatures),
            "gives projection_head something else than the output of backbone, unlike backb",
        ),
        (dropping(ForwardPastTheNorm), "gives projection_head something else .*of backbone, unlike forward"),
        (dropping(Neck), r"local crops would not go through neck\."),
        (dropping(ForwardPastTheNeck), r"local crops would not go through neck\..* name with online="),
        (PreparedOtherName, "What the step itself does to images"),
        (dropping(PreparedOtherName), "gives the backbone other images .* What the step itself does to images"),
        (PreparedOneOtherName, "gives the backbone other images .* What the step itself does to images"),
        (Mixed, "predicts of other images than the global crops, too, .* with target="),
        (MoreImages, "predicts of other images than the global crops, too, .* with target="),
        (TwoLosses, r"other losses of two tensors \(N, D\), too \(contrast\).* with criterion="),
        (dropping(Detached), r"local crops would train backbone.* does not train with this loss"),
        (DetachedRotated, r"local crops would train backbone.* does not train with this loss"),
        (Detached, r"local crops would train backbone.* does not train with this loss \(no_grad, detach\)"),
        (InOneCall, "called with 12 predictions of 6 images, .* Call it once for each view"),
        (Residual, "something else than the output of the projection_head or prediction_head"),
        (Subtracted, "subtracted for others, as for negatives"),
        (WeighsImages, "weighs images unequally"),
        (Overwritten, "changes in place what it has given .* with .clone"),
        (Reentrant, "use_reentrant=False"),
        (Lists, "takes lists of views"),
        (Bank, "memory bank and gave .* it is another loss"),
        (PredictsInTheLoss, "has layers of its own"),
    ],
)
def test_refused_before_a_weight_has_changed(model, message):
    torch.manual_seed(0)
    model = wrap(model())
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match=message):
        model.training_step(batch(), 0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_online_must_give_what_the_criterion_is_given():
    class Other(OnlyParts):
        def __init__(self):
            super().__init__()
            self.hidden = self.prediction_head
            del self.prediction_head

        def both(self, x):
            z = self.projection_head(self.backbone(x).flatten(1))
            return z, self.hidden(z)

        def swapped(self, x):
            return self.both(x)[::-1]

    torch.manual_seed(0)
    model = Other()
    with pytest.raises(RuntimeError, match="something else for global crops than swapped"):
        wrap(copy.deepcopy(model), online="swapped").training_step(batch(), 0)
    check(model, by_hand, online="both")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x, "something else for global crops than predict"),
        (dropping, "vectors of other lengths than predict"),
    ],
)
def test_online_must_give_the_lengths_that_the_criterion_is_given(change, message):
    """Where it makes a difference: the step's own predictions, of length 1, must not hide that."""

    class Products(nn.Module):
        def forward(self, query, key):
            return F.cross_entropy(query @ key.T / 0.1, torch.arange(len(query)))

    class Normalised(SimSiam):
        loss = Products

        def training_step(self, batch, batch_idx):
            q0, q1 = (F.normalize(self.predict(x), dim=1) for x in batch[0])
            k0, k1 = (F.normalize(self.both(x)[0].detach(), dim=1) for x in batch[0])
            return self.criterion(q0, k1) + self.criterion(q1, k0)

        def predict(self, x):
            return self.both(x)[1]

        def unit(self, x):
            return F.normalize(self.predict(x), dim=1)

    torch.manual_seed(0)
    model = change(Normalised)()
    with torch.no_grad():
        model.prediction_head[-1].weight.mul_(20)
    with pytest.raises(RuntimeError, match=message):
        wrap(copy.deepcopy(model), online="predict").training_step(batch(), 0)
    assert torch.isfinite(wrap(model, online="unit").training_step(batch(), 0))


class Dropped(SimSiam):
    def __init__(self):
        super().__init__()
        self.prediction_head = nn.Sequential(nn.Dropout(0.5), *mlp(10, 10))


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return x if torch.rand(()) < 0.5 else x + self.layer(x)


class SkippedLayer(SimSiam):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Skipping(), *conv())


class BySize(SimSiam):
    """Small crops have a stem of their own, which only they train."""

    def __init__(self):
        super().__init__()
        self.small = conv()

    def both(self, x):
        z = self.projection_head((self.backbone if x.shape[-1] > 20 else self.small)(x).flatten(1))
        return z, self.prediction_head(z)


class HalfHeads(SimSiam):
    def training_step(self, batch, batch_idx):
        with torch.autocast("cpu", torch.bfloat16):
            return super().training_step(batch, batch_idx)


class MoreInTheBatch(SimSiam):
    def training_step(self, batch, batch_idx):
        x0, x1 = batch[0]
        _, p = self.both(torch.cat([x0, x1, 0.5 * (x0 + x1)]))
        z0, z1 = (self.both(x)[0].detach() for x in (x0, x1))
        p0, p1, _ = p.chunk(3)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class CheckpointedBackbone(SimSiam):
    def training_step(self, batch, batch_idx):
        def both(x):
            h = checkpoint(self.backbone, x.detach().requires_grad_(), use_reentrant=True)
            z = self.projection_head(h.flatten(1))
            return z, self.prediction_head(z)

        (z0, p0), (z1, p1) = map(both, batch[0])
        return 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))


class KeepsItself(SimSiam):
    def __init__(self):
        super().__init__()
        self.criterion.kept = []
        self.criterion.kept.append(self.criterion.kept)
        self.criterion.register_buffer("sparse", torch.eye(3).to_sparse())


class AnyArguments(SimSiam):
    def training_step(self, *args, **kwargs):
        batch, batch_idx = args
        return super().training_step(batch, batch_idx, **kwargs)


class AugmentsInForward(SimSiam):
    """On the device, at random."""

    def both(self, x):
        return super().both(x + 0.1 * torch.randn_like(x))


class FlipsSomeBatches(SimSiam):
    def both(self, x):
        return super().both(x.flip(-1) if torch.rand(()) < 0.5 else x)


class Depth(nn.Module):
    """Layers of nearly no weight yet, left out by Python's random numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.scale = nn.Parameter(torch.full((8,), 1e-5))

    def forward(self, x):
        for layer in self.layers:
            x = x + self.scale * layer(x) if random.random() > 0.2 else x
        return x


class LeavesLayersOut(SimSiam):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(conv(), nn.Flatten(), Depth())


class Experts(nn.Module):
    """Each image goes through one of six layers."""

    def __init__(self):
        super().__init__()
        self.gate, self.layers = nn.Linear(8, 6, bias=False), nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(1).max(1)
        rows = [weight[i] * self.layers[int(k)](x[i]) for i, k in enumerate(chosen)]
        return x + torch.stack(rows)


class ExpertBackbone(SimSiam):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(conv(), nn.Flatten(), Experts())


class InSmallParts(dropping(SimSiam)):
    """The backbone two images at a time, the heads all."""

    def training_step(self, batch, batch_idx):
        features = [torch.cat([self.backbone(part) for part in x.split(2)]).flatten(1) for x in batch[0]]
        z0, z1 = map(self.projection_head, features)
        p0, p1 = map(self.prediction_head, (z0, z1))
        return 0.5 * (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach()))


class ReadOnly(dict):
    def __setitem__(self, *_):
        raise TypeError("read-only")

    update = __setitem__


class KeepsOddThings(SimSiam):
    def __init__(self):
        super().__init__()
        self.criterion.meter = SimpleNamespace(best=float("nan"))
        self.criterion.config = ReadOnly(a=1)
        self.criterion.library = math


class InTurns(SimSiam):
    """Views in turns in one batch, and random numbers."""

    def __init__(self):
        super().__init__()
        self.prediction_head = nn.Sequential(nn.Dropout(0.5), *mlp(10, 10))

    def training_step(self, batch, batch_idx):
        z, p = self.both(torch.stack(batch[0], 1).flatten(0, 1))
        return 0.5 * (self.criterion(p[::2], z[1::2].detach()) + self.criterion(p[1::2], z[::2].detach()))


class LearnedTemperature(nn.Module):
    def forward(self, pred, target, temperature):
        return cosine(pred, target) / temperature


class GivesTheTemperature(SimSiam):
    loss = LearnedTemperature

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = map(self.both, batch[0])
        first, second = (
            self.criterion(p0, z1.detach(), self.temperature),
            self.criterion(p1, z0.detach(), self.temperature),
        )
        return 0.5 * (first + second)


class SoftLabels(SimSiam):
    """A probe on features that are trained, too: a loss of (N, C) and (N, C), but of labels."""

    def __init__(self):
        super().__init__()
        self.probe, self.probe_loss = nn.Linear(10, 4), nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        labels = F.one_hot(batch[1], 4).float()
        supervised = self.probe_loss(self.probe(self.both(batch[0][0])[0]), 0.9 * labels + 0.025)
        return super().training_step(batch, batch_idx) + supervised


class LossOfFeatures(SimSiam):
    """A second loss that never reaches the projector."""

    def __init__(self):
        super().__init__()
        self.probe, self.probe_loss = nn.Linear(8, 4), nn.MSELoss()

    def training_step(self, batch, batch_idx):
        features = self.backbone(batch[0][0]).flatten(1)
        own = self.probe_loss(self.probe(features.detach()), F.one_hot(batch[1], 4).float())
        return super().training_step(batch, batch_idx) + own


class SplitBatchNorm(nn.BatchNorm2d):
    """As in the demonstration of MoCo's release: the batch is that of three devices."""

    def forward(self, x):
        split = F.batch_norm(
            x.view(-1, 3 * x.shape[1], *x.shape[2:]), None, None, self.weight.repeat(3), self.bias.repeat(3), True
        )
        return split.view(x.shape)


class InSplits(SimSiam):
    """Its network does not take just any number of images."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), SplitBatchNorm(8), nn.AdaptiveAvgPool2d(1))


class Perturbing(nn.Module):
    def forward(self, pred, target):
        return cosine(pred + 0.1 * torch.randn_like(pred), target)


class Perturbed(SimSiam):
    """No two calls of its criterion give the same."""

    loss = Perturbing


@pytest.mark.parametrize(
    "model",
    [
        *(Dropped, SkippedLayer, BySize, HalfHeads, MoreInTheBatch, CheckpointedBackbone, KeepsItself, AnyArguments),
        *(Rotated, dropping(SimSiam), dropping(Rotated), AugmentsInForward, GivesTheTemperature),
        *(FlipsSomeBatches, LeavesLayersOut, ExpertBackbone, InSmallParts, KeepsOddThings),
        *(OtherName, dropping(OtherName), LossOfFeatures, InSplits, Perturbed),
    ],
)
def test_no_reason_to_refuse(model):
    for seed in range(4):
        torch.manual_seed(seed)
        random.seed(seed)
        made = wrap(model())
        for _ in range(3):
            assert torch.isfinite(made.training_step(batch(), 0))


class Invariance(SimSiam):
    """A VICReg whose criterion is but a part of it, and the rest lines of the step."""

    loss = nn.MSELoss

    def training_step(self, batch, batch_idx):
        z0, z1 = (self.both(x)[0] for x in batch[0])
        return self.criterion(z0, z1) + sum(F.relu(1 - z.std(dim=0)).mean() for z in (z0, z1))


@pytest.mark.parametrize("model", [SoftLabels, Invariance])
def test_a_criterion_that_is_a_part_of_the_loss(model):
    torch.manual_seed(0)
    model = model()
    with pytest.warns(UserWarning, match=rf"{type(model).__name__} trains its projector by more than .* reduction="):
        assert torch.isfinite(wrap(copy.deepcopy(model)).training_step(batch(), 0))
    for options in ({"reduction": "sum"}, {"affinity": None, "local_global_weight": 0}):  # no warning: it would raise
        assert torch.isfinite(wrap(copy.deepcopy(model), **options).training_step(batch(), 0))


def test_a_method_that_is_tried_in_vain_leaves_no_trace():
    """Neither in the running statistics, which each of the four crops moves once, nor in the random numbers."""

    class FeaturesOnly(dropping(SimSiam)):
        def forward(self, x):
            return F.dropout(self.backbone(x), 0.1)

    torch.manual_seed(0)
    model, other = FeaturesOnly(), dropping(SimSiam)()
    other.load_state_dict(model.state_dict())
    for host in (model, other):
        torch.manual_seed(1)
        wrap(host, affinity=None).training_step(batch(), 0)
    assert model.backbone[1].num_batches_tracked == 4
    assert torch.equal(model.logo_terms.total, other.logo_terms.total)


@pytest.mark.parametrize("fails", [True, False])
def test_a_forward_that_moves_the_target(fails):
    """Before it fails for want of a second view (PCL), or for each crop."""

    class Moves(SimSiam):
        def __init__(self):
            super().__init__()
            self.target = copy.deepcopy(self.backbone).requires_grad_(False)

        def forward(self, x, other=None):
            with torch.no_grad():
                for old, new in zip(self.target.parameters(), self.backbone.parameters(), strict=True):
                    old.data = 0.9 * old.data + 0.1 * new.data
            return self.both(x if not fails else x + other)

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"of Moves moves parameters that nothing trains.* online="):
        wrap(Moves()).training_step(batch(), 0)
    model = Moves()
    assert torch.isfinite(wrap(model, online=model.both).training_step(batch(), 0))


def test_graphs_compiled_in_a_step_are_cached_apart():
    """inductor's cache on disk would give a step those of training without LoGo, which bear one gradient only."""
    compiler = pytest.importorskip("torch.compiler.config", reason="torch before 2.6 donates no buffers")
    functorch = importlib.import_module("torch._functorch.config")
    assert functorch.donated_buffer  # as it is by itself

    def settings():
        return functorch.donated_buffer, compiler.cache_key_tag

    class Records(nn.Module):
        def forward(self, pred, target):
            self.seen = settings()
            return cosine(pred, target)

    class Recorded(SimSiam):
        loss = Records

    before, model = settings(), wrap(Recorded())
    model.training_step(batch(), 0)
    assert settings() == before
    assert model.criterion.seen[1] != before[1]
    assert not model.criterion.seen[0]


def test_data_parallel_copies_are_refused():
    """What a copy's first step finds out would be lost with it, and with it each step's terms."""
    model = wrap(SimSiam())
    with pytest.raises(RuntimeError, match=r"would be lost\. Use torch\.nn\.parallel\.DistributedDataParallel"):
        model._replicate_for_data_parallel().training_step(batch(), 0)


def test_an_option_whose_name_has_braces():
    def fails(options, x):
        raise ValueError("boom")

    model = wrap(SimSiam(), online=functools.partial(fails, {"a": 1}))
    with pytest.raises(RuntimeError, match=r"{'a': 1}.* failed on crops .*ValueError: boom"):
        model.training_step(batch(), 0)


def test_heads_that_work_in_place_with_random_numbers():
    """What a head is given is compared as it was before."""

    class InPlaceHead(SimSiam):
        def __init__(self):
            super().__init__()
            self.projection_head = nn.Sequential(nn.ReLU(inplace=True), mlp(8, 10), nn.Dropout(0.1))

        def both(self, x):
            z = self.projection_head(self.backbone(x).flatten(1))
            return z, self.prediction_head(z)

    class MeanTarget(dropping(SimSiam)):
        """An extra call of the projector, on other features."""

        def training_step(self, batch, batch_idx):
            f0, f1 = (self.backbone(x).flatten(1) for x in batch[0])
            p0, p1 = (self.prediction_head(self.projection_head(f)) for f in (f0, f1))
            target = self.projection_head((f0 + f1) / 2).detach()
            return (self.criterion(p0, target) + self.criterion(p1, target)) / 2

    for model in (InPlaceHead, MeanTarget):
        torch.manual_seed(0)
        assert torch.isfinite(wrap(model()).training_step(batch(), 0))


def test_criteria_that_need_gradient():
    class Hooks(nn.Module):
        def forward(self, pred, target):
            pred.register_hook(lambda gradient: gradient)
            return cosine(pred, target)

    class Sometimes(nn.Module):
        def forward(self, pred, target):
            return cosine(pred, target) * random.choice([0.5, 1.0])

    class OnlyInTraining(nn.Module):
        def forward(self, pred, target):
            return cosine(pred, target) + (0.1 * pred.pow(2).mean() if torch.is_grad_enabled() else 0.0)

    for criterion in (Hooks, Sometimes, OnlyInTraining):
        for seed in range(6):
            torch.manual_seed(seed)
            random.seed(seed)
            model = SimSiam()
            model.criterion = criterion()
            assert torch.isfinite(wrap(model).training_step(batch(), 0))


def test_the_look_at_global_crops_changes_nothing():
    """Neither BatchNorm's running statistics nor the random numbers: two steps are as if it had not been."""

    class Noisy(SimSiam):
        def __init__(self):
            super().__init__()
            self.projection_head = nn.Sequential(*mlp(8, 10), nn.Dropout(0.1))

    torch.manual_seed(0)
    host = Noisy()
    wrapped = wrap(copy.deepcopy(host), affinity=None, local_global_weight=0, local_running_stats=False)
    views, labels = batch()
    torch.manual_seed(1)
    host.training_step([views[:2], labels], 0)
    [copy.deepcopy(host).both(view) for view in views[2:]]  # the random numbers of local crops
    expected = torch.rand(3)
    torch.manual_seed(1)
    wrapped.training_step(batch(), 0)
    assert torch.equal(torch.rand(3), expected)
    for name, buffer in host.named_buffers():
        torch.testing.assert_close(wrapped.get_buffer(name), buffer, msg=name)


def test_all_views_in_one_call():
    """With both methods named it is as in one call for each."""

    class Named(InOneCall):
        def predict(self, x):
            return self.both(x)[1]

        def project(self, x):
            return self.both(x)[0]

    torch.manual_seed(0)
    model = Named()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    check(model, by_hand, online="predict", target="project")


def test_a_backbone_called_by_another_name():
    """The step calls it as a whole, the method that is named by its parts, and outputs cannot be compared."""
    made = wrap(Dropped(), online=lambda x: made.prediction_head(made.projection_head(made.backbone[:](x).flatten(1))))
    assert torch.isfinite(made.training_step(batch(), 0))


def test_views_in_turns():
    made = wrap(InTurns(), online=lambda images: made.both(images)[1])
    assert torch.isfinite(made.training_step(batch(), 0))


class TestLightning:
    def test_logo_is_not_off_without_a_word(self):
        """In eval mode, and where a derived class has a step of its own."""
        model = wrap(SimSiam()).eval()
        with pytest.warns(UserWarning, match=r"SimSiam is in eval mode.*model\.train\(\)"):
            model.training_step(batch(), 0)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            model.training_step(batch(), 0)
        base = wrap(SimSiam)
        with pytest.warns(UserWarning, match=r"Own\.training_step takes the place .* Wrap Own, not its base"):

            class Own(base):
                def training_step(self, batch, batch_idx):
                    return self.both(batch[0][0])[1].mean()

        with warnings.catch_warnings():
            warnings.simplefilter("error")

            class Calls(base):
                def training_step(self, batch, batch_idx):
                    return super().training_step(batch, batch_idx)

            class Nothing(base):
                pass

    def test_a_copy_knows_its_options(self):
        copied = copy.deepcopy(wrap(SimSiam(), affinity=None, reduction="sum"))
        assert type(copied)().logo.reduction == "sum"

    def test_a_step_without_batch_idx(self):
        class Short(SimSiam):
            def training_step(self, batch):
                return super().training_step(batch, 0)

        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        model = wrap(Short())
        trainer.fit(model, torch.utils.data.DataLoader([batch()] * 2, batch_size=None))
        assert trainer.global_step == 2
        assert model.logo_terms is not None

    def test_what_else_is_in_the_batch(self):
        """None stays where it is; a criterion of two names is one."""

        class Unpacks(SimSiam):
            def training_step(self, batch, batch_idx):
                views, nothing, labels = batch
                assert nothing is None
                return super().training_step([views, labels], batch_idx)

        model = Unpacks()
        model.loss_fn = model.criterion
        views, labels = batch()
        assert torch.isfinite(wrap(model).training_step([views, None, labels], 0))

    def test_values_that_are_not_finite(self):
        model = wrap(SimSiam())
        with pytest.raises(RuntimeError, match="given predictions that are not finite"):
            model.training_step([[x * math.nan for x in batch()[0]], batch()[1]], 0)

    def test_a_named_tuple(self):
        made = namedtuple("Batch", "views labels")
        assert torch.isfinite(wrap(SimSiam()).training_step(made(*batch()), 0))

    @pytest.mark.parametrize("name", ["training_step", "configure_optimizers"])
    def test_methods_of_the_instance_are_refused(self, name):
        class Own(SimSiam):
            def __init__(self):
                super().__init__()
                setattr(self, name, getattr(super(), name))

        with pytest.raises(ValueError, match=f"a {name} of its own"):
            wrap(Own())

    def test_a_wrapper_around_an_optimizer(self):
        class Wrapper:
            def __init__(self, optimizer):
                self.optim, self.param_groups = optimizer, optimizer.param_groups

        class Lars(SimSiam):
            def configure_optimizers(self):
                return Wrapper(torch.optim.SGD(self.backbone.parameters(), 0.1))

        model = wrap(Lars())
        (group,) = model.configure_optimizers().param_groups
        known = {id(parameter) for parameter in group["params"]}
        assert all(id(parameter) in known for parameter in model.logo.affinity.parameters())

    def test_criterion_beside_a_loss_of_lightlys(self):
        class Both(SimSiam):
            def __init__(self):
                super().__init__()
                self.criterion, self.regulariser = PairLoss(), VICRegLoss()

        with pytest.raises(ValueError, match=r"several losses \(criterion, regulariser\)"):
            wrap(Both())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_target_network_in_forward_never_sees_local_crops(frozen):
    """Nor do its BatchNorms, which normalise as global crops are and are all that training moves there."""

    class BYOL(SimSiam):
        def __init__(self):
            super().__init__()
            self.slow_backbone, self.slow_head = copy.deepcopy(self.backbone), copy.deepcopy(self.projection_head)
            if frozen:
                nn.ModuleList([self.slow_backbone, self.slow_head]).requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                target = self.slow_head(self.slow_backbone(x).flatten(1))
            return target, self.both(x)[1]

        def training_step(self, batch, batch_idx):
            (t0, p0), (t1, p1) = map(self, batch[0])
            return 0.5 * (self.criterion(p0, t1) + self.criterion(p1, t0))

    torch.manual_seed(0)
    host, views = BYOL(), batch()[0]
    wrapped = wrap(copy.deepcopy(host), affinity=None)
    for _ in range(3):
        host.training_step([views[:2], batch()[1]], 0)
        loss = wrapped.training_step(batch(), 0)
    torch.testing.assert_close(loss, total(*slow_by_hand(copy.deepcopy(host), views)))
    expected, found = dict(host.named_buffers()), dict(wrapped.named_buffers())
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer) == name.startswith("slow_"), name


def slow_by_hand(model, views):
    (t0, p0), (t1, p1) = map(model, views[:2])
    mean = (cosine(p0, t1) + cosine(p1, t0)) / 2
    return mean, 1.0, mean, 2, [model.both(view)[1] for view in views[2:]], [t0, t1], cosine


class PlainNet(nn.Module):
    """`last` stands for what a loop's forward makes of a head's output."""

    def __init__(self, last, predictor=False):
        super().__init__()
        self.backbone, self.projector, self.last = conv(), mlp(8, 10), last
        if predictor:
            self.predictor = mlp(10, 10)

    def forward(self, x):
        z = self.projector(self.backbone(x).flatten(1))
        return (z.detach(), self.last(z, self.predictor(z))) if hasattr(self, "predictor") else self.last(z)


class Unit(nn.Module):
    def forward(self, z):
        return F.normalize(z, dim=1)


class Sum(nn.Module):
    def forward(self, z, p):
        return z + p


class Right(nn.Module):
    def forward(self, z, p):
        return p


def test_a_plain_loop_is_given_what_forward_gives():
    """Also by criterions to which the length of a projection means something."""
    for criterion in (BarlowTwinsLoss(), VICRegLoss(), NTXentLoss()):
        torch.manual_seed(0)
        host, views = PlainNet(Unit()), batch()[0]
        model = wrap(copy.deepcopy(host), criterion=criterion, affinity=None, local_global_weight=0)
        for _ in range(2):
            torch.testing.assert_close(model(views), criterion(host(views[0]), host(views[1])))


def test_pairs_of_a_forward_of_both_views_are_not_guessed():
    """lightly 1.5's own models give (projection, prediction) of each view; another's may be the other way round."""

    class Both(PlainNet):
        def forward(self, x1, x2):
            return super().forward(x1)[::-1], super().forward(x2)[::-1]

    model = wrap(Both(Sum(), predictor=True), criterion=NegativeCosineSimilarity())
    with pytest.raises(RuntimeError, match="say with step= what your loop computes"):
        model(batch()[0])


def test_a_plain_loop_gives_views_and_boxes_only():
    model = wrap(PlainNet(nn.Identity()), criterion=NTXentLoss())
    views, labels = batch()
    for call in (lambda: model(views, labels), lambda: model(views, labels=labels)):
        with pytest.raises(TypeError, match=r"takes the CropBoxes .* beside the views, got Tensor\. Labels"):
            call()


@pytest.mark.parametrize("options", [{}, {"affinity": "cosine", "local_predictor": True}])
def test_an_optimizer_that_was_built_too_early(options):
    net = PlainNet(Right(), predictor=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    model = wrap(net, criterion=NegativeCosineSimilarity(), gradient_ratio=0.1, anneal_repulsion=False, **options)
    for _ in range(31):
        model(batch()[0]).backward()
        optimizer.step()
    with pytest.warns(UserWarning, match="parameters that LoGo added have not changed in 32 steps"):
        model(batch()[0])


def test_a_nested_projector_is_named():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = conv().append(nn.Flatten())
            self.encoder.fc = mlp(8, 10)

        def forward(self, x):
            return 2 * self.encoder(x) + 1

    model = wrap(Nested(), projector="encoder.fc", criterion=NTXentLoss())
    with pytest.raises(RuntimeError, match=r"than the output of the encoder\.fc, so"):
        model(batch()[0])


@pytest.mark.parametrize(
    ("net", "criterion"),
    [
        (lambda: PlainNet(nn.Linear(10, 6)), NTXentLoss()),
        (lambda: PlainNet(nn.Linear(10, 10)), VICRegLoss()),
        (lambda: PlainNet(Sum(), predictor=True), NegativeCosineSimilarity()),
    ],
)
def test_a_plain_loop_whose_forward_goes_on_after_the_heads(net, criterion):
    torch.manual_seed(0)
    host, views = net(), batch()[0]
    model = wrap(copy.deepcopy(host), criterion=criterion)
    with pytest.raises(RuntimeError, match=r"something else than the output of the .*with online="):
        model(views)
    off = {"affinity": None, "local_global_weight": 0}
    loss = wrap(copy.deepcopy(host), criterion=criterion, online="forward", **off)(views)
    (first, second), symmetric = (host(view) for view in views[:2]), not isinstance(host.last, Sum)
    if not symmetric:
        expected = (criterion(first[1], second[0]) + criterion(second[1], first[0])) / 2
    torch.testing.assert_close(loss, criterion(first, second) if symmetric else expected)


def test_a_probe_with_batch_norm_in_forward():
    """LoGo gives the statistics of layers that local crops train nothing in back, and backward still goes."""

    class Probed(SimSiam):
        def __init__(self):
            super().__init__()
            self.probe = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))

        def forward(self, x):
            h = self.backbone(x).flatten(1)
            z = self.projection_head(h)
            return self.probe(h.detach()), z.detach(), self.prediction_head(z)

        def training_step(self, batch, batch_idx):
            (l0, z0, p0), (l1, z1, p1) = map(self, batch[0])
            own = F.cross_entropy(l0, batch[1]) + F.cross_entropy(l1, batch[1])
            return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0)) + own

    torch.manual_seed(0)
    host, views = Probed(), batch()[0]
    wrapped = wrap(copy.deepcopy(host), affinity=None)
    for _ in range(2):
        host.training_step([views[:2], batch()[1]], 0).backward()
        wrapped.training_step(batch(), 0).backward()
    torch.testing.assert_close(wrapped.probe[0].running_mean, host.probe[0].running_mean)
    torch.testing.assert_close(wrapped.probe[1].weight.grad, host.probe[1].weight.grad)


def test_a_loss_of_numbers_beside_lightlys():
    class Regularised(SimSiam):
        loss = nn.MSELoss

        def __init__(self):
            super().__init__()
            self.regulariser = VICRegLoss()

    with pytest.raises(ValueError, match=r"several losses \(criterion, regulariser\).*criterion="):
        wrap(Regularised())


def test_a_plain_loop_that_may_normalise():
    class Contrast(nn.Module):
        def forward(self, first, second):
            logits, own = first @ second.T / 0.2, torch.arange(len(first))
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    with pytest.raises(ValueError, match=r"cannot tell what your loop computes .* step="):
        wrap(Network(), criterion=Contrast())
    wrap(Network(), criterion=NTXentLoss())


class OneNetwork(nn.Module):
    """As in SimSiam's and MoCo's releases: the projector is the network's last layer, and forward takes both views."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(conv(), nn.Flatten(), mlp(8, 10))
        self.predictor = mlp(10, 10)

    def forward(self, x1, x2):
        z1, z2 = self.encoder(x1), self.encoder(x2)
        return self.predictor(z1), self.predictor(z2), z1.detach(), z2.detach()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("criterion", [nn.CosineSimilarity(), Similarity()])
def test_a_plain_loop_around_one_network(criterion, checkpoint):
    """The release's loop minimises the negative of a similarity, which LoGo does not guess: step= says so."""

    def step(model, views):
        p1, p2, z1, z2 = model(x1=views[0], x2=views[1])
        return (criterion(p1, z2).mean() + criterion(p2, z1).mean()) / -2

    torch.manual_seed(0)
    host, views = OneNetwork(), batch()[0]
    with pytest.raises(ValueError, match=r"has no projection_head .* with a dot, as 'encoder\.fc'"):
        wrap(copy.deepcopy(host), criterion=criterion)
    with pytest.raises(ValueError, match=r"cannot tell what your loop computes .* step="):
        wrap(copy.deepcopy(host), criterion=criterion, projector="encoder.2")
    options = {"step": step, "affinity": None, "checkpoint_local_crops": checkpoint}
    wrapped = wrap(copy.deepcopy(host), criterion=criterion, projector="encoder.2", **options)
    host.both = lambda x: (z := host.encoder(x), host.predictor(z))
    loss, expected = wrapped(views), total(*by_hand(host, views))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, other in zip(wrapped.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5)


class Doubling(OnlyParts):
    """Its method makes two views of each image, so each local crop would count twice."""

    def forward(self, x):
        return self.both(torch.cat([x, x.flip(-1)]))[1]


class ForInference(SimSiam):
    """The forward of the docs of many a model: features are not trained there, and the step does not use it."""

    def forward(self, x):
        with torch.no_grad():
            h = self.backbone(x).flatten(1)
        return self.prediction_head(self.projection_head(h))


class ThroughACopy(SimSiam):
    def __init__(self):
        super().__init__()
        self.frozen = copy.deepcopy(self.backbone).requires_grad_(False)

    def through_the_copy(self, x):
        return self.prediction_head(self.projection_head(self.frozen(x).flatten(1)))


class OtherDict(SimSiam):
    def training_step(self, batch, batch_idx):
        return {"cost": super().training_step(batch, batch_idx)}


class OfOneTensor(nn.Module):
    def forward(self, features):
        return cosine(*features.chunk(2))


class OneTensor(SimSiam):
    loss = OfOneTensor

    def training_step(self, batch, batch_idx):
        return self.criterion(self.both(torch.cat(batch[0]))[0])


def given(make):
    """A SimSiam whose criterion is given what `make` makes of two projections and predictions."""

    class Whatever(nn.Module):
        def forward(self, *given):
            return sum(x.float().sum() for x in given)

    class Given(SimSiam):
        loss = Whatever

        def training_step(self, batch, batch_idx):
            return self.criterion(*make(*(x for view in batch[0] for x in self.both(view))))

    return Given


class Tuple(SimSiam):
    class Loss(nn.Module):
        def forward(self, pred, target):
            return cosine(pred, target), pred

    loss = Loss

    def training_step(self, batch, batch_idx):
        (z0, _), (_, p1) = map(self.both, batch[0])
        return self.criterion(p1, z0.detach())[0]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (given(lambda z0, p0, z1, p1: (p0 @ z1.T, torch.arange(len(p0)))), {}, "logits and labels .* the projections"),
        (given(lambda z0, p0, z1, p1: (p0, z1.detach(), torch.randn(10, 18))), {}, "a queue of negatives goes into"),
        (given(lambda z0, p0, z1, p1: (z0, z1, p0, p1)), {}, "one prediction and its target, once for each pair"),
        (given(lambda z0, p0, z1, p1: (torch.stack([z0, z1], 1),)), {}, r"both views are in one tensor"),
        (Tuple, {}, r"Loss of Tuple returned tuple, .* return the loss alone"),
        (Doubling, {}, r"Doubling makes 12 predictions of 6 crops, .* with online="),
        (ForInference, {}, r"local crops would not go through backbone.* with online="),
        (ThroughACopy, {"online": "through_the_copy"}, r"local crops would not go through backbone"),
        (OtherDict, {}, r'the step of OtherDict gives a dict of cost, .*or a dict with the "loss"'),
        (OneTensor, {}, r"both views are in one tensor, give the criterion two, .*chunk\(2\)"),
    ],
)
def test_what_would_train_local_crops_wrongly(model, options, message):
    torch.manual_seed(0)
    wrapped = wrap(model(), **options)
    before = copy.deepcopy(wrapped.state_dict())
    if model is ThroughACopy:  # at the start the copy gives what the backbone does, and gradients must tell
        assert torch.equal(wrapped.frozen[0].weight, wrapped.backbone[0].weight)
    with pytest.raises(RuntimeError, match=message):
        wrapped.training_step(batch(), 0)
    assert all(torch.equal(p, before[name]) for name, p in wrapped.named_parameters())


def test_a_projector_in_a_list_of_a_model_without_a_backbone():
    class Listed(OnlyParts):
        def __init__(self):
            super().__init__()
            self.net, self.heads = self.backbone, nn.ModuleList([mlp(8, 10)])
            del self.backbone, self.projection_head

        def both(self, x):
            z = self.heads[0](self.net(x).flatten(1))
            return z, self.prediction_head(z)

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"no method of Listed that LoGo knows .* with online="):
        wrap(Listed(), projector="heads.0").training_step(batch(), 0)


class Arm(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.projector = conv(), mlp(8, 10)


class Arms(pl.LightningModule):
    """As in lightning-bolts: backbone and projector in a part, the predictor beside it."""

    def __init__(self):
        super().__init__()
        self.online_network, self.predictor, self.criterion = Arm(), mlp(10, 10), NegativeCosineSimilarity()

    def both(self, x):
        z = self.online_network.projector(self.online_network.backbone(x).flatten(1))
        return z, self.predictor(z)

    training_step, configure_optimizers = SimSiam.training_step, SimSiam.configure_optimizers


def test_a_predictor_beside_the_part_with_the_projector():
    torch.manual_seed(0)
    wrapped = check(Arms(), by_hand)
    assert wrapped._logo_online == "backbone, projector, predictor"
    assert wrap(Arms(), local_predictor=True).logo_local_predictor is not None


def test_a_copy_whose_step_calls_another_criterion_says_so():
    criterion = nn.CosineSimilarity()

    def step(model, views):
        p1, p2, z1, z2 = model(*views)
        return (criterion(p1, z2).mean() + criterion(p2, z1).mean()) / -2

    torch.manual_seed(0)
    model = wrap(OneNetwork(), criterion=criterion, step=step, projector="encoder.2", affinity=None)
    model(batch()[0])
    with pytest.warns(UserWarning, match="did not call CosineSimilarity of OneNetwork, .* wrap the model anew"):
        copy.deepcopy(model)(batch()[0])


def test_a_plain_loop_left_as_it_was_says_so():
    class GivesTheLoss(OneNetwork):
        def forward(self, images):
            z = self.encoder(images)
            (z1, z2), (p1, p2) = z.detach().chunk(2), self.predictor(z).chunk(2)
            return (self.criterion(p1, z2) + self.criterion(p2, z1)) / 2

    torch.manual_seed(0)
    model = GivesTheLoss()
    model.criterion = NegativeCosineSimilarity()
    images = torch.cat(batch()[0][:2])
    options = {"online": lambda x: model.predictor(model.encoder(x)), "projector": "encoder.2", "affinity": None}
    wrapped = wrap(model, step=lambda model, views: model(torch.cat(views)), **options)
    with pytest.warns(
        UserWarning, match=r"GivesTheLoss was given a tensor .* without LoGo\. Give it the list of views"
    ):
        wrapped(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(batch()[0])
        wrapped.eval()(images)
        with torch.no_grad():
            wrapped.train()(images)

    unchanged, used = (wrap(Network(), criterion=NTXentLoss(), affinity=None) for _ in range(2))
    with pytest.warns(UserWarning, match=r"Network was called 32 times in training .* loss = model\(views\) takes"):
        [unchanged(images) for _ in range(100)]
    used(batch()[0])
    for _ in range(100):  # no warning
        used(images)


def test_a_forward_that_takes_the_list_of_views():
    class OfAList(Network):
        def __init__(self):
            super().__init__()
            self.predictor, self.criterion = mlp(10, 10), NegativeCosineSimilarity()

        def forward(self, views):
            z0, z1 = map(super().forward, views)
            return (
                self.criterion(self.predictor(z0), z1.detach()) + self.criterion(self.predictor(z1), z0.detach())
            ) / 2

        def predict(self, images):
            return self.predictor(super().forward(images))

    torch.manual_seed(0)
    host = OfAList()
    options = {"step": lambda model, views: model(views), "online": "predict", "affinity": None}
    model, (views, _) = wrap(copy.deepcopy(host), **options), batch()
    local = [cosine(host.predict(x), Network.forward(host, t)) for x in views[2:] for t in views[:2]]
    torch.testing.assert_close(model(views), (host(views[:2]) + 2 * torch.stack(local).mean()) / 3)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(views), OfAList.forward(model, views[:2]))


def test_layers_without_a_size_yet():
    class Lazy(Network):
        def __init__(self):
            super().__init__()
            self.projector = nn.LazyLinear(10)

    with pytest.raises(ValueError, match=r"Lazy has layers whose sizes are not known yet .* before wrap"):
        wrap(Lazy(), criterion=NegativeCosineSimilarity())


def test_global_crops_of_two_sizes_are_named():
    class Four(SimSiam):
        def training_step(self, batch, batch_idx):
            outs = [self.both(x) for x in batch[0]]
            return torch.stack([self.criterion(p, z.detach()) for _, p in outs for z, _ in outs]).mean()

    views = [*batch()[0], *batch()[0][2:]]
    torch.manual_seed(0)
    model = wrap(Four(), global_crops=4, affinity=None)
    with pytest.warns(UserWarning, match=r"first 4 views have different sizes, .*MultiCropCollate\(global_crops=4\)"):
        model.training_step([views, batch()[1]], 0)


@pytest.mark.parametrize("criterion", [cosine, "measure"])
def test_a_function_is_no_criterion(criterion):
    model = Network()
    model.measure = cosine
    with pytest.raises(
        ValueError, match=r"neither a loss module .* must become a module.*class Criterion\(nn.Module\)"
    ):
        wrap(model, criterion=criterion)


def test_a_loss_itself_from_a_forward_of_two_views():
    class Itself(OneNetwork):
        def forward(self, x1, x2):
            p1, p2, z1, z2 = super().forward(x1, x2)
            return {"loss": 0.5 * (self.criterion(p1, z2) + self.criterion(p2, z1))}

    torch.manual_seed(0)
    model = Itself()
    model.criterion = NegativeCosineSimilarity()
    wrapped = wrap(copy.deepcopy(model), projector="encoder.2", affinity=None)
    with pytest.raises(RuntimeError, match=r"forward gives dict.* with step= what your loop computes"):
        wrapped(batch()[0])
    options = {"projector": "encoder.2", "affinity": None, "step": lambda model, views: model(*views)["loss"]}
    loss = wrap(copy.deepcopy(model), **options)(batch()[0])
    model.both = lambda x: (z := model.encoder(x), model.predictor(z))
    torch.testing.assert_close(loss, total(*by_hand(model, batch()[0])))


def test_a_similarity_is_no_loss_of_a_plain_loop():
    """BYOL's or SimSiam's parts with a criterion that is larger for equal views: the loop takes its negative."""

    class Parts(Network):
        def __init__(self):
            super().__init__()
            self.prediction_head = mlp(10, 10)

    with pytest.raises(ValueError, match=r"cannot tell what your loop computes .* step="):
        wrap(Parts(), criterion=Similarity())
    wrap(Parts(), criterion=NegativeCosineSimilarity())


def test_a_projector_in_a_list():
    class Listed(SimSiam):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([mlp(8, 10)])
            del self.projection_head

        def both(self, x):
            z = self.heads[0](self.backbone(x).flatten(1))
            return z, self.prediction_head(z)

    torch.manual_seed(0)
    check(Listed(), by_hand, projector="heads.0")


def test_a_plain_loop_with_a_target_network_that_no_known_method_runs():
    class BYOL(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.projection_head, self.prediction_head = conv(), mlp(8, 10), mlp(10, 10)
            self.target = Network().requires_grad_(False)

        def forward(self, x):
            return self.prediction_head(self.projection_head(self.backbone(x).flatten(1)))

    with pytest.raises(ValueError, match=r"networks that may give targets \(target\).*step="):
        wrap(BYOL(), criterion=NegativeCosineSimilarity())
    assert wrap(BYOL(), criterion=NegativeCosineSimilarity(), target=lambda x: x)


@pytest.mark.parametrize("predictor", [False, True])
def test_a_plain_loop_with_a_target_network_that_only_no_grad_keeps_from_training(predictor):
    """Copies that nobody froze, under names of the user's: SimSiam or SimCLR would be a wrong guess."""

    class Online(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.projection_head = conv(), mlp(8, 10)
            if predictor:
                self.prediction_head = mlp(10, 10)

        def forward(self, pixel_values):
            z = self.projection_head(self.backbone(pixel_values).flatten(1))
            return self.prediction_head(z) if predictor else z

    class Copies(Online):
        def __init__(self):
            super().__init__()
            self.slow_backbone, self.slow_head = copy.deepcopy(self.backbone), copy.deepcopy(self.projection_head)

    class Whole(Online):
        def __init__(self):
            super().__init__()
            self.slow = Network()

    criterion = NegativeCosineSimilarity() if predictor else NTXentLoss()
    with pytest.raises(ValueError, match=r"may give targets \(slow_backbone, slow_head\).*step="):
        wrap(Copies(), criterion=criterion)
    with pytest.raises(ValueError, match=r"may give targets \(slow\).*step="):
        wrap(Whole(), criterion=criterion)
    model = wrap(Online(), criterion=criterion)
    assert torch.isfinite(model(batch()[0]))
    assert model(pixel_values=batch()[0][0]).shape == (6, 10)
    assert torch.isfinite(model(x=batch()[0]))
