"""A hook of mkdocs: the reference links functions and classes that docstrings name."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Turn ``<code>name</code>`` into a link, but in the section of that name."""
    if page.file.src_uri != "reference.md":
        return html
    head, *sections = re.split(r'(?=<h3 id="[\w.]+")', html)
    entries = [section.split('"', 2)[1] for section in sections]
    # of several with one name, the first on the page
    of_name = {entry.rpartition(".")[2]: entry for entry in reversed(entries)}

    def linked(section: str, own: str) -> str:
        def link(code: re.Match[str]) -> str:
            entry = of_name.get(code[1], own)
            return code[0] if entry == own else f'<a href="#{entry}">{code[0]}</a>'

        return re.sub(r"(?<=[\s(])<code>(\w+)</code>", link, section)

    return head + "".join(map(linked, sections, entries))
