"""Training by forward passes alone: gradients are estimated along random directions that a seed stands for."""

from ssdtune.zeroth_order.estimators import FZOO, Estimator, EstimatorError, MeZO
from ssdtune.zeroth_order.method import Fold, Step, ZerothOrder

__all__ = ["FZOO", "Estimator", "EstimatorError", "Fold", "MeZO", "Step", "ZerothOrder"]
