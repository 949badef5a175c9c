"""Windlass trains convolutional networks fast, with every lever behind one plan."""

from windlass.config import TrainConfig
from windlass.plan.plan import Plan
from windlass.train import Result, train

__all__ = ["Plan", "Result", "TrainConfig", "train"]
