"""Compiled code that is kept on disk."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from prism_nemo import compiled
from prism_nemo.analysis import passes
from prism_nemo.generation import cpu_kernels


@pytest.mark.parametrize("function", [passes.levels, cpu_kernels._norm], ids=["analysis", "generation"])
def test_every_kernel_is_kept_behind_the_lock(function: Any) -> None:
    """Two ranks that compile the same function must not take each other's code for their own."""
    assert isinstance(function._cache, compiled._LockedCache)


def test_code_is_kept_and_found_by_one_process_at_a_time(tmp_path: Path) -> None:
    done = []

    class Cache:
        cache_path = str(tmp_path / "place")
        nowhere = 7

        def load_overload(self, *arguments: Any) -> Any:
            with (tmp_path / "place" / "compiled.lock").open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return arguments

        def save_overload(self, *arguments: Any) -> None:
            done.append(self.load_overload(*arguments))

    cache = compiled._LockedCache(Cache())
    assert cache.load_overload(1, 2) == (1, 2)
    cache.save_overload(3)
    assert done == [(3,)]
    assert cache.nowhere == 7
    with (tmp_path / "place" / "compiled.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (tmp_path / "file").touch()
    Cache.cache_path = str(tmp_path / "file" / "below")
    Cache.load_overload = lambda self, *arguments: arguments
    assert cache.load_overload(4) == (4,)


def test_without_a_place_for_compiled_code_it_is_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What numba raises where neither the package's folder nor the user's cache can be written to."""
    compile_ = compiled.njit

    def njit(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function 'twice': no locator available for file 'x.py'")
        return compile_(**options)

    monkeypatch.setattr(compiled, "njit", njit)
    twice = compiled.kept_on_disk(lambda x: 2 * x)
    assert twice(21) == 42
