"""The affinity: one pass for two terms, any precision, any BatchNorm, batches that are not finite."""

import contextlib
import copy
import math
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from logo_plugin import Affinity, LoGoLearner, LoGoLoss
from logo_plugin.affinity import CosineAffinity
from logo_plugin.affinity_terms import affinity_terms, local_local_loss


def projections(crops=2, images=6, features=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, features, generator=generator, dtype=dtype).requires_grad_() for _ in range(crops)]


def norms(affinity):
    return [module for module in affinity.modules() if isinstance(module, _BatchNorm)]


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


class Asked(Affinity):
    """Scores pair after pair, as an affinity of one's own does: once for the repulsion, once to be trained."""

    def forward(self, first, second):
        return super().forward(first, second)


@pytest.mark.parametrize("crops", [2, 4])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("form", ["logistic", "difference"])
@pytest.mark.parametrize("training", [True, False])
def test_one_pass_gives_what_two_would(crops, norm, form, training):
    """Values and every gradient: of the repulsion at the projections only, of the loss at the parameters only."""
    found = []
    for cls in (Affinity, Asked):
        affinity = cls(8, 16, norm=norm).double()
        affinity.load_state_dict(state_of(norm))
        affinity.train(training)
        z = projections(crops)
        partner, noise = torch.arange(6).roll(1), torch.randn(2, 6, 8, dtype=torch.float64, generator=seeded(1))
        terms = affinity_terms(affinity, z, repulsion="softplus", form=form, noise=noise, partner=partner)
        (3 * terms[0] + terms[1]).backward()
        found.append([*(t.detach() for t in terms), *(v.grad for v in z), *(p.grad for p in affinity.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("crops", [2, 3])
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_half_frozen_layers_train_their_other_half(crops, trained):
    affinity, asked, z = Affinity(8, 16).double(), Asked(8, 16).double(), projections(crops)
    for module in (affinity, asked):
        module.load_state_dict(state_of("batch"))
    noise = torch.randn(2, 6, 8, dtype=torch.float64, generator=seeded(1))
    options = {"noise": noise, "partner": torch.arange(6).roll(1)}
    affinity_terms(asked, z, **options)[1].backward()
    expected = {name: p.grad for name, p in asked.named_parameters() if name.endswith(trained)}
    for name, parameter in affinity.named_parameters():
        parameter.requires_grad_(name in expected)
    affinity_terms(affinity, z, **options)[1].backward()
    found = {name: p.grad for name, p in affinity.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def state_of(norm):
    torch.manual_seed(0)
    affinity = Affinity(8, 16, norm=norm).double()
    with torch.no_grad():
        for parameter in affinity.parameters():
            parameter.add_(torch.rand_like(parameter))
        for name, buffer in affinity.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return affinity.state_dict()


def test_subclasses_and_other_modules_are_asked_as_a_user_would():
    class Mine(Affinity):
        def forward(self, first, second):
            assert first.shape == second.shape
            return super().forward(first, second)

    class Bad(nn.Module):
        def forward(self, first, second):
            return (first * second).unsqueeze(-1)

    results = []
    for cls in (Affinity, Mine):
        torch.manual_seed(0)
        affinity = cls(8, 16).double()
        results.append(
            [float(t.detach()) for t in affinity_terms(affinity, projections(), partner=torch.arange(6).roll(1))]
        )
    assert results[0] == pytest.approx(results[1], rel=1e-10)
    with pytest.raises(ValueError, match=r"\(P, N, D\) = \(1, 6, 8\) to logits \(P, N\), and Bad gave \(1, 6, 8, 1\)"):
        affinity_terms(Bad(), projections())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_any_precision_is_computed_in_float32_at_least(weights, inputs, norm):
    torch.manual_seed(0)
    affinity = Affinity(8, 16, norm=norm).to(weights)
    z = projections(dtype=inputs)
    expected = copy.deepcopy(affinity).double()(z[0].double(), z[1].double())
    logits = affinity(*z)
    assert logits.dtype == (torch.float64 if torch.float64 in (weights, inputs) else torch.float32)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    options = {"gradient_ratio": 0.1} if norm == "batch" else {"local_weight": 0.1}
    criterion = LoGoLoss(affinity=affinity, **options)
    terms = criterion(global_pred=projections(2), global_target=projections(2, seed=1), local_pred=z)
    terms.total.backward()
    assert all(term.isfinite() for term in terms)
    assert {p.grad.dtype for p in affinity.parameters()} == {weights}
    assert z[0].grad.dtype == inputs
    assert z[0].grad.isfinite().all()
    assert {b.dtype for name, b in affinity.named_buffers() if "running" in name} <= {weights}
    affinity.eval()(*z)


@pytest.mark.parametrize("crops", [2, 3])
def test_backward_inside_autocast_stays_in_float32(crops):
    gradients = []
    for inside in (True, False):
        torch.manual_seed(0)
        affinity, z = Affinity(8, 16), projections(crops, dtype=torch.float32)
        terms = affinity_terms(affinity, z, partner=torch.arange(6).roll(1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            sum(terms).backward()
        gradients.append([*(p.grad for p in affinity.parameters()), *(v.grad for v in z)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["byol", "simsiam", "moco"])
@pytest.mark.parametrize("options", [{}, {"gradient_ratio": 0.1}, {"affinity_loss": "difference"}])
def test_a_whole_model_in_half_precision(method, options):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    queue = {"affinity": "learned"} | ({"queue_size": 16} if method == "moco" else {})
    learner = LoGoLearner(net, method, image_size=(16, 12), hidden_dim=16, output_dim=8, **queue, **options)
    learner.to(torch.bfloat16)
    says = (
        contextlib.nullcontext()
        if method == "simsiam"
        else pytest.warns(UserWarning, match="half precision rounds away")
    )
    with says as said:  # of its target, once
        for _ in range(2):
            loss = learner([torch.randn(4, 3, side, side, dtype=torch.bfloat16) for side in (16, 16, 12, 12)])
            loss.backward()
            assert loss.isfinite()
    assert method == "simsiam" or len(said) == 1
    assert all(p.grad.isfinite().all() for p in learner.parameters() if p.grad is not None)


def poisoned(kind):
    z = projections(dtype=torch.float32)
    with torch.no_grad():
        z[0][0, 0] = kind
    return z


@pytest.mark.parametrize("kind", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_bad_batch_does_not_stay_in_the_running_statistics(kind, momentum):
    """GradScaler skips such a step; the buffers must, too. A bad batch among good ones counts for nothing."""
    torch.manual_seed(0)
    affinity, twin = Affinity(8, 16), Affinity(8, 16)
    twin.load_state_dict(affinity.state_dict())
    for module in (affinity, twin):
        for norm in norms(module):
            norm.momentum = momentum
    for number in range(3):
        good = projections(seed=number, dtype=torch.float32)
        for module in (affinity, twin):
            torch.manual_seed(number)
            affinity_terms(module, good)
        affinity_terms(affinity, poisoned(kind))
        affinity(*poisoned(kind))
    for name, buffer in buffers(affinity).items():
        if "running" in name:
            torch.testing.assert_close(buffer, buffers(twin)[name])
    assert affinity.eval()(*projections(dtype=torch.float32)).isfinite().all()


def test_running_statistics_are_those_of_the_trained_pairs():
    """By hand: the mean over the batches of same-image and other-image pairs, with the momentum of BatchNorm."""
    affinity = Affinity(8, 16).double()
    z, partner = projections(), torch.arange(6).roll(1)
    affinity_terms(affinity, z, partner=partner)
    sides = [(z[0], z[1]), (z[1], z[0]), (z[0], z[1][partner]), (z[1], z[0][partner])]
    hidden = torch.stack([affinity.mlp[0](torch.cat(side, 1)) for side in sides])
    norm = affinity.mlp[1]
    torch.testing.assert_close(norm.running_mean, 0.1 * hidden.mean(1).mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * hidden.var(1).mean(0))
    assert norm.num_batches_tracked == 4


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_batches_at_once_are_tracked_as_several_calls(momentum):
    """Without momentum BatchNorm keeps the mean of all batches: SWA's `update_bn` works so."""
    z = [torch.stack(projections(3, seed=seed)) for seed in range(4)]
    affinity = Affinity(8, 16).double()
    plain = copy.deepcopy(affinity)
    for module in (affinity, plain):
        for norm in norms(module):
            norm.momentum = momentum
    for first, second in zip(z[::2], z[1::2], strict=True):
        affinity(first, second)
        hidden = torch.cat([first, second], -1)
        if momentum is None:
            for pair in hidden:  # as torch's own layers do it, call by call
                plain.mlp(pair)
        else:
            means = plain.mlp[0](hidden).mean(1).mean(0)
            plain.mlp[1].running_mean.lerp_(means.detach(), momentum)
    torch.testing.assert_close(affinity.mlp[1].running_mean, plain.mlp[1].running_mean)
    if momentum is None:
        for (name, one), two in zip(affinity.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(one, two, msg=name)


def no_affine(affinity):
    for i in (1, 4):
        affinity.mlp[i] = nn.BatchNorm1d(16, affine=False)


def not_tracked(affinity):
    for i in (1, 4):
        affinity.mlp[i] = nn.BatchNorm1d(16, track_running_stats=False)


def one_frozen(affinity):
    affinity.mlp[1].eval()


def other_widths(affinity):
    affinity.mlp[3], affinity.mlp[4], affinity.mlp[6] = nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 1)


def synchronised(affinity):
    affinity.mlp = nn.SyncBatchNorm.convert_sync_batchnorm(affinity.mlp)


def one_without_momentum(affinity):
    affinity.mlp[4].momentum = None


def no_bias(affinity):
    for i in (0, 3):
        affinity.mlp[i] = nn.Linear(16, 16, bias=False)


@pytest.mark.parametrize(
    "change",
    [no_affine, not_tracked, replace_all_batch_norm_modules_, one_frozen, other_widths, synchronised, no_bias,
     one_without_momentum],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_other_batch_norms(change, training):
    """Pair by pair as torch's own layers compute it, in one pass and in two."""
    torch.manual_seed(0)
    affinity = Affinity(8, 16).train(training)
    change(affinity)
    affinity.double()
    z = projections(3)
    plain = copy.deepcopy(affinity.mlp)
    if change is synchronised and training:  # torch's refuses tensors on the CPU in training
        plain = nn.Sequential(*(nn.BatchNorm1d(16).double() if isinstance(m, _BatchNorm) else m for m in plain))
    pairs = [torch.cat(pair, 1) for pair in combinations(z, 2)]
    expected = torch.stack([nn.functional.softplus(plain(pair)).mean() for pair in pairs]).mean()
    before = {name for name, _ in affinity.named_buffers()}
    local_local, trained = affinity_terms(affinity, z)
    torch.testing.assert_close(local_local, expected)
    (local_local + trained).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in affinity.parameters())
    assert {name for name, _ in affinity.named_buffers()} == before
    torch.testing.assert_close(affinity(*z[:2]), plain(pairs[0]).squeeze(1))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_one_pass_compiles(norm):
    """Of three crops, with LayerNorm, and with BatchNorm without momentum; the usual one is in test_losses."""
    torch.manual_seed(0)
    affinity = Affinity(8, 16, norm=norm)
    if norm == "batch":
        one_without_momentum(affinity)
    twin, partner = copy.deepcopy(affinity), torch.arange(6).roll(1)
    compiled = torch.compile(affinity_terms, fullgraph=True, backend="aot_eager")
    expected = affinity_terms(affinity, projections(3, dtype=torch.float32), partner=partner)
    found = compiled(twin, projections(3, dtype=torch.float32), partner=partner)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for (name, one), other in zip(twin.named_buffers(), affinity.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_of_more_than_two_crops_no_pair_is_made():
    """What backward keeps of the projections grows with the crops, not with their pairs; of W it keeps two copies."""
    images, crops, kept = 64, 6, []
    for features in (256, 512):
        affinity, storages = Affinity(features, 8), {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            terms = affinity_terms(affinity, projections(crops, images, features, dtype=torch.float32), noise=0.1)
        sum(terms).backward()
        kept.append(sum(storages.values()))
    assert kept[1] - kept[0] <= 4 * 256 * (images * (crops + 2) + 2 * 2 * 8)


@pytest.mark.parametrize("crops", [2, 3])
@pytest.mark.parametrize("form", ["logistic", "difference"])
def test_nothing_comes_from_the_cpu(crops, form):
    """No tensor is made of Python's numbers, no value looked at: a GPU would have to wait for both."""
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            called.add(operator._schema.name)
            return operator(*args, **(kwargs or {}))

    affinity, z = Affinity(8, 16), projections(crops, dtype=torch.float32)
    with Record():
        sum(affinity_terms(affinity, z, form=form, noise=0.1)).backward()
    assert {"aten::randint.low", "aten::randint"} & called
    assert not {"aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero"} & called


@pytest.mark.parametrize("row", [0.0, 1e-9])
def test_the_cosine_of_next_to_nothing_has_a_gradient_like_others(row):
    """As in the similarities: one image whose projection is zero must not outweigh the batch."""
    z = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    z[0, 3] = row
    z.requires_grad_()
    local_local_loss(CosineAffinity(), z, repulsion="logit").backward()
    norms = z.grad.norm(dim=-1)
    assert norms.isfinite().all()
    assert norms[0, 3] < 10 * norms[1].max() + 1
