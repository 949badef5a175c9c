"""The table of built-in networks and what can be said of a network by its name alone; no torch here."""

from __future__ import annotations

import keyword
from dataclasses import dataclass

from windlass.errors import ConfigError, unknown


@dataclass(frozen=True, kw_only=True)
class NetworkEntry:
    """A built-in network.

    Attributes:
        factory: where it is built, ``module:function``.
        title: its name and paper, one line.
        default_size: side of the square image of the paper.
        min_size: side of the smallest image it can take.
        flexible: whether it takes images of other sides than `default_size`.
        in_channels: channels of the paper's images.
        num_classes: classes of the paper's task.
    """

    factory: str
    title: str
    default_size: int
    min_size: int
    flexible: bool = True
    in_channels: int = 3
    num_classes: int = 1000


def _vgg(depth: int, configuration: str) -> NetworkEntry:
    return NetworkEntry(
        factory=f"windlass.networks.vgg:vgg{depth}",
        title=f"VGG-{depth}, configuration {configuration} (Simonyan and Zisserman 2015)",
        default_size=224,
        min_size=32,
    )


def _resnet(depth: int) -> NetworkEntry:
    return NetworkEntry(
        factory=f"windlass.networks.resnet:resnet{depth}",
        title=f"ResNet-{depth} (He, Zhang, Ren and Sun 2016)",
        default_size=224,
        min_size=8,
    )


NETWORKS: dict[str, NetworkEntry] = {
    "lenet5": NetworkEntry(
        factory="windlass.networks.lenet:lenet5",
        title="LeNet-5 (LeCun, Bottou, Bengio and Haffner 1998)",
        default_size=32,
        min_size=32,
        flexible=False,
        in_channels=1,
        num_classes=10,
    ),
    "alexnet": NetworkEntry(
        factory="windlass.networks.alexnet:alexnet",
        title="AlexNet with one tower (Krizhevsky 2014)",
        default_size=224,
        min_size=63,
    ),
    "vgg11": _vgg(11, "A"),
    "vgg16": _vgg(16, "D"),
    "vgg19": _vgg(19, "E"),
    "googlenet": NetworkEntry(
        factory="windlass.networks.googlenet:googlenet",
        title="GoogLeNet with both auxiliary heads (Szegedy et al. 2015)",
        default_size=224,
        min_size=32,
    ),
    "resnet18": _resnet(18),
    "resnet34": _resnet(34),
    "resnet50": _resnet(50),
    "resnet101": _resnet(101),
    "resnet152": _resnet(152),
    "coates": NetworkEntry(
        factory="windlass.networks.coates:coates",
        title="sparse autoencoder with untied receptive fields, one stage (Coates et al. 2013)",
        default_size=200,
        min_size=8,
        num_classes=1,
    ),
}
"""Name, as typed on a command line, of every built-in network."""


def check_network_name(name: str) -> None:
    """Raise `ConfigError` unless `name` is built in or reads ``package.module:function``.

    Nothing is imported: whether the function exists shows when the network is built.

    >>> check_network_name("resnet18")
    >>> check_network_name("my_nets.small:SmallNet")
    >>> check_network_name("my_nets:")
    Traceback (most recent call last):
    windlass.errors.ConfigError: network 'my_nets:' must be a built-in name or read package.module:function
    """
    if ":" not in name:
        if name not in NETWORKS:
            raise ConfigError(unknown("network", name, NETWORKS) + ", or package.module:function")
        return
    module, _, function = name.partition(":")
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in [*module.split("."), function]):
        raise ConfigError(f"network {name!r} must be a built-in name or read package.module:function")


def input_size(name: str, data_size: int) -> int:
    """Side of the square input that network `name` gets when the images have side `data_size`.

    A flexible network takes the images as they are, or enlarged to the smallest it can take; the others
    always get the paper's size.  A network by ``package.module:function`` takes them as they are.

    >>> input_size("lenet5", 28), input_size("resnet18", 32), input_size("alexnet", 32)
    (32, 32, 63)
    """
    check_network_name(name)
    entry = NETWORKS.get(name)
    if entry is None:
        return data_size
    return max(data_size, entry.min_size) if entry.flexible else entry.default_size
