"""Engines: the whole step of many parameters, from one description (:mod:`~trimtab.ops.kernels.job`).

Every engine computes the same numbers: :mod:`~trimtab.ops.kernels.torch_engine` is written with the
functions of :mod:`trimtab.ops` and is what the others are tested against.
"""
