"""The split of data into rows to train on and rows held out."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("split_heldout", ROOT / "scripts" / "split_heldout.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dialogue(number, reply="yes"):
    return {
        "chosen": f"\n\nHuman: question {number}\n\nAssistant: {reply}",
        "rejected": f"\n\nHuman: question {number}\n\nAssistant: no",
    }


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_every_row_lands_once_in_its_order_and_about_the_share_is_held_out(script, tmp_path, name):
    rows = [dialogue(number) for number in range(1000)]
    assert script.main([str(write(tmp_path / name, rows)), str(tmp_path / "out"), "--heldout", "0.3"]) == 0
    train, heldout = lines(tmp_path / "out" / "train.jsonl"), lines(tmp_path / "out" / "heldout.jsonl")
    given = [json.dumps(row) for row in rows]
    assert sorted(train + heldout) == sorted(given)
    assert [row for row in given if row in set(train)] == train
    assert [row for row in given if row in set(heldout)] == heldout
    assert 250 < len(heldout) < 350


def test_rows_with_the_same_question_stay_together_and_new_rows_move_no_old_ones(script, tmp_path):
    rows = [dialogue(number, reply) for number in range(200) for reply in ("yes", "well", "perhaps")]
    script.main([str(write(tmp_path / "a.jsonl", rows)), str(tmp_path / "a"), "--heldout", "0.5"])
    sides = {
        side: {script.question(row, "") for row in lines(tmp_path / "a" / f"{side}.jsonl")}
        for side in ("train", "heldout")
    }
    assert sides["train"]
    assert sides["heldout"]
    assert not sides["train"] & sides["heldout"]
    more = write(tmp_path / "b.jsonl", [dialogue(number) for number in range(500, 600)] + rows)
    script.main([str(more), str(tmp_path / "b"), "--heldout", "0.5"])
    assert set(lines(tmp_path / "a" / "heldout.jsonl")) <= set(lines(tmp_path / "b" / "heldout.jsonl"))


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "Do it.", "output": "Done."}, "Do it."),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, "Hi"),
        ({"prompt": [{"role": "user", "content": "Why?"}], "chosen": "a", "rejected": "b"}, "Why?"),
        (dialogue(7), "Human: question 7"),
    ],
)
def test_the_question_is_found_in_every_format(script, row, question):
    assert script.question(json.dumps(row), "here") == question


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot read"),
        ('{"prompt": "a"}\n{"prompt"\n', "rows.jsonl:2 is not JSON"),
        ('{"text": "a"}\n', "rows.jsonl:1 has none of the columns instruction, prompt"),
    ],
)
def test_wrong_input_is_said_in_one_sentence_and_nothing_is_written(script, tmp_path, capsys, text, sentence):
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    assert script.main([str(tmp_path / "rows.jsonl"), str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", ["0", "1", "-1"])
def test_a_share_that_splits_nothing_is_refused(script, tmp_path, capsys, share):
    source = write(tmp_path / "rows.jsonl", [dialogue(1)])
    assert script.main([str(source), str(tmp_path / "out"), f"--heldout={share}"]) == 2
    assert "between 0 and 1" in capsys.readouterr().err
