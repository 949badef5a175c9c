"""PyTorch modules and operators of Windlass: convolution by plan."""

from windlass.layers import batching, derivatives  # noqa: F401  # they register themselves with the operators
from windlass.layers.choice import Chooser, Layout, choice_for, resolve, set_chooser
from windlass.layers.convolution import conv2d
from windlass.layers.module import Conv2d

__all__ = ["Chooser", "Conv2d", "Layout", "choice_for", "conv2d", "resolve", "set_chooser"]
