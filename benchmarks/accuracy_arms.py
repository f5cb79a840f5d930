"""What is compared: the arms of benchmarks/accuracy.py, and what an epoch of each costs."""

from functools import partial

import torch.nn.functional as F

from logo_plugin import Affinity
from logo_plugin.affinity import CosineAffinity

# Passes of the network for an image: forward and backward of an online view costs 3, forward of a target view 1.
# The first number is that of the two global crops; every local crop adds 3.
GLOBAL_PASSES = {"simsiam": 6, "byol": 8, "moco": 4, "moco-both": 8}
LOCAL_PASSES = 3


class Attraction(CosineAffinity):
    """The control: local crops are pulled together instead."""

    def forward(self, first, second):
        return -super().forward(first, second)


class UnitAffinity(Affinity):
    """On projections of unit length, as in the official release: their length is no way out of the repulsion."""

    def forward(self, first, second):
        return super().forward(F.normalize(first, dim=-1), F.normalize(second, dim=-1))


# arm: (options of wrap or None for two crops, options of the run: crops, equal compute, factors of the lr, ...).
# An affinity is given as what makes it, so that the run's seed initialises it; 128 is the projector's width.
# "compute" trains for as many epochs as make the run cost what multi-crop 2 + 2 costs, in passes weighted by pixels.
LEARNED = {"affinity": "learned"}
TWO_CROPS = {"local_crops": 0, "global_scale": (0.2, 1.0)}
ARMS = {
    "2 crops": (None, {"crops": TWO_CROPS}),
    "2 crops, equal compute": (None, {"crops": TWO_CROPS, "compute": True}),
    # Small local crops cost more seconds than their pixels say: on a CPU a 2 + 2 step of BYOL at 64 and 32 px took
    # 1.33 x a 2-crop step, the making of the crops included; one of MoCo at 32 and 16 px, LoGo's, 1.7 x to 1.8 x.
    "2 crops, equal seconds": (None, {"crops": TWO_CROPS, "longer": 4 / 3}),
    "2 crops, equal seconds, 16 px": (None, {"crops": TWO_CROPS, "longer": 11 / 6}),
    "multi-crop": ({"affinity": None}, {}),
    "learned affinity": ({**LEARNED, "local_weight": 1e-4}, {}),
    "ratio 0.1": ({**LEARNED, "gradient_ratio": 0.1}, {}),
}
for weight in (1e-5, 1e-3, 1e-2, 1e-1, 1.0):
    ARMS[f"lambda {weight:g}"] = ({**LEARNED, "local_weight": weight}, {})
for ratio in (0.005, 0.015, 0.05, 0.3):
    ARMS[f"ratio {ratio:g}"] = ({**LEARNED, "gradient_ratio": ratio}, {})

# One factor at a time, at a repulsion that is strong enough for the factor to show.
STRONG = {**LEARNED, "gradient_ratio": 0.1}
COSINE = {"affinity": "cosine", "anneal_repulsion": False}
LAYER = {"affinity": partial(Affinity, 128, norm="layer")}
# The tiny network's features are 128 wide, too. MoCo has no predictor, so with another module than its projection head
# named as the projector LoGo must be told what makes its predictions; for BYOL, which has one, it changes nothing.
AT_BACKBONE = {"projector": "backbone", "online": "forward"}
ARMS |= {
    "difference": ({**STRONG, "affinity_loss": "difference"}, {}),
    "layer norm": ({**STRONG, **LAYER}, {}),
    "unit z": ({**STRONG, "affinity": partial(UnitAffinity, 128)}, {}),
    "layer norm, unit z": ({**STRONG, "affinity": partial(UnitAffinity, 128, norm="layer")}, {}),
    "logit": ({**STRONG, "repulsion": "logit"}, {}),
    "cosine": ({**STRONG, **COSINE}, {}),
    "cosine, annealed": ({"gradient_ratio": 0.1}, {}),  # to nothing, as the learning rate does
    "attraction": ({**STRONG, "affinity": Attraction}, {}),
    "no noise": ({**STRONG, "positive_noise": 0.0}, {}),
    "noise 1": ({**STRONG, "positive_noise": 1.0}, {}),
    "affinity lr x 0.1": (STRONG, {"affinity_lr": 0.1}),
    "affinity lr x 3": (STRONG, {"affinity_lr": 3.0}),
    "overlap": ({**STRONG, "weigh_overlap": True}, {"crops": {"return_boxes": True}}),
    "cosine, overlap": ({**STRONG, **COSINE, "weigh_overlap": True}, {"crops": {"return_boxes": True}}),
    "paper": ({"preset": "paper"}, {}),
    "release": ({"preset": "release"}, {}),
    "sum": ({"affinity": None, "reduction": "sum"}, {}),
    "lr x 5": ({"affinity": None}, {"lr": 5.0}),  # "sum" makes the loss 5 times as large
    "2 crops, equal compute, lr x 2": (None, {"crops": TWO_CROPS, "compute": True, "lr": 2.0}),
    "2 crops, equal compute, lr x 5": (None, {"crops": TWO_CROPS, "compute": True, "lr": 5.0}),
    "global scale 0.2-1": ({"affinity": None}, {"crops": {"global_scale": (0.2, 1.0)}}),
    "local predictor": ({"affinity": None, "local_predictor": True}, {}),
    "local predictor, ratio 0.1": ({**STRONG, "local_predictor": True}, {}),
    "averaged targets": ({"affinity": None, "average_targets": True}, {}),
}

# Dose and response, of three affinities at the projections and at the backbone's features.
for ratio in (0.005, 0.015, 0.05, 0.1, 0.3):
    dose = {"gradient_ratio": ratio}
    if ratio != 0.1:  # STRONG: above
        ARMS[f"cosine, ratio {ratio:g}"] = ({**dose, **COSINE}, {})
        ARMS[f"layer norm, ratio {ratio:g}"] = ({**dose, **LAYER}, {})
    ARMS[f"backbone, ratio {ratio:g}"] = ({**dose, **AT_BACKBONE, "affinity": partial(Affinity, 128)}, {})
    ARMS[f"backbone cosine, ratio {ratio:g}"] = ({**dose, **AT_BACKBONE, **COSINE}, {})
    ARMS[f"backbone layer norm, ratio {ratio:g}"] = ({**dose, **AT_BACKBONE, **LAYER}, {})
for ratio in (0.03, 0.3, 1.0):
    ARMS[f"cosine, annealed, ratio {ratio:g}"] = ({"gradient_ratio": ratio}, {})

# Without repulsion: how many local crops, how small, and whose predictor. MULAN (arXiv 2602.05845) weighs
# mean(global) + mean(local), which is the sum over 2 + 2 crops' four local-global pairs at a quarter each.
MULAN = {"affinity": None, "local_predictor": True, "reduction": "sum", "local_global_weight": 0.25}
ARMS |= {
    "local predictor, own start": ({"affinity": None, "local_predictor": True}, {"reinitialise": True}),
    "MULAN": (MULAN, {"reinitialise": True}),
    "MULAN's weights": ({"affinity": None, "reduction": "sum", "local_global_weight": 0.25}, {}),
    "4 local crops, equal compute": ({"affinity": None}, {"crops": {"local_crops": 4}, "compute": True}),
    "6 local crops, equal compute": ({"affinity": None}, {"crops": {"local_crops": 6}, "compute": True}),
}
# CIFAR-10's usual local crops, as large as the global ones, for a data set that has smaller ones.
AS_LARGE = {"crops": {"local_size": 32}, "compute": True}
ARMS["local 32 px, equal compute"] = ({"affinity": None}, AS_LARGE)
ARMS["LoGo, local 32 px, equal compute"] = ({"gradient_ratio": 0.3}, AS_LARGE)  # MoCo's default
for scale in ((0.15, 0.4), (0.08, 0.25), (0.05, 0.25), (0.05, 0.4)):
    ARMS[f"local scale {scale[0]:g}-{scale[1]:g}"] = ({"affinity": None}, {"crops": {"local_scale": scale}})
# MultiCropCollate's own, the release's.
ARMS["default scales"] = ({"affinity": None}, {"crops": {"global_scale": (0.4, 1.0), "local_scale": (0.05, 0.4)}})

# Where local crops lie.
APART = {"crops": {"local_placement": "apart"}}
ARMS |= {
    "local inside global": ({"affinity": None}, {"crops": {"local_placement": "inside"}}),
    "local apart": ({"affinity": None}, APART),
    "cosine, local apart": ({**STRONG, **COSINE}, APART),
}


def cost(method, arm, crops):
    """What an epoch costs, in epochs of the two global crops: passes of the network, weighted by the crops' pixels.

    `crops` are the data set's options of MultiCropCollate. Making the crops is left out, which a GPU's
    user has workers for: the runs' CPU seconds have it in them.
    """
    options = crops | ARMS[arm][1].get("crops", {})
    pixels = (options["local_size"] / options["global_size"]) ** 2
    return 1 + options.get("local_crops", 2) * LOCAL_PASSES * pixels / GLOBAL_PASSES[method]


def epochs_of(method, arm, epochs, crops):
    """How long an arm trains where multi-crop 2 + 2 trains for `epochs`."""
    run = ARMS[arm][1]
    if not run.get("compute"):
        return round(epochs * run.get("longer", 1))
    return round(epochs * cost(method, "multi-crop", crops) / cost(method, arm, crops))


CHOOSERS = ["2 crops, equal compute", "multi-crop"]  # the arms that choose the learning rates, for their likes
CHOOSING = (0, 1, 2)  # the seeds that choose the learning rates


def chooser(arm):
    """The arm whose runs choose the learning rate of `arm`."""
    return CHOOSERS[not arm.startswith("2 crops")]


def best_rate(of_rates):
    """The learning rate of {rate: {seed: record}} that validates best, of those with the most seeds."""
    return max(of_rates, key=lambda lr: (len(of_rates[lr]), validation(of_rates[lr])))


def validation(of_seeds):
    """k-NN on the images that chose, the mean of {seed: record}."""
    values = [record["final"].get("validation_knn", 0.0) for record in of_seeds.values()]
    return sum(values) / len(values)
