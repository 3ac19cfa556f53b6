"""Compiling the kernels: every way it can fail is one sentence, and nothing half-written is ever found."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.ops.kernels import build

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the kernels are compiled on POSIX systems only")

# A compiler that writes the arguments' number of letters: what is built from what can be seen, in no time.
FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake 1.0"; exit 0; fi
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; [ "${1##*.}" = c ] && source=$1; shift; done
echo "$source" >> "$(dirname "$0")/calls"
cat "$source" > "$out"
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """The fake compiler; beside it, ``calls`` has a line for each compilation."""
    path = executable(tmp_path / "fakecc", FAKE)
    monkeypatch.setenv("CC", str(path))
    return path


def calls(fake: Path) -> int:
    return len((fake.parent / "calls").read_text(encoding="utf-8").splitlines())


def test_it_is_compiled_once(fake: Path, cache: Path) -> None:
    first = build.library()
    assert first.parent == cache
    assert first.read_bytes() == (build.SOURCES / "native.c").read_bytes()
    assert build.library() == first
    assert calls(fake) == 1
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_what_it_depends_on_names_it(
    fake: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [build.library().name, build.library(["SQRT=1"]).name]
    executable(fake, FAKE.replace("fake 1.0", "fake 1.1"))
    names.append(build.library().name)
    monkeypatch.setattr(build, "_processor", lambda: "another processor")
    names.append(build.library().name)
    (tmp_path / "native").mkdir()
    (tmp_path / "native.c").write_text("int answer = 42;\n", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    names.append(build.library().name)
    (tmp_path / "native" / "part.h").write_text("/* included */\n", encoding="utf-8")
    names.append(build.library().name)
    assert len(set(names)) == 6
    assert calls(fake) == 6


def test_the_sources_are_all_there() -> None:
    names = [path.name for path in build.sources()]
    assert names[0] == "native.c"
    included = {
        line.split('"')[1].split("/")[-1]
        for path in build.sources()
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith('#include "')
    }
    assert included == set(names[1:])


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match=r"^there is no C compiler \(cc, gcc or clang\)$"):
        build.library()


def test_a_compiler_that_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "nocc -O2")
    with pytest.raises(build.BuildError, match="no compiler 'nocc', which the environment variable CC names"):
        build.library()


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo 'native.c:1: error: no such' >&2; exit 1", "not compile the CPU kernels: native.c:1: error"),
        ("exit 3", "does not compile the CPU kernels: exit code 3"),
        ("exit 0", "does not compile the CPU kernels: exit code 0"),  # and nothing written
    ],
)  # fmt: skip
def test_a_broken_compiler(fake: Path, cache: Path, script: str, sentence: str) -> None:
    executable(fake, f"#!/bin/sh\n{script}\n")
    with pytest.raises(build.BuildError, match=sentence) as error:
        build.library()
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_a_compiler_that_cannot_be_run(fake: Path) -> None:
    executable(fake, "#!/no/such/interpreter\n")
    with pytest.raises(build.BuildError, match="cannot be run"):
        build.library()


def test_a_compiler_that_does_not_end(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(fake, "#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(build, "_TIMEOUT", 0.05)
    with pytest.raises(build.BuildError, match=r"has not ended after 0\.05 seconds"):
        build.library()


def test_a_cache_that_cannot_be_written(fake: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(build.BuildError, match=r"compiled kernels cannot be kept in .*cache \("):
        build.library()


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"TRIMTAB_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/trimtab"),
        ({"HOME": "/c"}, "/c/.cache/trimtab"),
    ],
)
def test_where_the_cache_is(
    environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRIMTAB_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert build.cache_folder() == Path(folder)


def test_processes_that_compile_at_once_end_with_one_library(fake: Path, cache: Path, tmp_path: Path) -> None:
    # Each compilation waits until both have begun, so that both write.
    meeting = 'echo . >> "$0.met"; until [ "$(wc -l < "$0.met")" -ge 2 ]; do :; done\n'
    executable(fake, FAKE.replace("echo", meeting + "echo", 2).replace(meeting, "", 1))
    code = (
        "import importlib.util as i, sys; s = i.spec_from_file_location('build', sys.argv[1]); "
        "m = i.module_from_spec(s); s.loader.exec_module(m); print(m.library())"
    )
    command = [sys.executable, "-c", code, str(Path(build.__file__))]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [process.communicate(timeout=60)[0].strip() for process in both]
    assert found[0] == found[1]
    assert calls(fake) == 2
    assert [str(path) for path in cache.iterdir()] == [found[0]]
    assert Path(found[0]).read_bytes() == (build.SOURCES / "native.c").read_bytes()
