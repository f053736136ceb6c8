"""The charts put marks where the numbers are, and draw something sensible for any numbers."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from markupsafe import Markup

from prism_nemo.report import charts, curves
from prism_nemo.report.charts import Bar, Estimate
from prism_nemo.report.formatting import clean, compact, decimal, duration, percent, signed, significant
from prism_nemo.report.line_charts import Series, line_chart
from prism_nemo.report.svg import Scale, Style, nothing, span, stacked, ticks

STYLE = Style("s-base", "circle")
HOSTILE = "<script>alert(1)</script>\"'&"
NAN, INF = math.nan, math.inf


def parse(svg: Markup) -> ElementTree.Element:
    """Parses a picture and checks that no coordinate is broken."""
    root = ElementTree.fromstring(str(svg))
    for node in root.iter():
        for name, value in node.attrib.items():
            if name not in ("aria-label", "class"):
                assert not re.search(r"nan|inf|None", value), (node.tag, name, value)
        for name in ("width", "height", "r"):
            assert float(node.get(name, "1")) > 0, (node.tag, name)
    return root


def lines(svg: Markup) -> list[list[tuple[float, float]]]:
    """Returns the corners of every curve."""
    paths = [node.get("d", "") for node in parse(svg).iter("path") if node.get("class") == "line"]
    # The samples of the legend are relative paths.
    found = [re.findall(r"([-\d.]+) ([-\d.]+)", path) for path in paths if "h24" not in path]
    return [[(float(x), float(y)) for x, y in path] for path in found]


def draw(x: list[float], y: list[float], **options: object) -> Markup:
    """Draws one curve."""
    series = [Series("Base", STYLE, x, y)]
    return line_chart(series, title="Loss", x_label="step", y_label="nats", **options)  # type: ignore[arg-type]


def test_curve_goes_through_its_points() -> None:
    svg = draw([0, 1, 2, 4], [0.0, 1.0, 0.5, 0.0], y_range=(0.0, 1.0))
    (path,) = lines(svg)
    assert len(path) == 4
    assert path[1][1] < path[2][1] < path[0][1] == path[3][1], "larger values must be higher up"
    assert path[3][0] - path[2][0] == pytest.approx(2 * (path[1][0] - path[0][0]), abs=0.3)


@pytest.mark.parametrize(
    "y",
    [
        [],
        [NAN],
        [NAN, NAN, INF],
        [1.0],
        [2.0, 2.0, 2.0],
        [0.0, 0.0],
        [1e-12, 1e-12],
        [-1e300, 1e300],
        [-1.7e308, 1.7e308],
        [1.0, NAN, 2.0, INF, 3.0],
        [5.0] * 2000,
        [1.0, 1.0 + 1e-15],
    ],
)
def test_any_series_gives_a_sound_picture(y: list[float]) -> None:
    svg = draw([float(step) for step in range(len(y))], y)
    root = parse(svg)
    assert root.get("aria-label") == "Loss"
    finite = [value for value in y if math.isfinite(value)]
    assert ("not measured" in str(svg)) == (not finite)
    marks = list(root.iter("circle"))
    assert bool(marks) == bool(finite)


def test_no_series_at_all_says_not_measured() -> None:
    svg = line_chart([], title="Loss", x_label="step", y_label="nats")
    parse(svg)
    assert "not measured" in svg


def test_a_gap_is_drawn_as_a_gap() -> None:
    paths = lines(draw([1, 2, 3, 4, 5], [1, 2, NAN, 4, 5]))
    assert [len(path) for path in paths] == [2, 2]


def test_the_band_holds_every_value() -> None:
    noise = random.Random(3)
    y = [noise.gauss(0, 1) + (20 if place == 77 else 0) for place in range(200)]
    for half in (1, 5, 30):
        points = curves.smooth(range(200), y, half)
        assert [point.x for point in points] == list(range(200))
        for point, value in zip(points, y, strict=True):
            assert point.low <= value + 1e-9
            assert point.high >= value - 1e-9
            assert point.low - 1e-9 <= point.mean <= point.high + 1e-9


def test_smoothing_keeps_the_ends_and_the_level() -> None:
    y = [float(place % 2) for place in range(101)]
    points = curves.smooth(range(101), y, 10)
    assert (points[0].mean, points[-1].mean) == (0.0, 0.0)
    assert points[50].mean == pytest.approx(sum(y[40:61]) / 21)
    assert curves.smooth([1], [4.0], 5) == [curves.Point(1, 4.0, 4.0, 4.0)]
    assert curves.smooth([], [], 5) == []


def test_long_series_stay_small_and_keep_both_ends() -> None:
    picked = curves.thin(100_000)
    assert len(picked) == curves.MOST_POINTS
    assert (picked[0], picked[-1]) == (0, 99_999)
    assert curves.thin(3) == [0, 1, 2]
    svg = draw([float(step) for step in range(20_000)], [1 / (1 + step) for step in range(20_000)])
    assert len(svg) < 60_000


def test_intervals_are_drawn_around_their_values() -> None:
    rows = [Estimate("Base", STYLE, 0.5, 0.25, 1.0, 0.75), Estimate("Mid-trained", STYLE, None)]
    svg = charts.interval_rows(rows, title="Accuracy", value_format=percent, x_range=(0.0, 1.0), width=340)
    root = parse(svg)
    (whisker,) = [node.get("d", "") for node in root.iter("path") if node.get("class") == "whisker"]
    left, right = re.findall(r"M([\d.]+) [\d.]+v", whisker)
    assert (float(left), float(right)) == pytest.approx((8 + 324 * 0.25, 332))
    filled, hollow = list(root.iter("circle"))
    assert (filled.get("class"), hollow.get("class")) == ("dot", "ring")
    assert (float(filled.get("cx", "")), float(hollow.get("cx", ""))) == (8 + 324 * 0.5, 8 + 324 * 0.75)
    assert "Mid-trained: not measured." in "".join(root.itertext())
    assert "Base: 50.0% (95% interval 25.0% to 100.0%), greedy 75.0%." in "".join(root.itertext())


def test_an_interval_that_goes_on_beyond_the_drawing_has_no_cap_there() -> None:
    rows = [Estimate("Base", STYLE, 0.5, -3.0, 0.75)]
    svg = charts.interval_rows(rows, title="Gain", value_format=decimal, x_range=(0.0, 1.0), width=340)
    (whisker,) = [node.get("d", "") for node in parse(svg).iter("path") if node.get("class") == "whisker"]
    assert [float(x) for x in re.findall(r"M([\d.]+) [\d.]+v", whisker)] == pytest.approx([8 + 324 * 0.75])
    assert re.match(r"M14\.0 [\d.]+L8\.0 [\d.]+L14\.0 ", whisker), "an arrow at the edge"
    assert "-3.0" in "".join(parse(svg).itertext())


def test_pictures_are_stacked_without_touching() -> None:
    parts = [(name, charts.interval_rows([Estimate(name, STYLE, 0.5)] * n, title=name, value_format=decimal, width=340,
                                         reference=(0.25, 0.75))) for name, n in (("one", 1), ("two", 2))]  # fmt: skip
    root = parse(stacked("Both", [*parts, (HOSTILE, nothing(340, "none"))], 340))
    inner = [node for node in root if node.tag == "svg"]
    tops = [float(node.get("y", "")) for node in inner]
    heights = [float(node.get("height", "")) for node in inner]
    assert heights == [float(node.get("viewBox", "").split()[3]) for node in inner]
    assert all(tops[n + 1] > tops[n] + heights[n] for n in range(2))
    assert float(root.get("viewBox", "").split()[3]) > tops[-1] + heights[-1]
    assert len([node for node in inner[0].iter("line") if node.get("class") == "reference"]) == 2


def test_intervals_without_values_say_so() -> None:
    svg = charts.interval_rows([Estimate("Base", STYLE, None)], title="Accuracy", value_format=percent)
    parse(svg)
    assert "not measured" in svg
    parse(charts.interval_rows([], title="Accuracy", value_format=percent))
    parse(charts.interval_rows([Estimate("Base", STYLE, 3.0)], title="Loss", value_format=decimal, reference=3.0))


def test_bars_start_and_end_where_they_should() -> None:
    bars = [Bar("one", STYLE, 2.0, "2", "group", start=1.0), Bar("two", STYLE, None, "not measured", "group")]
    svg = charts.horizontal_bars(bars, title="Bars", x_range=(0.0, 4.0), labels=100, width=514)
    (bar,) = [node for node in parse(svg).iter("rect") if node.get("class") == "bar"]
    start, end = 110, 440
    assert float(bar.get("x", "")) == pytest.approx(start + (end - start) / 4)
    assert float(bar.get("width", "")) == pytest.approx((end - start) / 2)
    assert "not measured" in svg


@pytest.mark.parametrize("values", [[], [None], [0.0], [0.0, 0.0], [NAN], [1e-9, 1.0], [1e300]])
def test_any_bars_give_a_sound_picture(values: list[float | None]) -> None:
    svg = charts.horizontal_bars([Bar(f"bar {place}", STYLE, v, "x") for place, v in enumerate(values)], title="Bars")
    shown = [node for node in parse(svg).iter("rect") if node.get("class") == "bar"]
    assert len(shown) == sum(value is not None and math.isfinite(value) for value in values)


def test_heat_is_strongest_furthest_from_the_centre() -> None:
    rows = [("a", [1.0, 0.5, 1.25]), ("b", [None, NAN])]
    svg = charts.heat_strip(rows, ["x", "y", "z"], title="CKA", value_format=decimal, centre=1.0, least_reach=0.1)
    cells = [node for node in parse(svg).iter("rect") if (node.get("class") or "").startswith("heat")]
    assert [float(cell.get("fill-opacity", "")) for cell in cells] == [0.0, 1.0, 0.5]
    assert [cell.get("class") for cell in cells][1:] == ["heat below", "heat above"]
    assert len([node for node in parse(svg).iter("rect") if node.get("class") == "empty"]) == 3


def test_small_differences_get_little_colour() -> None:
    svg = charts.heat_strip([("a", [0.999])], ["x"], title="t", value_format=decimal, centre=1.0, least_reach=0.1)
    (cell,) = [node for node in parse(svg).iter("rect") if (node.get("class") or "").startswith("heat")]
    assert float(cell.get("fill-opacity", "")) == pytest.approx(0.01)


@pytest.mark.parametrize("rows", [[], [("a", [])], [("a", [None])], [("a", [1.0] * 80)]])
def test_any_heat_gives_a_sound_picture(rows: list[tuple[str, list[float | None]]]) -> None:
    columns = [f"layer {place}" for place in range(max((len(values) for _, values in rows), default=0))]
    parse(charts.heat_strip(rows, columns, title="t", value_format=decimal, centre=1.0, least_reach=0.1))


def test_text_from_outside_is_escaped() -> None:
    style = Style("s-other")
    pictures = [
        line_chart([Series(HOSTILE, style, [1], [1])], title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE),
        charts.interval_rows([Estimate(HOSTILE, style, 0.5)], title=HOSTILE, value_format=percent),
        charts.horizontal_bars([Bar(HOSTILE, style, 1.0, HOSTILE, HOSTILE, note=HOSTILE)], title=HOSTILE),
        charts.heat_strip([(HOSTILE, [1.0])], [HOSTILE], title=HOSTILE, value_format=str, centre=0.0, least_reach=1),
        nothing(100, HOSTILE),
    ]
    for svg in pictures:
        root = parse(svg)
        assert not list(root.iter("script"))
        assert root.get("aria-label") == HOSTILE


def test_ranges_and_ticks() -> None:
    assert span([]) == (0.0, 1.0)
    assert span([NAN, INF]) == (0.0, 1.0)
    assert span([0.0]) == (-1.0, 1.0)
    assert span([5.0, 5.0]) == (4.5, 5.5)
    assert span([0.0, 1.0], pad=0.1) == (-0.1, 1.1)
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3.2, 3.31, 3) == pytest.approx([3.2, 3.25, 3.3])
    assert ticks(1, 1) == [1]
    for low, high in ((0, 7e-9), (-3, 1234567), (0.999, 1.001)):
        found = ticks(low, high, 5)
        assert 2 <= len(found) <= 12
        assert all(low - 1e-9 <= tick <= high + 1e-9 * abs(high) for tick in found)
        assert all(second > first for first, second in pairwise(found))
    assert Scale(0, 10, 100, 0)(2.5) == 75


def test_numbers_as_people_read_them() -> None:
    for shown in (percent, decimal, signed, significant, compact, duration):
        assert shown(None) == shown(NAN) == shown(INF) == "not measured"
    assert [duration(value) for value in (0.31, 59.94, 59.96, 512.3, 3599.7, 7500)] == [
        "0.3 s",
        "59.9 s",
        "1 min 00 s",
        "8 min 32 s",
        "1 h 00 min",
        "2 h 05 min",
    ]
    assert [compact(value) for value in (12, 935_000, 1_024_000, 26.2e9)] == ["12", "935k", "1.02M", "26.2B"]
    assert [significant(value) for value in (0.02134, 1.23e-6, 20_000, 0)] == ["0.02134", "1.23e-06", "20,000", "0"]
    assert (signed(-0.5), percent(0.47266)) == ("−0.500", "47.3%")
    assert clean("abc", 2) == "ab […cut, 1 more characters]"
