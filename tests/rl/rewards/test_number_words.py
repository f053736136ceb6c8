"""English number words: those that can be read in one way are numbers, and no others."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_nemo.rl.rewards.mathematics import MathVerifier, same_answer
from prism_nemo.rl.rewards.plain_number import read_number
from prism_nemo.rl.rewards.task import Problem

ONES = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
PARTS = {
    2: ("half", "halves"),
    3: ("third", "thirds"),
    4: ("quarter", "quarters"),
    5: ("fifth", "fifths"),
    8: ("eighth", "eighths"),
    10: ("tenth", "tenths"),
}


def below_thousand(number: int, joined: bool) -> str:
    hundreds, rest = divmod(number, 100)
    small = ONES[rest] if rest < 20 else TENS[rest // 10 - 2] + (f"-{ONES[rest % 10]}" if rest % 10 else "")
    if not hundreds:
        return small
    return f"{ONES[hundreds]} hundred" + (f"{' and' if joined else ''} {small}" if rest else "")


def in_words(number: int, joined: bool) -> str:
    thousands, rest = divmod(number, 1000)
    if not thousands:
        return below_thousand(rest, joined)
    return f"{below_thousand(thousands, joined)} thousand" + (f" {below_thousand(rest, joined)}" if rest else "")


SCALES = [("hundred", 100), ("thousand", 1000), ("dozen", 12)]
SHARES = [("half", 2), ("a half", 2), ("one half", 2), ("a third", 3), ("one third", 3)]
numbers = st.builds(lambda n, joined: (Fraction(n), in_words(n, joined)), st.integers(0, 999_999), st.booleans())
shares = st.sampled_from(
    [
        (Fraction(over, under), f"{one} {PARTS[under][over > 1]}")
        for under in PARTS
        for over in range(1, under)
        for one in ([ONES[over]] if over > 1 else ["one", "an" if under == 8 else "a"])
    ]
    + [(Fraction(1, 2), "half")]
)
mixed = st.builds(
    lambda n, share: (n + share[0], f"{in_words(n, False)} and {share[1]}"),
    st.integers(1, 99),
    shares.filter(lambda share: share[1] != "half"),
)
dozens = st.sampled_from([(Fraction(12), "a dozen"), (Fraction(24), "two dozen"), (Fraction(100), "a hundred")])
unsigned = st.one_of(numbers, shares, mixed, dozens)
signed = st.builds(
    lambda found, sign: (found[0] * (-1 if sign else 1), f"{sign} {found[1]}".strip()),
    unsigned,
    st.sampled_from(["", "minus", "negative"]),
)


@given(signed)
@settings(max_examples=300, deadline=None)
def test_words_are_the_number_that_they_say(found: tuple[Fraction, str]) -> None:
    value, words = found
    for text in (words, words.capitalize(), words.replace("-", " ")):
        number = read_number(text)
        assert number is not None, text
        assert (number.value, number.unit, number.percent) == (value, "", False), text


@given(signed, signed)
@settings(max_examples=300, deadline=None)
def test_words_of_another_number_never_score(one: tuple[Fraction, str], other: tuple[Fraction, str]) -> None:
    expected = f"{one[0].numerator}/{one[0].denominator}"
    assert same_answer(expected, one[1])
    assert same_answer(expected, other[1]) == (one[0] == other[0])
    assert same_answer(one[1], other[1]) == (one[0] == other[0])


WORDS = (
    "one",
    "two",
    "eleven",
    "twenty",
    "hundred",
    "thousand",
    "and",
    "a",
    "half",
    "third",
    "thirds",
    "dozen",
    "zero",
)


def test_rows_of_number_words_that_are_numbers() -> None:
    """Of all rows of up to three of these words, these and no others; an "and" between hundreds and ones may be left
    out, and a hundred may be counted up to ninety-nine.
    """
    accepted = {}
    for count in (1, 2, 3):
        for row in product(WORDS, repeat=count):
            number = read_number(" ".join(row))
            if number is not None:
                accepted[" ".join(row)] = number.value
    wanted = {
        "zero": 0,
        "zero hundred": 0,
        "zero thousand": 0,
        "one": 1,
        "two": 2,
        "eleven": 11,
        "twenty": 20,
        "half": Fraction(1, 2),
        "twenty one": 21,
        "twenty two": 22,
        "one third": Fraction(1, 3),
        "one half": Fraction(1, 2),
        "two thirds": Fraction(2, 3),
        "eleven thirds": Fraction(11, 3),
        "a half": Fraction(1, 2),
        "a third": Fraction(1, 3),
        "a dozen": 12,
        "a hundred": 100,
        "a thousand": 1000,
        **{f"{n} dozen": 12 * v for n, v in (("zero", 0), ("one", 1), ("two", 2), ("eleven", 11), ("twenty", 20))},
        **{f"{share} {name}": Fraction(scale, part) for name, scale in SCALES for share, part in SHARES},
        **{f"two thirds {name}": Fraction(2 * scale, 3) for name, scale in SCALES},
        **{f"eleven thirds {name}": Fraction(11 * scale, 3) for name, scale in SCALES},
    }
    for head, value in (("one", 1), ("two", 2), ("eleven", 11), ("twenty", 20), ("a", 1)):
        for name, scale in SCALES[:2]:
            wanted[f"{head} {name}"] = value * scale
            for rest, more in (("one", 1), ("two", 2), ("eleven", 11), ("twenty", 20)):
                wanted[f"{head} {name} {rest}"] = value * scale + more
        if value > 1 or head == "one":
            wanted[f"{head} hundred thousand"] = value * 100_000
    wanted["a hundred thousand"] = 100_000
    for unit, value in (("one", 21), ("two", 22)):
        wanted |= {f"twenty {unit} {name}": value * scale for name, scale in SCALES[:2]}
    assert accepted == wanted


@pytest.mark.parametrize(
    "text",
    [
        "a", "an", "an answer", "a few", "a couple", "third", "twenty-third", "the third",
        "two third", "one thirds", "a thirds", "half of 7", "half and half", "half past two", "half or more",
        "minus", "negative", "minus minus 3",
        "minus -3", "negative minus two", "one hundred and three quarters", "a hundred and a half",
        "one hundred third", "twenty thirds", "three and four", "two and five quarters", "two and three",
        "one and a dozen", "minus 3 minus 4", "three point five", "a third of the cake", "no", "none", "a zero",
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_no_number(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{2}", "The answer is half."),
        ("-3", "The answer is minus 3."),
        ("-3", r"\boxed{\text{minus 3}}"),
        (r"-\frac{1}{2}", "So the answer is negative one half."),
        ("3/4", "Answer: three quarters"),
        ("0.75", "Answer: **three quarters**"),
        ("2.5", "The answer is two and a half."),
        ("12", "The answer is a dozen."),
        ("12", "The answer is a dozen eggs."),
        (r"-\$3", "The answer is minus $3."),
    ],
)
def test_in_answers(gold: str, answer: str) -> None:
    def score(expected: str) -> float:
        return MathVerifier().verify(Problem(task="", question="How much?", work="", answer=expected), answer)

    assert score(gold) == 1.0
    assert score("17") == 0.0
