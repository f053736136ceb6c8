"""Long-context tasks: the answer is there, nothing else could be meant, and the length is what was asked for."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.data.tokenizer import Tokenizer, save_tokenizer, train_bpe
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.question import EvaluationTask
from prism_nemo.evaluation.suites.long_context.filler import Filler, made_up_words, read_sentences
from prism_nemo.evaluation.suites.long_context.fitting import fit
from prism_nemo.evaluation.suites.long_context.suite import KINDS, LENGTHS, VERIFIER, long_context_tasks
from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import verifier_named

HIDDEN = ("needle_single", "needle_multikey", "needle_multivalue", "hops", "facts")
COUNTED = ("common_words", "frequent_words")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    words = " ".join(Filler(random.Random(1)).first(200))
    bpe = train_bpe([f"{words} the special magic number for variables in the text above"], 600, ["<eos>", "<pad>"])
    return save_tokenizer(bpe, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tasks(tokenizer: Tokenizer) -> dict[str, EvaluationTask]:
    """Six questions of each kind at 4096 tokens."""
    return {task.name: task for task in long_context_tasks(tokenizer, 4096, [4096], questions=6)}


def score(problem: Problem, answer: str) -> float:
    return verifier_named(problem.verifier).verify(problem, answer)


def context_of(problem: Problem) -> str:
    """The prompt without the question."""
    return problem.text.rpartition("\n\nQuestion:")[0]


@pytest.mark.parametrize("name", KINDS)
def test_length_is_never_over_and_at_most_two_percent_under(
    name: str, tokenizer: Tokenizer, tasks: dict[str, EvaluationTask]
) -> None:
    task = tasks[f"{name}_4k"]
    assert task.about["length"] == 4096
    assert len(task.questions) == 6
    for question in task.questions:
        total = len(tokenizer.encode(question.problem.text)) + task.sampling.max_new_tokens
        assert 0.98 * 4096 - 2 <= total <= 4096 - 2  # two tokens stay free for what an engine puts before a prompt


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1000, 3000), name=st.sampled_from(HIDDEN), seed=st.integers(0, 10**6))
def test_length_holds_for_any_length_and_seed(tokenizer: Tokenizer, length: int, name: str, seed: int) -> None:
    (task,) = long_context_tasks(tokenizer, length, [length], [name], questions=1, seed=seed)
    total = len(tokenizer.encode(task.questions[0].problem.text)) + task.sampling.max_new_tokens + 2
    assert 0.98 * length <= total <= length


@pytest.mark.parametrize("name", KINDS)
def test_the_answer_is_in_the_context(name: str, tasks: dict[str, EvaluationTask]) -> None:
    for question in tasks[f"{name}_4k"].questions:
        words = re.findall(r"\w+", context_of(question.problem))
        assert question.problem.answer == ", ".join(question.problem.metadata["parts"])
        assert all(part in words for part in question.problem.metadata["parts"])


@pytest.mark.parametrize(
    ("name", "gold", "all_of_them"), [("needle_single", 1, 1), ("needle_multikey", 1, 8), ("needle_multivalue", 4, 4)]
)
def test_exactly_as_many_needles_as_stated(
    name: str, gold: int, all_of_them: int, tasks: dict[str, EvaluationTask]
) -> None:
    for question in tasks[f"{name}_4k"].questions:
        found = re.findall(r"A special magic number for (\w+) is (\d+)\.", context_of(question.problem))
        assert len(found) == len({number for _, number in found}) == all_of_them
        asked = re.search(r"for (\w+) in the text above\?", question.problem.text)
        assert asked is not None
        values = {number for key, number in found if key == asked[1]}
        assert values == set(question.problem.metadata["parts"])
        assert len(values) == gold
        # Nothing in the filler is a number.
        assert sorted(re.findall(r"\d+", context_of(question.problem))) == sorted(number for _, number in found)


def test_hops_lead_to_all_parts_and_to_no_others(tasks: dict[str, EvaluationTask]) -> None:
    for question in tasks["hops_4k"].questions:
        values: dict[str, str] = {}
        statements = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", context_of(question.problem))
        for name, source in statements:
            values[name] = values.get(source, source)  # a source has to be assigned before it is used
        assert len(values) == len(statements) == 10
        asked = re.search(r"have the value (\d+)", question.problem.text)
        assert asked is not None
        gold = {name for name, value in values.items() if value == asked[1]}
        assert gold == set(question.problem.metadata["parts"])
        assert len(gold) == 5
        assert len(set(values.values())) == 2


def test_facts_have_one_answer(tasks: dict[str, EvaluationTask]) -> None:
    pattern = r"(\w+) was born in (\w+), learned the trade of a (\w+) and now lives in (\w+)\."
    for question in tasks["facts_4k"].questions:
        people = re.findall(pattern, context_of(question.problem))
        assert len(people) == 10
        asked = re.search(r"does the (\w+) of", question.problem.text)
        assert asked is not None
        assert [town for _, _, trade, town in people if trade == asked[1]] == question.problem.metadata["parts"]
        towns = [town for _, born, _, lives in people for town in (born, lives)]
        assert len(set(towns)) == 20
        assert set(towns) == set(question.problem.metadata["candidates"])


@pytest.mark.parametrize(("name", "count"), [("common_words", 10), ("frequent_words", 3)])
def test_the_words_asked_for_are_the_most_frequent(name: str, count: int, tasks: dict[str, EvaluationTask]) -> None:
    for question in tasks[f"{name}_4k"].questions:
        listed = context_of(question.problem).split("\n\n")[1].split()
        ranked = Counter(listed).most_common()
        assert {word for word, _ in ranked[:count]} == set(question.problem.metadata["parts"])
        assert ranked[count - 1][1] > ranked[count][1]  # no tie: one answer
        if name == "common_words":
            assert {times for _, times in ranked[:count]} == {30}
            assert ranked[count][1] <= 3


@pytest.mark.parametrize("name", KINDS)
def test_gold_scores_one_and_half_of_it_its_share(name: str, tasks: dict[str, EvaluationTask]) -> None:
    for question in tasks[f"{name}_4k"].questions:
        problem, parts = question.problem, question.problem.metadata["parts"]
        assert problem.verifier == VERIFIER
        assert score(problem, f" {problem.answer}.") == 1
        assert score(problem, " and ".join(reversed(parts))) == 1
        assert score(problem, parts[0]) == 1 / len(parts)
        assert score(problem, "") == score(problem, "I do not know.") == 0


@pytest.mark.parametrize("name", ["needle_multikey", "hops", "facts", *COUNTED])
def test_saying_everything_scores_nothing(name: str, tasks: dict[str, EvaluationTask]) -> None:
    for question in tasks[f"{name}_4k"].questions:
        assert score(question.problem, context_of(question.problem)) == 0


def test_more_numbers_than_asked_for_score_nothing(tasks: dict[str, EvaluationTask]) -> None:
    problem = tasks["needle_single_4k"].questions[0].problem
    assert score(problem, f"{problem.answer} or 7654321") == 0
    assert score(problem, f"{problem.answer} or {problem.answer}") == 1
    assert score(problem, f"line 12: {problem.answer}") == 1
    assert score(problem, problem.answer[:-1]) == score(problem, problem.answer + "0") == 0
    assert score(problem, f"{int(problem.answer):,}") == 1


def test_depths_are_spread_evenly_and_are_true(tasks: dict[str, EvaluationTask]) -> None:
    for question, depth in zip(tasks["needle_single_4k"].questions, (1, 3, 5, 7, 9, 11), strict=True):
        assert question.problem.metadata["depth"] == depth / 12
        context = context_of(question.problem)
        # Sentences differ in length: the place in characters is near the depth, not at it.
        assert context.index("A special magic number") / len(context) == pytest.approx(depth / 12, abs=0.06)


def test_same_seed_same_questions_other_seed_other_ones(tokenizer: Tokenizer) -> None:
    def ids(**options: object) -> list[str]:
        made = long_context_tasks(tokenizer, 1024, [1024], ["needle_single", "hops"], questions=3, **options)  # type: ignore[arg-type]
        return [question.id for task in made for question in task.questions]

    assert ids() == ids()
    assert len(set(ids())) == 6
    assert not set(ids()) & set(ids(seed=1))
    assert not set(ids()) & set(ids(split="validation"))


def test_filler_can_be_held_out_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    plain = [f"Sentence {word} is here." for word in made_up_words(random.Random(0), 150)]
    file.write_text("\n".join([*plain, "It costs 1234567 crowns.", "ABCDE is loud.", "That is magic."]))
    assert set(read_sentences(file)) == set(plain)
    (task,) = long_context_tasks(tokenizer, 2048, [2048], ["needle_single"], questions=1, text=file)
    context = context_of(task.questions[0].problem)
    assert context.count("is here.") > 20
    assert re.findall(r"\d+", context) == task.questions[0].problem.metadata["parts"]


@pytest.mark.parametrize("length", [1024, 4096])
def test_built_in_filler_hardly_repeats_itself(length: int) -> None:
    sentences = Filler(random.Random(3)).first(length)
    assert len(set(sentences)) > 0.99 * length
    assert Filler(random.Random(3)).first(10) == sentences[:10]


def test_a_length_beyond_the_model_is_refused_by_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"length 16384: the model reads at most 8192 tokens; ask for 4096, 8192"):
        long_context_tasks(tokenizer, 8192, LENGTHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [200], "kinds": ["hops"]}, "hops at 200 tokens: its question alone has"),
        ({"lengths": [1024], "kinds": ["common_words"]}, "common_words at 1024 tokens: its question alone has"),
        ({"kinds": ["needles"]}, "'needles' is unknown; known: needle_single"),
        ({"questions": 0}, "questions: 0 must be at least 1"),
        ({"text": Path("nowhere.txt")}, "nowhere.txt: cannot be read"),
    ],
)
def test_bad_requests_are_refused(tokenizer: Tokenizer, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        long_context_tasks(tokenizer, 4096, **{"lengths": [2048], **options})  # type: ignore[arg-type]


def test_a_file_with_too_few_sentences_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("One. Two. Three.")
    with pytest.raises(InputError, match=r"has 3 sentences .* at least 100"):
        read_sentences(file)


@settings(max_examples=200, deadline=None)
@given(unit=st.integers(1, 60), empty=st.integers(0, 300), budget=st.integers(300, 5000), bend=st.integers(0, 7))
def test_fit_finds_the_longest_text(unit: int, empty: int, budget: int, bend: int) -> None:
    """Against counting up one by one, for units that differ in length."""

    def length(units: int, short: int) -> int:
        return empty + sum(unit + i % (bend + 1) for i in range(units)) + short

    text = fit(lambda units, short: "x" * length(units, short), len, budget, budget, "a test")
    assert len(text) == budget
    units = max(n for n in range(budget + 1) if length(n, 0) <= budget)
    assert length(units, 0) > budget - unit - bend


def test_fit_refuses_what_it_cannot_reach() -> None:
    with pytest.raises(PrismError, match="no longer than"):
        fit(lambda units, short: "x" * min(units, 50), len, 100, 98, "a test")
    with pytest.raises(PrismError, match="a text of 98 to 100 tokens was asked for, but it has 93"):
        fit(lambda units, short: "x" * (31 * (units + short)), len, 100, 98, "a test")
