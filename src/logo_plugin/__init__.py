"""LoGo (arXiv 2203.17205) as a drop-in loss for existing self-supervised training runs."""

from logo_plugin.adapters.learner import LoGoLearner
from logo_plugin.affinity import Affinity
from logo_plugin.crops import MultiCropCollate, MultiCropTransform, crop_overlap
from logo_plugin.losses import LoGoLoss, LoGoTerms, info_nce
from logo_plugin.wrapping import wrap

__version__ = "0.1.0"

__all__ = [
    "Affinity",
    "LoGoLearner",
    "LoGoLoss",
    "LoGoTerms",
    "MultiCropCollate",
    "MultiCropTransform",
    "crop_overlap",
    "info_nce",
    "wrap",
]
