"""Identity preference optimization (arXiv 2310.12036): TRL's DPO trainer with its loss ``ipo``.

With h, the log-ratio of an answer to the reference as a *mean over its tokens*, TRL's loss of a pair with the
chosen answer y_w and the rejected y_l is

    h(y) = 1/|y| · log(π_θ(y | x) / π_ref(y | x)),    L = (h(y_w) − h(y_l) − 1 / (2β))²

The paper's Eq. 17 has the same form with sums over tokens, and calls β τ; ``docs/methods.md`` says what the
difference means for β.
"""

from __future__ import annotations

from trimtab.train.dpo import make_trainer

__all__ = ["make_trainer"]
