"""Keeping freed memory on CPU machines.

XLA's CPU backend asks malloc for all temporaries of a step in one block and frees it afterwards.
glibc gives so large a block back to the kernel at once, which must hand out and zero the same pages
again in the next step: on two cores a third of the time of a small model's step. Told not to, it
keeps the block. GPUs and TPUs have allocators of their own and are not concerned.
"""

from __future__ import annotations

import ctypes
import sys

import jax

# mallopt's parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, if steps run on the CPU; does nothing elsewhere.

    Called once weights are where steps read them: among the holes that loading leaves in the heap,
    blocks of a step found no place, and a process grew by one of them now and then (by up to the
    half in four runs of one benchmark, by nothing in three called afterwards).
    """
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        # Blocks come from the one growing heap, and the heap never shrinks.
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
        mallopt(_M_ARENA_MAX, 1)
