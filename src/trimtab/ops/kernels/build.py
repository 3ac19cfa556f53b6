"""Compiling the CPU kernels at first use, and keeping them in the user's cache.

What is compiled is named by a hash of all it depends on (sources, flags, compiler, processor), so that
nothing in the cache is ever stale: a change makes a new name. It is written under a temporary name and
renamed, and two processes that compile at once both end with the same file.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
"""Where ``native.c`` lies; what it includes lies in ``native``."""

# No contraction: every product and every sum rounds, as torch's do, unless the source says fma. The other two
# let loops with square roots and conditions be vectorised, and change no number.
_FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_QUIET = ("-w",)
_TIMEOUT = 120


class BuildError(Exception):
    """Why there is no library: one sentence."""


def cache_folder() -> Path:
    """Where libraries are kept: ``TRIMTAB_CACHE``, or ``trimtab`` in the user's cache folder."""
    if chosen := os.environ.get("TRIMTAB_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


def compiler() -> list[str]:
    """The C compiler's command: ``CC``, or the first of cc, gcc and clang that is there.

    Raises:
        BuildError: there is none.
    """
    if os.name != "posix":
        raise BuildError(f"the CPU kernels are not compiled on {platform.system()}")
    if chosen := shlex.split(os.environ.get("CC", "")):
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"there is no compiler {chosen[0]!r}, which the environment variable CC names")
        return chosen
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise BuildError("there is no C compiler (cc, gcc or clang)")


def flags(defines: Sequence[str] = ()) -> list[str]:
    """The compiler's flags; ``defines`` are macros, as ``NAME=VALUE``."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return [*_FLAGS, "-mcpu=native" if arm else "-march=native", *(f"-D{define}" for define in defines)]


def library(defines: Sequence[str] = ()) -> Path:
    """The compiled library: from the cache, or compiled into it (1 to 3 seconds).

    Args:
        defines: macros, as ``NAME=VALUE``.

    Raises:
        BuildError: no compiler, no cache to write to, or sources that do not compile here.
    """
    command, options = compiler(), flags(defines)
    path = cache_folder() / f"native-{_digest(command, options)}.so"
    if not path.is_file():
        _compile([*command, *options, *_QUIET], path)
    return path


def sources() -> list[Path]:
    """All files that make up the library, ``native.c`` first."""
    return [SOURCES / "native.c", *sorted((SOURCES / "native").glob("*.h"))]


def _digest(command: Sequence[str], options: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    described = [*command, *options, _run([*command, "--version"]).stdout, _processor()]
    for part in [*described, *(source.read_text(encoding="utf-8") for source in sources())]:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _processor() -> str:
    """What ``-march=native`` depends on, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "cpu family", "model\t", "stepping", "flags", "features", "cpu part")
    first = {line.partition(":")[0]: line for line in reversed(lines) if line.lower().startswith(wanted)}
    return "\n".join(first[key] for key in sorted(first))


def _compile(command: Sequence[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".so", dir=path.parent)
    except OSError as error:
        raise BuildError(f"compiled kernels cannot be kept in {path.parent} ({error.strerror})") from error
    os.close(handle)
    try:
        done = _run([*command, str(SOURCES / "native.c"), "-o", name])
        if done.returncode != 0 or Path(name).stat().st_size == 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            said = lines[0].strip() if lines else f"exit code {done.returncode}"
            raise BuildError(f"{command[0]} does not compile the CPU kernels: {said}")
        os.chmod(name, 0o755)
        os.replace(name, path)
    except OSError as error:
        raise BuildError(f"compiled kernels cannot be kept in {path.parent} ({error.strerror})") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} has not ended after {_TIMEOUT} seconds") from error
    except OSError as error:
        raise BuildError(f"the compiler {command[0]!r} cannot be run ({error.strerror})") from error
