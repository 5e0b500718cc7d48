"""The built site in a browser: what every page does for everybody, by eye, keyboard, paper, and without a script."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from headless import PHONE, Page, chromium_page, find_chromium
from matplotlib.colors import to_hex
from site_pages import ROOT, SITE, pages_of_the_book, require_site

from folovllm.book.plotting.book_figure import DARK_PAPER

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")

CHAPTERS = [name for name in pages_of_the_book() if name.startswith("notebooks/")]
PAGES = [*pages_of_the_book(), "search", "genindex", "404", "_modules/folovllm/config"]
"""Every page that is written, those that Sphinx makes, and one of the pages of source, which are all alike."""

HERE = Path(__file__).parent
WIDE = 1400
"""CSS pixels across a desk's screen."""
SHEET = 718
"""CSS pixels across a sheet of A4 between Chromium's margins."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    require_site()
    with chromium_page(find_chromium()) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    """The browser, as wide as a desk's, in light colours; what went wrong before is forgotten."""
    browser.set_dark(False)
    browser.set_width(WIDE)
    browser.requests.clear()
    browser.errors.clear()
    return browser


@functools.cache
def axe() -> str:
    """axe-core's script, of which a package of other people's holds a copy."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.fail("axe-playwright-python is not installed: run ./setup_env.sh")
    return (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def wait(page: Page, milliseconds: int) -> None:
    """Gives the page time, and hears what happens to it; it may go to another one meanwhile."""
    time.sleep(milliseconds / 1000)
    page.call("Page.enable")


RUN_AXE = """(async () => {{
    if (!window.axe) {{ {script} }}
    const options = {options};
    const found = await axe.run(document, options);
    const tell = ({{ id, nodes }}) => `${{id}}: ${{nodes.length}} times, as ${{nodes[0].html.slice(0, 200)}}`;
    return JSON.stringify(found.violations.map(tell));
}})()"""

FIND_FAINT_TEXT = (HERE / "faint_text.js").read_text(encoding="utf-8")


OF_EACH_KIND = {pages_of_the_book()[0], CHAPTERS[0], "book/api/config", "search", "_modules/folovllm/config"}
"""Pages on which axe-core measures the contrasts as well: it takes ten times as long as `FIND_FAINT_TEXT` on all."""


def run_axe(page: Page, colors: bool) -> list[str]:
    """What axe-core finds on the page as it is, with or without what depends on the colours."""
    options = {"resultTypes": ["violations"], "preload": False, "rules": {"color-contrast": {"enabled": colors}}}
    return json.loads(page.evaluate(RUN_AXE.format(script=axe(), options=json.dumps(options))))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_for_everybody(page: Page, name: str) -> None:
    """No host is asked, nothing scrolls sideways on a phone, no text is faint, and axe-core finds nothing."""
    wrong = []
    page.open(SITE / f"{name}.html")
    for width in (WIDE, PHONE):
        page.set_width(width)
        wait(page, 500)  # the theme lets the keyboard reach what scrolls, some time after the page became narrower
        if page.evaluate("document.documentElement.scrollWidth") > width:
            wrong.append(f"it is {page.evaluate('document.documentElement.scrollWidth')} pixels wide on {width}")
        for dark in (False, True):
            page.set_dark(dark)
            where = f"{'dark' if dark else 'light'}, {width} pixels"
            if not dark or name in OF_EACH_KIND:  # without colours, both themes are the same to axe-core
                wrong += [f"{where}: {found}" for found in run_axe(page, colors=name in OF_EACH_KIND)]
            if width == PHONE:
                wrong += [f"{where}: {faint}" for faint in json.loads(page.evaluate(FIND_FAINT_TEXT))]
    wrong += [f"asked for {url}" for url in page.requests if urlsplit(url).scheme not in ("file", "data")]
    assert page.requests, "the browser loaded nothing"
    assert not wrong + page.errors, "\n".join(wrong + page.errors)


SHOWN = """[...document.querySelectorAll("article figure img")]
    .filter(img => img.checkVisibility()).map(img => img.className)"""


def test_figures_have_the_colors_of_the_page_and_only_those_are_loaded(page: Page) -> None:
    for dark, chapter in ((True, CHAPTERS[0]), (False, CHAPTERS[1])):  # what is in memory is taken from there
        page.set_dark(dark)
        page.open(SITE / f"{chapter}.html")
        page.requests.clear()
        shown = page.evaluate(SHOWN)
        hidden = """[...document.querySelectorAll('figcaption')]
            .filter(caption => !caption.closest('details:not([open])') && !caption.checkVisibility()).length"""
        assert page.evaluate(hidden) == 0, "captions are hidden"
        if dark:
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert to_hex([int(part) / 255 for part in re.findall(r"\d+", ground)[:3]]) == DARK_PAPER
        assert len(shown) >= 3 and all(("only-dark" in classes) == dark for classes in shown), shown
        page.evaluate("""(async () => {
            for (const img of document.querySelectorAll("article figure img")) {
                if (!img.checkVisibility()) continue;
                img.scrollIntoView();
                await img.decode();
            }
        })()""")
        loaded = page.evaluate("""[...document.querySelectorAll("article figure img")]
            .filter(img => img.complete && img.naturalWidth).map(img => img.className)""")
        assert loaded and len(loaded) == len(shown) and all(("only-dark" in name) == dark for name in loaded), loaded


# By keyboard

FOCUS = """(() => {
    document.getAnimations().forEach(animation => animation.finish());
    const element = document.activeElement;
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    return {
        what: `${element.tagName.toLowerCase()}.${element.className} ${element.textContent.trim().slice(0, 30)}`,
        framed: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
        inSight: box.bottom > 0 && box.top < innerHeight && box.width > 0,
        inArticle: element.closest("article") !== null,
        isBody: element === document.body,
    };
})()"""


@pytest.mark.parametrize("name", [pages_of_the_book()[0], CHAPTERS[0]])
def test_by_keyboard_everything_is_reached_and_framed(page: Page, name: str) -> None:
    page.open(SITE / f"{name}.html")
    wanted = page.evaluate("""(() => {
        document.querySelectorAll("article details").forEach(details => details.open = false);
        const all = [...document.querySelectorAll("a[href], button, summary, input, [tabindex='0']")];
        return all.filter(e => e.checkVisibility({visibilityProperty: true}) && e.tabIndex >= 0).length;
    })()""")
    seen, wrong = 0, []
    for _ in range(wanted + 20):
        page.press("Tab")
        focus = page.evaluate(FOCUS)
        if focus["isBody"]:
            break
        seen += 1
        if not focus["framed"]:
            wrong.append(f"{focus['what']} shows no focus")
        if not focus["inSight"]:
            wrong.append(f"{focus['what']} has the focus and is out of sight")
    assert not wrong, "\n".join(wrong)
    assert seen >= 0.95 * wanted, f"of {wanted} only {seen} were reached"


def test_the_skip_link_leads_to_the_text(page: Page) -> None:
    page.open(SITE / f"{CHAPTERS[0]}.html")
    page.press("Tab")
    assert "Skip" in page.evaluate(FOCUS)["what"]
    page.press("Enter")
    page.press("Tab")
    assert page.evaluate(FOCUS)["inArticle"]


@pytest.mark.parametrize("button", [".primary-toggle", ".secondary-toggle"])
def test_escape_closes_a_phones_menu_and_gives_the_focus_back(page: Page, button: str) -> None:
    page.set_width(PHONE)
    page.open(SITE / f"{CHAPTERS[0]}.html")
    page.evaluate(f"document.querySelector('{button}').focus()")
    page.press("Enter")
    assert page.evaluate("document.querySelector('dialog[open]') !== null")
    page.press("Tab")
    page.press("Escape")
    assert page.evaluate("document.querySelector('dialog[open]') === null")
    assert page.evaluate(f"document.activeElement === document.querySelector('{button}')")


# On paper

PAPER = (HERE / "paper.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_can_be_printed(page: Page, name: str) -> None:
    """Also from the dark page: in black, nothing cut off, open what a reader would open, but not the solutions."""
    page.set_dark(True)
    page.open(SITE / f"{name}.html")
    page.set_width(SHEET)
    page.set_dark(True, paper=True)
    found = page.evaluate(PAPER)
    assert not found["cut"], f"lines are cut off: {found['cut']}"
    assert not found["pale"], f"not black: {found['pale'][:5]}"
    assert not found["closed"], f"closed: {found['closed']}"
    assert not found["open"], f"open: {found['open']}"
    assert not found["dark"], "figures of the dark page"
    assert not found["tall"], f"figures that a page's end may cut: {found['tall']}"
    assert found["solutions"] or not (ROOT / f"{name}.ipynb").read_text(encoding="utf-8").count('"solution"')


def test_figures_are_on_the_paper(page: Page) -> None:
    """Those that were never in sight on the screen, too."""
    page.set_dark(True)
    page.open(SITE / f"{CHAPTERS[0]}.html")
    with_all = len(page.call("Page.printToPDF")["data"])
    page.evaluate("document.querySelectorAll('figure img').forEach(img => img.remove())")
    without = len(page.call("Page.printToPDF")["data"])
    assert with_all > without + 40_000, "the figures are missing"


# The search

FIND = (
    """(query => Search._performSearch(...Search._parseQuery(query)).reverse().map(hit => hit[0] + hit[2]))({query})"""
)


def glossary() -> dict[str, str | None]:
    """Each term and the page of its chapter, if its entry names one."""
    text = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    chapters = {term: re.search(r"\.\./(notebooks/\w+)\.ipynb\S*\s*\Z", said) for term, said in entries}
    return {term: found[1] if found else None for term, found in chapters.items()}


def test_the_search_finds_the_chapter_and_the_glossarys_entry_first(page: Page) -> None:
    page.open(SITE / "search.html")
    wrong = []
    for term, chapter in glossary().items():
        for query in (term, term.lower()):
            first = [hit.split("#")[0] for hit in page.evaluate(FIND.format(query=json.dumps(query)))[:3]]
            wrong += [
                f"{query!r} finds {first}, not {want}"
                for want in ("book/glossary", chapter)
                if want and want not in first
            ]
    assert not wrong, "\n".join(wrong)


def test_the_search_shows_its_hits_from_a_file_and_says_what_it_cannot(page: Page) -> None:
    page.open((SITE / "search.html").resolve().as_uri() + f"?q={quote('top-p')}")
    page.evaluate("new Promise(done => setTimeout(done, 300))")
    assert page.evaluate("document.querySelectorAll('#search-results li').length") > 1
    assert "cannot" in page.evaluate("document.querySelector('.only-file').textContent")
    assert not page.errors


# Without a script, as a download, and for an address that is not there


@pytest.fixture
def without_script(page: Page) -> Iterator[Page]:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    yield page
    page.call("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_without_a_script_is_whole(without_script: Page, dark: bool) -> None:
    page = without_script
    page.set_dark(dark)
    page.set_width(PHONE)
    page.open(SITE / f"{CHAPTERS[0]}.html", settle=False)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", ground)[:3])) < 60) == dark, f"the page is {ground}"
    shown = page.evaluate(SHOWN)
    assert shown and all(("only-dark" in classes) == dark for classes in shown)
    dead = page.evaluate(
        "[...document.querySelectorAll('button')].filter(b => b.checkVisibility()).map(b => b.outerHTML)"
    )
    assert not dead, f"buttons that do nothing: {dead}"
    assert page.evaluate("document.querySelector('.bd-sidebar-primary').checkVisibility()"), "there is no way to a page"
    assert not json.loads(page.evaluate(FIND_FAINT_TEXT))


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves the site as GitHub does: an address that is not there gets the page for it."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments, directory=str(SITE))  # type: ignore[arg-type]

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def send_error(self, code: int, *arguments: object, **more: object) -> None:
        body = (SITE / "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def address() -> Iterator[str]:
    """Where a server has the site."""
    require_site()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_chapter_can_be_downloaded(page: Page, address: str, tmp_path: Path) -> None:
    name = CHAPTERS[0]
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    page.open(f"{address}/{name}.html")
    page.downloads.clear()
    page.evaluate("document.querySelector('.btn-download-source-button').click()")
    wait(page, 500)
    assert page.evaluate("location.pathname") == f"/{name}.html", "the notebook opened as text instead"
    assert set(page.downloads) == {f"{Path(name).name}.ipynb"}, page.downloads  # Chromium tells it twice
    assert (SITE / "_sources" / f"{name}.ipynb").read_bytes() == (ROOT / f"{name}.ipynb").read_bytes()


def test_a_page_opened_as_a_file_says_how_to_run_its_notebook(page: Page) -> None:
    page.open(SITE / f"{CHAPTERS[0]}.html")
    assert page.evaluate("document.querySelector('.btn-download-source-button')") is None, "it would open as text"
    how = page.evaluate("document.querySelector('.btn-how-to-run-button').href")
    assert how.endswith("book/setup.html#a-notebook-that-you-downloaded")


def test_an_address_that_is_not_there(page: Page, address: str) -> None:
    page.open(f"{address}/notebooks/gone/away.html")
    assert page.evaluate("document.querySelector('article h1').textContent").startswith("This page is not here")
    assert page.evaluate("[...document.styleSheets].filter(sheet => sheet.href && sheet.cssRules.length).length") > 3
    page.evaluate("document.querySelector('article a').click()")
    wait(page, 500)
    assert page.evaluate("location.pathname") == f"/{pages_of_the_book()[0]}.html"
