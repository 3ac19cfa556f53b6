"""``trimtab.train.run``: the run folder it leaves, what it refuses, and how it stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import tiny
from trimtab import UserError
from trimtab.recipe import make_recipe
from trimtab.terminal import plain_libraries
from trimtab.train import config_class, run
from trimtab.train.checkpoints import checkpoint_folders, last_complete, read_marker

pytestmark = pytest.mark.xdist_group("train")  # one worker: what costs is importing TRL


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def records(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_models: Any, tiny_pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with K = 3 over 4 steps, evaluations and samples; to be copied before it is changed."""
    values = tiny.recipe(
        tiny_models,
        tiny_pairs,
        tmp_path_factory.mktemp("run") / "out",
        optimizer={"merge_every": 3},
        training={"save_total_limit": 1},
        evaluation={"every": 2, "samples": 2, "max_new_tokens": 5, "prompts": ["say hello"]},
    )
    return tiny.train(values)


def test_the_run_folder_is_as_promised(finished: Path) -> None:
    top = {path.name for path in finished.iterdir()}
    written = {"README.md", "environment.json", "metrics.jsonl", "recipe.yaml"}
    assert top == written | {"checkpoint-4", "model", "results"}
    assert files(finished / "results") == {"data.json", "samples.json"}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trimtab.json"} <= files(
        finished / "checkpoint-4"
    )
    assert not [name for name in files(finished / "model") if name.endswith((".bin", ".pt", ".pth"))]
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert (environment["seed"], environment["device"], environment["processes"]) == (0, "cpu", 1)
    assert environment["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


def test_the_resolved_recipe_reads_back_as_the_same_recipe(finished: Path) -> None:
    values = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert make_recipe(values, config_class=config_class).resolved() == values


def test_every_log_is_a_line_with_its_step(finished: Path) -> None:
    lines = records(finished)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    assert all(line["time"] > 1.7e9 for line in lines)
    assert lines[0]["eval_rewards/margins"] == 0.0  # the policy is the reference, exactly


def test_the_model_loads_and_is_the_last_checkpoint_merged(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert model.dtype == torch.float32
    assert model.config.use_cache
    assert AutoTokenizer.from_pretrained(finished / "model").chat_template == tiny.CHAT_TEMPLATE
    saved, checkpoint = tiny.weights(finished / "model"), tiny.weights(finished / "checkpoint-4")
    assert saved.keys() == checkpoint.keys()
    assert all(torch.equal(saved[name], checkpoint[name]) for name in saved)
    state = torch.load(finished / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert {entry["merge_since"] for entry in state.values()} == {0}  # 4 = 3 + 1: nothing is left pending
    anchors = {tuple(entry["merge_anchor"].shape) for entry in state.values()}
    assert len(state) == len(saved)
    assert anchors == {tuple(value.shape) for value in saved.values()}


def test_answers_before_and_after_and_counts_are_kept(finished: Path) -> None:
    samples = json.loads((finished / "results" / "samples.json").read_text())
    assert list(samples) == ["before", "after"]
    assert [len(samples["before"]), len(samples["after"])] == [3, 3]
    assert samples["after"][2]["prompt"] == [{"role": "user", "content": "say hello"}]
    counts = json.loads((finished / "results" / "data.json").read_text())
    assert [counts[part]["sources"][0]["kept"] for part in ("train", "eval")] == [24, 8]


def test_the_card_tells_what_was_done(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    assert "OnDARE (lr 0.001, merge weight 0.001, reserve rate 0.5, a merge every 3 steps" in card
    assert "| rewards/margins | 0 |" in card
    assert "fingerprint" in card
    head = card.split("---")[1]
    assert yaml.safe_load(head) == {"library_name": "transformers", "tags": ["trimtab", "dpo"]}


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of the finished run and its recipe, pointed at the copy."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    return folder, yaml.safe_load((folder / "recipe.yaml").read_text()) | {"output": str(folder)}


def test_a_run_is_not_overwritten_unasked(copied: Any) -> None:
    folder, values = copied
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    with pytest.raises(UserError, match="already holds a run; continue it with --resume, replace it with"):
        tiny.train(values)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_overwriting_replaces_the_run_and_only_it(copied: Any) -> None:
    folder, values = copied
    (folder / "notes.txt").write_text("mine")
    short = {**values, "training": {**values["training"], "max_steps": 1}, "evaluation": {"samples": 0}}
    tiny.train(short, overwrite=True)
    assert list(checkpoint_folders(folder)) == [1]
    assert (folder / "notes.txt").read_text() == "mine"
    assert files(folder / "results") == {"data.json"}


def test_a_folder_of_something_else_is_refused(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"is not empty and holds no run \(recipe\.yaml is missing\)"):
            tiny.train(tiny.recipe(tiny_models, tiny_pairs, tmp_path), **flags)
    assert files(tmp_path) == {"thesis.tex"}


def test_resuming_a_finished_run_says_so_and_changes_nothing(copied: Any, capsys: Any) -> None:
    folder, values = copied
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    assert tiny.train(values, resume=True) == folder
    assert "is finished" in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_resuming_with_another_recipe_is_refused(copied: Any) -> None:
    _, values = copied
    other = {**values, "optimizer": {**values["optimizer"], "merge_weight": 0.5}}
    with pytest.raises(UserError, match=r"optimizer\.merge_weight \(was 0\.001, now 0\.5\)"):
        tiny.train(other, resume=True)


def test_a_resume_sets_incomplete_checkpoints_aside_and_cuts_the_metrics(copied: Any, capsys: Any) -> None:
    folder, values = copied
    shutil.rmtree(folder / "model")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-9")
    (folder / "checkpoint-9" / "trimtab.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    (folder / ".model.a1b2.tmp").mkdir()
    (folder / ".model.a1b2.tmp" / "model.safetensors").write_bytes(b"half")
    (folder / "results" / ".data.json.c3d4.tmp").write_text("half")
    tiny.train(values, resume=True)
    said = capsys.readouterr().err
    assert "an incomplete checkpoint was set aside as" in said
    assert (folder / "checkpoint-9.incomplete" / "optimizer.pt").exists()
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    assert max(line["step"] for line in records(folder)) == 4
    environment = json.loads((folder / "environment.json").read_text())
    assert [note["from"] for note in environment["resumed"]] == ["checkpoint-4"]


def test_a_resume_with_nothing_to_resume_starts_anew(copied: Any, capsys: Any) -> None:
    folder, values = copied
    for path in (folder / "model", folder / "checkpoint-4" / "trimtab.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    fewer = {**values["evaluation"], "samples": 0, "prompts": []}
    tiny.train({**values, "evaluation": fewer}, resume=True)
    assert "holds no complete checkpoint; the run starts anew" in capsys.readouterr().err
    assert (folder / "checkpoint-4.incomplete").is_dir()
    assert read_marker(folder / "checkpoint-4") is not None
    assert [line["step"] for line in records(folder) if "loss" in line] == [1, 2, 3, 4]


def test_another_number_of_processes_cannot_resume(copied: Any) -> None:
    folder, values = copied
    shutil.rmtree(folder / "model")
    marker = folder / "checkpoint-4" / "trimtab.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"world_size": 2}))
    with pytest.raises(UserError, match="was written by 2 processes and this run has 1"):
        tiny.train(values, resume=True)


def test_a_training_that_diverges_stops_before_the_step_that_would_spread_it(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    section = {**tiny.ADAMW, "lr": 1e30}
    training = {"save_steps": 1, "max_steps": 9}
    values = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "o", optimizer=section, training=training, base=None
    )
    sentence = (
        r"the gradient norm is (nan|inf) at step 2 .* checkpoint is .*checkpoint-1; lower optimizer\.lr"
    )
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)
    kept = last_complete(tmp_path / "o")
    assert kept is not None
    assert kept.name == "checkpoint-1"
    assert all(value.isfinite().all() for value in tiny.weights(kept).values())
    assert not (tmp_path / "o" / "model").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = tmp_path / "broken"
    shutil.copytree(tiny_models[1], broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(broken)
    values = tiny.recipe(
        (tiny_models[0], broken), tiny_pairs, tmp_path / "o", optimizer=tiny.ADAMW, base=None
    )
    with pytest.raises(UserError, match=r"the loss is nan at step 1 .*no checkpoint was written yet"):
        tiny.train(values)
    assert all("NaN" not in line for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines())


def test_an_interrupt_is_passed_on_and_says_how_to_go_on(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from trimtab.train.dpo import MergingDPOTrainer

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    training_step = MergingDPOTrainer.training_step
    monkeypatch.setattr(MergingDPOTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        tiny.train(tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o"))
    (note,) = stop.value.__notes__
    assert note.endswith("checkpoint-2 is complete, so the same command with --resume continues from there")
    assert "complete, so" not in capsys.readouterr().err  # the command says it, in one line with the stop


def test_a_run_killed_while_its_first_files_were_written_can_be_resumed(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        (path.parent / f".{path.name}.a1b2.tmp").write_text(text[:40])
        raise SystemExit(9)

    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", training={"max_steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr("trimtab.train.folder.write_text", killed)
        with pytest.raises(SystemExit):
            tiny.train(values)
    assert not (tmp_path / "o" / "recipe.yaml").exists()
    folder = tiny.train(values, resume=True)
    assert (folder / "model").is_dir()
    assert not list(folder.glob(".*.tmp"))


def test_an_interrupted_save_leaves_no_half_checkpoint(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer._save_rng_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o"))
    assert checkpoint_folders(tmp_path / "o") == {}


def test_a_full_disk_is_said_in_a_sentence(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", full)
    with pytest.raises(UserError, match="no space is left on the disk of"):
        tiny.train(tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o"))
    assert checkpoint_folders(tmp_path / "o") == {}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"training": {"evaluation_strategy": "steps"}}, "evaluation_strategy"),
        ({"streaming": True}, r"training\.max_steps"),
        ({"training": {"fp16": True, "bf16": True}}, "training: At most one of fp16 and bf16"),
        (
            {"training": {"fsdp": True}},
            r"training\.fsdp is not supported yet; several processes train with DDP",
        ),
        (
            {"training": {"save_only_model": True}},
            r"training\.save_only_model would leave nothing that a resume",
        ),
        (
            {"training": {"ignore_data_skip": True}},
            r"training\.ignore_data_skip would give a resumed run other",
        ),
        ({"training": {"auto_find_batch_size": True}}, r"training\.auto_find_batch_size would change"),
        ({"training": {"push_to_hub": True}}, r"training\.push_to_hub is not supported yet"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    change: dict[str, Any], sentence: str, tiny_models: Any, tiny_pairs: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", **change)
    if values.pop("streaming", False):
        values["data"]["streaming"] = True
        values["training"] = {}
    with pytest.raises(UserError, match=sentence):
        tiny.train(values)
    assert not (tmp_path / "o").exists()


def test_what_trl_refuses_is_said_as_a_mistake(tiny_models: Any, tiny_pairs: Any, tmp_path: Path) -> None:
    training = {"f_divergence_type": "js_divergence"}
    values = tiny.recipe(
        tiny_models, tiny_pairs, tmp_path / "o", loss={"type": "nca_pair"}, training=training
    )
    with pytest.raises(
        UserError, match="TRL refuses this dpo recipe: `f_divergence_type='js_divergence'` is"
    ):
        tiny.train(values)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("key", "other"), [("reference", {}), ("model", {}), ("model", {"reference": None})])
def test_a_model_that_is_not_there_is_reported_under_its_key(
    key: str, other: dict[str, None], tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", **{key: "nobody/nothing"}, **other)
    with pytest.raises(UserError, match=f"^{key}: there is no folder 'nobody/nothing' here, and the hub"):
        tiny.train(values)


def test_conversations_without_a_chat_template_are_refused(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_models[1], bare)
    tiny.tokenizer(chat_template=None).save_pretrained(bare)
    (bare / "chat_template.jinja").unlink()
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o", reference=str(bare))
    with pytest.raises(UserError, match="chat template"):
        tiny.train(values)
    assert not (tmp_path / "o").exists()


def test_a_tokenizer_without_padding_pads_with_its_end(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path
) -> None:
    from trimtab.model_folder import find_model, load_tokenizer

    bare = tmp_path / "bare"
    shutil.copytree(tiny_models[1], bare)
    tiny.tokenizer(pad_token=None).save_pretrained(bare)
    tokenizer = load_tokenizer(find_model(str(bare), "model"))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"


def test_sft_trains_and_its_model_can_be_the_reference(tiny_models: Any, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.instruction_rows(16))
    values = {
        "method": "sft",
        "model": str(tiny_models[0]),
        "data": {"train": str(rows), "max_length": 64},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1},
        "output": str(tmp_path / "sft"),
    }
    folder = tiny.train(values)
    losses = [line["loss"] for line in records(folder) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preference_rows(4))
    tuned = tiny.recipe(
        (tiny_models[0], folder / "model"), (pairs, pairs), tmp_path / "dpo", evaluation={"at_start": True}
    )
    assert records(tiny.train(tuned))[0]["eval_rewards/margins"] == 0.0


def test_a_dry_run_loads_no_weights_and_writes_nothing(
    tiny_models: Any, tiny_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    values = tiny.recipe(tiny_models, tiny_pairs, tmp_path / "o")
    assert run(make_recipe(values, config_class=config_class), dry_run=True) is None
    said = capsys.readouterr().out
    assert yaml.safe_load(said[: said.index("\n\n")])["optimizer"]["name"] == "ondare"
    assert "20,896 (20,896 trained)" in said
    assert "4 of 2 rows" in said
    assert not (tmp_path / "o").exists()


def test_library_settings_are_put_back() -> None:
    import datasets
    from transformers.utils import logging

    before = (datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled())
    with plain_libraries():
        pass
    assert (datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()) == before
