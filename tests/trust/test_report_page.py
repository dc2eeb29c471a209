# SPDX-License-Identifier: Apache-2.0
"""Hostile words on a page are words: in a browser none of them runs, asks anybody anything or opens a window."""

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anabranch.report.page import Page, Section, Table, render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FALL = "document.documentElement.setAttribute('data-fell-{0}','1');fetch('{1}/{0}')"
SHAPES = [
    "<script>{js}</script>",
    "<ScRiPt>{js}</sCrIpT>",
    "</td></table><script>{js}</script>",
    "</title><script>{js}</script>",
    "</style><script>{js}</script>",
    "--><script>{js}</script>",
    "]]><script>{js}</script>",
    "</svg><script>{js}</script>",
    '<img src=x onerror="{js}">',
    "<img src=x onerror={js}>",
    '"><img src=x onerror="{js}">',
    '\'><img src=x onerror="{js}">',
    '<svg onload="{js}">',
    "<svg><script>{js}</script></svg>",
    '<body onload="{js}">',
    '<iframe srcdoc="<script>parent.{js}</script>">',
    '<iframe src="javascript:parent.{js}">',
    '<details open ontoggle="{js}">',
    '<input autofocus onfocus="{js}">',
    '<video><source onerror="{js}"></video>',
    '<audio src=x onerror="{js}">',
    '<object data="javascript:{js}">',
    '<embed src="javascript:{js}">',
    '<meta http-equiv=refresh content="0;url=javascript:{js}">',
    "{{{{7*7}}}}<script>{js}</script>",
    "{{% raw %}}<script>{js}</script>",
    '<img src="{url}/{n}">',
    '<link rel=stylesheet href="{url}/{n}">',
    '<style>@import "{url}/{n}";</style>',
    '<div style="background:url({url}/{n})">',
]


@pytest.fixture
def server():
    """Who is asked for anything writes it down."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def hostile(url):
    return [s.format(js=FALL.format(n, url), url=url, n=n) for n, s in enumerate(SHAPES)]


def fallen(html, folder, asked):
    """Which strings did something, by number."""
    asked.clear()
    (folder / "page.html").write_text(html, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", f"--user-data-dir={folder}"]
    command = [CHROMIUM, *options, "--dump-dom", (folder / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout
    head = dom[: dom.find(">", dom.find("<html"))]
    ran = {n for n in range(len(SHAPES)) if f"data-fell-{n}=" in head}
    return ran | {int(path[1:]) for path in asked if path[1:].isdigit()}


def page_of(words):
    table = Table(caption=words[0], columns=("what", words[1]), rows=[(word, word) for word in words])
    section = Section(title=words[2], text=words, tables=[table])
    return render(Page(title=words[3], lead=words[:4], facts=[(word, word) for word in words], sections=[section]))


@pytest.mark.slow
@pytest.mark.row("S8", cheap=True)
def test_hostile_words_do_nothing_in_a_browser(server, tmp_path, counted):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    url, asked = server
    words = hostile(url)
    raw = sum(bool(fallen(f"<html><body>{word}</body></html>", tmp_path, asked)) for word in words[::3])
    did = fallen(page_of(words), tmp_path, asked)
    assert asked == []
    counted(
        len(words), len(did), control=(raw, f"of {len(words[::3])} tried do something on a page that just holds them")
    )
