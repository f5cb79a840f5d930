"""How many operators LoGo's terms dispatch in a step: on a GPU each is a kernel launch, whatever the batch.

    python benchmarks/operators.py
    python benchmarks/operators.py --lightly  # and a whole step of BYOL as lightly's examples write it, wrapped

Counted by `TorchDispatchMode`, on the CPU: the loss forward and backward, with a predictor of one matrix product for
each local crop; 2 global and `--local-crops` local crops. LoGo is the default, the cosine at a ratio of gradients; the
learned affinity has a fixed weight. Views and bare allocations launch nothing and are not counted; kernels that one
operator launches itself (a reduction's second pass) are not told apart.
"""

import argparse
import sys
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from logo_plugin import Affinity, LoGoLoss, info_nce, wrap

_FREE = ("aten::detach", "aten::_unsafe_view", "aten::empty", "aten::new_empty", "aten::new_empty_strided")
IMAGES, FEATURES = 16, 32


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view and operator._schema.name not in _FREE:
            self.found[operator._schema.name.removeprefix("aten::")] += 1
        return operator(*args, **(kwargs or {}))


def count(local_crops=2, affinity=None, **options):
    """Operators of one step."""
    criterion = LoGoLoss(affinity=affinity, **options)
    criterion.anneal(0.3)
    views = [
        [torch.randn(IMAGES, FEATURES, requires_grad=g) for _ in range(n)]
        for n, g in ((2, True), (2, False), (local_crops, True))
    ]
    predictor = torch.randn(FEATURES, FEATURES, requires_grad=True)
    given = {"global_pred": views[0], "global_target": views[1], "local_proj": views[2]}
    with Count() as counting:
        total = criterion(**given, local_pred=[z @ predictor for z in views[2]]).total
        torch.autograd.grad(total, [*views[0], *views[2], predictor, *criterion.parameters()])
    return counting.found


def of_byol(local_crops, affinity):
    """Operators of the second step of a wrapped BYOL on a network of one convolution, forward and backward."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from lightly_models import BYOL

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1))
    model = wrap(BYOL(net, 8), affinity=affinity)
    model.logo.anneal(0.3)
    views = [torch.randn(IMAGES, 3, size, size) for size in (16, 16, *[8] * local_crops)]
    model.training_step([views], 0)
    with Count() as counting:
        model.training_step([views], 1).backward()
    return counting.found.total()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local-crops", type=int, default=2)
    parser.add_argument("--names", action="store_true", help="which operators LoGo adds to multi-crop, with cosine")
    parser.add_argument("--lightly", action="store_true")
    arguments = parser.parse_args()
    similarities = {
        "cosine": "cosine",
        "InfoNCE in the batch": info_nce,
        "InfoNCE with a queue": partial(info_nce, queue=F.normalize(torch.randn(FEATURES, 64), dim=0)),
        "a callable (4 operators)": lambda pred, target: (pred - target).square().mean(),
    }
    arms = {"multi-crop": lambda: None, "LoGo": lambda: "cosine", "learned affinity": lambda: Affinity(FEATURES)}
    print(f"torch {torch.__version__}, 2 global and {arguments.local_crops} local crops, forward and backward")
    print(f"{'similarity':26}" + "".join(f"{arm:>24}" for arm in arms))
    counted = {
        name: [count(arguments.local_crops, make(), similarity=similarity).total() for make in arms.values()]
        for name, similarity in similarities.items()
    }
    if arguments.lightly:
        warnings.simplefilter("ignore")  # no Trainer to log to
        of = [of_byol(arguments.local_crops, affinity) for affinity in (None, "cosine", "learned")]
        counted["BYOL of lightly, all of it"] = of
    for name, (plain, *others) in counted.items():
        print(f"{name:26}{plain:24}" + "".join(f"{f'{n} (+{n - plain})':>24}" for n in others))
    if arguments.names:
        more = count(arguments.local_crops, "cosine")
        more.subtract(count(arguments.local_crops))
        print(", ".join(f"{name} {n:+}" for name, n in more.most_common() if n))


if __name__ == "__main__":
    main()
