"""Functions with PyTorch's own calling conventions, computed by Windlass.

>>> import torch
>>> from windlass.functional import conv2d
>>> conv2d(torch.ones(1, 2, 5, 5), torch.ones(4, 2, 3, 3), padding=1).shape
torch.Size([1, 4, 5, 5])
"""

from windlass.layers import conv2d

__all__ = ["conv2d"]
