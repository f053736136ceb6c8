"""Places of models in the picture of where they come from."""

from __future__ import annotations

import random

from prism_nemo.report.svg import Style
from prism_nemo.report.tree import draw, lay_out


def test_a_chain_goes_straight_and_branches_hang_below_it() -> None:
    # base, mid, mid longer, RL on mid, RL on base
    assert lay_out([[], [0], [1], [1], [0]]) == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 2)]


def test_a_merge_stands_right_of_both_parents() -> None:
    assert lay_out([[], [0], [1, 0]]) == [(0, 0), (1, 0), (2, 0)]


def test_no_two_models_share_a_place() -> None:
    chance = random.Random(3)
    for _ in range(200):
        count = chance.randint(1, 25)
        parents = [chance.sample(range(child), min(child, chance.randint(0, 2))) for child in range(count)]
        places = lay_out(parents)
        assert len(set(places)) == count
        assert all(places[one][0] < places[child][0] for child, above in enumerate(parents) for one in above)


def test_every_arrow_is_drawn_and_said() -> None:
    svg = str(draw(["a", "b", "c"], [("x",)] * 3, [Style("s-base")] * 3, [[], [0], [1, 0]]))
    assert svg.count('class="arrow"') == 3
    assert "c: x; from b and a" in svg
