"""Stacked similarities: all pairs at once give what one by one does, and predictions of zero a finite gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from logo_plugin import LoGoLoss, info_nce
from logo_plugin.similarities import mean_over_pairs, negative_cosine


class CosineLoss(torch.nn.Module):
    """Given as a class, not an instance."""

    def __init__(self, dim=1, eps=1e-8):
        super().__init__()


def views(count, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(count)]


QUEUE = F.normalize(torch.randn(8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=0)
STACKED = {
    "cosine": negative_cosine,
    "in the batch": info_nce,
    "temperature": partial(info_nce, temperature=0.07),
    "queue": partial(info_nce, queue=QUEUE, temperature=0.1),
}


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_at_once_as_one_by_one(name, apart, count):
    results = []
    for score in (STACKED[name], lambda p, t: STACKED[name](p, t)):  # a lambda is nothing we know
        preds, targets = views(count if apart else 3, 1), views(count, 2)
        value = mean_over_pairs(score, preds, targets, apart=apart)
        value.backward()
        assert all(target.grad is None for target in targets)
        results.append([value.detach(), *(p.grad for p in preds)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def written_out(pred, target, queue=None, temperature=0.1):
    """InfoNCE as cross-entropy over the logits."""
    pred, target = (F.normalize(x, dim=1) for x in (pred, target))
    if queue is None:
        return F.cross_entropy(pred @ target.T / temperature, torch.arange(len(pred)))
    logits = torch.cat([(pred * target).sum(1, keepdim=True), pred @ queue], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(pred), dtype=torch.long))


@pytest.mark.parametrize("queue", [None, QUEUE], ids=["batch", "queue"])
@pytest.mark.parametrize("globals_", [2, 3])
def test_info_nce_and_its_gradient_longhand(queue, globals_):
    """Both are computed in one pass; here by torch's cross-entropy and autograd."""
    preds, targets, local = views(globals_, 1), views(globals_, 2), views(2, 3)
    terms = LoGoLoss(similarity=partial(info_nce, queue=queue, temperature=0.1))(
        global_pred=preds, global_target=[2 * target for target in targets], local_pred=local
    )
    pairs = [(p, t) for i, p in enumerate(preds) for j, t in enumerate(targets) if i != j]
    pairs += [(p, t) for p in local for t in targets]
    expected = torch.stack([written_out(p, t.detach(), queue) for p, t in pairs]).mean()
    torch.testing.assert_close(terms.total, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(*(torch.autograd.grad(x, [*preds, *local]) for x in (terms.total, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


def test_info_nce_by_itself_longhand():
    pred, target = views(2, 1)
    for queue in (None, QUEUE):
        value = info_nce(3 * pred, 2 * target, queue=queue, temperature=0.1)
        torch.testing.assert_close(value, written_out(pred, target, queue))


def test_an_empty_queue():
    """As one that fills has at first: nothing to tell a prediction from, no loss."""
    preds, targets = views(2, 1), views(2, 2)
    total = LoGoLoss(similarity=partial(info_nce, queue=QUEUE[:, :0]))(global_pred=preds, global_target=targets).total
    total.backward()
    assert total == info_nce(preds[0], targets[0], queue=QUEUE[:, :0]) == 0
    assert not any(p.grad.any() for p in preds)


@pytest.mark.parametrize("learned", ["queue", "temperature"])
def test_what_info_nce_compares_with_may_learn(learned):
    """Then its gradient at the predictions comes from autograd, too."""
    given = {"queue": QUEUE.clone(), "temperature": torch.tensor(0.2, dtype=torch.float64)}
    preds, targets = views(2, 1), views(2, 2)
    learning = given[learned].requires_grad_()
    total = LoGoLoss(similarity=partial(info_nce, **given))(global_pred=preds, global_target=targets).total
    expected = sum(written_out(preds[i], targets[1 - i].detach(), **given) for i in (0, 1)) / 2
    got, wanted = (torch.autograd.grad(x, [*preds, learning]) for x in (total, expected))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("learned", ["target", "queue", "temperature"])
def test_info_nce_trains_whatever_learns(learned):
    pred, target = views(2, 1)
    queue, temperature = QUEUE.clone().requires_grad_(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    given = {"pred": pred, "target": target.detach(), "queue": QUEUE, "temperature": 0.2}
    given[learned] = {"target": target, "queue": queue, "temperature": temperature}[learned]
    got, wanted = (torch.autograd.grad(f(**given), [pred, given[learned]]) for f in (info_nce, written_out))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_info_nce_keeps_no_logits_for_backward():
    """With MoCo's 65,536 keys they were most of what a step kept."""
    queue, kept = F.normalize(torch.randn(8, 4096), dim=0), []
    preds, targets = views(2, 1, torch.float32), views(2, 2, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        LoGoLoss(similarity=partial(info_nce, queue=queue))(global_pred=preds, global_target=targets)
    assert kept
    assert all(x.data_ptr() == queue.data_ptr() or x.numel() < 4096 for x in kept)


def test_other_callables_get_pairs_one_by_one():
    seen = []

    def similarity(pred, target):
        seen.append((pred, target))
        return (pred - target).square().mean()

    g, t, local = views(2, 1), views(2, 2), views(2, 3)
    LoGoLoss(similarity=similarity)(global_pred=g, global_target=t, local_pred=local)
    expected = [(g[0], t[1]), (g[1], t[0]), *((p, target) for p in local for target in t)]
    assert len(seen) == len(expected)
    for (pred, target), (p, known) in zip(seen, expected, strict=True):
        assert pred is p
        assert torch.equal(target, known)
        assert target.shape == (5, 8)
        assert not target.requires_grad


@pytest.mark.parametrize(
    ("similarity", "got"),
    [
        (F.cosine_similarity, r"shape \(5,\)"),
        (lambda pred, target: pred @ target.T, r"shape \(5, 5\)"),
        (CosineLoss, "CosineLoss"),
        (lambda pred, target: 0.5, "float"),
    ],
)
def test_a_similarity_gives_one_number(similarity, got):
    pred, target = torch.randn(2, 2, 5, 3)
    with pytest.raises(ValueError, match=rf"similarity must give a scalar tensor.*got {got}"):
        LoGoLoss(similarity=similarity)(global_pred=pred, global_target=target)


def test_one_similarity_for_each_target():
    t, local = views(2, 2), views(2, 3)
    queues = [QUEUE, QUEUE.flip(1)[:, :5]]
    scores = [partial(info_nce, queue=queue) for queue in queues]
    zero = torch.zeros((), dtype=torch.float64)
    terms = LoGoLoss().extend(
        zero, global_global=zero, global_pairs=2, global_target=t, local_pred=local, similarity=scores
    )
    longhand = sum(info_nce(p, t[j], queue=queues[j]) for p in local for j in (0, 1)) / 4
    torch.testing.assert_close(terms.local_global, longhand)


@pytest.mark.parametrize("similarity", ["cosine", info_nce, STACKED["queue"]], ids=["cosine", "batch", "queue"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_predictions_of_zero_have_a_finite_gradient(similarity, dtype):
    """A dead ReLU before the loss: 1 / eps was infinite in float16."""
    pred = [torch.zeros(5, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        pred[1][1:] = 1.0  # beside others that are not zero
    target = views(2, 2, dtype)
    terms = LoGoLoss(similarity=similarity)(global_pred=pred, global_target=target, local_pred=pred)
    (1024 * terms.total).backward()  # as a GradScaler does
    assert terms.total.isfinite()
    for p in pred:
        assert p.grad.isfinite().all()
        assert p.grad.abs().max() > 0


def test_the_cosine_is_torchs():
    pred, target = views(2, 1)
    expected = -F.cosine_similarity(pred, target).mean()
    assert torch.equal(negative_cosine(pred, target), expected)
    got, wanted = (torch.autograd.grad(x, pred)[0] for x in (negative_cosine(pred, target), expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("globals_", "locals_"), [(2, 2), (3, 5)])
def test_the_cosine_and_its_gradient_longhand(globals_, locals_):
    """Both are computed in one pass; here as Eq. 3, 4 and 5 say, by torch's cosine and autograd."""
    preds, targets, local, proj = views(globals_, 1), views(globals_, 2), views(locals_, 3), views(locals_, 4)
    criterion = LoGoLoss(affinity="cosine", local_weight=0.3, anneal_repulsion=False)
    terms = criterion(global_pred=preds, global_target=targets, local_pred=local, local_proj=proj)
    cosine = partial(F.cosine_similarity, dim=1)
    pulled = [-cosine(p, t.detach()) for i, p in enumerate(preds) for j, t in enumerate(targets) if i != j]
    pulled += [-cosine(p, t.detach()) for p in local for t in targets]
    repelled = [cosine(proj[i], proj[j]) for i in range(locals_) for j in range(i)]
    expected = torch.stack(pulled).mean() + 0.3 * torch.stack(repelled).mean()
    torch.testing.assert_close(terms.total, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        *(torch.autograd.grad(x, [*preds, *local, *proj]) for x in (terms.total, expected)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("globals_", [2, 3])
def test_their_gradients_have_a_gradient(name, globals_):
    """For second-order optimizers and gradient penalties."""
    criterion = LoGoLoss(affinity="cosine", similarity=STACKED[name], local_weight=0.3, anneal_repulsion=False)
    targets = views(globals_, 2)

    def total(*x):
        return criterion(global_pred=x[:globals_], global_target=targets, local_pred=x[globals_:]).total

    assert torch.autograd.gradgradcheck(total, [*views(globals_, 1), *views(3, 3)])


def test_targets_of_another_precision():
    preds, targets = views(2, 1, torch.float32), views(2, 2)
    total = LoGoLoss(affinity="cosine", local_weight=0.3, anneal_repulsion=False)(
        global_pred=preds, global_target=targets, local_pred=[preds[0] + 1, preds[1] - 1]
    ).total
    total.backward()
    assert (total.dtype, preds[0].grad.dtype) == (torch.float64, torch.float32)
