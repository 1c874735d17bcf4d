"""Charts put values where they belong, and nothing where there is nothing."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recclr.report.charts import Bar, Line, bar_chart, difference_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"
VALUES = st.floats(-1e30, 1e30)


def draw_lines(*lines: Line) -> ET.Element:
    return ET.fromstring(line_chart(lines, title="t", x_label="epoch", y_label="loss"))


def draw_bars(*bars: Bar) -> ET.Element:
    return ET.fromstring(bar_chart(bars, title="t", x_label="recall"))


def polyline(root: ET.Element, number: int = 0) -> list[tuple[float, float]]:
    points = root.findall(f"{SVG}polyline")[number].get("points").split()
    return [tuple(map(float, point.split(","))) for point in points]


def texts(root: ET.Element) -> dict[str, ET.Element]:
    return {element.text: element for element in root.iter(f"{SVG}text")}


def rule_at(root: ET.Element, label: str) -> float:
    """Height of the horizontal rule that a tick label stands at."""
    y = float(texts(root)[label].get("y"))
    return min((float(r.get("y1")) for r in root.iter(f"{SVG}line")), key=lambda at: abs(at - y))


def test_a_point_on_a_tick_lies_on_its_rule():
    root = draw_lines(Line("a", [(0, 10.0), (1, 20.0), (2, 30.0)]))
    heights = [y for _, y in polyline(root)]
    assert heights == pytest.approx([rule_at(root, label) for label in ("10", "20", "30")], abs=0.1)
    assert heights[0] > heights[1] > heights[2]


def test_points_are_spaced_as_their_values_are():
    (x0, y0), (x1, y1), (x2, y2) = polyline(draw_lines(Line("a", [(0, 1.0), (1, 2.0), (4, 8.0)])))
    assert (x2 - x0) / (x1 - x0) == pytest.approx(4, rel=0.01)
    assert (y2 - y0) / (y1 - y0) == pytest.approx(7, rel=0.01)


def test_lines_share_one_pair_of_axes():
    root = draw_lines(Line("low", [(0, 1.0), (1, 1.0)]), Line("high", [(0, 3.0), (1, 5.0)]))
    assert polyline(root)[0][0] == polyline(root, 1)[0][0]
    assert polyline(root)[0][1] > polyline(root, 1)[0][1] > polyline(root, 1)[1][1]


def test_the_legend_stands_above_every_point():
    root = draw_lines(Line("first", [(0, 1.0), (1, 2.0)]), Line("second", [(0, 9.0), (1, 3.0)]))
    highest = min(y for number in (0, 1) for _, y in polyline(root, number))
    for name, number in (("first", 0), ("second", 1)):
        label = texts(root)[name]
        assert float(label.get("y")) + 12 < highest
        assert label.get("fill") == root.findall(f"{SVG}polyline")[number].get("stroke")


def test_the_marked_point_has_a_dot():
    root = draw_lines(Line("a", [(1, 0.1), (2, 0.4), (3, 0.3)], mark=2))
    (dot,) = root.findall(f"{SVG}circle")
    assert (float(dot.get("cx")), float(dot.get("cy"))) == pytest.approx(polyline(root)[1], abs=0.1)


def test_a_single_point_is_a_dot_within_the_chart():
    root = draw_lines(Line("a", [(3, 0.25)]))
    (dot,) = root.findall(f"{SVG}circle")
    _, _, width, height = map(float, root.get("viewBox").split())
    assert 0 < float(dot.get("cx")) < width
    assert 0 < float(dot.get("cy")) < height
    assert not root.findall(f"{SVG}polyline")


@pytest.mark.parametrize("lines", [[], [Line("a", [])], [Line("a", [(1, math.nan)])]])
def test_no_points_give_no_chart(lines):
    assert line_chart(lines, title="t", x_label="x", y_label="y") == ""


def test_points_that_are_not_finite_are_left_out():
    bad = [(1, math.nan), (2, math.inf), (math.nan, 2.0), (3, -math.inf), (4, 1e300)]
    clean = [(0, 1.0), (5, 2.0)]
    assert polyline(draw_lines(Line("a", [*clean[:1], *bad, *clean[1:]]))) == polyline(
        draw_lines(Line("a", clean))
    )


def test_a_long_line_is_thinned_but_keeps_its_end_and_its_mark():
    root = draw_lines(Line("a", [(x, 5.0) for x in range(1998)] + [(1998, 9.0)], mark=997))
    drawn = polyline(root)
    assert len(drawn) < 500
    assert drawn[-1][1] < drawn[0][1] == drawn[-2][1]
    assert len(root.findall(f"{SVG}circle")) == 1


@given(st.lists(st.tuples(st.floats(0, 1e6), VALUES), min_size=1, max_size=20))
def test_any_finite_line_stays_inside_its_frame(points):
    root = draw_lines(Line("a", sorted(points)))
    _, _, width, height = map(float, root.get("viewBox").split())
    for shape in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(shape.get(name, 0)) <= width
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(shape.get(name, 0)) <= height
    assert "nan" not in ET.tostring(root, "unicode")


@given(VALUES, st.floats(1e-6, 1e6))
def test_ticks_are_distinct_and_few(low, span):
    root = draw_lines(Line("a", [(0, low), (1, low + span)]))
    rules = root.findall(f"{SVG}line")
    assert 1 <= len(rules) <= 8


def bar_lengths(root: ET.Element) -> list[float]:
    return [float(rect.get("width")) for rect in root.findall(f"{SVG}rect")]


def test_bars_are_as_long_as_their_values():
    root = draw_bars(Bar("model", 0.4, strong=True), Bar("knn", 0.1), Bar("none", 0.0))
    long, short, none = bar_lengths(root)
    assert long / short == pytest.approx(4, rel=0.01)
    assert none == 0
    fills = [rect.get("fill") for rect in root.findall(f"{SVG}rect")]
    assert fills[0] != fills[1] == fills[2]
    assert {"0.4000", "0.1000", "0.0000"} <= set(texts(root))


def test_a_bar_ends_at_the_tick_of_its_value():
    root = draw_bars(Bar("a", 0.4), Bar("b", 0.2))
    rect = root.findall(f"{SVG}rect")[1]
    end = float(rect.get("x")) + float(rect.get("width"))
    assert end == pytest.approx(float(texts(root)["0.2"].get("x")), abs=0.2)


def test_whiskers_span_the_interval():
    root = draw_bars(Bar("a", 0.3, low=0.2, high=0.4), Bar("b", 0.1))
    (path,) = root.findall(f"{SVG}path")
    left, right = map(float, re.match(r"M ([\d.]+) \S+ H ([\d.]+)", path.get("d")).groups())
    assert left == pytest.approx(float(texts(root)["0.2"].get("x")), abs=0.2)
    assert right == pytest.approx(float(texts(root)["0.4"].get("x")), abs=0.2)
    assert float(texts(root)["0.3000"].get("x")) > right


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bar_that_is_not_finite_is_said_and_spoils_no_other(value):
    root = draw_bars(Bar("a", 0.4), Bar("b", value, low=value, high=value), Bar("c", 0.2))
    assert "n/a" in texts(root)
    assert bar_lengths(root) == bar_lengths(draw_bars(Bar("a", 0.4), Bar("c", 0.2)))
    assert not root.findall(f"{SVG}path")


def test_all_zero_bars_are_drawn():
    assert bar_lengths(draw_bars(Bar("a", 0.0), Bar("b", 0.0))) == [0, 0]


def test_no_bars_give_no_chart():
    assert bar_chart([], title="t", x_label="x") == ""


def test_names_are_escaped_everywhere():
    name = '<b>&"x"'
    for root in (
        draw_bars(Bar(name, 0.1)),
        draw_lines(Line(name, [(0, 1.0)]), Line("b", [(0, 2.0)])),
    ):
        assert name in texts(root)
    title = ET.fromstring(bar_chart([Bar("a", 1.0)], title=name, x_label=name))
    assert (title.get("aria-label"), title.find(f"{SVG}title").text) == (name, name)


def test_a_logarithmic_axis_gives_equal_ratios_equal_room():
    line = Line("a", [(0.01, 1.0), (0.1, 2.0), (1.0, 3.0)])
    root = ET.fromstring(
        line_chart([line], title="t", x_label="share", y_label="recall", log_x=True)
    )
    (x0, _), (x1, _), (x2, _) = polyline(root)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    for value, x in ((0.01, x0), (0.1, x1), (1, x2)):
        assert float(texts(root)[f"{value:g}"].get("x")) == pytest.approx(x, abs=0.1)
    assert {"0.02", "0.05", "0.2", "0.5"} <= set(texts(root))
    alone = line_chart([Line("a", [(0.3, 1.0)])], title="t", x_label="x", y_label="y", log_x=True)
    assert 64 < float(ET.fromstring(alone).find(f"{SVG}circle").get("cx")) < 744


def test_intervals_stand_where_their_values_are():
    ends = {0: (1.0, 3.0), 1: (2.0, 2.5), 2: (math.nan, 9.0), 5: (0.0, 9.0)}
    root = draw_lines(Line("a", [(0, 2.0), (1, 2.25), (2, 2.5)], intervals=ends))
    found = [
        [float(number) for number in re.findall(r"-?[\d.]+", path.get("d"))]
        for path in root.findall(f"{SVG}path")
    ]
    # Neither what is no number nor what has no point.
    assert len(found) == 2
    (first, second), line = found, polyline(root)
    assert (first[3], second[3]) == pytest.approx((line[0][0], line[1][0]), abs=0.1)
    assert first[4] == pytest.approx(rule_at(root, "1"), abs=0.1)
    assert first[5] == pytest.approx(rule_at(root, "3"), abs=0.1)


def test_a_legend_of_many_has_rows_above_the_plot_and_a_colour_for_each():
    lines = [Line(f"ranker {n}", [(0, 1.0 + n), (1, 9.0 - n)]) for n in range(9)]
    root = draw_lines(*lines)
    places = {(float(t.get("x")), float(t.get("y"))) for t in (texts(root)[x.name] for x in lines)}
    assert len(places) == 9
    lowest = max(y for _, y in places)
    assert all(lowest < y for number in range(9) for _, y in polyline(root, number))
    assert len({p.get("stroke") for p in root.findall(f"{SVG}polyline")}) == 9


# --- differences ---------------------------------------------------------------------------------


def circles(svg):
    return [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]


def test_differences_stand_left_and_right_of_zero_in_their_proportion():
    bars = [
        Bar("worse", -0.02, -0.03, -0.01, strong=True),
        Bar("none", 0.0, -0.01, 0.01),
        Bar("better", 0.04, 0.02, 0.06, strong=True),
    ]
    svg = difference_chart(bars, title="Difference", x_label="Δ recall@20")
    (zero,) = map(float, re.findall(r'<path d="M ([\d.]+) \d+ V', svg))
    worse, none, better = circles(svg)
    assert none == pytest.approx(zero, abs=0.1)
    assert (better - zero) / (zero - worse) == pytest.approx(2.0, rel=0.02)
    whiskers = re.findall(r'<path d="M ([\d.]+) [\d.]+ H ([\d.]+)"', svg)
    assert len(whiskers) == 3
    low, high = map(float, whiskers[2])
    assert low < better < high
    assert svg.count("var(--model)") == 4
    for text in ("-0.0200", "+0.0400", "worse", "Δ recall@20"):
        assert text in svg


def test_differences_without_intervals_or_figures():
    assert difference_chart([], title="t", x_label="x") == ""
    assert difference_chart([Bar("a", math.nan)], title="t", x_label="x") == ""
    svg = difference_chart([Bar("a", 0.0), Bar("b", math.inf)], title="t", x_label="x")
    assert len(circles(svg)) == 1
    assert " H " not in svg
