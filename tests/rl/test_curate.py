"""Prompt curation: pass rates of a model, and which prompts are kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import string
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import curate_workers
import pytest
from tiny_training import character_tokenizer, write_llama

from prism_nemo.checkpoint.atomic import HASHES, MANIFEST
from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import ParallelConfig, RewardConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.generation.requests import Response
from prism_nemo.rl import curate
from prism_nemo.rl.curate import FilterConfig, check_filter, measure, write_kept
from prism_nemo.rl.keeping import choose, parse_rule
from prism_nemo.rl.pass_rates import PassRates, pass_rate, read_measured, solved
from prism_nemo.rl.prompt_file import PromptFile
from prism_nemo.rl.rewards.task import Problem, Score
from prism_nemo.rl.rollout import Rollout
from prism_nemo.runtime.launch import launch

SAMPLES = 8
RIGHT = {"digit": str.isdigit, "letter": str.isalpha, "never": lambda _: False}


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("1", (1, 1)),
        ("1:", (1, 16)),
        (":3", (0, 3)),
        ("1:15", (1, 15)),
        ("0", (0, 0)),
        ("16", (16, 16)),
        ("0:", (0, 16)),
    ],
)
def test_rules(text: str, bounds: tuple[int, int]) -> None:
    assert parse_rule(text, 16) == bounds


@pytest.mark.parametrize("text", ["", ":", "x", "-1", "1:2:3", "1 :", "1/16", "5:3", "17", "1:17", "17:"])
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match=f"^--keep {text}: "):
        parse_rule(text, 16)


def _measured(**rights: list[int]) -> list[dict[str, Any]]:
    """Lines of prompts by domain, whose numbers do not follow the domains."""
    lines = [{"domain": domain, "right": right} for domain, all_ in rights.items() for right in all_]
    return [{"number": i, **line} for i, line in enumerate(sorted(lines, key=lambda line: line["right"]))]


def _kept(lines: list[dict[str, Any]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for line in lines:
        found[line["domain"]].append(line["right"])
    return dict(found)


MEASURED = _measured(math=[0, 0, 1, 1, 2, 16], code=[0, 1, 5, 16], science=[0, 0, 3])


def test_rules_by_domain() -> None:
    """The study's: exactly one of 16 for math, at least one for the rest."""
    kept = choose(MEASURED, {"math": "1", "*": "1:"}, 16, None, 0)
    assert _kept(kept) == {"math": [1, 1], "code": [1, 5, 16], "science": [3]}
    numbers = [line["number"] for line in kept]
    assert numbers == sorted(numbers)


def test_a_domain_without_a_rule_is_left_out() -> None:
    assert _kept(choose(MEASURED, {"code": "1:15"}, 16, None, 0)) == {"code": [1, 5]}


def test_balance_thins_out_at_random_and_fills_up_with_what_was_never_solved() -> None:
    measured = _measured(math=[0] * 5 + [1] * 30, code=[0] * 40 + [1] * 4 + [16] * 9)
    rules = {"math": "1", "code": "1:15"}
    kept = choose(measured, rules, 16, 12, seed=1)
    assert _kept(kept) == {"math": [1] * 12, "code": [0] * 8 + [1] * 4}
    assert len({line["number"] for line in kept}) == 24
    assert choose(measured, rules, 16, 12, seed=1) == kept
    assert choose(measured, rules, 16, 12, seed=2) != kept
    # Exactly so many need no choice, whatever the seed.
    assert choose(measured, {"math": "1"}, 16, 30, 1) == choose(measured, {"math": "1"}, 16, 30, 2)
    # All of those drawn are drawn somewhere: none is favoured by its place.
    drawn = Counter(line["number"] for seed in range(60) for line in choose(measured, {"math": "1"}, 16, 12, seed))
    assert len(drawn) == 30


def test_a_rule_that_keeps_what_was_never_solved_is_not_filled_up_with_the_same() -> None:
    measured = _measured(math=[0] * 4 + [1] * 2 + [9])
    kept = choose(measured, {"*": "0:1"}, 16, 6, 0)
    assert [line["number"] for line in kept] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match=r"--balance 7: domain math has 6 prompts by its rule and 0 that were never"):
        choose(measured, {"*": "0:1"}, 16, 7, 0)


def test_too_few_to_balance() -> None:
    message = r"--balance 4: domain math has 2 prompts by its rule and 1 that were never solved; use at most 3"
    with pytest.raises(InputError, match=message):
        choose(_measured(math=[0, 1, 1, 9], code=[1] * 9), {"*": "1"}, 16, 4, 0)


def test_only_full_marks_in_the_required_form_are_right() -> None:
    """Part of the marks is not, and a right answer with a penalty is, although its reward says otherwise."""
    scores = [
        Score(1.0, True, "a"),
        Score(0.5, True, "a", correct=0.5),
        Score(-0.2, True, "a", correct=1.0, penalties={"long": -1.2}),
        Score(1.0, False, "a", correct=1.0),
        Score(1.0, True, None, failure="raised ValueError"),
        Score(0.0, True, "b"),
    ]
    problem = Problem("", "q", "", "a", domain="maths")
    group = [Rollout(problem, Response([1], [2] * i, [], i < 2), score) for i, score in enumerate(scores)]
    assert pass_rate(group) == {
        "domain": "maths",
        "right": 2,
        "well_formed": 5,
        "finished": 2,
        "tokens": 15,
        "failures": {"raised ValueError": 1},
    }
    assert solved([{"right": 0}, {"right": 3}, {"right": 1}, {"right": 0}, {"right": 0}]) == 0.4


def test_nothing_is_left() -> None:
    with pytest.raises(InputError, match="no prompt is left; right answers of 16: 0 in 2 prompts, 3 in 1 prompts"):
        choose(_measured(math=[0, 3, 0]), {"*": "1"}, 16, None, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random model and its tokenizer."""
    root = tmp_path_factory.mktemp("model")
    character_tokenizer(root / "tokenizer")
    _import(root / "hf", root / "native", seed=3)
    return {"checkpoint": str(root / "native"), "tokenizer": str(root / "tokenizer")}


def _import(hf: Path, out: Path, seed: int) -> None:
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    import_hf(write_llama(hf, seed=seed, std=0.1, **sizes), out, ParallelConfig())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files, of 9 and 4 prompts, three domains."""
    root = tmp_path_factory.mktemp("prompts")
    kinds = ["digit", "letter", "digit", "never", "letter", "digit", "digit", "digit", "never"]
    files = {"a.jsonl": kinds, "b.jsonl": ["letter", "never", "digit", "digit"]}
    for name, rows in files.items():
        lines = [
            {
                "question": f"{name} {i}",
                "answer": "é",
                "reward": f"curate_workers:{kind.title()}",
                "domain": kind,
                "id": f"{name} {i}",
                "source": ["kept", None],
            }
            for i, kind in enumerate(rows)
        ]
        (root / name).write_text("\n" + "".join(json.dumps(line) + "\n" for line in lines))
    return [str(root / name) for name in files]


def _config(model: dict[str, str], prompts: list[str], out: Path, **changes: Any) -> FilterConfig:
    values: dict[str, Any] = {
        "samples": SAMPLES,
        "max_new_tokens": 6,
        "batch": 3,
        "rewards": RewardConfig(gate="none"),
        **model,
        **changes,
    }
    return FilterConfig(prompts, out=str(out), **values)


def _measure(config: FilterConfig, folder: Path) -> list[dict[str, Any]]:
    """The answers of a measurement in processes of its own."""
    folder.mkdir()
    count = launch(curate_workers.measure_and_tell, config, str(folder), processes=config.parallel.world_size)
    assert count == 13
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(
    model: dict[str, str], prompts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[FilterConfig, list[dict[str, Any]]]:
    """A measurement in one process and its answers."""
    root = tmp_path_factory.mktemp("whole")
    config = _config(model, prompts, root / "out" / "kept.jsonl", keep={"digit": "1:", "*": "1:7"})
    return config, _measure(config, root / "answers")


Whole = tuple[FilterConfig, list[dict[str, Any]]]


def _lines(config: FilterConfig) -> list[dict[str, Any]]:
    return read_measured(Path(f"{config.out}.measured.jsonl"))[1]


def test_pass_rates_are_those_of_the_answers(whole: Whole, prompts: list[str]) -> None:
    """Counted anew from the answers; every prompt has as many as were asked for, in the order of the files."""
    config, answers = whole
    lines = _lines(config)
    by_number: dict[int, list[str]] = defaultdict(list)
    for answer in answers:
        by_number[answer["number"]].append(answer["text"])
    assert [line["number"] for line in lines] == list(range(13))
    assert [(line["file"], line["row"]) for line in lines] == [(prompts[0], i) for i in range(9)] + [
        (prompts[1], i) for i in range(4)
    ]
    for line in lines:
        question = f"{Path(line['file']).name} {line['row']}"
        assert {a["prompt"] for a in answers if a["number"] == line["number"]} == {f"Q: {question}\n<think>"}
        texts = by_number[line["number"]]
        assert len(texts) == SAMPLES
        bare = [text.removesuffix("<eos>").rpartition("</think>")[2].strip()[:1] for text in texts]
        assert line["right"] == sum(bool(first) and RIGHT[line["domain"]](first) for first in bare)
        assert line["finished"] == sum(text.endswith("<eos>") for text in texts)
        missing = sum(first in tuple(string.punctuation) for first in bare) if line["domain"] == "letter" else 0
        assert line["failures"] == ({"raised ValueError": missing} if missing else {})
    # As the record says: temperature 1, and no token is cut off.
    assert {tuple(answer["sampling"]) for answer in answers} == {(1.0, 1.0, SAMPLES, 6, 1234)}
    rights = [line["right"] for line in lines if line["domain"] != "never"]
    assert len(set(rights)) > 2  # otherwise the comparisons below say little
    assert any(line["failures"] for line in lines)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(data_parallel_size=2), ParallelConfig(tensor_model_parallel_size=2)],
    ids=lambda value: value.describe(),
)
def test_any_layout_measures_the_same(
    whole: Whole, model: dict[str, str], prompts: list[str], tmp_path: Path, parallel: ParallelConfig
) -> None:
    """The last batch has one prompt, so one of two ranks has none."""
    config = _config(model, prompts, tmp_path / "kept.jsonl", parallel=parallel)
    answers = _measure(config, tmp_path / "answers")
    assert _lines(config) == _lines(whole[0])
    shares = Counter(path.name for path in (tmp_path / "answers").iterdir())
    assert len(shares) == parallel.data_parallel_size
    assert {(a["number"], a["text"]) for a in answers} == {(a["number"], a["text"]) for a in whole[1]}


def test_a_measurement_that_was_killed_goes_on(
    whole: Whole, model: dict[str, str], prompts: list[str], tmp_path: Path
) -> None:
    """Killed with two processes in the middle of a batch and of a line: four prompts are known, and one process goes on
    with the rest."""
    parallel = ParallelConfig(data_parallel_size=2)
    config = _config(model, prompts, tmp_path / "kept.jsonl", parallel=parallel)
    with pytest.raises(PrismError):
        launch(curate_workers.measure_and_be_killed, config, 1, processes=2)
    config = _config(model, prompts, tmp_path / "kept.jsonl")
    assert not Path(config.out).exists()
    assert [line["number"] for line in _lines(config)] == [0, 1, 2, 3]
    answers = _measure(config, tmp_path / "answers")
    assert {answer["number"] for answer in answers} == set(range(4, 13))
    assert len(answers) == 9 * SAMPLES
    assert _lines(config) == _lines(whole[0])


def test_kept_prompts_never_stand_without_their_record(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two, the same command must be able to go on."""
    config = replace(whole[0], out=str(tmp_path / "kept.jsonl"))
    shutil.copy(f"{whole[0].out}.measured.jsonl", f"{config.out}.measured.jsonl")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("write_json", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(curate, name, killed)
            with pytest.raises(KeyboardInterrupt):
                write_kept(config)
        assert not Path(config.out).exists()
        check_filter(config)
    record = write_kept(config)
    assert json.loads(Path(f"{config.out}.json").read_text()) == json.loads(json.dumps(record))
    assert record["sha256"] == hashlib.sha256(Path(config.out).read_bytes()).hexdigest()


def test_kept_prompts_and_how_they_were_chosen(whole: Whole, prompts: list[str], tmp_path: Path) -> None:
    config, _ = whole
    lines = _lines(config)
    record = write_kept(config)
    kept = [line for line in lines if line["right"] >= 1 and (line["domain"] == "digit" or line["right"] <= 7)]
    rows = [json.loads(row) for row in Path(config.out).read_text(encoding="utf-8").splitlines()]
    sources = {name: PromptFile(Path(name)) for name in prompts}
    assert [{k: v for k, v in row.items() if k != "pass_rate"} for row in rows] == [
        sources[line["file"]].row(line["row"]) for line in kept
    ]
    assert [row["pass_rate"] for row in rows] == [
        {"right": line["right"], "samples": SAMPLES, "checkpoint": config.checkpoint} for line in kept
    ]
    assert json.loads(Path(f"{config.out}.json").read_text()) == json.loads(json.dumps(record))
    assert record["sha256"] == hashlib.sha256(Path(config.out).read_bytes()).hexdigest()
    for domain, part in record["domains"].items():
        mine = [line for line in lines if line["domain"] == domain]
        assert part["measured"] == len(mine)
        assert part["kept"] == sum(line in kept for line in mine)
        assert part["right_answers"] == Counter(line["right"] for line in mine)
        assert part["never_solved_kept"] == 0
        assert part["no_verdict"] == sum((Counter(line["failures"]) for line in mine), Counter())
    assert record["domains"]["letter"]["no_verdict"]
    measured_with = record["measured_with"]
    assert measured_with["checkpoint"] == config.checkpoint
    # Which model it was, file by file, also when its folder is gone.
    manifest = json.loads((Path(config.checkpoint) / MANIFEST).read_text())
    assert measured_with[HASHES] == manifest[HASHES] != {}
    assert measured_with["prompts"] == {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in prompts}
    # The result is a prompt file.
    result = PromptFile(Path(config.out))
    assert [result.row(i) for i in range(len(result))] == rows
    Path(config.out).unlink()


def _without_hashes(checkpoint: Path) -> str:
    """Take the hashes out of a checkpoint's manifest, and return what is left."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest.pop(HASHES, None)
    text = json.dumps(manifest)
    (checkpoint / MANIFEST).write_text(text)
    return text


def test_another_model_at_the_same_place_is_refused(prompts: list[str], tmp_path: Path) -> None:
    """Manifests without hashes, as imports of earlier versions have them, are the same to the letter."""
    character_tokenizer(tmp_path / "tokenizer")
    model = {"checkpoint": str(tmp_path / "native"), "tokenizer": str(tmp_path / "tokenizer")}
    config = _config(model, prompts[1:], tmp_path / "kept.jsonl")
    _import(tmp_path / "hf", tmp_path / "native", seed=3)
    before = _without_hashes(tmp_path / "native")
    PassRates(Path(f"{config.out}.measured.jsonl"), curate._identity(config))
    for folder in ("native", "hf"):
        shutil.rmtree(tmp_path / folder)
    _import(tmp_path / "hf", tmp_path / "native", seed=4)
    assert _without_hashes(tmp_path / "native") == before
    with pytest.raises(InputError, match=r"kept.jsonl.measured.jsonl: was measured with another weights; remove it"):
        launch(measure, config)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"samples": 4}, "samples"),
        ({"max_new_tokens": 7}, "max_new_tokens"),
        ({"seed": 5}, "seed"),
        ({"rewards": RewardConfig(gate="think")}, "gate"),
        ({"rewards": RewardConfig(gate="none", verifiers={"m": "curate_workers:Never"})}, "verifiers"),
        ({"rewards": RewardConfig(gate="none", code_seconds=1.0)}, "code_seconds"),
        ({"rewards": RewardConfig(gate="none", time_limit=1.0)}, "time_limit"),
        ({"rewards": RewardConfig(gate="none", sandbox="process")}, "sandbox"),
        ({"templates": ["{question}"]}, "templates"),
        ({"prompts": 1}, "prompts"),
        ({"tokenizer": 1}, "tokenizer"),
    ],
)
def test_what_decides_a_pass_rate_may_not_change(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], what: str
) -> None:
    """Otherwise one file would hold pass rates of two kinds."""
    config = FilterConfig(**{**vars(whole[0]), "out": str(tmp_path / "kept.jsonl")})
    path = Path(f"{config.out}.measured.jsonl")
    path.write_text(Path(f"{whole[0].out}.measured.jsonl").read_text())
    assert PassRates(path, curate._identity(config)).count == 13
    if what == "prompts":
        changed = tmp_path / "b.jsonl"
        changed.write_text(Path(config.prompts[1]).read_text().replace("b.jsonl 3", "b.jsonl 7"))
        other = shutil.copy(config.prompts[0], tmp_path / "a.jsonl")
        changes = {"prompts": [str(other), str(changed)]}
    if what == "tokenizer":
        shutil.copytree(config.tokenizer, tmp_path / "tokenizer")
        file = tmp_path / "tokenizer" / "tokenizer.json"
        file.write_text(file.read_text() + "\n")
        changes = {"tokenizer": str(tmp_path / "tokenizer")}
    identity = curate._identity(FilterConfig(**{**vars(config), **changes}))
    with pytest.raises(InputError, match=f"measured with another {what}; remove it to measure anew"):
        PassRates(path, identity)


def test_a_checkpoint_that_was_written_anew_is_another(whole: Whole, tmp_path: Path) -> None:
    """By its manifest and by its files, each by itself."""
    copy = tmp_path / "native"
    shutil.copytree(whole[0].checkpoint, copy)
    config = FilterConfig(**{**vars(whole[0]), "checkpoint": str(copy)})
    before = curate._identity(config)
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"remark": "another run"}))
    after = curate._identity(config)
    assert after["manifest_sha256"] != before["manifest_sha256"]
    assert after["weights"] == before["weights"]
    _without_hashes(copy)
    name = next(iter(manifest["files"]))
    hashed = curate._identity(config)["weights"]
    damaged = bytearray((copy / name).read_bytes())
    damaged[-1] ^= 1
    (copy / name).write_bytes(damaged)
    assert curate._identity(config)["weights"] != hashed


@pytest.mark.parametrize("changes", [{"batch": 5}, {"keep": {"*": "2"}}, {"balance": 3}])
def test_what_does_not_decide_a_pass_rate_may(whole: Whole, changes: dict[str, Any]) -> None:
    assert curate._identity(FilterConfig(**{**vars(whole[0]), **changes})) == curate._identity(whole[0])


def test_a_damaged_measurement_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"number": 0}\n{"num\n{"number": 2}\n')
    with pytest.raises(InputError, match=r"m.jsonl:3: not valid JSON; remove the file"):
        read_measured(path)
    path.write_text('{"a": 1}\n{"number": 0}\n{"num')
    assert read_measured(path) == ({"a": 1}, [{"number": 0}])
    for text in ("", '{"a'):
        path.write_text(text)
        with pytest.raises(InputError, match=r"m.jsonl.*remove the file to measure anew"):
            read_measured(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "--samples, --batch and --max-new-tokens must be at least 1"),
        ({"balance": 0}, "--balance 0: must be at least 1"),
        ({"balance": 5}, "--balance 5: domain letter has 3 prompts; use at most 3"),
        ({"balance": 8, "keep": {"digit": "1:"}}, "--balance 8: domain digit has 7 prompts"),
        ({"keep": {"*": "9"}}, "--keep 9: 9 to 9 right answers are not within 0 to 8"),
        ({"keep": {"maths": "1"}}, "--keep maths=...: no prompt has this domain; there are digit, letter, never"),
        ({"max_new_tokens": 64}, "--max-new-tokens 64 leaves no room"),
        ({"max_new_tokens": 51}, "9 of 9 prompts are longer than the 13 tokens that --max-new-tokens leaves"),
        ({"rewards": RewardConfig(gate="thought")}, "rewards.gate: 'thought' is unknown"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"tokenizer": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    model: dict[str, str], prompts: list[str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_filter(_config(model, prompts, tmp_path / "kept.jsonl", **changes))


def test_files_that_are_refused(model: dict[str, str], prompts: list[str], tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").touch()
    with pytest.raises(InputError, match=r"--out .*there.jsonl: already exists"):
        check_filter(_config(model, prompts, tmp_path / "there.jsonl"))
    with pytest.raises(InputError, match=r"--out .*kept.jsonl.zst: is written as plain text"):
        check_filter(_config(model, prompts, tmp_path / "kept.jsonl.zst"))
    with pytest.raises(InputError, match=r"a.jsonl: is named twice"):
        check_filter(_config(model, [prompts[0], prompts[1], prompts[0]], tmp_path / "kept.jsonl"))
    again = Path(prompts[0]).parent / ".." / Path(prompts[0]).parent.name / Path(prompts[0]).name
    with pytest.raises(InputError, match=r"a.jsonl: is named twice"):
        check_filter(_config(model, [prompts[0], str(again)], tmp_path / "kept.jsonl"))
    # Without an id there is nothing to repeat.
    same = tmp_path / "same.jsonl"
    lines = Path(prompts[1]).read_text().splitlines()
    same.write_text("\n".join(lines).replace('"id"', '"name"') + "\n" + lines[2].replace("b.jsonl 1", "a.jsonl 8"))
    with pytest.raises(InputError, match=r"same.jsonl:6: 'id' 'a.jsonl 8' is that of .*a.jsonl:10 too"):
        check_filter(_config(model, [prompts[0], str(same)], tmp_path / "kept.jsonl"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('\n{"question": "q", "answer": 1, "reward": "maths"}\n')
    with pytest.raises(InputError, match=r"bad.jsonl:2: .*'maths' is unknown; known: choice, code, exact, math"):
        check_filter(_config(model, [str(bad)], tmp_path / "kept.jsonl"))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run: Run) -> Run:
    """`prompts filter` with the arguments."""
    return partial(run, "prompts", "filter")


def test_the_command(whole: Whole, model: dict[str, str], prompts: list[str], tmp_path: Path, run: Run) -> None:
    """The same prompts with another rule need no new answers."""
    out = tmp_path / "kept.jsonl"
    options = ["--checkpoint", model["checkpoint"], "--tokenizer", model["tokenizer"], "--out", out, "--batch", 5]
    options += ["--samples", SAMPLES, "--max-new-tokens", 6, "--reward", "gate=none"]
    code, printed, err = run(*prompts, *options, "--keep", "digit=8", "--keep", "never=1:", "--json")
    assert code == 2
    assert "no prompt is left" in err
    assert not out.exists()
    assert _lines(FilterConfig(prompts, out=str(out), **model)) == _lines(whole[0])
    before = Path(f"{out}.measured.jsonl").read_text()
    code, printed, err = run(*prompts, *options, "--keep", "digit=1:", "--keep", "0", "--json")
    assert code == 0, err
    assert Path(f"{out}.measured.jsonl").read_text() == before
    record = json.loads(printed)
    assert record == json.loads(Path(f"{out}.json").read_text())
    assert record["domains"]["never"]["kept"] == record["domains"]["never"]["never_solved_kept"] == 3
    out.unlink()
    code, printed, err = run(*prompts, *options, "--keep", "never=0")
    assert code == 0, err
    assert printed.splitlines()[1].startswith("letter: 0 of 3 prompts kept; ")
    assert "answers without a verdict (raised ValueError)" in printed.splitlines()[1]
    assert printed.splitlines()[2:] == [
        "never: 3 of 3 prompts kept, 3 of them never solved",
        f"{out}: measured with {model['checkpoint']}; how it was chosen: {out}.json",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "digit=1", "--keep", "digit=2"], "--keep digit=2: there is another rule for digit"),
        (["--keep", "1:", "--keep", "1"], "--keep 1: there is another rule for all domains"),
        (["--keep", "one"], "--keep one: expected N, LO:, :HI or LO:HI"),
        (["--reward", "gates=none"], "gates"),
        (["--gate", "no"], "rewards.gate: 'no' is unknown"),
        (["--template", "Answer."], "prompt_templates: 'Answer.' has no {question}"),
    ],
)
def test_the_command_refuses(
    model: dict[str, str], prompts: list[str], tmp_path: Path, run: Run, options: list[str], message: str
) -> None:
    places = ["--checkpoint", model["checkpoint"], "--tokenizer", model["tokenizer"], "--out", tmp_path / "k.jsonl"]
    code, out, err = run(*prompts, *places, "--max-new-tokens", 6, *options)
    assert (code, out) == (2, "")
    assert err.startswith("prism-nemo: ")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
