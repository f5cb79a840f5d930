"""Every method of every host: what docs/methods.md says of it is what happens."""

import copy

import methods_lightly
import methods_table
import pytest
import torch
from example_files import before_training
from torch.nn.functional import cross_entropy, normalize

needs_lightly = pytest.mark.skipif(not methods_lightly.ROOT, reason="LIGHTLY_ROOT names no clone of lightly")


@needs_lightly
@pytest.mark.parametrize("file", methods_lightly.files())
def test_example_file_of_lightly_trains_rightly_or_is_refused(file):
    """It trains as without LoGo when LoGo's weights are zero, and rightly with its defaults; or our error stops it."""
    assert not methods_lightly.examine(file).problems


def momentum(model, criterion, bank, crops):
    return model, [model.forward_momentum(crop) for crop in crops]


def stop_gradient(model, criterion, bank, crops):
    return lambda crop: model(crop)[1], [model(crop)[0] for crop in crops]


def mean_of_others(model, criterion, bank, crops):
    predict, targets = stop_gradient(model, criterion, bank, crops)
    return predict, [torch.stack(targets[:i] + targets[i + 1 :]).mean(dim=0) for i in range(len(targets))]


def nearest_neighbours(model, criterion, bank, crops):
    predict, (first, second) = stop_gradient(model, criterion, bank, crops)
    return predict, [bank(first, update=False), bank(second, update=True)]


def other_view(model, criterion, bank, crops):
    return model, [model(crop) for crop in crops]


def one_key(model, criterion, bank, crops):
    """MoCo's key is the second view's; its negatives are the queue's as it was."""
    return model, [model.forward_momentum(crops[1])]


def one_global_key(model, criterion, bank, crops):
    """DenseCL: dense features, global projection, dense projections."""
    return lambda crop: model(crop)[1], [model.forward_momentum(crops[1])[1]]


def one_target(model, criterion, bank, crops):  # by the criterion's running covariance of before the step
    return model, [model.forward_momentum(crops[1])]


# How local crops are pulled, by method: (model, criterion, memory bank, global crops) -> (prediction of, targets)
PULLS = {
    "BYOL": momentum,
    "SimSiam": stop_gradient,
    "FastSiam": mean_of_others,
    "NNCLR": nearest_neighbours,
    "MoCo": one_key,
    "DenseCL": one_global_key,
    "TiCo": one_target,
} | dict.fromkeys(["SimCLR", "DCL", "DCLW", "FDA", "Barlow Twins", "VICReg"], other_view)


def contrast_with_queue(criterion, queue):
    def loss(query, key):
        query, key = normalize(query), normalize(key)
        logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ queue], dim=1) / criterion.temperature
        return cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))

    return loss


@needs_lightly
@pytest.mark.parametrize("file", methods_lightly.files())
@pytest.mark.filterwarnings("ignore::UserWarning")  # DCL's loss copies a tensor by torch.tensor
def test_local_crops_of_lightly_are_pulled_to_what_the_method_takes_for_targets(file):
    """`local_global` of the first step is the method's own loss of (local prediction, target), over all pairs."""
    result = methods_lightly.examine(file)
    _, method, verdict, _ = result.row
    if verdict == "refused":
        assert method not in PULLS
        return
    names = before_training(methods_lightly.source_of(file))
    model = names["model"]
    criterion = next(v for k, v in [*names.items(), *model.named_children()] if "criterion" in k)
    bank = names.get("memory_bank", getattr(model, "memory_bank", None))
    crops, global_crops = result.crops, result.options.get("global_crops", 2)
    torch.manual_seed(0)  # as in the run: memory banks are drawn in the first step
    with torch.no_grad():
        predict, targets = PULLS[method](model, criterion, bank, crops[:global_crops])
        loss = criterion
        if method in ("MoCo", "DenseCL"):
            _, queue = criterion.memory_bank(targets[0])
            loss = contrast_with_queue(criterion, queue)
        preds = [predict(crop) for crop in crops[global_crops:]]
        losses = [copy.deepcopy(loss)(pred, target) for pred in preds for target in targets]
    found = result.local_global
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the hosts' own
@pytest.mark.parametrize("source", methods_table.SOURCES)
def test_page_is_what_the_runs_say(source):
    if source not in methods_table.here():
        pytest.skip(f"the host of {source} is not here")
    committed = methods_table.sections(methods_table.PAGE.read_text())
    for host, section in methods_table.fresh(source).items():
        assert committed.get(host) == section, f"docs/methods.md is stale: {methods_table.COMMAND}"


def test_page_is_written_around_its_text():
    before = methods_table.PAGE.read_text()
    assert methods_table.page(before, {}) == before
    host, *others = methods_table.sections(before)
    after = methods_table.page(before, {host: "new", "another": "text"})
    assert list(methods_table.sections(after)) == [host, *others, "another"]
    assert methods_table.sections(after)[host] == "new"
    assert after.partition("## ")[0] == before.partition("## ")[0]
