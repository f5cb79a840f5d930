"""The objective: golden values, who receives gradient, negatives, precision, errors."""

import copy
import functools
import inspect
import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from logo_plugin import Affinity, LoGoLoss, diagnose, info_nce
from logo_plugin.affinity_terms import affinity_terms, local_local_loss
from logo_plugin.presets import PRESETS

GOLDEN = json.loads((Path(__file__).parent / "data" / "logo_reference.json").read_text())
INPUTS = {name: torch.tensor(value, dtype=torch.float64) for name, value in GOLDEN["inputs"].items()}
EXPECTED = GOLDEN["expected"]
FLIP = torch.arange(6).flip(0)
COMBINATIONS = [
    {"affinity_loss": form, "repulsion": repulsion, "reduction": reduction, **weight}
    for form in ("logistic", "difference")
    for repulsion in ("softplus", "logit")
    for reduction in ("pairs", "sum")
    for weight in ({"local_weight": 0.3}, {"gradient_ratio": 0.1}, {"local_weight": 0.3, "average_targets": True})
]


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance, check_dtype=False
    )


@pytest.fixture
def affinity():
    module = Affinity(dim=8, hidden_dim=16).double()
    parameters = {k: torch.tensor(v, dtype=torch.float64) for k, v in GOLDEN["affinity_parameters"].items()}
    missing, unexpected = module.load_state_dict(parameters, strict=False)
    assert not unexpected
    assert all("running" in name or "num_batches" in name for name in missing)
    return module


def encoder_outputs(globals_=2, locals_=2, n=6, d=8, seed=0, dtype=torch.float64):
    """Inputs with a graph behind them: (parameter of each part, arguments of LoGoLoss.forward)."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    parts = {
        "global": leaf(globals_, n, d),
        "local": leaf(locals_, n, d),
        "target": leaf(globals_, n, d),
        "predictor": leaf(d, d),
    }
    arguments = {
        "global_pred": [x @ parts["predictor"] for x in parts["global"]],
        "global_target": [x * 1.0 for x in parts["target"]],
        "local_proj": [x * 1.0 for x in parts["local"]],
    }
    arguments["local_pred"] = [x @ parts["predictor"] for x in arguments["local_proj"]]
    return parts, arguments


class TestGolden:
    """Reference values from the paper's official release, in float64."""

    @pytest.mark.parametrize("noisy", [False, True])
    def test_affinity_logistic(self, affinity, noisy):
        expected = EXPECTED["affinity_logistic_with_noise" if noisy else "affinity_logistic"]
        noise = INPUTS["noise_first_second"] if noisy else 0.0
        _, loss = affinity_terms(affinity, INPUTS["query_local"], partner=FLIP, noise=noise)
        close(loss, expected["total"])
        if not noisy:
            loss.backward()
            close(affinity.mlp[0].weight.grad, expected["grad_first_weight"])

    def test_affinity_difference(self, affinity):
        _, loss = affinity_terms(affinity, INPUTS["query_local"], partner=FLIP, form="difference")
        close(loss, EXPECTED["affinity_difference_eq6"]["loss"])

    def test_logits(self, affinity):
        first, second = INPUTS["query_local"]
        close(affinity(first, second), EXPECTED["logits"]["positive_12"])
        close(affinity(first, second[FLIP]), EXPECTED["logits"]["negative_12"])

    def test_local_local(self, affinity):
        z = INPUTS["query_local"].clone().requires_grad_()
        loss = local_local_loss(affinity, z)
        close(loss, EXPECTED["local_local_softplus"]["value"])
        loss.backward()
        close(z.grad[0], EXPECTED["local_local_softplus"]["grad_local_1"])
        close(z.grad[1], EXPECTED["local_local_softplus"]["grad_local_2"])
        close(local_local_loss(affinity, z, repulsion="logit"), EXPECTED["local_local_logit_eq5"]["value"])

    def test_info_nce(self):
        expected = EXPECTED["info_nce"]
        nce = functools.partial(info_nce, queue=INPUTS["queue_DxK"], temperature=GOLDEN["sizes"]["temperature"])
        queries, local, keys = INPUTS["query_global"], INPUTS["query_local"], INPUTS["key_global"]
        close(torch.stack([nce(queries[0], keys[1]), nce(queries[1], keys[0])]), expected["global_global"])
        values = [nce(x, key) for x in local for key in keys]
        close(torch.stack(values), expected["local_global_l1g1_l1g2_l2g1_l2g2"])
        terms = LoGoLoss(similarity=nce)(global_pred=queries, global_target=keys, local_pred=local)
        close(terms.total, expected["mean_of_six"])

    def test_negative_cosine(self):
        expected = EXPECTED["negative_cosine"]
        views = {
            "global_pred": INPUTS["prediction_global"],
            "global_target": INPUTS["projection_global"],
            "local_pred": INPUTS["prediction_local"],
        }
        terms = LoGoLoss()(**views)
        close(terms.total, expected["mean_of_six"])
        close(terms.global_global, sum(expected["global_global"]) / 2)
        close(terms.local_global, sum(expected["local_global_l1g1_l1g2_l2g1_l2g2"]) / 4)
        close(LoGoLoss(reduction="sum")(**views).total, expected["eq9_symmetric_gg"])
        # A host with one direction: Eq. 9 to the letter.
        one_way = -F.cosine_similarity(views["global_pred"][0], views["global_target"][1]).mean()
        del views["global_pred"]
        terms = LoGoLoss(reduction="sum").extend(one_way, global_global=one_way, global_pairs=1, **views)
        close(terms.total, expected["eq9_without_local_local"])


class TestPresets:
    def test_paper_by_the_golden_values(self, affinity):
        arguments = {
            "global_pred": INPUTS["prediction_global"],
            "global_target": INPUTS["projection_global"],
            "local_pred": INPUTS["prediction_local"],
            "local_proj": INPUTS["query_local"],
        }
        terms = LoGoLoss.paper(affinity=affinity)(**arguments)
        repulsion = EXPECTED["local_local_logit_eq5"]["value"]
        close(terms.local_local, repulsion)
        close(terms.total - terms.affinity, EXPECTED["negative_cosine"]["eq9_symmetric_gg"] + 1e-4 * repulsion)
        twin = copy.deepcopy(affinity)
        torch.manual_seed(0)
        terms = LoGoLoss.paper(affinity=affinity)(**arguments)
        torch.manual_seed(0)  # the same negatives; Eq. 6 has no noise
        close(terms.affinity, affinity_terms(twin, INPUTS["query_local"], form="difference")[1])

    def test_release_by_the_golden_values(self, affinity):
        nce = functools.partial(info_nce, queue=INPUTS["queue_DxK"], temperature=GOLDEN["sizes"]["temperature"])
        local = INPUTS["query_local"].clone().requires_grad_()
        criterion = LoGoLoss.release(affinity=copy.deepcopy(affinity), similarity=nce)
        terms = criterion(
            global_pred=INPUTS["query_global"], global_target=INPUTS["key_global"], local_pred=local, local_proj=local
        )
        close(terms.local_local, EXPECTED["local_local_softplus"]["value"])
        pull, push, whole = (
            torch.autograd.grad(term, local, retain_graph=True)[0]
            for term in (4 / 6 * terms.local_global, terms.local_local, terms.total)
        )
        weight = 0.015 * pull.norm() / push.norm()
        close(whole, pull + weight * push)
        close(terms.total - terms.affinity - weight * terms.local_local, EXPECTED["info_nce"]["mean_of_six"])
        assert (criterion.affinity_loss, criterion.positive_noise) == ("logistic", 0.3)

    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_do_not_depend_on_defaults(self, name):
        keywords = inspect.signature(LoGoLoss).parameters.keys() - {"affinity", "similarity"}
        assert PRESETS[name].keys() == keywords

    @pytest.mark.parametrize(
        ("preset", "options", "expected"),
        [
            ("paper", {"reduction": "pairs"}, {"reduction": "pairs", "repulsion": "logit", "local_weight": 1e-4}),
            ("paper", {"gradient_ratio": 0.1}, {"gradient_ratio": 0.1, "repulsion": "logit"}),
            ("release", {"local_weight": 0.5}, {"gradient_ratio": None, "local_weight": 0.5, "positive_noise": 0.3}),
            ("release", {"local_weight": None, "reduction": None}, {"gradient_ratio": 0.015, "reduction": "pairs"}),
        ],
    )
    def test_given_options_win(self, preset, options, expected):
        criterion = getattr(LoGoLoss, preset)(affinity=None, **options)
        assert {name: getattr(criterion, name) for name in expected} == expected
        with pytest.raises(ValueError, match=rf"{preset}\(affinity=Affinity\(dim\)\).*affinity=None is multi-crop"):
            getattr(LoGoLoss, preset)(**options)

    def test_both_weights_are_still_too_many(self):
        with pytest.raises(ValueError, match="not both"):
            LoGoLoss.release(local_weight=0.1, gradient_ratio=0.1)


class TestObjective:
    @pytest.mark.parametrize(("globals_", "locals_"), [(2, 2), (2, 3), (3, 4)])
    @pytest.mark.parametrize("reduction", ["pairs", "sum"])
    @pytest.mark.parametrize("form", ["logistic", "difference"])
    def test_longhand(self, globals_, locals_, reduction, form):
        """The total, re-derived pair by pair with separate calls to the affinity."""
        _, arguments = encoder_outputs(globals_, locals_)
        module = Affinity(8, 16).double()
        criterion = LoGoLoss(
            affinity=module, local_weight=0.7, reduction=reduction, affinity_loss=form, positive_noise=0.0
        )
        torch.manual_seed(3)
        shift = int(torch.randint(1, 6, ()))
        torch.manual_seed(3)
        terms = criterion(**arguments)

        def s(p, t):
            return -sum(torch.dot(a, b) / a.norm() / b.norm() for a, b in zip(p, t, strict=True)) / len(p)

        preds, targets, z = arguments["global_pred"], arguments["global_target"], arguments["local_proj"]
        gg = [s(preds[i], targets[j]) for i in range(globals_) for j in range(globals_) if i != j]
        lg = [s(p, t) for p in arguments["local_pred"] for t in targets]
        close(terms.global_global, sum(gg) / len(gg))
        close(terms.local_global, sum(lg) / len(lg))
        ll = [F.softplus(module(z[i], z[j])).mean() for i, j in itertools.combinations(range(locals_), 2)]
        close(terms.local_local, sum(ll) / len(ll))
        if form == "logistic":
            pairs = list(itertools.permutations(range(locals_), 2))
            positive = [F.softplus(-module(z[i], z[j])).mean() for i, j in pairs]
            negative = [F.softplus(module(z[i], z[j].roll(-shift, 0))).mean() for i, j in pairs]
        else:
            pairs = list(itertools.combinations(range(locals_), 2))
            positive = [-module(z[i], z[j]).mean() for i, j in pairs]
            negative = [module(z[i], z[j].roll(-shift, 0)).mean() for i, j in pairs]
        close(terms.affinity, sum(positive) / len(pairs) + sum(negative) / len(pairs))
        pull = (sum(gg) + sum(lg)) / (len(gg) + len(lg)) if reduction == "pairs" else sum(gg) / len(gg) + sum(lg)
        close(terms.total, pull + 0.7 * terms.local_local + terms.affinity)

    @pytest.mark.parametrize("reduction", ["pairs", "sum"])
    def test_without_local_crops_it_is_the_host_loss(self, reduction):
        _, arguments = encoder_outputs()
        p, t = arguments["global_pred"], arguments["global_target"]
        host = 0.5 * (-F.cosine_similarity(p[0], t[1]).mean() - F.cosine_similarity(p[1], t[0]).mean())
        terms = LoGoLoss(reduction=reduction)(global_pred=p, global_target=t)
        assert torch.equal(terms.total, host)
        assert terms.local_global == terms.local_local == terms.affinity == 0

    @pytest.mark.parametrize("reduction", ["pairs", "sum"])
    def test_with_weights_at_zero_a_host_loss_is_unchanged(self, reduction):
        _, arguments = encoder_outputs()
        host, gg = torch.tensor(5.0).double(), torch.tensor(-0.4).double()
        criterion = LoGoLoss(local_global_weight=0, reduction=reduction)
        del arguments["global_pred"]
        terms = criterion.extend(host, global_global=gg, global_pairs=2, scale=4.0, **arguments)
        assert torch.equal(terms.total, host)

    def test_scale_of_the_host_reaches_the_local_pairs(self):
        _, arguments = encoder_outputs()
        p, t = arguments["global_pred"], arguments["global_target"]
        gg = LoGoLoss()(global_pred=p, global_target=t).total
        expected = LoGoLoss()(**arguments).total * 4 + 7
        del arguments["global_pred"]
        terms = LoGoLoss().extend(4 * gg + 7, global_global=gg, global_pairs=2, scale=4.0, **arguments)
        close(terms.total, expected)

    @pytest.mark.parametrize("reduction", ["pairs", "sum"])
    def test_average_targets_longhand(self, reduction):
        """Two unequal targets: the local crops meet their mean, at the weight that two targets have."""
        _, arguments = encoder_outputs(2, 3)
        arguments["global_target"][1] = 3 * arguments["global_target"][1]  # projections, averaged as they come
        criterion = LoGoLoss(average_targets=True, reduction=reduction, local_global_weight=0.5)
        terms = criterion(**arguments)
        mean = (arguments["global_target"][0] + arguments["global_target"][1]) / 2
        local_global = -sum(F.cosine_similarity(p, mean).mean() for p in arguments["local_pred"]) / 3
        close(terms.local_global, local_global)
        each = LoGoLoss(reduction=reduction, local_global_weight=0.5)(**arguments)
        assert torch.equal(terms.global_global, each.global_global)
        gg = terms.global_global
        pull = (2 * gg + 3 * local_global) / 5 if reduction == "pairs" else gg + 3 * local_global
        close(terms.total, pull)

    def test_average_of_unit_targets_keeps_the_direction_of_the_gradient(self):
        gradients = []
        for average in (False, True):
            parts, arguments = encoder_outputs()
            arguments["global_target"] = [F.normalize(t, dim=1) for t in arguments["global_target"]]
            LoGoLoss(average_targets=average)(**arguments).local_global.backward()
            gradients.append(parts["local"].grad)
        mean_norm = (arguments["global_target"][0] + arguments["global_target"][1]).norm(dim=1, keepdim=True) / 2
        close(gradients[0], mean_norm * gradients[1])

    def test_average_targets_of_a_dot_product_stay_unit(self):
        """solo-learn's MoCo normalises before its loss and has a queue for each target."""
        _, arguments = encoder_outputs()
        unit = {name: [F.normalize(x, dim=1) for x in views] for name, views in arguments.items()}
        queues = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        def nce(p, t, queue):
            logits = torch.cat([(p * t).sum(1, keepdim=True), p @ queue], 1) / 0.2
            return -logits.log_softmax(1)[:, 0].mean()

        del unit["global_pred"]
        terms = LoGoLoss(average_targets=True).extend(
            torch.zeros(()),
            global_global=torch.zeros(()),
            global_pairs=2,
            similarity=[functools.partial(nce, queue=queue) for queue in queues],
            **unit,
        )
        mean = F.normalize(unit["global_target"][0] + unit["global_target"][1], dim=1)
        close(terms.local_global, sum(nce(p, mean, queue) for p in unit["local_pred"] for queue in queues) / 4)

    def test_gradient_ratio_caps_the_gradient(self):
        _, arguments = encoder_outputs()
        for ratio in (1e-3, 1e9):
            criterion = LoGoLoss(affinity=Affinity(8, 16).double(), gradient_ratio=ratio)
            terms = criterion(**arguments)
            z = arguments["local_proj"]
            pull = torch.autograd.grad(4 / 6 * terms.local_global, z, retain_graph=True)
            push = torch.autograd.grad(terms.local_local, z, retain_graph=True)
            whole = torch.autograd.grad(terms.total, z, retain_graph=True)
            norms = [torch.cat(g).norm() for g in (pull, push)]
            weight = min(1.0, float(ratio * norms[0] / norms[1]))
            assert weight == 1.0 if ratio == 1e9 else weight < 1
            close(torch.cat(whole), torch.cat(pull) + weight * torch.cat(push))

    @pytest.mark.parametrize("crops", [2, 3])
    @pytest.mark.parametrize("progress", [None, 0.0, 0.25, 1.0])
    @pytest.mark.parametrize("weight", [{}, {"gradient_ratio": 0.3}, {"local_weight": 0.7}])
    def test_the_cosine_is_repelled_as_it_is(self, weight, progress, crops):
        _, arguments = encoder_outputs(locals_=crops)
        before = torch.get_rng_state()
        criterion = LoGoLoss(affinity="cosine", **weight | ({"anneal_repulsion": False} if progress is None else {}))
        assert not [*criterion.parameters(), *criterion.state_dict()]
        criterion.anneal(progress or 0)
        strength = 1 if progress is None else (1 + math.cos(math.pi * progress)) / 2
        terms, z = criterion(**arguments), arguments["local_proj"]
        assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn: nothing is trained
        assert terms.affinity == 0
        pairs = list(itertools.combinations(z, 2))
        close(terms.local_local, sum(F.cosine_similarity(a, b).mean() for a, b in pairs) / len(pairs))
        fraction = 2 * crops / (2 + 2 * crops)
        pull, push, whole = (
            torch.cat(torch.autograd.grad(term, z, retain_graph=True))
            for term in (fraction * terms.local_global, terms.local_local, terms.total)
        )
        ratio = strength * weight.get("gradient_ratio", 0.1)
        fixed = strength * weight["local_weight"] if "local_weight" in weight else None
        close(whole, pull + (min(1.0, float(ratio * pull.norm() / push.norm())) if fixed is None else fixed) * push)

    @pytest.mark.parametrize("options", [{"affinity": "cosine"}, {"affinity": Affinity(8), "anneal_repulsion": True}])
    def test_annealing_asks_how_far_the_training_is(self, options):
        criterion, (_, arguments) = LoGoLoss(**options), encoder_outputs(dtype=torch.float32)
        with torch.no_grad():
            criterion(**arguments)  # nothing is trained, so nobody need know
        with pytest.raises(
            RuntimeError, match=r"anneal\(steps done / steps in all\).*anneal_repulsion=False.*affinity=None"
        ):
            criterion(**arguments)
        criterion.anneal(1 / 3)
        for copied in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), criterion.double()):
            assert copied(**arguments).total.requires_grad
        assert "_strength" not in criterion.state_dict()

    @pytest.mark.parametrize("progress", [-0.1, 1.01, math.nan, True, "half", None])
    def test_progress_is_a_share(self, progress):
        with pytest.raises(ValueError, match=r"progress must be .* in \[0, 1\], got .*steps done / steps in all"):
            LoGoLoss(affinity="cosine").anneal(progress)

    def test_without_gradients_nothing_is_repelled(self):
        """There is no gradient to take a ratio of."""
        _, arguments = encoder_outputs()
        with torch.no_grad():
            terms, other = (LoGoLoss(affinity=affinity)(**arguments) for affinity in ("cosine", None))
        assert terms.total == other.total
        assert terms.local_local != 0

    def test_gradient_ratio_takes_a_stacked_projection(self):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(2, 6, 8, generator=generator).requires_grad_()
        views = torch.randn(2, 2, 6, 8, generator=generator)
        criterion = LoGoLoss(affinity=Affinity(8), gradient_ratio=0.1)
        criterion(global_pred=views[0], global_target=views[1], local_pred=2 * z, local_proj=z).total.backward()
        assert z.grad.isfinite().all()

    def test_gradcheck(self, affinity):
        affinity.eval()  # running statistics: a function of its input alone
        z = INPUTS["query_local"].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: local_local_loss(affinity, x), (z,))
        parameters = dict(affinity.named_parameters())
        weight = parameters["mlp.0.weight"].detach().clone().requires_grad_()

        def of_weight(w):
            return torch.func.functional_call(
                Scored(affinity), {"affinity.mlp.0.weight": w}, (INPUTS["query_local"], FLIP)
            )

        assert torch.autograd.gradcheck(of_weight, (weight,))
        pred, target = INPUTS["prediction_local"]
        pred = pred.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda p: info_nce(p, target, queue=INPUTS["queue_DxK"], temperature=0.1), pred)
        assert torch.autograd.gradcheck(lambda p: info_nce(p, target, temperature=0.1), pred)
        views = {"global_target": INPUTS["projection_global"], "local_pred": INPUTS["prediction_local"]}
        assert torch.autograd.gradcheck(
            lambda p: LoGoLoss()(global_pred=p, **views).total, INPUTS["prediction_global"].clone().requires_grad_()
        )


class Scored(nn.Module):
    def __init__(self, affinity):
        super().__init__()
        self.affinity = affinity

    def forward(self, z, partner):
        return affinity_terms(self.affinity, z, partner=partner)[1]


ROUTES = {
    "global_global": {"global", "predictor"},
    "local_global": {"local", "predictor"},
    "local_local": {"local"},
    "affinity": {"affinity"},
    "total": {"global", "local", "predictor", "affinity"},
}


class TestRouting:
    """The table of who receives gradient, and that nobody else does."""

    @pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(map(str, o.values())))
    @pytest.mark.parametrize("term", ROUTES)
    def test_who_receives_gradient(self, term, options):
        parts, arguments = encoder_outputs()
        criterion = LoGoLoss(affinity=Affinity(8, 16).double(), **options)
        getattr(criterion(**arguments), term).backward()
        received = {name for name, x in parts.items() if x.grad is not None and x.grad.abs().max() > 0}
        gradients = [p.grad for p in criterion.affinity.parameters()]
        if any(g is not None and g.abs().max() > 0 for g in gradients):
            received.add("affinity")
        assert received == ROUTES[term]
        if term == "total":  # DDP without find_unused_parameters needs all of them in the graph
            assert all(g is not None for g in gradients)

    @pytest.mark.parametrize("form", ["logistic", "difference"])
    def test_affinity_learns_as_if_alone(self, form):
        """lambda * local_local adds nothing to the affinity's gradient."""
        gradients = []
        for weight in (0.0, 10.0):
            _, arguments = encoder_outputs()
            torch.manual_seed(0)
            criterion = LoGoLoss(affinity=Affinity(8, 16).double(), local_weight=weight, affinity_loss=form)
            criterion(**arguments).total.backward()
            gradients.append([p.grad for p in criterion.affinity.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)

    def test_targets_that_carry_a_graph_receive_nothing(self):
        parts, arguments = encoder_outputs()
        LoGoLoss(affinity=Affinity(8, 16).double())(**arguments).total.backward()
        assert parts["target"].grad is None

    def test_without_affinity(self):
        parts, arguments = encoder_outputs()
        criterion = LoGoLoss()
        assert not list(criterion.parameters())
        criterion(**arguments).total.backward()
        assert parts["local"].grad.abs().max() > 0


class Recorder(nn.Module):
    """An affinity that keeps the pairs it is asked to score."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.pairs = []

    def forward(self, first, second):
        self.pairs.append((first.detach(), second.detach()))
        return self.scale * (first * second).sum(-1)


class TestNegatives:
    @pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8])
    def test_no_image_is_its_own_negative(self, n):
        image = torch.arange(float(n)).repeat(2, 1).unsqueeze(-1)  # every feature is the image's index
        seen = set()
        for _ in range(60):
            recorder = Recorder()
            affinity_terms(recorder, image)
            _, (first, second) = recorder.pairs  # the repelled ones come first
            same = (first == second).squeeze(-1)
            assert same[:2].all()
            assert not same[2:].any()
            seen.update(second[2:].flatten().tolist())
        assert seen == set(range(n))

    def test_positive_noise_has_the_documented_size(self):
        z = torch.zeros(2, 500, 64, requires_grad=True)
        recorder = Recorder()
        _, arguments = encoder_outputs(n=500, d=64)
        arguments["local_proj"] = list(z)
        torch.manual_seed(0)
        LoGoLoss(affinity=recorder, positive_noise=0.3)(**arguments)
        first, second = recorder.pairs[-1]
        for side in (first, second):
            assert side[:2].std() == pytest.approx(0.3 / math.sqrt(64), rel=0.02)
            assert side[2:].abs().max() == 0

    def test_one_image(self):
        _, arguments = encoder_outputs(n=1)
        with pytest.raises(ValueError, match=r"at least 2 images.*drop_last=True"):
            LoGoLoss(affinity=Affinity(8).double())(**arguments)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_float32_under_autocast(self, dtype):
        affinity = Affinity(8, 16)
        z = torch.randn(6, 8)
        expected = affinity(z.to(dtype).float(), z.to(dtype).float().flip(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = affinity(z.to(dtype), z.to(dtype).flip(0))
            loss = info_nce(z.to(dtype), z.to(dtype).flip(0), queue=F.normalize(torch.randn(8, 5), dim=0).to(dtype))
        assert logits.dtype == loss.dtype == torch.float32
        assert torch.equal(logits, expected)

    def test_bfloat16_predictions(self):
        criterion = LoGoLoss(affinity=Affinity(8))
        _, arguments = encoder_outputs(dtype=torch.float32)
        arguments = {k: [x.detach().bfloat16().requires_grad_() for x in v] for k, v in arguments.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = criterion(**arguments)
        assert {t.dtype for t in terms} == {torch.float32}
        terms.total.backward()
        assert all(p.grad.dtype == torch.float32 for p in criterion.parameters())


class TestModule:
    def test_state_dict_and_pickle_round_trip(self):
        criterion = LoGoLoss(affinity=Affinity(8, 16), gradient_ratio=0.1, reduction="sum")
        criterion(**encoder_outputs(dtype=torch.float32)[1])  # running statistics away from their start
        other = LoGoLoss(affinity=Affinity(8, 16), gradient_ratio=0.1, reduction="sum")
        other.load_state_dict(criterion.state_dict())
        for copied in (other, pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
            totals = []
            for module in (criterion, copied):
                torch.manual_seed(0)
                totals.append(module.eval()(**encoder_outputs(dtype=torch.float32)[1]).total)
            assert torch.equal(*totals)

    def test_running_statistics_follow_the_batches(self):
        affinity = Affinity(8, 16)
        z = torch.randn(4, 64, 8)
        for _ in range(200):
            affinity(z[:2], z[2:])
        affinity.eval()
        with_running = affinity(z[:2], z[2:])
        affinity.train()
        assert (with_running - affinity(z[:2], z[2:])).abs().max() < 0.2
        assert affinity.mlp[1].num_batches_tracked == 402

    @pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at every input's .grad
    @pytest.mark.parametrize("similarity", ["cosine", info_nce])
    @pytest.mark.parametrize(
        "options", [{}, {"affinity_loss": "difference", "reduction": "sum", "average_targets": True}]
    )
    def test_compiles_without_a_graph_break(self, options, similarity):
        criterion = LoGoLoss(affinity=Affinity(8, 16), similarity=similarity, **options)
        compiled = torch.compile(copy.deepcopy(criterion), fullgraph=True, backend="aot_eager")
        results = []
        for module in (criterion, compiled):
            parts, arguments = encoder_outputs(dtype=torch.float32)
            torch.manual_seed(0)
            terms = module(**arguments)
            terms.total.backward()
            results.append([t.detach() for t in terms] + [x.grad for x in parts.values() if x.grad is not None])
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(eager, fast)

    @pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
    def test_annealing_compiles_once(self):
        criterion = LoGoLoss(affinity="cosine", local_weight=0.5)
        compiled, frames = copy.deepcopy(criterion), []

        def backend(graph, inputs):
            frames.append(graph)
            return graph

        fast = torch.compile(compiled, fullgraph=True, backend=backend)
        _, arguments = encoder_outputs(dtype=torch.float32)
        for progress in (0, 0.3, 0.7, 1):
            criterion.anneal(progress)
            compiled.anneal(progress)
            torch.testing.assert_close(criterion(**arguments).total, fast(**arguments).total)
        assert len(frames) == 1

    @pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
    def test_gradient_ratio_compiles_with_a_graph_break(self):
        criterion = LoGoLoss(affinity=Affinity(8, 16), gradient_ratio=0.1)
        totals = []
        for module in (criterion, torch.compile(copy.deepcopy(criterion), backend="aot_eager")):
            torch.manual_seed(0)
            totals.append(module(**encoder_outputs(dtype=torch.float32)[1]).total.detach())
        torch.testing.assert_close(*totals)

    def test_print_shows_the_options(self):
        assert "local_weight=0.0001" in str(LoGoLoss())
        assert "gradient_ratio=0.1" in str(LoGoLoss(affinity=Affinity(8), gradient_ratio=0.1))


def views(*shapes):
    return [torch.randn(shape) for shape in shapes]


GOOD = {
    "global_pred": views((4, 8), (4, 8)),
    "global_target": views((4, 8), (4, 8)),
    "local_pred": views((4, 8), (4, 8)),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"global_pred": views((4, 8), (4, 9))}, r"global_pred .*got 2 views \[\(4, 8\), \(4, 9\)\]"),
        ({"global_pred": views((4, 8))}, r"at least 2 global crops, got 1"),
        ({"global_target": views((4, 8))}, r"global_target has 1 views, global_pred has 2"),
        ({"global_target": views((5, 8), (5, 8))}, r"global_target and global_pred .*\(5, 8\).*\(4, 8\)"),
        ({"local_pred": views((4, 9), (4, 9))}, r"local_pred and global_target .*\(4, 9\)"),
        ({"local_pred": views((3, 8), (3, 8))}, r"local_pred and global_target .*\(3, 8\)"),
        ({"local_pred": torch.randn(4, 8)}, r"local_pred must have shape \(V, N, D\).*\(4, 8\)"),
        ({"local_pred": None}, r"local_pred must be a tensor \(V, N, D\) or V tensors.*NoneType"),
        ({"local_pred": [torch.ones(4, 8, dtype=torch.long)] * 2}, r"floating-point views"),
        ({"local_pred": ()}, r"local_pred is missing.*affinity=None"),
        ({"local_pred": views((4, 8))}, r"at least 2 local crops"),
        ({"local_proj": views((4, 8), (4, 8), (4, 8))}, r"local_proj matches local_pred"),
        ({"local_proj": views((3, 8), (3, 8))}, r"local_proj matches local_pred"),
        (
            {"local_proj": views((4, 5), (4, 5))},
            r"Affinity\(dim=8\) expects projections of 8 features, got 5\. Set dim=5",
        ),
    ],
)
def test_bad_input(changed, message):
    with pytest.raises(ValueError, match=message):
        LoGoLoss(affinity=Affinity(8))(**{**GOOD, **changed})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_weight": math.nan}, r"local_weight must be a finite number >= 0, got nan"),
        ({"local_weight": -1}, r"local_weight .*got -1"),
        ({"gradient_ratio": math.inf}, r"gradient_ratio .*got inf"),
        ({"positive_noise": "a"}, r"positive_noise .*got 'a'"),
        ({"local_global_weight": True}, r"local_global_weight .*got True"),
        ({"local_weight": 0.1, "gradient_ratio": 0.1}, r"not both"),
        ({"affinity_loss": "hinge"}, r"affinity_loss must be one of \('logistic', 'difference'\), got 'hinge'"),
        ({"repulsion": "relu"}, r"repulsion must be one of"),
        ({"reduction": "mean"}, r"reduction must be one of \('pairs', 'sum'\), got 'mean'"),
        ({"similarity": "dot"}, r'similarity must be "cosine" or a callable'),
        ({"average_targets": 1}, r"average_targets must be True or False, got 1"),
        ({"affinity": nn.Linear(4, 1)}, r"affinity must be a module such as Affinity\(dim\).*got Linear.*two tensors"),
        ({"affinity": 256}, r'affinity must be a module like Affinity\(dim\), "cosine" or None; .* got 256'),
        ({"affinity": "cosin"}, r'"cosine" or None; of wrap and LoGoLearner also "learned": got \'cosin\''),
        ({"affinity": "cosine", "repulsion": "relu"}, r"repulsion must be one of"),
        (
            {"affinity": "cosine", "positive_noise": 0.0},
            r"positive_noise=0\.0: without effect beside the cosine.*learned",
        ),
        ({"anneal_repulsion": 1}, r"anneal_repulsion must be True or False, got 1"),
    ],
)
def test_bad_option(options, message):
    with pytest.raises(ValueError, match=message):
        LoGoLoss(**options)


@pytest.mark.parametrize("make", [functools.partial(LoGoLoss, gradient_ratio=0.1), LoGoLoss.release])
def test_a_ratio_of_nothing_is_refused(make):
    """Without a pull of local crops the ratio caps the repulsion at zero; without an affinity there is none to cap."""
    with pytest.raises(ValueError, match=r"local_global_weight=0 leaves none.*fixed local_weight"):
        make(affinity=Affinity(8), local_global_weight=0)
    make(affinity=None, local_global_weight=0)
    LoGoLoss.release(affinity=Affinity(8), local_global_weight=0, local_weight=1e-4)
    LoGoLoss(affinity=Affinity(8), local_global_weight=0, gradient_ratio=0)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (LoGoLoss, {"lamda": 0.1}, r"^LoGoLoss: unknown option lamda; did you mean local_weight\?"),
        (functools.partial(LoGoLoss, 1e-4), {}, r"^LoGoLoss takes its options by name, as in affinity=.*got float"),
        (LoGoLoss, {"weight": 0.1}, r"unknown option weight; did you mean local_weight\?"),
        (LoGoLoss.release, {"lr": 0.1}, r"unknown option lr; none is near\. There are affinity, "),
        (
            functools.partial(Affinity, 8),
            {"hiden_dim": 4},
            r"^Affinity: unknown option hiden_dim; did you mean hidden_dim\?",
        ),
    ],
)
def test_unknown_options_are_named(make, options, message):
    with pytest.raises(TypeError, match=message):
        make(**options)


@pytest.mark.parametrize("cls", [LoGoLoss, Affinity])
def test_the_signature_stays_typed(cls):
    parameters = list(inspect.signature(cls).parameters.values())
    assert all(p.annotation is not p.empty and p.kind is not p.VAR_KEYWORD for p in parameters)


def test_an_empty_batch_is_an_error_without_affinity_too():
    empty = views((0, 8), (0, 8))
    with pytest.raises(ValueError, match="at least one image"):
        LoGoLoss()(global_pred=empty, global_target=empty, local_pred=empty)


def test_gradient_ratio_without_a_path_to_the_projection():
    criterion = LoGoLoss(affinity=Affinity(8), gradient_ratio=0.1)
    _, arguments = encoder_outputs(dtype=torch.float32)
    arguments["local_proj"] = [z.detach().requires_grad_() for z in arguments["local_proj"]]
    with pytest.raises(ValueError, match="computed from the very tensors"):
        criterion(**arguments)


def test_a_fixed_weight_without_a_path_to_the_encoder():
    _, arguments = encoder_outputs(dtype=torch.float32)
    arguments["local_proj"] = [z.detach() for z in arguments["local_proj"]]
    with pytest.raises(ValueError, match="local_proj carries no gradient while local_pred does"):
        LoGoLoss(affinity="cosine", local_weight=0.1, anneal_repulsion=False)(**arguments)
    LoGoLoss(affinity=Affinity(8), local_weight=0)(**arguments)  # to watch the affinity
    with torch.no_grad():
        LoGoLoss(affinity=Affinity(8), local_weight=0.1)(**arguments)


def test_numbers_of_numpy():
    criterion = LoGoLoss(affinity="cosine")
    criterion.anneal(np.float32(0.5))
    assert criterion._strength.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pred": torch.randn(4, 8), "target": torch.randn(3, 8)}, "same"),
        ({"pred": torch.randn(4, 8), "target": torch.randn(4, 8), "queue": torch.randn(5, 8)}, r"\(D, K\) with D = 8"),
        ({"pred": torch.randn(4, 8), "target": torch.randn(4, 8), "temperature": 0}, "positive, got 0"),
    ],
)
def test_bad_info_nce(arguments, message):
    with pytest.raises(ValueError, match=message):
        info_nce(**arguments)


@pytest.mark.parametrize("options", [{"dim": 0}, {"dim": 8, "hidden_dim": 2.5}, {"dim": True}, {"dim": "8"}])
def test_bad_affinity(options):
    with pytest.raises(ValueError, match="positive integer"):
        Affinity(**options)
    with pytest.raises(ValueError, match='norm must be "batch" or "layer", got \'group\''):
        Affinity(8, norm="group")


def test_layer_norm_judges_each_pair_by_itself():
    """BatchNorm lets the affinity learn to tell the two batches apart instead: a lower loss, a worse judge."""

    def crops(images):
        shown = torch.randn(images, 8)
        return torch.stack([shown + 0.3 * torch.randn(images, 8) for _ in range(2)])

    torch.manual_seed(0)
    loss, accuracy = {}, {}
    for norm in ("layer", "batch"):
        affinity = Affinity(8, 64, norm=norm)
        optimizer = torch.optim.Adam(affinity.parameters(), 0.01)
        for _ in range(200):
            _, value = affinity_terms(affinity, crops(64))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        loss[norm], accuracy[norm] = float(value.detach()), diagnose(crops(500), affinity)["affinity_accuracy"]
    assert accuracy["layer"] > 0.95
    assert accuracy["batch"] < 0.85
    alone = Affinity(8, norm="layer")
    first, second = crops(6)
    torch.testing.assert_close(alone(first[:1], second[:1]), alone(first, second)[:1])


def test_affinity_rejects_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Affinity\(dim=8\) expects .*got \(4, 8\) and \(5, 8\)"):
        Affinity(8)(torch.randn(4, 8), torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"Affinity\(dim=8\) expects two .*got \(4, 8\) and None"):
        Affinity(8)(torch.randn(4, 8))


@pytest.mark.parametrize("local_crops", [2, 3])
def test_an_affinity_of_another_width_says_which(local_crops):
    criterion, views = LoGoLoss(affinity=Affinity(7)), torch.randn(local_crops, 4, 8)
    with pytest.raises(ValueError, match=r"Affinity\(dim=7\) .* 7 features, got 8\. Set dim=8, the width of"):
        criterion(global_pred=views[:2], global_target=views[:2], local_pred=views)
