from __future__ import annotations

from typing import Any

import pytest

from prism_nemo.data.expression import FieldError
from prism_nemo.data.template import Piece, render_field, render_template, render_turns, text_of
from prism_nemo.errors import InputError


def test_question_and_answer_are_joined_by_one_line_break() -> None:
    render, fields = render_template("{question}\n{answer.text}")
    assert fields == ["question", "answer.text"]
    pieces: list[Piece] = [("1+1?", "question"), ("\n", None), ("2", "answer.text")]
    assert render({"question": "1+1?", "answer": {"text": "2"}}) == pieces
    assert text_of(pieces) == "1+1?\n2"


def test_braces_in_a_field_stay_and_doubled_braces_are_braces() -> None:
    assert text_of(render_template("{{{a}}}")[0]({"a": "{b}"})) == "{{b}}"


@pytest.mark.parametrize("template", ["{a.__class__.x[0]}", "{a!r}", "{a:>9}", "{}", "{a", "a}", "no field", "{a..b}"])
def test_nothing_else_of_format_strings(template: str) -> None:
    with pytest.raises(InputError, match=r"here: "):
        render_template(template, "here")


def test_python_attributes_cannot_be_reached() -> None:
    with pytest.raises(FieldError, match="no field"):
        render_template("{a.__class__}")[0]({"a": "x"})


def test_turns_in_both_spellings() -> None:
    openai = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    for turns in (openai, sharegpt):
        assert text_of(render_turns("m")({"m": turns})) == "User: hi\nAssistant: hello"
        assert text_of(render_turns("m", speakers=False)({"m": turns})) == "hi\nhello"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hi", "must be a list"),
        (["hi"], r"m\[0\] must be a turn"),
        ([{"role": "user", "content": "a"}, {"role": "critic", "content": "b"}], r"m\[1\] has the role 'critic'"),
        ([{"role": "user", "content": None}], "must have text"),
        ([{"content": "a"}], "role None"),
    ],
)
def test_turns_that_are_none(turns: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        render_turns("m")({"m": turns})


def test_a_field_must_be_text() -> None:
    with pytest.raises(FieldError, match="'a' must be text, found list"):
        render_field("a")({"a": []})
