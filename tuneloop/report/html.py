"""HTML that cannot be written unescaped: every text becomes safe unless it is already `Html`."""

import html
from collections.abc import Iterable
from typing import Any

# C0 and C1 control characters become visible pictures; a tab and a line feed stay what they are.
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_VOID = frozenset({"br", "hr", "meta", "col", "path", "line", "rect", "circle"})


class Html(str):
    """Text that is HTML already; only `tag`, `text` and `join` make it."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def text(value: object) -> Html:
    """`value` as escaped text; lone surrogates and control characters are made printable."""
    plain = str(value).encode("utf-8", "replace").decode().translate(_CONTROLS)
    return Html(html.escape(plain, quote=True))


def join(children: Iterable[Any], separator: str = "") -> Html:
    """Children one after the other; what is not `Html` is escaped, None is left out, iterables are flattened."""
    return Html(separator.join(_flat(child) for child in children if child is not None))


def tag(name: str, *children: Any, cls: str = "", **attributes: Any) -> Html:
    """An element. `aria_label=` is written aria-label; None and False leave an attribute out, True writes it bare."""
    if cls:
        attributes = {"class": cls, **attributes}
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    key = key.rstrip("_").replace("_", "-")
    key = {"viewbox": "viewBox", "preserveaspectratio": "preserveAspectRatio"}.get(key, key)
    return f" {key}" if value is True else f' {key}="{text(value)}"'


def _flat(child: Any) -> str:
    if isinstance(child, Html):
        return child
    if isinstance(child, str) or not isinstance(child, Iterable):
        return text(child)
    return join(child)
