"""How strong the repulsion of a fixed lambda is, as the affinity learns: its share of the gradient, step by step.

    python benchmarks/repulsion_share.py --data data    # Imagenette, BYOL, LoGo's defaults, 11 epochs

Every 25 steps: the norm of `local_weight` times local_local's gradient at the local crops' projections, in percent of
the norm of local_global's with its weight in the loss. That is what `gradient_ratio` caps. Needs pip install
'.[benchmarks]'.
"""

import argparse
from tempfile import TemporaryDirectory
from unittest.mock import patch

import accuracy
import torch

from logo_plugin import LoGoLoss

EVERY, PLAIN = 25, LoGoLoss.extend


def extend(loss, host_loss, **given):
    """As `LoGoLoss.extend`, and prints every 25th call's share."""
    terms = PLAIN(loss, host_loss, **given)
    loss.calls = getattr(loss, "calls", 0) + 1
    if loss.calls % EVERY == 0:
        pull, push = (
            torch.cat(torch.autograd.grad(term, given["local_proj"], retain_graph=True)).float().norm()
            for term in (terms.local_global, terms.local_local)
        )
        pairs = len(given["local_pred"]) * len(given["global_target"])
        weight = given["scale"] * pairs / (given["global_pairs"] + pairs)
        share = 100 * float(loss.local_weight * push / (weight * pull))
        print(f"step {loss.calls}: {share:.2f} %, affinity's loss {float(terms.affinity):.3f}", flush=True)
    return terms


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the data sets' folder, as for accuracy.py")
    data = parser.parse_args().data
    accuracy.prepare()
    with TemporaryDirectory() as folder, patch.object(LoGoLoss, "extend", extend):
        job = ["--data", data, "--dataset", "imagenette", "--methods", "byol", "--arms", "LoGo", "--seeds", "0"]
        job += ["--backbone", "tiny", "--batch-size", "64", "--precision", "bf16-mixed", "--validate"]
        job += ["--epochs", "11", "--lr", "0.4", "--output", folder]
        for run in accuracy.runs(accuracy.parse(job)):
            accuracy.train_run(*run)


if __name__ == "__main__":
    main()
