"""solo-learn (https://github.com/vturrisi/solo-learn): its methods with LoGo, as `method=logo_byol` and so on.

Importing this package registers them with solo-learn. Each is solo-learn's own class, whose unmodified
training step runs on the two global crops; the local crops and LoGo's terms come on top (`step.py`). What a
local crop is compared with, and how, is one row of `methods.py`; what LoGo cannot carry is in `refused.py`.
"""

from logo_plugin.adapters.solo.fast_crops import FastCrops
from logo_plugin.adapters.solo.methods import (
    LoGoBarlowTwins,
    LoGoBYOL,
    LoGoMoCoV2Plus,
    LoGoMoCoV3,
    LoGoNNBYOL,
    LoGoNNCLR,
    LoGoNNSiam,
    LoGoSimCLR,
    LoGoSimSiam,
    LoGoVIbCReg,
    LoGoVICReg,
    wrap,
)
from logo_plugin.adapters.solo.options import OPTIONS
from logo_plugin.adapters.solo.refused import REFUSED
from logo_plugin.adapters.solo.registering import register

__all__ = [
    "OPTIONS",
    "REFUSED",
    "FastCrops",
    "LoGoBYOL",
    "LoGoBarlowTwins",
    "LoGoMoCoV2Plus",
    "LoGoMoCoV3",
    "LoGoNNBYOL",
    "LoGoNNCLR",
    "LoGoNNSiam",
    "LoGoSimCLR",
    "LoGoSimSiam",
    "LoGoVICReg",
    "LoGoVIbCReg",
    "wrap",
]

register()
