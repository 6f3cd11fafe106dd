"""The largest size whose prompt still fits, with few prompts built.

A bracket as in binary search, probed where a straight line through its ends says: counts
grow nearly in proportion to the size, so a handful of probes does where halving takes
twenty. Knows no text.

    largest_fitting(lambda size: 24 * size + 60, minimum=1, limit=2048)      # 82
"""

from __future__ import annotations

from collections.abc import Callable

from dsatrace.errors import UserError


def largest_fitting(count: Callable[[int], int], minimum: int, limit: int, guess: int = 0) -> int:
    """The largest size >= `minimum` with `count(size) <= limit`; `count` must not fall, and grow in the end.

    `guess` is probed first. Raises `UserError` with the numbers if not even `minimum` fits.
    """
    low, low_count = minimum, count(minimum)
    if low_count > limit:
        raise UserError(f"needs at least {low_count} tokens, not {limit}; ask for a larger length")
    first, first_count = low, low_count
    high, high_count = 0, 0  # high 0: no size is known yet that does not fit
    probe, num_bracketed = max(guess, low + 1), 0
    while not high or high - low > 1:
        probed = count(probe)
        if probed <= limit:
            low, low_count = probe, probed
        else:
            high, high_count = probe, probed
        if not high:
            slope = max((low_count - first_count) / (low - first), 1e-3)
            probe = min(low + 1 + int((limit - low_count) / slope), 64 * low + 64)
            continue
        num_bracketed += 1
        probe = low + (limit - low_count) * (high - low) // (high_count - low_count)
        if num_bracketed % 4 == 0:  # halve now and then, so that no curve can make this slow
            probe = (low + high) // 2
        probe = min(max(probe, low + 1), high - 1)
    return low
