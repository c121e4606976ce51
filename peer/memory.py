"""How does memory that was freed go back to the machine, for the others who work on it?"""

from __future__ import annotations

import ctypes
import sys


def release_freed_memory() -> bool:
    """Gives the pages of freed blocks back to the system; False where the C library cannot.

    glibc keeps what lies below the last block in use. After finetuning 22.7M parameters that were
    500 of 1300 MiB, on top of which the all-reduce then allocated its own (docs/experiments.md).
    """
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
    if trim is None:
        return False
    trim(ctypes.c_size_t(0))
    return True
