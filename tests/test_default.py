"""What one line gives: the cosine of two local crops is repelled, ever less until the training ends."""

import copy
import math

import hosts
import pytest
import pytorch_lightning as pl
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision.datasets import FakeData

from logo_plugin import Affinity, LoGoLearner, LoGoLoss, MultiCropCollate, wrap

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Memory bank size:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
COLLATE = MultiCropCollate(global_size=24, local_size=16)


class Stream(IterableDataset):
    """24 images and no length."""

    def __iter__(self):
        return iter([*FakeData(24, (3, 32, 32))])


class Strengths(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        strength = pl_module.logo._strength
        self.seen.append(1 if strength is None else float(strength))


def batch():
    return COLLATE([(x, 0) for x, _ in FakeData(8, (3, 32, 32))])[0]


def fit(model, images=None, *, path=None, **options):
    strengths = Strengths()
    loader = DataLoader(images or [*FakeData(24, (3, 32, 32))], batch_size=8, collate_fn=COLLATE)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=[strengths], **silent | {"enable_checkpointing": False} | options)
    trainer.fit(model, loader, ckpt_path=path, weights_only=False)
    return strengths.seen, trainer


def half_cosine(steps, *, of):
    return pytest.approx([(1 + math.cos(math.pi * i / of)) / 2 for i in steps], abs=1e-6)


@pytest.mark.parametrize("cls", [hosts.BYOL, hosts.MoCo, hosts.SimSiam, hosts.SimCLR, hosts.NNCLR, hosts.TiCo])
def test_the_line(cls):
    """It adds nothing that an optimizer or a checkpoint holds, and repels."""
    models = []
    for options in ({}, {"affinity": None}):
        torch.manual_seed(0)
        models.append(wrap(cls(), **options))
        torch.manual_seed(0)
        seen, _ = fit(models[-1], max_epochs=1)
        assert seen == (half_cosine(range(3), of=3) if not options else [1, 1, 1])
    model, other = models
    ratio = 0.3 if cls is hosts.MoCo else 0.1
    assert (model.logo.gradient_ratio, model.logo.anneal_repulsion) == (ratio, True)
    assert model.state_dict().keys() == cls().state_dict().keys()
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def ratios(make, **arguments):
    """What an option of any method turns out as: a strength that was given is never another one."""
    options = [{}, {"gradient_ratio": 0.2}, {"gradient_ratio": 0.0}, {"local_weight": 0.2}, {"affinity": None}]
    made = [make(**arguments, **given) for given in [*options, {"affinity": "learned"}]]
    return [getattr(one, "logo", None) or one.criterion for one in made]


@pytest.mark.parametrize("usual", [0.1, 0.3])
@pytest.mark.parametrize("kind", ["lightly", "plain", "learner"])
def test_beside_a_queue_of_negatives_it_is_stronger(kind, usual):
    if kind == "learner":
        sizes = {"image_size": (24, 16), "hidden_dim": 16, "output_dim": 16}
        sizes |= {"queue_size": 16} if usual == 0.3 else {"predictor_dim": 8}
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        found = ratios(lambda **o: LoGoLearner(net, "moco" if usual == 0.3 else "byol", **sizes, **o))
    elif kind == "plain":
        plain, criterion = hosts.PlainBYOL, NegativeCosineSimilarity()
        if usual == 0.3:
            plain, criterion = hosts.PlainMoCo, NTXentLoss(memory_bank_size=(64, 16))
        found = ratios(lambda **o: wrap(plain(), **o), criterion=criterion)
    else:
        found = ratios(
            lambda **o: wrap(hosts.MoCo if usual == 0.3 else hosts.SimCLR, **o)()
        )  # SimCLR's bank has no size
    assert [one.gradient_ratio for one in found] == [usual, 0.2, 0.0, None, None, None]
    assert [one.local_weight for one in found[3:]] == [0.2, 1e-4, 1e-4]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2}, 6),
        ({"max_epochs": 9, "max_steps": 4}, 4),
        ({"max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6),  # it moves with the batches
    ],
)
def test_follows_the_trainer(options, steps):
    assert fit(wrap(hosts.BYOL()), **options)[0] == half_cosine(range(steps), of=steps)


def test_a_stream_moves_it_with_the_epochs():
    """An epoch is as long as the ones before it; the only one cannot be told."""
    seen, _ = fit(wrap(hosts.BYOL()), Stream(), max_epochs=2)
    assert seen == half_cosine((0, 0, 0, 3, 4, 5), of=6)
    with pytest.warns(UserWarning, match=r"no length and max_epochs=1.*repulsion keeps its whole strength.*max_steps"):
        fit(wrap(hosts.BYOL()), Stream(), max_epochs=1)


@pytest.mark.parametrize("epochs", [-1, 1000])
def test_max_time_ends_it(epochs):
    seen, _ = fit(wrap(hosts.BYOL()), max_epochs=epochs, max_time={"seconds": 5})
    assert seen[0] > 0.9
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.2


def test_goes_on_where_it_was(tmp_path):
    first = wrap(hosts.BYOL())
    _, trainer = fit(first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    seen, _ = fit(wrap(hosts.BYOL()), path=tmp_path / "last.ckpt", max_epochs=2)
    assert seen == half_cosine((3, 4, 5), of=6)


def test_a_trainer_without_an_end_is_refused():
    model = wrap(hosts.BYOL())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"nothing says how far that is.*max_epochs, max_steps or max_time.*affinity=None"
    ):
        fit(model, max_epochs=-1)
    assert all(torch.allclose(value, before[name]) for name, value in model.named_parameters())
    seen, _ = fit(wrap(hosts.BYOL(), affinity="cosine", anneal_repulsion=True), max_steps=3)
    assert seen == half_cosine(range(3), of=3)


def test_a_plain_loop_says_how_far_it_is():
    model = wrap(hosts.PlainBYOL(), criterion=NegativeCosineSimilarity())
    with pytest.raises(RuntimeError, match=r"model\.logo\.anneal"):
        model(batch())
    other = wrap(copy.deepcopy(hosts.PlainBYOL()), criterion=NegativeCosineSimilarity(), affinity=None)
    other.load_state_dict(model.state_dict())
    views, gradients = batch(), {}
    for progress in (0.0, 1.0):
        model.logo.anneal(progress)
        model.zero_grad()
        model(views).backward()
        gradients[progress] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.load_state_dict(other.state_dict())
    other(views).backward()
    bare = [p.grad for p in other.parameters() if p.grad is not None]
    for found, expected in zip(gradients[1.0], bare, strict=True):  # annealed, it is plain multi-crop
        torch.testing.assert_close(found, expected)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(gradients[0.0], bare, strict=True))


def test_the_learner_too():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    learner = LoGoLearner(net, "simsiam", image_size=(24, 16), hidden_dim=16, output_dim=16, predictor_dim=8)
    with torch.no_grad():
        assert learner(batch()).isfinite()
    with pytest.raises(RuntimeError, match=r"learner\.criterion\.anneal"):
        learner(batch())
    learner.criterion.anneal(0.5)
    learner(batch()).backward()
    assert all(p.grad is not None for p in learner.parameters())


def test_presets_have_the_affinity_of_the_paper():
    for preset in ("paper", "release"):
        model = wrap(hosts.BYOL(), preset=preset)
        assert isinstance(model.logo.affinity, Affinity)
        assert not model.logo.anneal_repulsion
    assert wrap(hosts.BYOL(), preset="release", affinity="cosine").logo.gradient_ratio == 0.015
    with pytest.raises(ValueError, match=r"positive_noise=0\.0, repulsion='logit': without effect beside the cosine"):
        wrap(hosts.BYOL(), preset="paper", affinity="cosine")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["byol", "simsiam", "moco"])
def test_a_compiled_learner_repels_as_an_eager_one(method):
    """The ratio is taken at the projections, which no graph may hide."""
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        queue = {"queue_size": 16} if method == "moco" else {"predictor_dim": 8}
        learner = LoGoLearner(
            net, method, image_size=(24, 16), hidden_dim=16, output_dim=16, gradient_ratio=0.5, **queue
        )
        learner.criterion.anneal(0.0)
        (torch.compile(learner, backend="aot_eager") if compiled else learner)(batch()).backward()
        gradients.append([p.grad for p in learner.parameters() if p.grad is not None])
    for eager, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_hides_the_predictor_is_refused():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.projector, self.predictor = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            z = self.projector(x)
            return z, self.predictor(z)

    heads = torch.compile(Heads(), backend="aot_eager")
    z, p = zip(*(heads(torch.randn(6, 8)) for _ in range(4)), strict=True)
    parts = {"global_pred": p[:2], "global_target": z[:2], "local_pred": p[2:], "local_proj": z[2:]}
    with pytest.raises(
        RuntimeError, match=r"one graph of torch\.compile.*Compile encoder and predictor apart.*local_weight"
    ):
        LoGoLoss(affinity="cosine", anneal_repulsion=False)(**parts)
    assert LoGoLoss(affinity="cosine", anneal_repulsion=False, local_weight=0.1)(**parts).total.isfinite()


def test_a_trainer_before_says_nothing_of_the_next():
    """Its end, at which nothing is repelled, is not where a run without an end begins."""
    model = wrap(hosts.SimSiam())
    fit(model, max_epochs=1)
    with pytest.raises(RuntimeError, match="nothing says how far that is"):
        fit(model, max_epochs=-1)
    seen, _ = fit(model, max_epochs=1)
    assert seen == half_cosine(range(3), of=3)


@pytest.mark.parametrize("cls", [hosts.MoCo, hosts.SimCLR])
def test_bfloat16_models_are_not_refused_by_chance(cls):
    for seed in range(6):
        torch.manual_seed(seed)
        model = wrap(cls(), anneal_repulsion=False).bfloat16()
        views = [view.bfloat16() for view in batch()]
        assert model.training_step([views, None], 0).isfinite()
