"""The two networks of Gupta et al. (ICML 2015, section 4.1): fully connected, and convolutional after LeNet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn


def dnn(*, in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """Pixels-1000-1000-classes with ReLU: 1.8 million parameters for MNIST."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(in_channels * image_size**2, 1000),
            relu1=nn.ReLU(),
            fc2=nn.Linear(1000, 1000),
            relu2=nn.ReLU(),
            fc3=nn.Linear(1000, num_classes),
        )
    )


def cnn(*, in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """5×5 convolutions to 8 and 16 maps with ReLU and 2×2 max-pooling, 128 ReLU, classes: 38 thousand parameters."""
    side = ((image_size - 4) // 2 - 4) // 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 8, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(8, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * side**2, 128),
            relu3=nn.ReLU(),
            fc2=nn.Linear(128, num_classes),
        )
    )


BUILDERS: dict[str, Callable[..., nn.Module]] = {"dnn": dnn, "cnn": cnn}


def build_paper_network(
    name: str,
    *,
    in_channels: int,
    image_size: int,
    num_classes: int,
    deviation: float,
    generator: torch.Generator,
) -> nn.Module:
    """A network of the paper with weights from N(0, deviation²) and biases 0.

    Args:
        name: a key of `BUILDERS`.
        in_channels: of its images.
        image_size: side of its square images.
        num_classes: number of its outputs.
        deviation: of the weights.
        generator: of the weights.
    """
    network = BUILDERS[name](in_channels=in_channels, image_size=image_size, num_classes=num_classes)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.zero_()
            else:
                parameter.normal_(0.0, deviation, generator=generator)
    return network
