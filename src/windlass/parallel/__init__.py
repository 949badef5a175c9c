"""Networks divided over workers: a placement in the plan, executed on PyTorch modules."""

from windlass.parallel.apply import apply
from windlass.parallel.placed import PlacedModule
from windlass.parallel.trace import trace
from windlass.parallel.transport import NullTransport, TorchTransport

__all__ = ["NullTransport", "PlacedModule", "TorchTransport", "apply", "trace"]
