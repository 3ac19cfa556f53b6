"""Ranked responses made out of what several models say, and rewards measured on them.

:func:`rank` is ``trimtab data rank``; :func:`score` is ``trimtab data score``.
"""

from trimtab.ranking.rank import rank
from trimtab.ranking.score import score

__all__ = ["rank", "score"]
