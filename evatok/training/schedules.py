"""Learning rates as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "wsd"]


def learning_rate(
    step: int, *, steps: int, peak: float, final: float, warmup: int, shape: Shape, decay: float
) -> float:
    """The rate used by optimizer step ``step`` (0 is the first of ``steps``).

    Linear warm-up over ``warmup`` steps to ``peak``, then one of
    - ``cosine``: half a cosine to ``final`` at the last step;
    - ``wsd`` (warm-up, stable, decay): ``peak`` until the last share ``decay`` of all steps, then down to
      ``final`` as 1 - sqrt (GigaTok's shape; EVATok states 80 % constant, 20 % decay).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "cosine":
        passed = (step - warmup) / max(1, steps - 1 - warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, passed)))
    else:
        stable = steps - round(decay * steps)
        passed = (step - stable + 1) / max(1, steps - stable)
        share = 1 - math.sqrt(min(1.0, max(0.0, passed)))
    return final + (peak - final) * share
