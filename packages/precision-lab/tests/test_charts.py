import math
import re
import xml.etree.ElementTree as ElementTree

from precision_lab.charts import HEIGHT, POINTS, WIDTH, Bar, Line, bar_rows, line_chart


def points(svg):
    tree = ElementTree.fromstring(svg)
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in tree.iter("polyline")
    ]


def test_lines_are_drawn_where_their_values_are():
    (line,) = points(line_chart([Line("a & b", [1, 2, 3], [1.0, 2.0, 3.0], 0)], "title <x>"))
    (x1, y1), (x2, y2), (x3, y3) = line
    assert x2 - x1 == x3 - x2 > 0 and abs((y1 - y2) - (y2 - y3)) < 0.2 and y1 > y2
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in line)


def test_a_logarithmic_axis_leaves_out_what_has_no_logarithm():
    (line,) = points(line_chart([Line("a", [1, 2, 3, 4], [1e-4, math.nan, 0.0, 1e-2], 0)], "t", logarithmic=True))
    assert len(line) == 2
    assert line_chart([Line("a", [1], [math.nan], 0)], "t") == line_chart([], "t") == ""


def test_only_the_end_and_few_points_are_drawn():
    steps = list(range(1, 10_001))
    (line,) = points(line_chart([Line("a", steps, [1 / s for s in steps], 0)], "t", first=5000))
    assert POINTS / 2 < len(line) <= 2 * POINTS


def test_bars_have_the_width_of_their_bytes():
    text = bar_rows([Bar("a<b", [("params", 10, "10 B"), ("grads", 30, "30 B")]), Bar("c", [("params", 20, "20 B")])])
    assert [float(width) for width in re.findall(r"width:([\d.]+)%", text)] == [25, 75, 50]
    assert "a&lt;b" in text and "params 10 B, grads 30 B" in text
