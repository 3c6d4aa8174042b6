"""The documentation's pages in a browser: nothing is cut off, broken or unreadable, on a screen and on a phone.

They need Debian's chromium and chromium-driver, and run with ``make pages``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from webdriver import Browser

pytestmark = pytest.mark.pages

ROOT = Path(__file__).parent.parent
PAGES = sorted(page.stem for page in (ROOT / "docs").glob("*.md"))
PICTURES = sorted(str(picture.relative_to(ROOT / "docs")) for picture in (ROOT / "docs").rglob("*.svg"))

SCHEMES = {"light": "default", "dark": "slate"}
"""What the system prefers, and the theme's name for it."""

LEAST_CONTRAST = 3.0
"""Of text in a picture, whose colours are the same on a light and on a dark page: more than 4 is not possible."""

CUT_OFF = r"""
const left = innerWidth, found = [];
const words = e => e.textContent.trim().slice(0, 60);
if (document.documentElement.scrollWidth > left) {
  found.push('the page is ' + document.documentElement.scrollWidth + ' wide');
  for (const e of document.querySelectorAll('.md-content *'))
    if (e.getBoundingClientRect().right > left && !e.closest('pre, .md-typeset__scrollwrap')) found.push(words(e));
}
for (const e of document.querySelectorAll('.md-content pre > code, .md-typeset__scrollwrap')) {
  if (e.scrollWidth <= e.clientWidth + 1) continue;
  if (!getComputedStyle(e).backgroundImage.includes('gradient')) found.push('scrolls without a sign: ' + words(e));
  const signature = e.closest('.doc-signature'), printed = e.closest('.highlight:not([class*=language-])');
  if (signature || left >= 1280 && !printed) found.push('wider than the column: ' + words(e));
}
for (const e of document.images) if (!e.naturalWidth) found.push('no picture: ' + e.src);
return found;
"""
"""What is cut off on a page: its own width, blocks of code and tables.

On a phone these may scroll, with a shadow, and so may what a program prints."""

FAINT = r"""
const numbers = text => text.match(/[\d.]+/g).slice(0, 3).map(Number);
const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                     return .2126 * r + .7152 * g + .0722 * b + .05; };
const page = numbers(arguments[0]), found = [];
for (const text of document.querySelectorAll('text')) {
  const box = text.getBoundingClientRect(), at = [box.x + box.width / 2, box.y + box.height / 2];
  const ground = document.elementsFromPoint(...at).map(e => [e, getComputedStyle(e)])
    .find(([e, s]) => e.localName == 'path' && s.fill != 'none' && s.fillOpacity > 0);
  const inks = [numbers(getComputedStyle(text).fill), ground ? numbers(ground[1].fill) : page].map(light);
  const contrast = Math.max(...inks) / Math.min(...inks);
  if (contrast < arguments[1]) found.push(text.textContent + ': ' + contrast.toFixed(2));
}
return found;
"""
"""Texts of a picture with less than a contrast to what is under them, where the page's colour shows through."""


class Links(HTMLParser):
    """What a page links to, where it can be linked to, and its headings."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: list[str] = []
        self.first_headings = 0
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.targets += [value for name in ("href", "src") if (value := own.get(name))]
        self.anchors += [value for value in (own.get("id"), own.get("name") if tag == "a" else None) if value]
        self.first_headings += tag == "h1"


def path_of(page: str) -> str:
    return "" if page == "index" else f"{page}/"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built anew; any warning is an error."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the pages are served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("chromium is not installed: apt-get install chromium chromium-driver")
    with Browser(program, driver, tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_cut_off(browser: Browser, address: str, page: str) -> None:
    for width in (1280, 390):
        browser.show(width, "light")
        browser.open(address + path_of(page))
        for scheme, name in SCHEMES.items():
            browser.show(width, scheme)
            browser.wait_for("return document.body.dataset.mdColorScheme === arguments[0]", name)
            assert browser.run(CUT_OFF) == [], (width, scheme)
    assert browser.messages() == []


@pytest.fixture(scope="module")
def grounds(browser: Browser, address: str) -> dict[str, str]:
    """The colour of a page in each scheme."""
    found = {}
    for scheme in SCHEMES:
        browser.show(1280, scheme)
        browser.open(address)
        found[scheme] = browser.run("return getComputedStyle(document.body).backgroundColor")
    return found


@pytest.mark.parametrize("picture", PICTURES)
def test_text_in_a_picture_is_readable(browser: Browser, address: str, grounds: dict[str, str], picture: str) -> None:
    for scheme, ground in grounds.items():
        browser.show(1280, scheme)
        browser.open(address + picture)
        assert browser.run(FAINT, ground, LEAST_CONTRAST) == [], scheme


def test_searching_finds_a_function_in_the_reference(browser: Browser, address: str) -> None:
    browser.show(1280, "light")
    browser.open(f"{address}?q=inject_lora")
    second = "const link = document.querySelectorAll('.md-search-result__link')[1]; return link?.hash === arguments[0]"
    assert browser.wait_for(second, "#lora_plus.inject_lora"), "below the page itself"


def test_links_lead_somewhere(site: Path) -> None:
    pages = {page.parent: Links(page) for page in site.rglob("index.html")}
    assert len(pages) == len(PAGES) and all(page.first_headings == 1 for page in pages.values())
    broken = []
    for folder, page in pages.items():
        assert len(set(page.anchors)) == len(page.anchors), folder
        for target in page.targets:
            outside = re.match(r"[a-z]+:", target)
            path, _, anchor = target.partition("#")
            there = (folder / path).resolve() if path else folder
            if outside:
                fine = re.fullmatch(r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|[\w.-]+(/[\w.~%#/-]*)?)", target)
            elif there in pages:
                fine = not anchor or anchor in pages[there].anchors
            else:
                fine = there.is_file()
            broken += [] if fine else [(folder.name, target)]
    assert broken == []


def test_signatures_show_public_names_that_are_links(site: Path) -> None:
    reference = (site / "reference" / "index.html").read_text()
    shown = set(re.findall(r'<span title="(lora_plus\.[^"]+)"', reference))
    assert {name for name in shown if name.rpartition(".")[2] not in ("M", "O")} == set()
    code = "".join(re.findall(r'<div class="doc-signature.*?</div>', reference, re.DOTALL))
    assert re.findall(r"\b_[A-Za-z]\w*", re.sub(r"<[^>]*>", "", code)) == []
    assert re.findall(r"(?:Examples?|Returns|Raises|Args)::?\s*</p>", reference) == []


def test_a_docstring_in_the_reference_links_to_the_functions_that_it_names(site: Path) -> None:
    reference = (site / "reference" / "index.html").read_text()
    entries = {entry.rpartition(".")[2] for entry in re.findall(r'<h3 id="([\w.]+)"', reference)}
    assert len(re.findall(r'as in <a href="#lora_plus\.inject_lora"><code>inject_lora</code>', reference)) > 5
    assert {name for name in re.findall(r"as in <code>(\w+)</code>", reference) if name in entries} == set()
