"""The whole pipeline with a tiny setting: every part runs, the contract's keys are there, a second run does nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_nemo.errors import InputError
from prism_nemo.quickstart.pipeline import STAGES, Quickstart
from prism_nemo.quickstart.settings import TASKS, PocketSettings

TINY = PocketSettings(
    base_steps=12, midtrain_steps=10, rl_steps=2, questions=12, documents_per_task=400, general_chars=300_000,
    prompts_per_step=4, group_size=4, vocab_size=600,
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return out, Quickstart(out, TINY, lambda line: None).run()


def test_the_summary_keeps_its_contract(done: tuple[Path, dict[str, Any]]) -> None:
    out, summary = done
    written = json.loads((out / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert {"seconds", "peak_rss_gb", "versions", "stages", "weights", "cka", "hf_export"} <= set(written)
    assert set(written["stages"]) == {"base", "midtrained", "midtrained_longer", "base_rl", "prism_rl"}
    for stage in written["stages"].values():
        assert set(stage["tasks"]) == set(TASKS)
        for task in stage["tasks"].values():
            low, high = task["ci95"]
            assert low <= task["accuracy"] <= high
            assert task["n"] == 12
            assert 0.0 <= task["greedy_accuracy"] <= 1.0
        assert 0.0 < stage["retention_loss"] < 2 * math.log(600)
    for pair in ("base->midtrained", "midtrained->prism_rl", "base->base_rl"):
        assert {"changed_fraction_1pct", "relative_l2"} <= set(written["weights"][pair])
    for pair in ("base/midtrained", "midtrained/prism_rl"):
        cka = written["cka"][pair]
        assert cka["min"] == min(cka["by_layer"])
        assert len(cka["by_layer"]) == 5
    assert written["hf_export"]["max_abs_logit_diff"] < written["hf_export"]["tolerance"]
    assert 0.1 < written["peak_rss_gb"] < 6.0


def test_mid_training_changed_the_weights(done: tuple[Path, dict[str, Any]]) -> None:
    assert done[1]["weights"]["base->midtrained"]["relative_l2"] > 0.01


def test_conversion_was_checked_at_three_layouts_and_bit_for_bit(done: tuple[Path, dict[str, Any]]) -> None:
    checks = done[1]["conversion"]
    assert [c["passed"] for c in checks] == [True] * 4
    assert {"TP1 PP1 DP1", "TP2 PP1 DP1", "TP1 PP2 DP1"} <= {c["check"].rpartition(" at ")[2] for c in checks}


def test_the_report_is_one_page_of_this_run(done: tuple[Path, dict[str, Any]]) -> None:
    page = (done[0] / "report.html").read_text()
    assert f"{done[1]['stages']['prism_rl']['retention_loss']:.3f}" in page
    assert 'src="http' not in page


def test_a_second_run_does_nothing_again(done: tuple[Path, dict[str, Any]]) -> None:
    out, summary = done
    said: list[str] = []
    again = Quickstart(out, TINY, said.append).run()
    assert said == [f"report: {out / 'report.html'}"]
    assert again["stages"] == summary["stages"]


def test_a_second_run_does_not_forget_what_the_first_measured(done: tuple[Path, dict[str, Any]]) -> None:
    """Time and memory are those of the work, not of the second run, which did none."""
    out, summary = done
    again = Quickstart(out, TINY, lambda line: None).run()
    assert again["seconds"] == summary["seconds"]
    assert again["timeline"] == summary["timeline"]
    assert again["peak_rss_gb"] == summary["peak_rss_gb"]


def test_a_run_that_was_cut_goes_on_with_the_part_it_was_at(done: tuple[Path, dict[str, Any]]) -> None:
    """As a kill leaves it: the part's files are there, its record is not. Greedy answers and losses are the same."""
    out, summary = done
    parts = json.loads((out / "parts.json").read_text())
    names = list(parts)
    for name in ("evaluate prism_rl", "weights", "export base_rl"):
        del parts[name]
    (out / "parts.json").write_text(json.dumps(parts))
    said: list[str] = []
    again = Quickstart(out, TINY, said.append).run()
    assert [line.partition(" (")[0] for line in said[:-1]] == ["evaluate prism_rl", "export base_rl", "weights"]
    assert set(json.loads((out / "parts.json").read_text())) == set(names)
    assert again["stages"] == summary["stages"]
    assert again["weights"] == summary["weights"]


def test_other_settings_in_the_same_folder_are_refused(done: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="holds a run with other settings"):
        Quickstart(done[0], replace(TINY, rl_steps=3), lambda line: None)


def test_stages_come_from_the_checkpoints_that_they_should(done: tuple[Path, dict[str, Any]]) -> None:
    parents = {}
    for stage in STAGES[1:]:
        (parent,) = json.loads((done[0] / stage / "lineage.json").read_text())["parents"]
        parents[stage] = Path(parent).parents[1].name
    assert parents == {
        "midtrained": "base", "midtrained_longer": "midtrained", "base_rl": "base", "prism_rl": "midtrained"
    }  # fmt: skip
