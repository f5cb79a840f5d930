"""Overlap of crops and the repulsion weighted by it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from photos import tiles

from logo_plugin import Affinity, LoGoLoss, MultiCropCollate, crop_overlap


def test_overlap_of_known_boxes():
    boxes = torch.tensor(
        [
            [[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 4, 8]],
            [[0, 0, 10, 10], [10, 0, 20, 10], [2, 0, 6, 8]],
            [[5, 5, 15, 15], [0, 0, 10, 5], [2, 2, 4, 4]],
        ]
    )
    expected = [[1, 0, 1 / 3], [25 / 175, 0.5, 4 / 32], [25 / 175, 0, 4 / 32]]  # pairs 01, 02, 12
    torch.testing.assert_close(crop_overlap(boxes.float()), torch.tensor(expected))
    torch.testing.assert_close(crop_overlap(boxes), torch.tensor(expected))


def test_overlap_of_halved_boxes():
    """Lightning's precision="16-true" casts them, and float16 ends at 65504: areas were infinite, overlaps 0 or nan."""
    boxes = torch.tensor([[[0.0, 0, 640, 480]], [[0, 0, 320, 480]]])
    torch.testing.assert_close(crop_overlap(boxes.half()), torch.tensor([[0.5]]))


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 4), (2, 3, 5)])
def test_overlap_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\(L, N, 4\) with L >= 2, got \(" + ", ".join(map(str, shape))):
        crop_overlap(torch.zeros(shape))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    names = {"global_pred": 2, "global_target": 2, "local_pred": 3, "local_proj": 3}
    return {name: torch.randn(v, 5, 8, generator=generator).requires_grad_() for name, v in names.items()}


@pytest.mark.parametrize("repulsion", ["softplus", "logit"])
def test_repulsion_is_multiplied_by_one_minus_overlap(inputs, repulsion):
    criterion = LoGoLoss(affinity=Affinity(8, 16), local_weight=0.3, repulsion=repulsion)
    overlap = torch.rand(3, 5)
    expected = 0
    for k, (i, j) in enumerate(itertools.combinations(range(3), 2)):
        logits = criterion.affinity(inputs["local_proj"][i], inputs["local_proj"][j])
        repelled = F.softplus(logits) if repulsion == "softplus" else logits
        expected = expected + sum((1 - overlap[k, n]) * repelled[n] for n in range(5)) / 15
    torch.testing.assert_close(criterion(**inputs, local_overlap=overlap).local_local, expected)


def test_no_overlap_changes_nothing_and_full_overlap_ends_the_repulsion(inputs):
    criterion = LoGoLoss(affinity=Affinity(8, 16), local_weight=0.3)
    torch.manual_seed(0)
    plain = criterion(**inputs)
    torch.manual_seed(0)
    apart = criterion(**inputs, local_overlap=torch.zeros(3, 5))
    torch.manual_seed(0)
    same = criterion(**inputs, local_overlap=torch.ones(3, 5))
    torch.testing.assert_close(apart, plain)
    assert same.local_local == 0
    assert same.local_global == plain.local_global
    torch.testing.assert_close(same.affinity, plain.affinity)
    torch.testing.assert_close(same.total, plain.total - 0.3 * plain.local_local)
    assert not torch.autograd.grad(same.local_local, inputs["local_proj"])[0].any()
    assert torch.autograd.grad(plain.local_local, inputs["local_proj"])[0].any()


def test_extend_takes_the_overlap(inputs):
    criterion = LoGoLoss(affinity=Affinity(8, 16))
    host_loss = torch.zeros(())
    terms = criterion.extend(
        host_loss,
        global_global=host_loss,
        global_pairs=2,
        **{name: inputs[name] for name in ("global_target", "local_pred", "local_proj")},
        local_overlap=torch.ones(3, 5),
    )
    assert terms.local_local == 0


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (3,), (5, 3)])
def test_overlap_of_another_shape_is_refused(inputs, shape):
    with pytest.raises(ValueError, match=r"local_overlap must have shape .* = \(3, 5\)"):
        LoGoLoss(affinity=Affinity(8, 16))(**inputs, local_overlap=torch.zeros(shape))


@pytest.mark.parametrize(
    ("overlap", "message"),
    [
        (torch.full((3, 5), 5.0), r"must be in \[0, 1\], got 15 values that are not, such as 5\. .*crop_overlap"),
        (torch.tensor([[0.0] * 5, [1.0] * 5, [0.5] * 4 + [-0.1]]), r"got 1 values that are not, such as -0\.1"),
        (torch.full((3, 5), torch.nan), r"\[0, 1\], got 15 values that are not, such as nan"),
        (torch.zeros(3, 5, dtype=torch.int64), r"must be a floating-point tensor, got torch\.int64"),
        ([[0.0] * 5] * 3, r"must be a floating-point tensor, got list"),
    ],
)
def test_overlap_out_of_range_is_refused(inputs, overlap, message):
    with pytest.raises(ValueError, match=f"local_overlap .*{message}"):
        LoGoLoss(affinity=Affinity(8, 16))(**inputs, local_overlap=overlap)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_where_values_cannot_be_looked_at_a_wrong_overlap_is_nan(inputs):
    """On a GPU looking makes it wait, compiled it breaks the graph; attraction instead of repulsion it never is."""
    torch._dynamo.reset()  # of other tests
    compiled = torch.compile(LoGoLoss(affinity=Affinity(8, 16)), fullgraph=True, backend="aot_eager")
    assert compiled(**inputs, local_overlap=torch.full((3, 5), 0.5)).local_local.isfinite()
    assert compiled(**inputs, local_overlap=torch.full((3, 5), 5.0)).local_local.isnan()


def test_boxes_of_a_batch_weigh_the_loss(inputs):
    *_, crops = MultiCropCollate.cifar10(local_crops=3, return_boxes=True)(tiles(5))
    overlap = crop_overlap(crops.boxes[2:])
    assert overlap.shape == (3, 5)
    assert 0 < overlap.max() <= 1
    assert LoGoLoss(affinity=Affinity(8, 16))(**inputs, local_overlap=overlap).total.isfinite()
