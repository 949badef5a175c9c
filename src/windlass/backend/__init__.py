"""``torch.distributed`` over MPI: ``torch.distributed.init_process_group("windlass")`` after ``import windlass``.

Imported without PyTorch, as `windlass` itself is; what needs PyTorch comes when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from windlass.backend.options import Options
from windlass.backend.register import backend_for, register

if TYPE_CHECKING:
    from windlass.backend.barrier import barrier
    from windlass.backend.failure import LostPeerError
    from windlass.backend.hooks import Int16State, bf16_compress_hook, int16_stochastic_hook

__all__ = [
    "Int16State",
    "LostPeerError",
    "Options",
    "backend_for",
    "barrier",
    "bf16_compress_hook",
    "int16_stochastic_hook",
    "register",
]

_HOME = {
    "barrier": "barrier",
    "LostPeerError": "failure",
    "Int16State": "hooks",
    "bf16_compress_hook": "hooks",
    "int16_stochastic_hook": "hooks",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"windlass.backend.{_HOME[name]}"), name)
    globals()[name] = value  # `barrier` is also a module's name, which the import has just bound here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
