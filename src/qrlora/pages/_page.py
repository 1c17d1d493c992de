"""A page: pictures as data URIs, no script, no outside address."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from qrlora.pages._figures import Picture


def document(title: str, body: Iterable[str]) -> str:
    """The whole page.

    Args:
        title: plain text.
        body: HTML, a part a line.
    """
    style = files("qrlora.pages").joinpath("_style.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{style}</style></head>",
            "<body><main>",
            *body,
            "</main></body></html>",
            "",
        ]
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "table") -> str:
    """A table of cells that are HTML already; `kind` is its class in the style sheet."""
    head = "".join(f"<th>{text}</th>" for text in heads)
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def figure(picture: Picture) -> str:
    """A picture within the page, its caption above it."""
    source = base64.b64encode(picture.content).decode()
    return (
        f"<figure><figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}</figcaption>"
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{source}"></figure>'
    )
