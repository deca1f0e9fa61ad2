"""Which numbers of an array a fingerprint is taken over, where all would take too long."""

from __future__ import annotations

import math
from collections.abc import Sequence


def stride(shape: Sequence[int], count: int) -> int:
    """The step that takes about `count` numbers of an array, row by row, and walks through its columns: it shares no factor with
    their number, so that it comes back to one only after all.
    """
    step = max(1, math.prod(shape) // count)
    while shape and math.gcd(step, shape[-1]) > 1:
        step += 1
    return step
