"""Our model class in lm-eval: the same tokens, scores and answers as its own Hugging Face backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from harness_files import Knowing, save_model, save_tokenizer_files, write_tasks
from harness_workers import TASKS, ours, theirs_and_ours
from lm_eval.api.model import CachingLM

from prism_nemo import lm_eval_door
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.harness.model import PrismNemoLM
from prism_nemo.runtime.launch import launch

ENGINES = ("megatron", "transformers")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["plain", "bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer adds no token to texts, and one whose tokenizer does."""
    return save_model(tmp_path_factory.mktemp("models") / request.param, bos=request.param == "bos")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def found(folder: Path, tasks: Path) -> dict[str, dict[str, Any]]:
    both: dict[str, dict[str, Any]] = launch(theirs_and_ours, str(folder), str(tasks), ENGINES)
    return both


def check_same(theirs: dict[str, Any], mine: dict[str, Any], name: str) -> None:
    """Log-probabilities within 1e-4, all else equal; perplexities of sums of many of them within 1e-4 of themselves."""
    assert len(theirs["answers"][name]) == len(mine["answers"][name]) > 0
    for (doc, expected), (own_doc, got) in zip(theirs["answers"][name], mine["answers"][name], strict=True):
        assert doc == own_doc
        for (wanted,), (given,) in zip(expected, got, strict=True):
            if isinstance(wanted, tuple | list):
                assert given[0] == pytest.approx(wanted[0], abs=1e-4)
                assert given[1] == wanted[1]
            elif isinstance(wanted, float):
                # A whole text is a sum over windows: each is within 1e-4.
                assert given == pytest.approx(wanted, abs=1e-3)
            else:
                assert given == wanted
    results, own = theirs["results"][name], mine["results"][name]
    assert results.keys() == own.keys()
    for metric, value in results.items():
        if isinstance(value, float):
            exact = metric.startswith(("acc", "exact_match"))
            assert own[metric] == (value if exact else pytest.approx(value, rel=1e-4)), metric


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TASKS)
def test_same_scores_as_the_hugging_face_backend(found: dict[str, dict[str, Any]], name: str, engine: str) -> None:
    check_same(found["hf"], found[engine], name)


def test_the_comparison_has_something_to_compare(found: dict[str, dict[str, Any]]) -> None:
    """Else a model that prefers one option always, or texts that all fit, would show nothing."""
    theirs = found["hf"]
    assert 0 < theirs["results"]["choices"]["acc,none"] < 1
    scores = [[score for ((score, _),) in options] for _, options in theirs["answers"]["choices"]]
    assert len({options.index(max(options)) for options in scores}) >= 3
    written = [answer for _, ((answer,),) in theirs["answers"]["writing"]]
    assert len(set(written)) > 1
    assert any(written)


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_same_tokens_as_the_hugging_face_backend(found: dict[str, Any], add_bos: bool | None) -> None:
    theirs, mine = found["tokens"][add_bos]
    assert mine == theirs


def test_same_scores_on_two_ranks(folder: Path, found: dict[str, dict[str, Any]], tasks: Path) -> None:
    """Tensor-parallel with one tokenizer, in a pipeline with the other one."""
    tp, pp = (2, 1) if folder.name == "bos" else (1, 2)
    several = launch(ours, str(folder), str(tasks), tp, pp, processes=2)
    for name in TASKS:
        check_same(found["megatron"], several, name)


class _Asked:
    """A request as lm-eval makes it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer_files(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 50])
def test_each_token_of_a_text_is_scored_once(tokenizer: Any, length: int) -> None:
    model = Knowing(tokenizer, max_length=16)
    lm = PrismNemoLM(checkpoint=model)
    ids = [5 + i for i in range(length)]
    lm.text.encode = lambda text, add_special_tokens=None: ids  # type: ignore[method-assign]
    (total,) = lm.loglikelihood_rolling([_Asked("a text")])
    assert [token for asked in model.scored for token in asked.tokens] == ids
    assert total == -50.0 * length
    first, *rest = model.scored
    assert list(first.context) == [tokenizer.eos_id]
    done = len(first.tokens)
    for asked in rest:  # with all the context that there is room for
        whole = [*asked.context, *asked.tokens]
        assert len(whole) == 17
        assert whole == ids[done + len(asked.tokens) - 17 : done + len(asked.tokens)]
        done += len(asked.tokens)


def test_long_contexts_are_cut_from_the_left(tokenizer: Any) -> None:
    model = Knowing(tokenizer, max_length=8)
    lm = PrismNemoLM(checkpoint=model)
    context = "red fox sees a slow dog near old trees and two birds sing of rain"
    lm.loglikelihood([_Asked(context, " in a town")])
    (asked,) = model.scored
    ids = tokenizer.encode(context + " in a town")
    assert [*asked.context, *asked.tokens] == ids[-9:]  # the last is scored, not read
    assert tokenizer.decode(asked.tokens) == " in a town"


def test_a_continuation_that_cannot_be_scored_is_named(tokenizer: Any) -> None:
    lm = PrismNemoLM(checkpoint=Knowing(tokenizer, max_length=4))
    with pytest.raises(PrismError, match=r"' sees a slow dog near old trees' after .*the model reads 4"):
        lm.loglikelihood([_Asked("red fox", " sees a slow dog near old trees")])
    with pytest.raises(PrismError, match="nothing is left to score of ''"):
        lm.loglikelihood([_Asked("red fox", "")])


def test_nothing_asked_nothing_answered(tokenizer: Any) -> None:
    lm = PrismNemoLM(checkpoint=Knowing(tokenizer))
    assert lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == lm.generate_until([]) == []


def test_how_answers_are_asked_for(tokenizer: Any) -> None:
    model = Knowing(tokenizer, writes=lambda prompt: " fox the end", max_length=64)
    (tokenizer.path.parent / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 7]}))
    lm = PrismNemoLM(checkpoint=model)
    answers = lm.generate_until(
        [
            _Asked("red", {"until": ["the", ""], "max_gen_toks": 30}),
            _Asked("red", {"until": "\n", "max_new_tokens": 2, "do_sample": True, "temperature": 0.5, "top_p": 0.9}),
            _Asked("red", {"until": "\n", "max_new_tokens": 2, "do_sample": True, "temperature": 0.5, "top_p": 0.9}),
            _Asked("slow dog " * 40, {"max_gen_toks": 60}),
        ]
    )
    greedy, sampled, again, long = (request.sampling for request in model.requests)
    assert answers[0] == " fox "  # up to the stop text, without it
    assert greedy.stop_texts == ("the",)
    assert greedy.stop_ids == (tokenizer.eos_id, 7)
    assert (greedy.temperature, greedy.max_new_tokens) == (0.0, 30)
    assert (sampled.temperature, sampled.top_p, sampled.top_k, sampled.max_new_tokens) == (0.5, 0.9, 0, 2)
    assert sampled.seed != again.seed  # the same question twice: two answers
    assert long.stop_texts == ()
    assert model.requests[3].prompt == tokenizer.encode("slow dog " * 40)[-4:]
    assert not lm.was_cut("red", answers[0])
    assert lm.was_cut("red", answers[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "num_beams cannot be followed"),
        ({"max_gen_toks": 64}, "max_gen_toks: 64 leaves no room"),
        ({}, "max_gen_toks: 256 leaves no room"),
    ],
)
def test_what_cannot_be_followed_is_refused(tokenizer: Any, given: dict[str, Any], message: str) -> None:
    lm = PrismNemoLM(checkpoint=Knowing(tokenizer, max_length=64))
    with pytest.raises(PrismError, match=message):
        lm.generate_until([_Asked("red", given)])


def test_thinking_is_cut_off_before_the_stop_texts_count(tokenizer: Any) -> None:
    model = Knowing(tokenizer, writes=lambda prompt: "the\n\nred</think> slow dog\nbirds")
    lm = PrismNemoLM(checkpoint=model, think_end_token="</think>")
    assert lm.generate_until([_Asked("red", {"until": ["\n"]})]) == ["slow dog"]
    assert model.requests[0].sampling.stop_texts == ()


def test_cached_answers_are_not_asked_for_again(tokenizer: Any, tmp_path: Path) -> None:
    def lm(model: Knowing) -> CachingLM:
        return CachingLM(PrismNemoLM(checkpoint=model), str(tmp_path / "cache.db"))

    asked = [_Asked("red fox", " sees"), _Asked("red fox", " dog")]
    first, second = Knowing(tokenizer, likes=lambda c, t: t == " dog"), Knowing(tokenizer)
    expected = lm(first).loglikelihood(asked)
    assert lm(second).loglikelihood(asked) == expected
    assert len(first.scored) == 2
    assert second.scored == []


def test_a_cache_is_refused_on_several_ranks(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = PrismNemoLM(checkpoint=Knowing(tokenizer))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="--use_cache works with one process only"):
        CachingLM(lm, str(tmp_path / "cache.db"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "checkpoint is missing"),
        ({"checkpoint": "x", "engin": "vllm"}, r"engin is unknown; did you mean engine\?"),
        ({"checkpoint": "x", "trust_remote_code": True}, "trust_remote_code"),
        ({"checkpoint": "x", "tp": 2}, "needs 2 processes; start them with `torchrun --nproc-per-node 2 -m lm_eval"),
        ({"checkpoint": "nowhere"}, "nowhere: no such folder"),
        ({"checkpoint": 12}, "12: no such folder"),
        ({"checkpoint": "x", "engine": "transformers", "batch_tokens": 9}, "batch_tokens: no option of engine"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    # What lm-eval gives along.
    with pytest.raises(InputError, match=message):
        PrismNemoLM.create_from_arg_obj(options, {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"})


def test_lengths_beyond_the_model_are_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="max_length: 65 is not from 1 to the model's 64"):
        PrismNemoLM(checkpoint=Knowing(tokenizer, max_length=64), max_length=65)
    assert PrismNemoLM(checkpoint=Knowing(tokenizer, max_length=64), max_length=32).max_length == 32


def test_the_door_is_shut_where_lm_eval_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lm_eval")
    monkeypatch.delitem(sys.modules, "lm_eval.models", raising=False)
    lm_eval_door.register()
    assert "lm_eval" not in sys.modules


def test_the_door_tells_of_another_lm_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch has to be importable whatever lm-eval looks like."""
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", SimpleNamespace())
    lm_eval_door.register()
    assert "lm-eval does not know the model 'prism_nemo'" in capsys.readouterr().err


def test_the_command_knows_the_model(tmp_path: Path, tasks: Path) -> None:
    """The installed lm_eval, unchanged, in a process of its own, with our entry point as pyproject.toml has it."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    installed = tmp_path / "site" / "prism_nemo_here-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: prism-nemo-here\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in own.items()) for group, own in points.items()]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    folder = save_model(tmp_path / "model")
    script = Path(sys.executable).with_name("lm_eval")
    command = [str(script)] if script.is_file() else [sys.executable, "-m", "lm_eval"]
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *command,
            *("--model", "prism_nemo", "--model_args", f"checkpoint={folder}", "--tasks", "choices,writing"),
            *("--include_path", str(tasks), "--output_path", str(out), "--log_samples"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.glob("**/results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["model"] == "prism_nemo"
    assert results["config"]["model_hash"]
    assert 0 < results["results"]["choices"]["acc,none"] < 1
    assert results["n-samples"]["writing"] == {"original": 4, "effective": 4}
