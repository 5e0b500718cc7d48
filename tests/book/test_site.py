"""The built site: nothing comes from another host, no link is dead, and every page is legible on any screen."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from site_pages import ROOT, SITE, pages_of_the_book, require_site

import folovllm

LINKED_HOSTS = {
    "aclanthology.org",
    "arxiv.org",
    "docs.pytest.org",
    "docs.python.org",
    "docs.vllm.ai",
    "doi.org",
    "github.com",
    "huggingface.co",
    "jfly.uni-koeln.de",
    "jupyterbook.org",
    "jax-ml.github.io",
    "kellerjordan.github.io",
    "learn.microsoft.com",
    "nbval.readthedocs.io",
    "openreview.net",
    "pip.pypa.io",
    "pytorch.org",
    "www.lesswrong.com",
    "www.python.org",
    "www.usenix.org",
}
"""Where a link that a reader clicks may lead."""

LARGEST_PAGE = 1_500_000
"""Bytes of a page and all it loads, its maths script left out."""

CHAPTERS = [name for name in pages_of_the_book() if name.startswith("notebooks/")]

LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
}
"""The elements that make a browser ask for a file, and where they name it; ``link`` is a case of its own."""


@pytest.fixture(scope="module", autouse=True)
def _site() -> None:
    require_site()


class Nesting(HTMLParser):
    """Finds end tags that end something else; a parser that mends what it reads, as a browser's does, hides them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.wrong.append(f"line {self.getpos()[0]}: </{tag}> inside <{self.open[-1] if self.open else 'nothing'}>")


@functools.cache
def parse(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def html_files() -> list[Path]:
    """Every page, those that Sphinx makes by itself included; the theme leaves templates in ``_static``."""
    return sorted(path for path in SITE.rglob("*.html") if SITE / "_static" not in path.parents)


def resources(path: Path) -> Iterator[str]:
    """Addresses of everything a browser loads to show a page."""
    soup = parse(path)
    for tag, attribute in LOADED.items():
        yield from (element[attribute] for element in soup.find_all(tag) if element.get(attribute))
    for link in soup.find_all("link"):
        if {"stylesheet", "icon", "preload"} & set(link.get("rel", [])):
            yield link["href"]


def local_file(page: Path, address: str) -> Path:
    """The file that an address on a page means."""
    path = unquote(urlsplit(address).path)
    return (page.parent / path).resolve() if path else page


def test_nothing_is_loaded_from_another_host():
    wrong = [
        f"{path.relative_to(SITE)} loads {address}"
        for path in html_files()
        for address in resources(path)
        if urlsplit(address).scheme not in ("", "data") or address.startswith("//")
    ]
    outside = re.compile(r"""(?:url\(\s*["']?|@import\s*["'])(?:https?:)?//""")
    wrong += [
        f"{path.relative_to(SITE)} names another host"
        for path in SITE.rglob("*.css")
        if outside.search(path.read_text(encoding="utf-8"))
    ]
    # A script in the page may fetch what no attribute names, as thebe's and mermaid's would.
    wrong += [
        f"{path.relative_to(SITE)} names another host in a script: {script.string.strip()[:100]}"
        for path in html_files()
        for script in parse(path).find_all("script")
        if "://" in (script.string or "") and script.get("type") != "application/json"
    ]
    assert not wrong, "\n".join(wrong)


def test_links_to_other_hosts_are_known():
    wrong = {
        f"{path.relative_to(SITE)} links to {link['href']}"
        for path in html_files()
        for link in parse(path).find_all("a", href=True)
        if urlsplit(link["href"]).scheme and urlsplit(link["href"]).hostname not in LINKED_HOSTS
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_no_link_or_anchor_is_dead():
    @functools.cache
    def anchors(path: Path) -> set[str]:
        return {
            value for element in parse(path).find_all(True) for key in ("id", "name") if (value := element.get(key))
        }

    wrong = set()
    for path in html_files():
        links = [link["href"] for link in parse(path).find_all("a", href=True)]
        for address in {*links, *resources(path)}:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = local_file(path, address)
            if not target.is_file():
                wrong.add(f"{path.relative_to(SITE)} names {address}, which is not there")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in anchors(target):
                wrong.add(f"{path.relative_to(SITE)} names {address}, a page without that anchor")
    assert not wrong, "\n".join(sorted(wrong))


def test_a_link_to_a_file_of_the_package_leads_to_its_source():
    for name in CHAPTERS:
        text = (ROOT / f"{name}.ipynb").read_text(encoding="utf-8")
        named = re.findall(r"\]\(\.\./(folovllm/[\w/]+?)(?:/__init__)?\.py\)", text)
        links = {link["href"] for link in parse(SITE / f"{name}.html").find_all("a", href=True)}
        assert named and {f"../_modules/{module}.html" for module in named} <= links, f"{name} links {named}"
    assert not (SITE / "_downloads").exists(), "a file is offered for download instead"


def test_no_page_is_heavy():
    """What a page makes a browser load, in either theme: the pictures of the other one are not."""
    for path in html_files():
        dark, light = ({img["src"] for img in parse(path).select(f"img.only-{theme}")} for theme in ("dark", "light"))
        for others in (dark, light):
            named = {local_file(path, name) for name in resources(path) if name not in others and name[:5] != "data:"}
            size = path.stat().st_size + sum(file.stat().st_size for file in named if "mathjax" not in file.parts)
            assert size <= LARGEST_PAGE, f"{path.relative_to(SITE)} and what it loads take {size:,} bytes"


def test_no_page_loads_what_it_does_not_need():
    for path in html_files():
        text = path.read_text(encoding="utf-8")
        has_formula = parse(path).select_one(".math") is not None
        assert ("/mathjax/" in text) == has_formula, f"{path.relative_to(SITE)}: MathJax is for pages with a formula"
        assert ("searchindex.js" in text) == (path.name == "search.html"), (
            f"{path.relative_to(SITE)} and the search's index"
        )


def test_pages_say_what_they_are():
    """To a browser's tab, a search engine, a chat window."""
    titles: dict[str, Path] = {}
    for path in html_files():
        soup, name = parse(path), path.relative_to(SITE)
        title = soup.title.get_text(strip=True)
        assert title not in titles, f"{name} and {titles[title]} are both called {title!r}"
        titles[title] = name
        assert soup.html.get("lang") == "en", f"{name} does not say its language"
        words = title.split()
        assert not any(one == other for one, other in zip(words, words[2:])), f"{name} is called {title!r}"
        if name != Path("index.html"):
            said = soup.find("meta", attrs={"name": "description"})
            assert said and len(said["content"]) >= 25, f"{name} has no description"
            for key in ("og:title", "og:description", "og:site_name", "og:type"):
                assert soup.find("meta", property=key), f"{name} has no {key}"


CITATION = re.compile(r"[A-Z][\w-]+ (?:et al\.|and [A-Z][\w-]+),? \(?(?:19|20)\d\d")


def test_every_citation_leads_to_its_entry():
    """In chapters, pages and the docstrings that the API reference shows; a missing entry fails the build."""
    found = 0
    for path in html_files():
        if path == SITE / "book" / "references.html" or "_modules" in path.parts:
            continue
        article = BeautifulSoup(str(parse(path).find("article")), "html.parser")
        for link in article.find_all("a", href=re.compile(r"references\.html#[\w-]+-\d{4}$")):
            found += 1
            link.decompose()
        for code in article.find_all("pre"):
            code.decompose()  # a listing is shown as it is
        left = CITATION.findall(" ".join(article.get_text().split()))
        assert not left, f"{path.relative_to(SITE)} cites {left} without a link"
    assert found >= 10


def test_the_references_say_who_cites_them():
    entries = parse(SITE / "book" / "references.html").select("article li[id]")
    citing = {
        link["href"].split("#")[0] for entry in entries for link in entry.find_all("a", href=re.compile("notebooks/"))
    }
    assert len(entries) >= 15 and len(citing) >= 2


@pytest.mark.parametrize(
    "name, chapter",
    [
        ("model.quantized_layers.rotate", "15_fewer_bits"),
        ("model.layers.Linear", "07_how_long_is_a_step"),
        ("worker.traced.rotate", None),  # another function of that name is meant
        ("worker.model_runner.token_bytes", None),
        ("simulator.runner.make_engine", None),  # a chapter defines its own
    ],
)
def test_the_reference_leads_to_the_section_that_means_it(name, chapter):
    entry = parse(SITE / "book" / "api" / f"{name.split('.')[0]}.html").find(id=f"folovllm.{name}").parent.find("dd")
    links = entry.find_all("a", href=re.compile(r"notebooks/\d\d"), recursive=True)
    found = [Path(urlsplit(link["href"]).path).stem for link in links if "Discussed in" in link.parent.get_text()]
    assert found == [chapter] * (chapter is not None)


def test_printed_sentences_may_be_broken_and_printed_tables_not():
    outputs = {
        " ".join(block.get_text().split())[:15]: "sentences" in block["class"]
        for path in (SITE / "notebooks").glob("0[02]*.html")
        for block in parse(path).select(".output.stream")
    }
    assert outputs["Once upon a tim"] and outputs["temperature mus"]
    assert not outputs["nothing keeps 1"]


TERMS = """Attention, Query, Rotary positions, Hidden state, Step, Slot, Budget, Latency, Throughput, TTFT, TPOT, ITL,
Goodput, Top-k, Top-p, Min-p, Penalties, Seed, Swapping, Static batching, Preemption, Paged attention, Block hash"""


def test_the_glossary_has_what_readers_looked_for():
    headings = {heading.find(string=True) for heading in parse(SITE / "book" / "glossary.html").select("article h2")}
    assert set(TERMS.replace("\n", " ").split(", ")) <= headings


def test_no_page_names_the_machine_it_was_built_on():
    for path in html_files():
        text = path.read_text(encoding="utf-8")
        for folder in {str(ROOT), sys.prefix, str(Path(folovllm.__file__).parent)}:
            assert folder not in text, f"{path.relative_to(SITE)} names {folder}"
        traceback = re.search(r"File (?:/|[A-Z]:\\)\S+", text)  # of the machine that ran the notebook
        assert not traceback, f"{path.relative_to(SITE)} shows {traceback.group()}"


@pytest.mark.parametrize("name", pages_of_the_book())
def test_page_is_whole(name):
    path = SITE / f"{name}.html"
    nesting = Nesting()
    nesting.feed(path.read_text(encoding="utf-8"))
    # A heading inside raw HTML does this: Sphinx begins a section there, and the page falls apart.
    assert not nesting.wrong, f"{name}: elements overlap, {nesting.wrong[0]}"
    soup = parse(path)
    assert soup.title and soup.title.get_text(strip=True), f"{name} has no title"
    article = soup.find("article")
    assert len(article.find_all("h1")) == 1, f"{name} must have exactly one heading of the first level"
    leftovers = re.findall(r"\{(?:py:\w+|term|ref|numref|doc|eval-rst)\}\S*", article.get_text())
    assert not leftovers, f"{name} shows roles that were not understood: {leftovers}"
    errors = article.select(".problematic, .system-message")
    assert not errors, f"{name} shows an error of the build: {errors[0].get_text()[:200]}"


def test_every_page_is_in_the_contents():
    contents = parse(SITE / "book" / "welcome.html").find(class_="bd-sidebar-primary")
    listed = {local_file(SITE / "book" / "welcome.html", a["href"]) for a in contents.find_all("a", href=True)}
    made_by_sphinx = {
        SITE / "index.html",
        SITE / "genindex.html",
        SITE / "search.html",
        SITE / "404.html",
        *SITE.glob("_modules/**/*.html"),
    }
    missing = sorted(str(path.relative_to(SITE)) for path in {*html_files()} - listed - made_by_sphinx)
    assert not missing, f"no entry of the contents leads to {missing}"


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_has_one_number(name):
    """The notebook's own, and the one that the site counts (see book/_ext/chapter_numbers.py)."""
    notebook = json.loads((ROOT / f"{name}.ipynb").read_text(encoding="utf-8"))
    title = "".join(notebook["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
    heading = parse(SITE / f"{name}.html").find("article").h1.find_all(string=True, recursive=True)
    shown = "".join(heading).strip().removesuffix("#")
    number = int(name.removeprefix("notebooks/")[:2])
    assert number == CHAPTERS.index(name) and title.startswith(f"{number}. "), (
        f"{name}.ipynb must begin with its number, not {title!r}"
    )
    assert shown == title, f"the site calls {name} {shown!r}, the notebook {title!r}"


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_picture_of_a_chapter_is_described(name):
    for picture in parse(SITE / f"{name}.html").find("article").find_all("img"):
        alt = picture.get("alt", "")
        # Without mystnb.image.alt in the cell's metadata it is the file's name, which is a hash.
        assert len(alt) >= 20 and " " in alt, f"{name}: {picture['src']} is described by {alt!r} only"
