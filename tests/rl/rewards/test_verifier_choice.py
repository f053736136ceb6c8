"""Multiple choice: which option a response chose, and the order in which they are shown."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from answer_forms import NOT_GIVEN, WRAPPINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.choice import LETTERS, ChoiceVerifier, chosen, shuffled_options
from prism_nemo.rl.rewards.task import Problem

OPTIONS = ["a dog", "Paris", "a cat", "London and Rome"]
TEN = [f"thing number {i}" for i in range(10)]
# Usual ways to give the letter; ``@`` is the letter, ``~`` the option's text.
CHOICES = [
    "(@)",
    "@.",
    "@)",
    "[@]",
    "**(@)**",
    "@. ~",
    "@) ~",
    "(@) ~",
    "@: ~",
    "@ - ~",
    "**@. ~**",
    "@ ~",
    "@, ~",
    "The answer is @, ~.",
    "The correct answer is option @, ~.",
    "The answer is (@), ~",
    "So it is @.",
    "It is (@).",
    "answer: @",
    "Answer: (@) ~",
    "**Answer:** @. ~",
    "The answer is (@).",
    "The answer is (@) ~.",
    "The answer is option @.",
    "The correct answer is @. ~",
    "The correct option is @",
    "So the correct choice is (@).",
    "Option @",
    "Option @ is correct.",
    "Therefore, @ is correct.",
    "@ is the correct answer.",
    "Hence, option (@).",
    "My choice: @",
    "I choose @.",
    "I would go with @.",
    r"\boxed{\text{@}}",
    r"\boxed{\text{(@)}}",
    r"$\boxed{\textbf{@}}$",
    r"$\text{@}$",
    r"\boxed{@. ~}",
    "<answer>@. ~</answer>",
    "~",
    "~.",
    "The answer is ~.",
    r"\boxed{\text{~}}",
    "<answer>~</answer>",
    "A quick look at a map, or at an atlas, helps.\n\nThe answer is @.",
    "A. is wrong, B. is wrong, and so on.\nAnswer: @",
]
NO_CHOICE = [
    "A dog barks",
    "A good answer would be long.",
    "The answer is a difficult one.",
    "A lot of people say so.",
    "Answer: A very long story",
    "Answer: A Paris",
    "I have a cat",
    "I",
    "a",
    "The answer is B or C",
    "The answer is B, C",
    "B and C",
    "C/D",
    "It is a cat's",
    "It is not C.",
    "So it is C or D.",
    "The answer is C, Paris.",
    "The answer is option C, D.",
    "C, D",
    "(C), (D)",
    "(C) or (D)",
    "A. B. C.",
    "a) b) c)",
    "A, B, C, D",
    r"\boxed{C} or \boxed{D}",
    r"\boxed{C, D}",
    "I choose B or C.",
    "I'd pick A over C",
    "Between B and C, C is the best answer.",
    "The answer is A or a cat",
    "The answer is not C.",
    "The answer isn't C.",
    "C is not correct.",
    "Not C",
    "C?",
    "Is the answer C?",
    "(A) is not right, and (B) neither.",
    "C: Paris",
    "(C) Paris",
    "E",
    "All of them",
    "",
    "C is what the others say; nobody knows",
    "Vitamin C is good for you",
    "Maybe the answer is C.",
]


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
def test_the_right_letter_in_every_form(letter: str) -> None:
    text = TEN[LETTERS.index(letter)]
    wrong = [other for other in LETTERS if other != letter]
    for form in {*WRAPPINGS, *CHOICES}:
        response = form.replace("@", letter).replace("~", text)
        assert chosen(response, TEN) == letter, response
        for other in wrong:
            assert ChoiceVerifier().verify(Problem("t", "?", "", other, {"options": TEN}), response) == 0.0


def test_there_are_enough_forms() -> None:
    assert len({*WRAPPINGS, *CHOICES}) >= 30


def test_lower_case_letters_count_where_they_can_be_no_word() -> None:
    for response in ("(c)", "c)", "c.", r"\boxed{c}", "Answer: c", "The answer is (c)."):
        assert chosen(response, OPTIONS) == "C", response


@pytest.mark.parametrize("response", [text for text in NO_CHOICE if text != "a"])
def test_what_is_no_choice(response: str) -> None:
    assert chosen(response, OPTIONS) is None


def test_a_letter_that_is_not_given_as_the_answer() -> None:
    problem = Problem("t", "?", "", "C", {"options": OPTIONS})
    for text in NOT_GIVEN:
        response = text.replace("@", "C").replace("~", "D")
        assert ChoiceVerifier().verify(problem, response) == 0.0, response


def test_the_article_is_no_choice() -> None:
    # "A dog" is option A only because that is its text.
    options = ["a dog", "a cat"]
    assert chosen("A dog", options) == "A"
    assert chosen("A cat", options) == "B"
    assert chosen("The answer is a cat.", options) == "B"
    assert chosen("A horse", options) is None
    assert chosen("So a horse it is.", options) is None
    assert chosen("A", options) == "A"


def test_texts_that_two_options_share_or_that_are_letters() -> None:
    assert chosen("same", ["same", "same", "other"]) is None
    assert chosen("B. same", ["same", "same", "other"]) is None or chosen("B", ["same", "same", "x"]) == "B"
    assert chosen("The answer is B", ["C", "A", "B"]) == "B"  # the letter, not the text
    assert chosen("A, C", ["C", "A", "B"]) is None


@pytest.mark.parametrize("response", ["2", "2.", "The answer is 2.", r"\boxed{2}", "B, 2", "B. 2"])
def test_texts_of_one_character(response: str) -> None:
    assert chosen(response, ["1", "2", "3"]) == "B"
    assert chosen(response, ["1", "3", "2"]) == (None if "B" in response else "C")
    assert chosen("x", ["y", "x"]) == "B"
    assert chosen("E", ["K", "E"]) == "B"  # no letter of an option
    assert chosen("AB", ["O", "AB", "B"]) == "B"


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(LETTERS), st.sampled_from(LETTERS), st.sampled_from(WRAPPINGS), st.sampled_from(CHOICES))
def test_two_letters_never_score(first: str, second: str, wrapping: str, form: str) -> None:
    if first == second:
        return
    for both in (f"{first} or {second}", f"{first}, {second}", f"{first} and {second}", f"({first}) or ({second})"):
        assert chosen(wrapping.replace("@", both), TEN) is None, both
        if "~" not in form:
            assert chosen(form.replace("@", both), TEN) is None, form.replace("@", both)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_no_text_makes_it_raise(text: str) -> None:
    assert chosen(text, OPTIONS) in (None, *"ABCD")


@settings(max_examples=200, deadline=None)
@given(st.text(), st.lists(st.text(), min_size=2, max_size=10), st.integers(0, 9), st.integers(0, 5))
def test_shuffling_keeps_the_right_option(question: str, options: list[str], right: int, seed: int) -> None:
    right %= len(options)
    shown, letter = shuffled_options(question, options, right, seed)
    assert sorted(shown) == sorted(options)
    assert shown[LETTERS.index(letter)] == options[right]
    assert shuffled_options(question, options, right, seed) == (shown, letter)


def test_the_right_letter_is_not_always_the_same() -> None:
    # 4,000 questions: each letter 1,000 times with a standard deviation of 27; six of them leave no false alarm.
    found = Counter(shuffled_options(f"question {i}", ["w", "x", "y", "z"], 0, seed=0)[1] for i in range(4000))
    assert set(found) == set("ABCD")
    assert all(abs(count - 1000) < 6 * 27.4 for count in found.values())


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    options = [str(i) for i in range(10)]
    # Frozen: another order would give a continued run other prompts.
    assert shuffled_options("q", options, 3, 0) == (["2", "3", "7", "1", "0", "6", "5", "9", "4", "8"], "B")
    assert len({tuple(shuffled_options("q", options, 3, seed)[0]) for seed in range(20)}) == 20


@pytest.mark.parametrize(
    ("options", "right", "message"),
    [
        (["x"], 0, "2 to 10"),
        ([str(i) for i in range(11)], 0, "2 to 10"),
        (["x", "y"], 2, "none of"),
        (["x", "y"], -1, "-1"),
    ],
)
def test_options_that_cannot_be_shown(options: list[str], right: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shuffled_options("q", options, right, 0)


@pytest.mark.parametrize(
    ("answer", "metadata", "message"),
    [
        ("A", {}, "'options'"),
        ("A", {"options": "AB"}, "'options'"),
        ("E", {"options": OPTIONS}, "not the letter"),
        ("Paris", {"options": OPTIONS}, "not the letter"),
        ("", {"options": OPTIONS}, "not the letter"),
    ],
)
def test_problems_that_cannot_be_judged(answer: str, metadata: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChoiceVerifier().verify(Problem("t", "?", "", answer, metadata), "A")


def test_it_stays_in_process_and_can_be_pickled() -> None:
    assert not ChoiceVerifier.isolated
    again = pickle.loads(pickle.dumps(ChoiceVerifier()))
    assert again.verify(Problem("t", "?", "", "C", {"options": OPTIONS}), "(C)") == 1.0
