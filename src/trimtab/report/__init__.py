"""Tables, pictures and pages about reward and tax, made from plain numbers.

Nothing here knows how the numbers came about: a :class:`~trimtab.report.curves.Curve` is a list of points
(reward, tax), and everything else is computed from curves.
"""
