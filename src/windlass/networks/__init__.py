"""The networks that Windlass brings, and any other by ``package.module:function``.

Importing this package costs no torch: a command line can be checked at once.  `windlass.networks.capture`
(not imported here) records a built network as a `windlass.plan.graph.Graph`.
"""

from windlass.networks.build import build_network
from windlass.networks.catalog import NETWORKS, NetworkEntry, check_network_name, input_size

__all__ = ["NETWORKS", "NetworkEntry", "build_network", "check_network_name", "input_size"]
