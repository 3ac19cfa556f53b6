"""The tiny model organism: a world of nine capabilities, models that live in it, and the quickstart.

The world is in :mod:`~trimtab.lab.world` (questions), :mod:`~trimtab.lab.answers` (scores),
:mod:`~trimtab.lab.documents` and :mod:`~trimtab.lab.preferences` (what is learnt from);
:mod:`~trimtab.lab.pretrain`, :mod:`~trimtab.lab.dpo` and :mod:`~trimtab.lab.methods` train,
:mod:`~trimtab.lab.measure` measures, :mod:`~trimtab.lab.quickstart` does it all and
:mod:`~trimtab.lab.story` tells it.
"""
