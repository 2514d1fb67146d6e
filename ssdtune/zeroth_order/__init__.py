"""Training by forward passes alone: gradients are estimated along random directions that a seed stands for."""

from ssdtune.zeroth_order.estimators import FZOO, LOZO, Estimator, EstimatorError, MeZO
from ssdtune.zeroth_order.log import read_log
from ssdtune.zeroth_order.masks import Mask
from ssdtune.zeroth_order.method import Fold, Step, ZerothOrder, replayed
from ssdtune.zeroth_order.rules import Rule

__all__ = [
    "FZOO",
    "LOZO",
    "Estimator",
    "EstimatorError",
    "Fold",
    "Mask",
    "MeZO",
    "Rule",
    "Step",
    "ZerothOrder",
    "read_log",
    "replayed",
]
