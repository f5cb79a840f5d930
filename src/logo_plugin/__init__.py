"""LoGo (arXiv 2203.17205) as a drop-in loss for existing self-supervised training runs."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

_failure: Exception | None = None
try:
    from logo_plugin.adapters.learner import LoGoLearner
    from logo_plugin.affinity import Affinity
    from logo_plugin.crops import MultiCropCollate, MultiCropTransform, crop_overlap
    from logo_plugin.diagnostics import diagnose
    from logo_plugin.losses import LoGoLoss, LoGoTerms
    from logo_plugin.similarities import info_nce
    from logo_plugin.wrapping import wrap
except (ImportError, OSError, RuntimeError) as error:  # torch or torchvision is missing, or they don't fit each other
    _failure = error  # the doctor runs all the same; any use of a name raises it

if TYPE_CHECKING:
    from logo_plugin.adapters.lightning import LoGoMonitor as LoGoMonitor

__version__ = "0.1.0"

__all__ = [
    "Affinity",
    "LoGoLearner",
    "LoGoLoss",
    "LoGoTerms",
    "MultiCropCollate",
    "MultiCropTransform",
    "crop_overlap",
    "diagnose",
    "info_nce",
    "wrap",
]
if find_spec("lightning") or find_spec("pytorch_lightning"):  # without, `from logo_plugin import *` must not ask for it
    __all__ += ["LoGoMonitor"]


def __getattr__(name: str) -> Any:
    if _failure is not None and name in (*__all__, "LoGoMonitor"):
        raise ImportError(
            f"logo_plugin cannot import what it needs ({type(_failure).__name__}: {_failure}); "
            "python -m logo_plugin says what to do."
        ) from _failure
    if name == "LoGoMonitor":  # only when asked for: it imports Lightning
        from logo_plugin.adapters.lightning import LoGoMonitor

        return LoGoMonitor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
