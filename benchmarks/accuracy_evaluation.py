"""How features are judged: k-NN, linear probes, transfer, and what the representation looks like."""

import warnings

import torch
import torch.nn.functional as F
from accuracy_data import first_per_class
from lightly.utils.benchmarking import knn_predict
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from logo_plugin import MultiCropCollate


def evaluate(model, setting, train, validation, test, others, scenes):
    banks = [features(model, setting, *part) for part in (train, test)]
    tenth = first_per_class(train[1], len(train[1]) // 10)
    found = {"knn": knn(*banks, k=setting.neighbours), "linear": linear(*banks)}
    found["linear_10_percent"] = linear(tuple(part[tenth] for part in banks[0]), banks[1])
    if validation:
        found["validation_knn"] = knn(banks[0], features(model, setting, *validation), k=setting.neighbours)
    for name, parts in others.items():
        pair = [features(model, setting, *part) for part in parts]
        found[f"{name}_knn"], found[f"{name}_linear"] = knn(*pair, k=20), linear(*pair)
    if scenes:
        found["scenes_map"] = mean_average_precision(*(features(model, setting, *part, whole=True) for part in scenes))
    return found | mechanism(model, setting, scenes[1][0] if scenes else test[0])


@torch.no_grad()
def features(model, setting, images, labels, whole=False):
    """Backbone features (N, D), float32, and labels, of the images' centres, or of whole images."""
    mode = model.training
    model.eval()
    found = []
    crops = MultiCropCollate(**setting.crops)
    mean, std = (torch.tensor(values, device=model.device).view(3, 1, 1) for values in (crops.mean, crops.std))
    edge = max(0, images.shape[-1] - setting.view) // 2 * (not whole)
    for part in images[:, :, edge : images.shape[-1] - edge, edge : images.shape[-1] - edge].split(250):
        found.append(model.backbone((part.to(model.device).float() / 255 - mean) / std).flatten(1))
    model.train(mode)
    return torch.cat(found).float(), labels.to(model.device)


def knn(bank, queries, k=200, classes=10):
    """Weighted k-NN (T 0.1) in percent."""
    (known, labels), (asked, answers) = bank, queries
    known, asked = F.normalize(known, dim=1), F.normalize(asked, dim=1)
    k = min(k, len(known) // 2)
    predicted = torch.cat(
        [knn_predict(part, known.T, labels, classes, knn_k=k, knn_t=0.1)[:, 0] for part in asked.split(1000)]
    )
    return 100 * float((predicted == answers).float().mean())


def linear(bank, queries):
    """Logistic regression (C 1) on standardised features, in percent."""
    (x, y), (asked, answers) = ((part.cpu().numpy() for part in pair) for pair in (bank, queries))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged in 500 iterations
        return 100 * float(probe.fit(x, y).score(asked, answers))


def mean_average_precision(bank, queries):
    """Of one logistic regression (C 0.1) per class on standardised features, labels (N, classes), in percent."""
    (x, y), (asked, answers) = ((part.cpu().numpy() for part in pair) for pair in (bank, queries))
    probe = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=200))).fit(x, y)
    return 100 * float(average_precision_score(answers, probe.decision_function(asked), average="macro"))


def effective_rank(x):
    """exp(entropy) of the normalised singular values of centred features (Roy and Vetterli, 2007)."""
    share = torch.linalg.svdvals((x - x.mean(0)).double())
    share = share / share.sum()
    return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def mechanism(model, setting, images):
    """How alike two local crops are, whether an affinity tells images apart, and the rank of the features."""
    model.eval()
    torch.manual_seed(0)
    views = MultiCropCollate(**setting.crops)(list(images[:1000]))[0][2:]
    h = [model.backbone(view.to(model.device)).flatten(1).float() for view in views]
    z = [model.projection_head(part).float() for part in h]
    found = {}
    for name, pair in (("", z), ("feature_", h)):
        unit = [F.normalize(part, dim=1) for part in pair]
        found[f"{name}local_local_similarity"] = float((unit[0] * unit[1]).sum(1).mean())
        found[f"{name}other_image_similarity"] = float((unit[0] * unit[1].roll(1, 0)).sum(1).mean())
    logo = getattr(model, "logo", None)
    if getattr(logo, "affinity", None) is not None:
        pair = h if model.logo_settings.projector == "backbone" else z
        right = [
            (logo.affinity(*pair) > 0).float().mean(),
            (logo.affinity(pair[0], pair[1].roll(1, 0)) < 0).float().mean(),
        ]
        found["affinity_accuracy"] = 50 * float(sum(right))
    whole, _ = features(model, setting, images[:2000], torch.zeros(2000))
    return found | {"effective_rank": effective_rank(whole)}
