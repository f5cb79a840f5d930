"""The methods of solo-learn that LoGo cannot carry, and why."""

from solo import methods

_NO_CURE = "There is no option that helps; LoGoLoss takes the outputs of a training step of your own."
REFUSED: dict[type, str] = {
    methods.All4One: "it adds up three losses, and only one of them compares the predictions of two crops with "
    f"targets; the others are of neighbours and of feature dimensions. {_NO_CURE}",
    methods.DeepClusterV2: "it classifies crops by the clusters of a memory bank, and has no loss between two crops. "
    f"{_NO_CURE}",
    methods.DINO: "it compares prototype scores of all crops at once, with a centre that each call moves; DINO has a "
    f"multi-crop of its own, which solo-learn does not have. {_NO_CURE}",
    methods.MAE: "it reconstructs masked patches of each crop by itself, and has no loss between two crops. "
    f"{_NO_CURE}",
    methods.ReSSL: "it has one direction only, with the weakly augmented second crop as the only target, and LoGo "
    f"needs one of each global crop. {_NO_CURE}",
    methods.SupCon: "its positives are all images of a class, by the labels, and LoGo's are crops of one image. "
    "solo-learn has multi-crop for it: scripts/pretrain/imagenet-100-multicrop/supcon.yaml.",
    methods.SwAV: "it compares the prototype assignments of all crops at once, and has a multi-crop of its own: "
    "scripts/pretrain/cifar-multicrop/swav.yaml.",
    methods.WMSE: "it whitens random slices of the batch of global crops within its step, so that its loss is no "
    f"function of two crops. {_NO_CURE}",
}


def reason(method: type) -> str | None:
    """Why LoGo cannot carry a method or a subclass of it, and the cure; None if it is not among those refused."""
    return next((REFUSED[base] for base in method.__mro__ if base in REFUSED), None)
