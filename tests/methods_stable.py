"""What `wrap` makes of each forward and method class of stable-pretraining, from real runs, for docs/methods.md."""

from functools import partial

import stable_hosts
import stable_pretraining as spt
import torch
from adapter_contract import AdapterCase, seeded, step, views, weights_at_zero
from stable_pretraining import losses, methods
from torch import nn

from logo_plugin import wrap

NOTES = {
    "stable-pretraining": "Its forwards and the classes of its `methods`, with [`wrap(module)`](stable-pretraining.md)."
}


def _host(name, filled=0):
    model = stable_hosts.host(name)
    return stable_hosts.with_queue(model, filled) if name == "nnclr" else model


def _with_logo(name, filled=0, **options):
    """The classes without the forward that the benchmarks give them: LoGo brings it."""
    model = stable_hosts.method(name) if name in stable_hosts.CLASSES else stable_hosts.module(name)
    model = stable_hosts.with_queue(model, filled) if name == "nnclr" else model
    return wrap(model, **{"affinity": "learned"} | options)


OF_ONE_RANK = ("byol", "BYOL", "SimSiam", "MoCov2")  # the losses of the others gather from all ranks


def case(name, filled=0):
    return AdapterCase(
        host=partial(_host, name, filled),
        build=partial(_with_logo, name, filled),
        loss=stable_hosts.loss,
        shares_batch=name not in OF_ONE_RANK,
    )


CASES = {name: case(name) for name in (*stable_hosts.FORWARDS, *stable_hosts.CLASSES)}


def refused_forwards():
    """`spt.Module`s around the other forwards, by name."""
    student = stable_hosts.teacher_student
    vit = {"backbone": student(stable_hosts.backbone()), "projector": student(nn.Linear(32, 16))}
    cnn = {"backbone": stable_hosts.backbone(), "projector": nn.Linear(32, 16)}
    return {
        "supervised": lambda: stable_hosts.module("supervised", supervised_loss=nn.CrossEntropyLoss()),
        "swav": lambda: stable_hosts.module("swav", swav_loss=losses.SwAVLoss(), prototypes=nn.Linear(16, 8), **cnn),
        "dino": lambda: stable_hosts.module("dino", dino_loss=losses.DINOv1Loss(), **vit),
        "dinov2": lambda: stable_hosts.module("dinov2", dinov2_loss=losses.DINOv2Loss(), **vit),
    }


def rows():
    """(host, method, verdict, reason) for each forward, then each class."""
    found = []
    for name, of in CASES.items():
        weights_at_zero(of)
        assert torch.isfinite(step(of, seeded(of.build, affinity="cosine", anneal_repulsion=False), views())[0]), name
        loss, gradients = step(of, seeded(of.build), views())
        assert torch.isfinite(loss), name
        assert any(key.startswith("logo.affinity") for key in gradients), name
        found.append((f"methods.{name}" if name in stable_hosts.CLASSES else f"forward.{name}", "works", ""))
    refused = {f"forward.{name}": build for name, build in refused_forwards().items()}
    refused |= {f"methods.{n}": partial(getattr, methods, n) for n in methods.__all__ if n not in stable_hosts.CLASSES}
    for name, build in refused.items():
        try:
            wrap(build())
        except ValueError as error:
            found.append((name, "refused", str(error)))
        else:
            raise AssertionError(f"{name} is neither tested nor refused")
    return [("stable-pretraining", *row) for row in sorted(found)]


if __name__ == "__main__":
    print(spt.__version__)
    for row in rows():
        print(*row, sep=" | ")
