"""The page itself: markup that cannot be left unescaped, pictures as part of the page."""

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

STYLE = Path(__file__).with_name("report.css")
SHORT = 60  # characters of a value in a table; the whole of it is its tooltip


class Html(str):
    """Text that is markup already. `el` escapes every other string."""


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element. Attributes: `class_` is class, `stroke_width` is stroke-width; None leaves one out. None is no child."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(
        child if isinstance(child, Html) else escape(str(child))
        for child in children
        if child is not None
    )
    return Html(f"<{tag}{given}>" if tag in ("img", "meta") else f"<{tag}{given}>{inner}</{tag}>")


def absent(text: str) -> Html:
    """The grey line in place of a section or a part of it: what would fill it."""
    return el("p", text, class_="absent")


def text(value: Any) -> str:
    """A setting as one line."""
    if isinstance(value, str):
        return value
    return "—" if value is None else json.dumps(value, ensure_ascii=False)


def shown(value: Any) -> Html:
    """A setting for people: hashes by their first twelve digits, long values cut; the tooltip has the whole."""
    whole = text(value)
    is_hash = len(whole) >= 32 and not set(whole) - set("0123456789abcdef")
    cut = (
        whole[:12] + "…" if is_hash else whole if len(whole) <= SHORT else whole[: SHORT - 1] + "…"
    )
    return el(
        "span", cut, title=whole if cut != whole else None, class_="hash" if is_hash else None
    )


def number(value: float, digits: int = 3) -> Html:
    """A measured value, rounded for people; all its digits are in the markup and in the tooltip."""
    cut = f"{value:,.{digits if abs(value) < 100 else 1}f}"
    return el("data", cut, value=repr(value), title=repr(value))


def swatch(colour: int | None, dash: str | None = None) -> Html:
    """A stroke in the colour of a run."""
    line = el("path", d="M1 5H21", stroke_dasharray=dash, class_="line")
    return el(
        "svg",
        line,
        viewBox="0 0 22 10",
        class_=f"swatch c{colour}" if colour is not None else "swatch",
        aria_hidden="true",
    )


def picture(image: Image.Image, alt: str, most: int) -> Html:
    """As part of the page, at most `most` pixels wide, PNG or JPEG, whichever is shorter."""
    image = image.convert("RGB")
    if image.width > most:
        image = image.resize(
            (most, max(1, round(image.height * most / image.width))), Image.Resampling.LANCZOS
        )
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append(
            (
                len(buffer.getvalue()),
                f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
            )
        )
    return el("img", src=min(encoded)[1], alt=alt, width=image.width, height=image.height)


def picture_file(path: Path, alt: str, most: int) -> Html:
    """An image of the disk, or a line saying that it cannot be read."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return picture(image, alt, most)
    except (OSError, Image.DecompressionBombError) as error:
        return absent(f"{path} cannot be read ({type(error).__name__})")


def table(head: list[Any], rows: list[list[Html]], class_: str | None = None) -> Html:
    """Cells are <td> or <th> elements; the table scrolls inside its own box."""
    top = el(
        "thead",
        el(
            "tr",
            *(cell if isinstance(cell, Html) else el("th", cell, scope="col") for cell in head),
        ),
    )
    body = el("tbody", *(el("tr", *row) for row in rows))
    return el("div", el("table", top, body, class_=class_), class_="scroll", tabindex="0")


def page(title: str, body: Html) -> str:
    """The whole document."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(STYLE.read_text())),
    )
    return f"<!doctype html>\n{el('html', head, el('body', body), lang='en')}\n"
