"""Pictures and pages: valid, self-contained, escaped; the terminal picture puts things where they belong."""

import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

from rich.console import Console

from trimtab.report import page
from trimtab.report.curves import Curve, Point
from trimtab.report.pictures import INK, Look, inline, seeds_picture, standalone, trade_picture
from trimtab.report.tables import Table
from trimtab.report.terminal import Canvas, Line, reward_tax_picture, rich_table

CURVES = [
    Curve(method, seed, (Point(0.3, 0.0), Point(0.4 + seed / 100, 3.0), Point(0.5, 9.0 + seed)))
    for method in ("A", "B <&>")
    for seed in (0, 1)
]
LOOKS = {"A": Look("#111111"), "B <&>": Look("#d55e00", "s")}


def test_pictures_are_valid_svg_and_the_same_each_time():
    for draw in (
        lambda: trade_picture(CURVES, LOOKS),
        lambda: seeds_picture(CURVES, LOOKS, "A", tax_limit=8.0),
    ):
        svg = draw()
        ElementTree.fromstring(svg)
        assert svg == draw()
        assert "B &lt;&amp;&gt;" in svg


def test_an_inline_picture_takes_the_pages_ink_and_a_file_stands_alone():
    svg = trade_picture(CURVES, LOOKS)
    inside = inline(svg, "reward against tax")
    assert "currentColor" in inside
    assert INK not in inside
    alone = standalone(svg)
    assert ElementTree.fromstring(alone.encode()).tag.endswith("svg")
    assert "currentColor" not in alone


class Tags(HTMLParser):
    """Checks that tags close in order, and collects what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith("#")
        ]
        if tag not in ("meta", "br", "path", "use", "rect", "image"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src",)]

    def handle_endtag(self, tag):
        if tag in ("path", "use", "rect", "image"):
            return
        assert self.open.pop() == tag


def test_a_page_is_self_contained_and_escapes_what_it_is_given():
    table = Table("t & t", ["m<", "x"], [["<b>", "1"]])
    text = page.page(
        "A < B",
        "lead & more",
        page.verdict_box("head", ["<script>"], "note & note") + page.cards([("1", "one")]),
        [
            page.Section(
                "S", page.html_table(table) + page.bullets(["x"]) + page.folded("more", page.paragraph("p"))
            ),
            page.Section("P", page.figure(inline(trade_picture(CURVES, LOOKS), "t"), "caption")),
        ],
        "end",
    )
    parser = Tags()
    parser.feed(text)
    assert parser.open == []
    assert parser.fetched == []
    assert "<script>" not in text
    assert "&lt;b&gt;" in text


def test_the_canvas_draws_from_the_lower_left():
    canvas = Canvas(4, 2)
    canvas.line(0, 0, 0, 1, "red")
    canvas.letter(1, 0, "Z", "blue")
    rows = [row.plain for row in canvas.rows()]
    assert rows == ["⡇⠀⠀⠀", "⡇⠀⠀Z"]


def test_lines_that_leave_the_canvas_are_cut():
    canvas = Canvas(2, 1)
    canvas.line(0.5, 0.5, 5, 5, "red")
    canvas.letter(3, 3, "X", "red")
    assert "X" not in canvas.rows()[0].plain


def plain(renderable) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    text = console.export_text()
    console.file.close()
    return text


def test_the_terminal_picture_has_axes_marks_and_a_legend():
    lines = [Line("A", CURVES[0].points, "white", "A"), Line("B", CURVES[1].points, "red", "B")]
    text = plain(reward_tax_picture(lines, width=40, height=8))
    assert "reward" in text
    assert "tax" in text
    assert "● reference (start)   A A   B B" in text
    first, last = text.splitlines()[1], text.splitlines()[8]
    assert "B" in first
    assert "●" in last


def test_a_flat_picture_is_drawn_too():
    line = Line("A", (Point(0.3, 0.0), Point(0.3, 0.0)), "white", "A")
    assert "A A" in plain(reward_tax_picture([line], width=20, height=4))


def test_the_rich_table_shows_cells_and_note():
    text = plain(rich_table(Table("title", ["m", "x"], [["a", "1 [b] (0 to 2)"]], "note")))
    assert "title" in text
    assert "1 [b]" in text
    assert "(" not in text
    assert "note" in text
