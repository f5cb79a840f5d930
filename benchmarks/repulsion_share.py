"""How strong the repulsion of a fixed lambda is, as the affinity learns: its share of the gradient, step by step.

    python benchmarks/repulsion_share.py --data data    # Imagenette, BYOL, learned affinity, 11 epochs
    python benchmarks/repulsion_share.py --data data --runs accuracy_runs/imagenette/60/*learned*/  # at their end

Every 25 steps: the norm of `local_weight` times local_local's gradient at the local crops' projections, in percent of
the norm of local_global's with its weight in the loss. That is what `gradient_ratio` caps. Of finished runs of
accuracy_study.py the mean over 25 batches. Needs pip install '.[benchmarks]'.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import accuracy
import torch
from accuracy_data import DATASETS
from accuracy_training import build
from torch.utils.data import DataLoader, TensorDataset

from logo_plugin import LoGoLoss, MultiCropCollate

EVERY, PLAIN = 25, LoGoLoss.extend


def share(loss, terms, given):
    """The repulsion's part of the gradient in percent."""
    pull, push = (
        torch.cat(torch.autograd.grad(term, given["local_proj"], retain_graph=True)).float().norm()
        for term in (terms.local_global, terms.local_local)
    )
    pairs = len(given["local_pred"]) * len(given["global_target"])
    weight = given["scale"].detach() * pairs / (given["global_pairs"] + pairs)
    return 100 * float(loss.local_weight * push / (weight * pull))


def tell(loss, host_loss, **given):
    """As `LoGoLoss.extend`, and prints every 25th call's share."""
    terms = PLAIN(loss, host_loss, **given)
    loss.calls = getattr(loss, "calls", 0) + 1
    if loss.calls % EVERY == 0:
        found = share(loss, terms, given)
        print(f"step {loss.calls}: {found:.2f} %, affinity's loss {float(terms.affinity):.3f}", flush=True)
    return terms


def of_run(folder, data):
    """The share in the first batches of an epoch, with the weights that a run ended with."""
    record, state = json.loads(Path(f"{folder}.json").read_text()), torch.load(folder / "weights.pt")
    options = argparse.Namespace(lr=record["lr"], **record["setting"])
    model = build(record["method"], record["arm"], options, 1, 1).to(memory_format=torch.channels_last)
    model.on_load_checkpoint({"state_dict": state})
    model.load_state_dict(state)
    (images, labels), *_ = accuracy.load("imagenette", data, None, True)
    collate = MultiCropCollate(**DATASETS["imagenette"].crops)
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(images, labels), options.batch_size, shuffle=True, collate_fn=collate)
    shares = []

    def keep(loss, host_loss, **given):
        terms = PLAIN(loss, host_loss, **given)
        shares.append(share(loss, terms, given))
        return terms

    with patch.object(LoGoLoss, "extend", keep):
        for i, batch in zip(range(EVERY), loader, strict=False):
            with torch.autocast("cpu", torch.bfloat16):
                model.training_step(batch, i)
    print(f"{folder.name}: {sum(shares) / len(shares):.2f} % ({min(shares):.2f} to {max(shares):.2f})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data sets' folder, as for accuracy.py")
    parser.add_argument("--runs", type=Path, nargs="+", help="folders of finished runs")
    options = parser.parse_args()
    accuracy.prepare()
    if options.runs:
        for folder in options.runs:
            of_run(folder, options.data)
        return
    with TemporaryDirectory() as folder, patch.object(LoGoLoss, "extend", tell):
        job = ["--data", str(options.data), "--dataset", "imagenette", "--methods", "byol"]
        job += ["--seeds", "0", "--backbone", "tiny", "--batch-size", "64", "--precision", "bf16-mixed", "--validate"]
        job += ["--arms", "learned affinity", "--epochs", "11", "--lr", "0.4", "--output", folder]
        for run in accuracy.runs(accuracy.parse(job)):
            accuracy.train_run(*run)


if __name__ == "__main__":
    main()
