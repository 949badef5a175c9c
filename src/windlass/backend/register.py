"""Makes ``init_process_group("windlass")`` known to PyTorch, whichever of the two is imported first.

Registration costs microseconds and imports nothing heavy.  While PyTorch is not there, a finder at the front of
``sys.meta_path`` waits for the one module in which backends are registered; it loads nothing itself.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

_REGISTRY = "torch.distributed.distributed_c10d"


def register() -> None:
    """Registers the backend now if PyTorch is there, else as soon as it comes; a second call does nothing."""
    module = sys.modules.get(_REGISTRY)
    if module is not None and not _is_loading(module):
        _register(module)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _is_loading(module: types.ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _register(c10d: types.ModuleType) -> None:
    from windlass.backend.rendezvous import serve_mpi

    if "WINDLASS" not in c10d.Backend._plugins:
        c10d.Backend.register_backend("windlass", _create, extended_api=True, devices=["cpu"])
        serve_mpi()


def _create(opts: Any, options: Any) -> object:
    """PyTorch's call for a new group; MPI comes in here."""
    from windlass.backend.create import create_group

    return create_group(opts, options)


class _Watch(importlib.abc.MetaPathFinder):
    """Registers the backend when PyTorch's registry has been loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Leaves the search to the others, and follows the loader they find."""
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: types.ModuleType) -> None:
                del loader.exec_module
                execute(module)
                _register(module)

            loader.exec_module = execute_and_register
        return spec


def backend_for(device: str) -> str:
    """The backend that moves tensors of a device: ``nccl`` for CUDA's, else ``windlass``.

    >>> backend_for("cpu"), backend_for("cuda:1")
    ('windlass', 'nccl')
    """
    return "nccl" if device.partition(":")[0] == "cuda" else "windlass"
