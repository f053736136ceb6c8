"""Functions that numba compiles for the machine, with the code kept on disk for the next process."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from numba import njit


def kept_on_disk(function: Callable[..., Any], made_with: Path | None = None, fastmath: bool | set[str] = False) -> Any:
    """Compile for the machine, with the code kept on disk where there is a place for it.

    numba writes beside the source or, where that is read-only, into the user's cache or ``NUMBA_CACHE_DIR``. Without
    any such place every process compiles.

    Args:
        function: Runs without Python's lock, and divides by zero as numpy does.
        made_with: Another source file that its code is made from, of which numba does not know.
        fastmath: What LLVM may take for granted; see numba.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        found: Any = njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)
    if made_with is not None:
        kept, own = found._cache._cache_file, made_with.stat()
        kept._source_stamp = kept._source_stamp, own.st_mtime, own.st_size
    found._cache = _LockedCache(found._cache)
    return found


class _LockedCache:
    """numba's cache of a function, used by one process at a time.

    Two processes that compile for different types at the same time choose the same file name for their code, and until
    both have written, the index of one leads to the code of the other (`numba/core/caching.py`,
    `IndexDataCacheFile.save`).
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with ExitStack() as held:
            # Not to be written to, or on a file system without locks: then every process compiles, or takes its chance.
            with suppress(OSError):
                Path(self._cache.cache_path).mkdir(parents=True, exist_ok=True)
                lock = held.enter_context((Path(self._cache.cache_path) / "compiled.lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def load_overload(self, *arguments: Any) -> Any:
        """Compiled code for a signature, or None."""
        with self._alone():
            return self._cache.load_overload(*arguments)

    def save_overload(self, *arguments: Any) -> None:
        """Keep compiled code for a signature."""
        with self._alone():
            self._cache.save_overload(*arguments)
