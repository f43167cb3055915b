"""Work done ahead of its use, in threads, without changing its order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over make(first), make(first + 1), …; up to `ahead` of them are being made or wait, each in a thread of its own.

    What is made for a number must depend on that number alone; then threads, and stopping and starting again, change nothing. An
    error in `make` is raised when its turn comes. With `ahead` 0 nothing is made before it is asked for.
    """

    def __init__(self, make: Callable[[int], T], *, first: int = 0, ahead: int = 2) -> None:
        self.make, self.following, self.ahead = make, first, ahead
        self.made: deque[Future[T]] = deque()
        self.threads = ThreadPoolExecutor(max(1, ahead), thread_name_prefix="prefetch")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        while len(self.made) <= self.ahead:
            self.made.append(self.threads.submit(self.make, self.following))
            self.following += 1
        return self.made.popleft().result()

    def close(self) -> None:
        """Let go of what was made ahead."""
        self.threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
