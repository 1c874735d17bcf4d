"""What comes from outside arrives as text, whatever it holds."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from recclr.report.charts import Bar, Line, bar_chart, line_chart
from recclr.report.markup import Cell, figure, folded, pairs, paragraph, section, table

# Control characters are no text in HTML and never reach a page; a parser may drop them.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)
HOSTILE = st.one_of(
    TEXT, st.sampled_from(["<script>x</script>", '"><img src=x>', "a&lt;b", "</td>"])
)


class Reader(HTMLParser):
    """Collects tags, attributes and text of a fragment."""

    def __init__(self, fragment: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], []
        self.feed(fragment)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def every_piece(text: str) -> dict[str, str]:
    lines = [Line(text, [(0, 1.0)]), Line("b", [(1, 2.0)])]
    return {
        "p": paragraph(text, css=text),
        "table": table([text, "b"], [(text, [Cell(text, text, text), Cell(text)])], text),
        "facts": pairs([(text, text)], text),
        "section": section(text, "x"),
        "figure": figure("<svg></svg>", text),
        "details": folded(text, "x"),
        "bars": bar_chart([Bar(text, 0.5)], title=text, x_label=text),
        "lines": line_chart(lines, title=text, x_label=text, y_label=text),
    }


@given(HOSTILE)
def test_no_text_opens_a_tag_or_an_attribute(text):
    harmless = every_piece("x")
    for name, piece in every_piece(text).items():
        found, expected = Reader(piece), Reader(harmless[name])
        assert [tag for tag in found.tags if tag != "wbr"] == expected.tags, name
        assert [key for key, _ in found.attributes] == [key for key, _ in expected.attributes], name
        assert text in "".join(found.text), name


def test_nothing_inside_gives_nothing():
    assert table(["a"], []) == ""
    assert pairs([]) == ""
    assert section("Title", "", "") == ""
    assert figure("", "caption") == ""
    assert folded("more", "") == ""


def test_a_column_of_text_is_aligned_as_text_in_head_and_body():
    rows = [("", [Cell("a"), Cell("warm", css="text"), Cell("0.1")])]
    read = Reader(table(["name", "slice", "value"], rows))
    assert read.attributes.count(("class", "text")) == 2


def test_shades_are_kept_in_range():
    row = [Cell("a", shade=-3.0), Cell("b", shade=0.5), Cell("c", shade=9.0), Cell("d")]
    styles = [
        value for key, value in Reader(table(["a"] * 4, [("", row)])).attributes if key == "style"
    ]
    assert [style.rsplit(", ", 1)[1] for style in styles] == ["0.00)", "0.25)", "0.50)"]
