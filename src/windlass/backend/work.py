"""What a caller holds while an operation is under way: PyTorch's ``Work``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import Work as TorchWork

if TYPE_CHECKING:
    from windlass.backend.progress import Operation, Progress

_NO_LIMIT = timedelta(0)


class Work(TorchWork):
    """An operation of a group, complete or not.

    Errors are raised by `wait` and by the future's readers alike.  A future's error must be raised by a callback:
    one that is stored as a value is a Python object to C++, and DDP's reducer would read it as tensors.
    """

    def __init__(self, operation: Operation, progress: Progress, tensors: Sequence[Any]) -> None:
        super().__init__()
        self._operation = operation
        self._progress = progress
        self._tensors = list(tensors)
        self._future: torch.futures.Future[list[Any]] | None = None

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Returns when the result stands; after `timeout` it raises, and the operation goes on."""
        operation = self._operation
        if not operation.done:
            self._progress.run_until(operation, timeout.total_seconds())
        if operation.error is not None:
            raise operation.error
        return True

    def is_completed(self) -> bool:
        """Whether it has ended, well or not; moves it on when nobody else does."""
        if not self._operation.done:
            self._progress.turn()
        return self._operation.done

    def is_success(self) -> bool:
        """Whether it has ended well."""
        return self._operation.done and self._operation.error is None

    def exception(self) -> BaseException | None:
        """What went wrong."""
        return self._operation.error

    def result(self) -> list[Any]:
        """The tensors that hold the result."""
        return self._tensors

    def synchronize(self) -> None:
        """The same as `wait`: there is no device to synchronize with."""
        self.wait()

    def source_rank(self) -> int:
        """Of a receive from any source: the sender's number within the group."""
        return self._operation.source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[Any]]:
        """A future of the tensors, which raises the operation's error where it is read."""
        if self._future is None:
            base: torch.futures.Future[list[Any]] = torch.futures.Future()
            operation, tensors = self._operation, self._tensors

            def value(_: torch.futures.Future[list[Any]]) -> list[Any]:
                if operation.error is not None:
                    raise operation.error
                return tensors

            self._future = base.then(value)
            self._progress.when_done(operation, lambda: base.set_result(tensors))
        return self._future
