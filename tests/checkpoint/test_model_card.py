"""The card of an exported model: what it says is of this model, at this step, and read as it is meant."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.numpy import save_file

from prism_nemo.checkpoint.hashes import sha256
from prism_nemo.checkpoint.model_card import CARD, refuse_existing_card, write_model_card
from prism_nemo.checkpoint.model_card.markdown import escape
from prism_nemo.errors import InputError
from prism_nemo.evaluation.engines.fingerprint import fingerprint
from prism_nemo.evaluation.result import Evaluation, TaskScore

HOSTILE = '<script>alert(1)</script> | [x](javascript:1) `q` ![i](http://e.x/i) \n# H\n---\n\u202eevil "a": b\x07'


def checkpoint(path: Path, step: int = 0, **more: Any) -> Path:
    """A checkpoint without tensors: its manifest is all that a card reads."""
    path.mkdir(parents=True)
    manifest = {"architecture": {"name": str(path.name)}, "step": step, "files": {}, "sha256": {"x": str(path)}, **more}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def run_directory(path: Path, stage: str, step: int, parent: Path | None, **config: Any) -> Path:
    """A run that ended at `step`, and its checkpoint there."""
    made = checkpoint(path / "checkpoints" / f"step_{step:08d}", step, stage=path.name)
    events = [{"event": "started from", "manifest_sha256": sha256(parent / "manifest.json")}] if parent else []
    lineage = {"stage": stage, "parents": [str(parent)] if parent else [], "starts": [{}], "events": events}
    (path / "lineage.json").write_text(json.dumps(lineage | {"versions": {"prism-nemo": "9.9"}}))
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return made


@dataclasses.dataclass
class Story:
    """Base, mid-training and RL, with the export of the last."""

    root: Path
    base: Path
    mid: Path
    rl: Path
    out: Path

    def card(self, **options: Any) -> ModelCard:
        """Write the card and read it as the hub's own library does."""
        return ModelCard.load(write_model_card(self.out, self.rl, **options))


@pytest.fixture
def story(tmp_path: Path) -> Story:
    root = tmp_path / "runs"
    hf = tmp_path / "org-base"
    hf.mkdir()
    save_file({"w": np.ones((2, 3), np.float32)}, hf / "model.safetensors")
    (hf / "config.json").write_text("{}")
    (hf / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# Base\n")
    data = tmp_path / "tokens"
    data.mkdir()
    sources = [
        {"name": "general", "domain": "general", "weight": 0.2},
        {"name": HOSTILE, "domain": "math", "weight": 0.8},
    ]
    (data / "manifest.json").write_text(json.dumps({"sources": sources}))
    base = checkpoint(tmp_path / "native" / "base", imported_from=str(hf))
    mid = run_directory(
        root / "mid", "midtrain", 400, base,
        train_steps=800, seq_length=64, global_batch_size=8, data={"path": str(data)}, optimizer={"lr": 5e-5},
    )  # fmt: skip
    lines = [
        {"step": 200, "loss": 2.0, "tokens/general": 100, f"tokens/{HOSTILE}": 100},
        {"step": 400, "loss": 1.5, "tokens/general": 250, f"tokens/{HOSTILE}": 750, "epoch/general": 0.5},
        {"step": 800, "loss": 0.5, "tokens/general": 900, f"tokens/{HOSTILE}": 900},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "mid" / "metrics.jsonl").write_text(text + '{"step": 9')
    rl = run_directory(root / "rl", "rl", 30, mid, train_steps=30, tasks=[HOSTILE], rewards={"gate": "think"})
    out = tmp_path / "hf" / "prism"
    out.mkdir(parents=True)
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float32)}, out / "model.safetensors")
    (out / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512})
    )
    return Story(root, base, mid, rl, out)


def evaluation(folder: Path, model: Path, task: str = "math500", estimate: float = 0.5, **more: Any) -> Path:
    """An evaluation of a model, told by its hash alone."""
    folder.mkdir(parents=True)
    kind = "native" if (model / "manifest.json").is_file() else "huggingface"
    score = TaskScore("math", "pass@1", estimate, estimate - 0.05, estimate + 0.04, 500, 64)
    about = {"path": "/elsewhere", "kind": kind, "name": "a name", "hash": fingerprint(model)}
    found = Evaluation("reasoning", "test", about, {}, {task: score}, **more)
    (folder / "evaluation.json").write_text(json.dumps(dataclasses.asdict(found)))
    return folder


def cells(card: ModelCard) -> list[list[str]]:
    """Every table row of the card as a Markdown reader sees it."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level >= 4:
            rows[-1].append("".join(child.content for child in token.children or []))
    return rows


def test_a_card_says_where_the_model_comes_from(story: Story) -> None:
    card = story.card()
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en", "de"]
    assert card.data.library_name == "transformers"
    assert {"mid-training", "reinforcement-learning"} <= set(card.data.tags)
    assert "22 parameters" in card.text
    assert "from org-base: mid-training (mid), reinforcement learning" in card.text
    assert ["learning rate (peak)", "5e-05"] in cells(card)
    assert str(story.root) not in card.content
    assert card.data.to_dict().get("base_model") is None  # a folder's name is no id of the hub


def test_shares_are_those_at_the_checkpoint_and_not_at_the_end_of_the_run(story: Story) -> None:
    rows = {row[0]: row for row in cells(story.card())}
    assert rows["general"] == ["general", "general", "250", "25.00%", "20.00%", "0.5"]
    assert [row[1] for row in cells(story.card()) if row[0] == "steps"] == ["400 of 800", "30"]
    assert "loss 1.5" in story.card().text


def test_without_results_nothing_is_claimed(story: Story) -> None:
    card = story.card()
    assert "## Evaluation\n\n**Not measured.**" in card.text
    assert "**Not measured** question by question" in card.text
    assert "no evaluation of this model is on record" in card.text
    assert card.data.eval_results is None


def test_results_beside_the_run_are_found_and_those_of_other_models_are_not(story: Story) -> None:
    evaluation(story.root / "evals" / "rl", story.rl, estimate=0.61, marks=["279 questions, not 280"])
    evaluation(story.root / "evals" / "mid", story.mid, estimate=0.42)
    other = checkpoint(story.root / "other" / "checkpoints" / "step_00000009")
    evaluation(story.root / "evals" / "other", other, estimate=0.99)
    card = story.card()
    rows = [row for row in cells(card) if len(row) == 9 and row[1] == "math500"]
    assert [row[:6] for row in rows] == [
        ["this model", "math500", "math", "pass@1", "61.0", "56.0 to 65.0"],
        ["mid", "math500", "math", "pass@1", "42.0", "37.0 to 46.0"],
    ]
    assert "279 questions" in card.text
    (result,) = card.data.eval_results
    assert result.metric_value == 0.61
    assert result.metric_args["low"] == pytest.approx(0.56)
    assert "Abilities in: code, science, general, long context" in card.text


def test_the_export_and_the_base_folder_are_told_by_their_bytes(story: Story, tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / "e1", story.out), evaluation(tmp_path / "e2", tmp_path / "org-base", "bbh")]
    owners = {row[1]: row[0] for row in cells(story.card(results=folders)) if len(row) == 9}
    assert owners["math500"] == "this model"
    assert owners["bbh"] == "org-base"


def test_results_of_another_model_are_refused(story: Story, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other")
    with pytest.raises(InputError, match="is about another model"):
        story.card(results=[evaluation(tmp_path / "e", other)])
    with pytest.raises(InputError, match="holds neither"):
        story.card(results=[tmp_path])
    assert not (story.out / CARD).exists()


def test_retention_with_its_verdicts(story: Story, tmp_path: Path) -> None:
    mine = evaluation(tmp_path / "e", story.rl)
    theirs = evaluation(tmp_path / "f", checkpoint(tmp_path / "other"))
    line = {"name": "mmlu", "kind": "task", "unit": "share", "base": 0.62, "model": 0.6, "change": -0.02}
    line |= {"low": -0.035, "high": -0.005, "verdict": "lost"}
    models = [{"path": str(mine), "lines": [line]}, {"path": str(theirs), "lines": [{**line, "name": "not mine"}]}]
    folder = tmp_path / "retention"
    folder.mkdir()
    (folder / "retention.json").write_text(json.dumps({"base": "org/base", "suite": "retention", "models": models}))
    card = story.card(results=[folder])
    assert ["mmlu", "62.00", "60.00", "-2.00", "-3.50 to -0.50", "lost"] in cells(card)
    assert "not mine" not in card.text
    assert "Changes against org/base" in card.text


def test_hostile_names_are_text(story: Story) -> None:
    evaluation(story.root / "evals" / "rl", story.rl, task=HOSTILE)
    card = story.card()
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").render(card.text)
    assert "<script" not in shown
    assert "<img" not in shown
    assert 'javascript:1"' not in shown
    assert "<a " not in shown
    assert "\u202e" not in card.content
    assert "\x07" not in card.content
    assert [row[0] for row in cells(card) if row and row[0].startswith("<script>")]
    assert all(len(row) in (2, 6, 9) for row in cells(card))
    (result,) = card.data.eval_results
    assert result.dataset_name.startswith("<script>")


@pytest.mark.parametrize(
    "text", ["- a", "+ a", "1. a", "1) a", "# a", "> a", "www.e.x", "http://e.x", "a@b.c", "&lt;", "~~a~~"]
)
def test_escaped_text_reads_as_it_was(text: str) -> None:
    (token,) = [t for t in MarkdownIt("gfm-like", {"linkify": False}).parse(escape(text)) if t.type == "inline"]
    assert "".join(child.content for child in token.children or []) == text


def test_a_moved_run_is_followed_and_a_replaced_parent_is_not(story: Story, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    story.root.rename(moved)
    rl = moved / "rl" / "checkpoints" / story.rl.name
    text = write_model_card(story.out, rl).read_text()
    assert "mid-training (mid)" in text
    manifest = moved / "mid" / "checkpoints" / story.mid.name / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    text = write_model_card(story.out, rl).read_text()
    assert "mid-training (mid)" not in text
    assert "The record has a gap: rl started from step" in text.replace("\\", "")
    assert "Licence: **unknown**" in text


def test_an_unknown_licence_is_said_and_not_guessed(story: Story, tmp_path: Path) -> None:
    readme = tmp_path / "org-base" / "README.md"
    readme.unlink()
    card = story.card()
    assert card.data.to_dict().get("license") is None
    assert "Licence of the base model: **unknown** (org-base has neither" in card.text
    (tmp_path / "org-base" / "LICENSE").write_text("\n  Some Community Licence\nmore")
    card = story.card()
    assert card.data.to_dict().get("license") is None
    assert "begins with: Some Community Licence" in card.text


def test_a_hub_model_is_named_with_its_commit(story: Story) -> None:
    manifest = json.loads((story.base / "manifest.json").read_text()) | {"imported_from": "ibm-granite/granite@abc123"}
    (story.base / "manifest.json").write_text(json.dumps(manifest))
    path = story.root / "mid" / "lineage.json"
    lineage = json.loads(path.read_text())
    lineage["events"][0]["manifest_sha256"] = sha256(story.base / "manifest.json")
    path.write_text(json.dumps(lineage))
    card = story.card()
    assert card.data.base_model == "ibm-granite/granite"
    assert "commit abc123" in card.text


def test_weights_from_nothing_have_no_base(story: Story) -> None:
    path = story.root / "mid" / "lineage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parents": []}))
    card = story.card()
    assert "There is no base model" in card.text
    assert "training from nothing (mid)" in card.text
    assert card.data.to_dict().get("license") is None


def test_a_card_of_somebody_else_is_kept(story: Story) -> None:
    story.card()
    story.card()  # ours may be written anew
    (story.out / CARD).write_text("# Mine\n")
    with pytest.raises(InputError, match="--overwrite-card"):
        refuse_existing_card(story.out)
    with pytest.raises(InputError, match="--overwrite-card"):
        story.card()
    assert (story.out / CARD).read_text() == "# Mine\n"
    assert "Written by prism-nemo" in story.card(overwrite=True).content


def test_what_cannot_be_used_is_refused(story: Story, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json is missing"):
        write_model_card(tmp_path, story.rl)
    path = story.root / "mid" / "lineage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parents": [str(story.rl)], "events": []}))
    with pytest.raises(InputError, match="its own ancestor"):
        story.card()


def test_the_quickstart_summary_counts_for_the_checkpoint_that_it_evaluated(story: Story) -> None:
    tasks = {"lists": {"n": 800, "accuracy": 0.73, "ci95": [0.7, 0.76]}}
    stages = {"rl": {"tasks": tasks, "retention_loss": 3.5}, "mid": {"tasks": tasks}, "other": {"tasks": tasks}}
    (story.root / "summary.json").write_text(json.dumps({"stages": stages}))
    rows = [row for row in cells(story.card()) if len(row) == 9][1:]
    assert [row[0] for row in rows] == ["this model", "this model", "mid"]
    assert rows[1][4:6] == ["3.5000", "not measured"]
    checkpoint(story.root / "rl" / "checkpoints" / "step_00000090")
    rows = [row for row in cells(story.card()) if len(row) == 9][1:]
    assert [row[0] for row in rows] == ["mid"]
