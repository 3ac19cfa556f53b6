"""Measure a finished model: log-probabilities of given answers, and intervals that say how sure they are."""

from trimtab.evaluate.intervals import Interval, paired_bootstrap, wilson
from trimtab.evaluate.likelihood import Encoded, Scored, encode, score

__all__ = ["Encoded", "Interval", "Scored", "encode", "paired_bootstrap", "score", "wilson"]
