"""diagnose(): its numbers longhand and at their extremes, and that looking changes nothing."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from logo_plugin import Affinity, diagnose


def projections(crops=2, images=6, features=5, seed=0):
    return torch.randn(crops, images, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("crops", [2, 3])
@pytest.mark.parametrize("features", [4, 40])  # fewer and more than there are crops
def test_longhand(crops, features):
    z = projections(crops, 6, features)
    found = diagnose(z)
    same, other = [], []
    for i in range(crops):
        for j in range(crops):
            for n in range(6):
                for m in range(6):
                    if n != m:
                        other.append(F.cosine_similarity(z[i, n], z[j, m], dim=0))
                    elif i < j:
                        same.append(F.cosine_similarity(z[i, n], z[j, n], dim=0))
    unit = F.normalize(z, dim=-1)
    std = torch.stack([view.std(0).mean() for view in unit]).mean() * math.sqrt(features)
    values = torch.linalg.svdvals(torch.cat([view - view.mean(0) for view in unit]).double())
    share = values[values > 1e-6] / values.sum()
    expected = {
        "local_local_similarity": torch.stack(same).mean(),
        "other_image_similarity": torch.stack(other).mean(),
        "embedding_std": std,
        "effective_rank": torch.exp(-(share * share.log()).sum()),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    assert diagnose(list(z)) == found
    assert diagnose(3 * z) == pytest.approx(found)


def test_collapse_to_a_point():
    found = diagnose(torch.randn(8).expand(2, 32, 8))
    assert found["embedding_std"] == pytest.approx(0, abs=1e-6)
    assert found["effective_rank"] == 1
    assert found["other_image_similarity"] == pytest.approx(1)
    assert diagnose(torch.zeros(2, 32, 8))["effective_rank"] == 1


def test_collapse_to_a_line():
    sides = torch.ones(32, 1)
    sides[::2] = -1
    found = diagnose((sides * torch.randn(64)).expand(2, 32, 64))
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)  # float32 Gram matrices would give 2 or more
    assert found["embedding_std"] > 0.7  # the spread alone sees nothing wrong
    assert found["local_local_similarity"] == pytest.approx(1)


@pytest.mark.parametrize(("images", "features"), [(400, 32), (32, 400)])
def test_isotropic(images, features):
    found = diagnose(projections(2, images, features))
    bound = min(2 * (images - 1), features)
    assert 0.9 * bound < found["effective_rank"] <= bound
    assert found["embedding_std"] == pytest.approx(1, abs=0.02)
    assert abs(found["other_image_similarity"]) < 0.01


class Scorer(nn.Module):
    """Calls it one image when the first features agree."""

    def forward(self, first, second):
        return 0.5 - (first[..., 0] - second[..., 0]).abs()


def test_accuracy_counts_both_kinds():
    z = torch.randn(3, 8, 5)
    z[..., 0] = torch.arange(8.0)
    assert diagnose(z, Scorer())["affinity_accuracy"] == 1
    z[..., 0] = 0
    assert diagnose(z, Scorer())["affinity_accuracy"] == 0.5  # all of one image, none of two
    z[:, :, 0] = 10 * torch.arange(3.0)[:, None]
    assert diagnose(z, Scorer())["affinity_accuracy"] == 0.5  # none of one image, all of two
    z[:, :, 0] = torch.arange(8.0)
    z[0, :4, 0] += 50  # the first crop of four images: 2 of 3 pairs of each are wrong
    assert diagnose(z, Scorer())["affinity_accuracy"] == pytest.approx((1 - 4 * 2 / 24 + 1) / 2)


def test_looking_changes_nothing():
    affinity = Affinity(5, 8)
    affinity.mlp[1].eval()  # a mode of its own
    state, modes = copy.deepcopy(affinity.state_dict()), [module.training for module in affinity.modules()]
    torch.manual_seed(0)
    z = projections().requires_grad_()
    before = torch.get_rng_state()
    first = diagnose(z, affinity)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in affinity.modules()] == modes
    for name, value in affinity.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert diagnose(z, affinity) == first
    assert all(parameter.grad is None for parameter in affinity.parameters())


def test_modes_come_back_after_an_error():
    affinity = Affinity(7)
    with pytest.raises(ValueError, match=r"Affinity\(dim=7\) expects"):
        diagnose(projections(), affinity)
    assert all(module.training for module in affinity.modules())


def test_what_is_not_defined_is_left_out():
    names = ["other_image_similarity", "embedding_std", "effective_rank"]
    assert list(diagnose(projections(1), Affinity(5))) == names


def test_not_finite_is_nan():
    z = projections()
    z[0, 0, 0] = math.inf
    found = diagnose(z, Affinity(5))
    assert len(found) == 5
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_have_no_accuracy(wrong):
    """nan compares as smaller and greater to nothing: it was an accuracy of 0."""

    class Broken(nn.Module):
        def forward(self, first, second):
            return first[..., 0].where(first[..., 0] < first[..., 0].max(), wrong)

    found = diagnose(projections(), Broken())
    assert math.isnan(found["affinity_accuracy"])
    assert {name: value for name, value in found.items() if name != "affinity_accuracy"} == diagnose(projections())


def test_half_precision():
    z = projections(2, 64, 16)
    found = diagnose(z.bfloat16(), Affinity(16))
    exact = diagnose(z)
    assert {name: found[name] for name in exact} == pytest.approx(exact, abs=0.01, rel=0.01)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.randn(6, 5), r"local_proj must have shape \(V, N, D\) .* got a tensor \(6, 5\)"),
        (torch.randn(2, 1, 5), r"at least 2 images, got \(2, 1, 5\)"),
        ([torch.randn(6, 5), torch.randn(6, 4)], r"views of one shape \(N, D\), got 2 views"),
        (torch.ones(2, 6, 5, dtype=torch.int64), "floating-point"),
        (None, "got NoneType"),
    ],
)
def test_bad_input(z, message):
    with pytest.raises(ValueError, match=message):
        diagnose(z)
