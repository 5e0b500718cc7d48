"""What ``./setup_env.sh lab`` opens: a real JupyterLab, in which the links of the notebooks lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest
from site_pages import ROOT
from test_notebooks import links

TOKEN = "secret"
RUN_LAB = 'cd "$1" && . ./setup_env.sh && VENV=$2 && shift 2 && run_lab "$@"'


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address that it prints, without the token."""
    folder = tmp_path_factory.mktemp("jupyter")
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    flags = ["--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--IdentityProvider.token={TOKEN}"]
    process = subprocess.Popen(
        [shutil.which("bash") or "bash", "-c", RUN_LAB, "bash", ROOT, sys.prefix, *flags],
        env={**os.environ, **{name: str(folder / name) for name in places}},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+/[^? ]*", line):
                yield found.group()
                break
        else:
            pytest.fail(f"JupyterLab did not start:\n{''.join(said)}")
    finally:
        process.terminate()
        process.communicate()


def ask(lab: str, path: str) -> dict:
    server = lab.split("/lab/")[0]
    request = urllib.request.Request(f"{server}/{path}", headers={"Authorization": f"token {TOKEN}"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def relative_links() -> Iterator[tuple[str, str]]:
    """Each notebook and the files, seen from the root, that its text links."""
    for page in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        cells = nbformat.read(page, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        for link in sorted({link.partition("#")[0] for link in links(text)}):
            if link and not re.match(r"\w+:", link):
                yield page.name, os.path.normpath(Path("notebooks", link))


def test_the_first_chapter_is_opened(lab: str) -> None:
    first = min((ROOT / "notebooks").glob("[0-9]*.ipynb")).name
    assert lab.endswith(f"/lab/tree/notebooks/{first}")


def test_every_link_of_a_notebook_is_a_file_that_it_serves(lab: str) -> None:
    found = list(relative_links())
    assert {"book/glossary.md", "book/api/config.md", "folovllm/config.py"} <= {path for _, path in found}
    dead = []
    for page, path in found:
        try:
            assert ask(lab, f"api/contents/{quote(path)}?content=0")["type"] in ("file", "notebook")
        except urllib.error.HTTPError as error:
            dead.append(f"{page} links {path}: {error.code}")
    assert not dead, "\n".join(dead)


def test_pages_are_shown_and_not_their_source(lab: str) -> None:
    plugin = ask(lab, "lab/api/settings/%40jupyterlab%2Fdocmanager-extension%3Aplugin")
    assert plugin["schema"]["properties"]["defaultViewers"]["default"]["markdown"] == "Markdown Preview"


def test_it_asks_no_other_host_for_news(lab: str) -> None:
    plugin = ask(lab, "lab/api/settings/%40jupyterlab%2Fapputils-extension%3Anotification")
    assert plugin["schema"]["properties"]["fetchNews"]["default"] == "false"
    assert plugin["schema"]["properties"]["checkForUpdates"]["default"] is False
