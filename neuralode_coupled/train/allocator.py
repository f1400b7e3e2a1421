"""How the C library allocates the memory of tensors on the CPU."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Of ``mallopt``, in glibc's malloc.h."""

LEFT_ALONE = "NEURALODE_COUPLED_ALLOCATOR"
"""The environment variable that says so, with 0 as its value."""

_PAD = 64 * 2**20
_CACHED, _SMALL = 7, range(24, 136, 16)
"""How many blocks of a size the cache of a thread holds, and the sizes that the alignment of a tensor leaves over."""
_SET_BY_USERS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensors, in this process from now on; returns whether it does.

    By default it takes every tensor above 32 MiB, and the first ones above 128 KiB, from the system, and returns them
    after their last use, as it does with free memory at the end of the heap. The system then clears each page again.
    Kept memory counts as the process's; `PeakMemory` returns free memory before it measures.

    It changes nothing and returns False with another C library, and if the environment chooses the allocation:
    ``NEURALODE_COUPLED_ALLOCATOR=0``, ``GLIBC_TUNABLES``, ``MALLOC_...``, or ``LD_PRELOAD``
    for another allocator.
    """
    if os.environ.get(LEFT_ALONE) == "0" or any(os.environ.get(name) for name in _SET_BY_USERS):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (there, or not: other libraries' mallopt does nothing)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # -1 is never. Memory of the heap alone comes back to the system at its end, and so not at all.
    if not all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_TOP_PAD, _PAD)]):
        return False
    _fill_the_cache(libc)
    return True


def _fill_the_cache(libc: ctypes.CDLL) -> None:
    """Fill this thread's cache of small blocks.

    A tensor's memory is cut out of a larger block, because it is aligned; what is left over behind it goes to that
    cache while there is room. It then keeps the freed memory from growing together with its surroundings, so that it is
    too small for the next tensor of the same size: the heap would grow by a tensor for each place in the cache.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    for block in [libc.malloc(size) for size in _SMALL for _ in range(_CACHED)]:
        libc.free(block)
