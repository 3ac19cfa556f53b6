"""Ranked responses made out of what several models say, and rewards measured on them.

:func:`rank` is ``trimtab data rank``; :func:`score` is ``trimtab data score``.
"""

from trimtab.ranking.rank_command import rank
from trimtab.ranking.score_command import score

__all__ = ["rank", "score"]
