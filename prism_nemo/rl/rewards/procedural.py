"""Small generators that write a question, the worked answer and the answer.

The work spells out every step that the answer needs, so that a model of a million parameters can learn it, and the
answer can be read off it.
"""

from __future__ import annotations

import random

from prism_nemo.rl.rewards.task import Problem, Task, register


def add_columns(a: int, b: int) -> str:
    """Column addition of two numbers below 100: ones first, then tens with the carry."""
    ones = a % 10 + b % 10
    carry = "+1" if ones > 9 else ""
    return f"{a % 10}+{b % 10}={ones};{a // 10}+{b // 10}{carry}={(a + b) // 10}"


class Arithmetic(Task):
    """Two-digit sums, and chains of three one-digit numbers."""

    name, domain = "arithmetic", "math"

    def draw(self, rng: random.Random) -> Problem:
        """See `Task.draw`."""
        if rng.random() < 0.75:
            a, b = rng.randint(10, 99), rng.randint(10, 99)
            return Problem(self.name, f"{a}+{b}=?", add_columns(a, b), str(a + b))
        while True:
            value = rng.randint(1, 9)
            question, steps = str(value), []
            for _ in range(2):
                operand, sign = rng.randint(1, 9), rng.choice("+-")
                result = value + operand if sign == "+" else value - operand
                if result < 0:
                    break
                question += f"{sign}{operand}"
                steps.append(f"{value}{sign}{operand}={result}")
                value = result
            if len(steps) == 2:
                return Problem(self.name, f"{question}=?", ";".join(steps), str(value))


class Lists(Task):
    """What a line of Python prints: reversing, summing, the largest, indexing."""

    name, domain = "lists", "code"

    def draw(self, rng: random.Random) -> Problem:
        """See `Task.draw`."""
        a = [rng.randint(0, 9) for _ in range(3)]
        shown = str(a).replace(" ", "")
        kind = rng.randrange(4)
        if kind == 0:
            code, work = "a[::-1]", ";".join(f"a[{i}]={a[i]}" for i in (2, 1, 0))
            answer = str(a[::-1]).replace(" ", "")
        elif kind == 1:
            code, answer = "sum(a)", str(sum(a))
            work = f"{a[0]}+{a[1]}={a[0] + a[1]};{a[0] + a[1]}+{a[2]}={sum(a)}"
        elif kind == 2:
            first = max(a[:2])
            code, answer = "max(a)", str(max(a))
            work = f"max({a[0]},{a[1]})={first};max({first},{a[2]})={max(a)}"
        else:
            i = rng.randrange(3)
            code, work, answer = f"a[{i}]", f"a[{i}]={a[i]}", str(a[i])
        return Problem(self.name, f"a={shown};print({code})", work, answer)


class Formulas(Task):
    """Physics in one line: name the formula, put in the numbers, work it out."""

    name, domain = "formulas", "science"

    _TEXTS = (
        ("speed {} m/s, gain {} m/s, final speed?", "speed+gain"),
        ("mass {} kg, added {} kg, total mass?", "mass+added"),
        ("charge {} C, second {} C, total charge?", "charge+second"),
        ("height {} m, rise {} m, new height?", "height+rise"),
    )

    def draw(self, rng: random.Random) -> Problem:
        """See `Task.draw`."""
        text, formula = rng.choice(self._TEXTS)
        a, b = rng.randint(10, 99), rng.randint(1, 9)
        return Problem(self.name, text.format(a, b), f"{formula}={a}+{b};{add_columns(a, b)}", str(a + b))


register(Arithmetic())
register(Lists())
register(Formulas())
