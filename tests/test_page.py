"""report.html: one file, nothing fetched, the same tables and pictures as report.md."""

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest

from studies.page import page

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
MARKDOWN = """# planted: methods <compared>

A line of `code`, **bold**, and R&D.
It goes on.

## Table

| method | HR@1 | note |
| --- | --- | --- |
| sft | 0.5000 [0.4, 0.6] | "quoted" |
| recpo λ=4 | 0.2500 |  |
- a list
- of two

![a picture](p.png)
"""


class Reader(HTMLParser):
    """Checks that tags close in order, and collects what the page shows and loads."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.cells, self.loads, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def read(document: str) -> Reader:
    reader = Reader()
    reader.feed(document)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def document(tmp_path: Path) -> str:
    (tmp_path / "p.png").write_bytes(PIXEL)
    return page(MARKDOWN, tmp_path)


def test_a_page_holds_every_block(document):
    reader = read(document)
    assert reader.cells == [
        *("method", "HR@1", "note"),
        *("sft", "0.5000 [0.4, 0.6]", '"quoted"'),
        *("recpo λ=4", "0.2500", ""),
    ]
    for tag, count in (("h1", 1), ("h2", 1), ("p", 1), ("ul", 1), ("li", 2), ("table", 1)):
        assert reader.tags.count(tag) == count, tag
    shown = "".join(reader.text)
    assert "methods <compared>" in shown and "R&D. It goes on." in shown
    assert "<code>code</code>" in document and "<b>bold</b>" in document
    assert document.startswith("<!doctype html>")


def test_nothing_is_fetched(document):
    """The only thing loaded is the picture, and it stands in the page itself."""
    (source,) = read(document).loads
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PIXEL
    for word in ("http:", "https:", "@import", "url(", "fetch(", "XMLHttp", "<link"):
        assert word not in document, word


def test_what_a_report_says_is_no_markup(tmp_path):
    """A method's or a file's name cannot bring a script along."""
    cell = "<script>alert(1)</script>"
    document = page(f"# x\n\n| {cell} |\n| --- |\n| <b onclick=y> |\n", tmp_path)
    assert read(document).tags.count("script") == 1  # the page's own
    assert read(document).cells == [cell, "<b onclick=y>"]
