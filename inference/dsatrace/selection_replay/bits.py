"""Counting bits in compiled code: numba has no word for the processor's instruction.

    popcount(np.uint64(0b1011))        # 3
    lowest_bit(np.uint64(0b1000))      # 3

numba keeps a compiled kernel until that kernel's own file changes: who changes this file must touch
the kernels that use it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from dsatrace.jit import inner

ONE = np.uint64(1)
ALL = np.uint64(2**64 - 1)


def _define_ctpop(typing_context: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


_ctpop: Any = intrinsic(_define_ctpop)


@inner
def popcount(word: np.uint64) -> np.int64:
    """How many bits are set."""
    return np.int64(_ctpop(word))


@inner
def lowest_bit(word: np.uint64) -> np.int64:
    """Place of the lowest bit that is set; 64 where none is."""
    return np.int64(_ctpop(~word & (word - ONE)))
