"""What pytest leaves out: doctests of modules that import what is not installed."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["src/trimtab/ops/kernels/triton_*.py"]
