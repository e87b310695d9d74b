"""The built pages as a real browser shows them from disk, without a network, wide and narrow, light and dark."""

import ast
import importlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import executing
import nbformat
import pytest

pytestmark = pytest.mark.slow
PAGES = [*executing.pages(), "genindex", "py-modindex", "search"]
DESKTOP, PHONE = (1280, 900), (390, 844)
LOCAL = ("file", "data", "blob", "chrome")  # the last: the empty tab that the browser begins with
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars
""".split()
# Everything that a page must be is read in one go, when its scripts, fonts, images and equations are there.
SETTLE = """
    const done = arguments[0];
    const images = [...document.images];
    images.forEach(image => { image.loading = "eager"; });
    Promise.all([
        window.MathJax && MathJax.startup ? MathJax.startup.promise : null, document.fonts.ready,
        ...images.map(image => image.decode().catch(() => null)),
    ]).then(() => requestAnimationFrame(() => setTimeout(done, 50)));
"""
LOOK = """
    const shown = element => element.checkVisibility({opacityProperty: true, visibilityProperty: true});
    const formulas = [...document.querySelectorAll(".math")];
    const boxed = element => {
        for (let box = element.parentElement; box && box !== document.documentElement; box = box.parentElement)
            if (["auto", "scroll", "hidden", "clip"].includes(getComputedStyle(box).overflowX)) return true;
        return false;
    };
    const wide = [...document.querySelectorAll("article *")]
        .filter(element => shown(element) && element.getBoundingClientRect().right > arguments[0] + 1 &&
        !boxed(element));
    const cramped = [...document.querySelectorAll("article :is(p, li, dd)")]
        .filter(element => shown(element) && element.textContent.length > 40 &&
        element.getBoundingClientRect().width < 110 &&
        !element.closest(".pst-scrollable-table-container, .cell_output, figure"));
    return {
        theme: document.documentElement.dataset.theme,
        heading: [...document.querySelectorAll("main h1")].find(shown)?.innerText ?? "",
        formulas: formulas.length,
        unset: formulas.filter(element => !element.querySelector("mjx-container")).map(element =>
            element.textContent.slice(0, 80)),
        broken: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(element =>
            element.textContent.slice(0, 80)),
        loose: (document.querySelector("article")?.innerText.match(/\\\\[([][^\\n]{0,60}|\\$\\$[^\\n]{0,60}/g) ?? []),
        images: document.images.length,
        figures: document.querySelectorAll(".cell_output img").length,
        empty: [...document.images].filter(image => !image.naturalWidth).map(image => image.src.slice(0, 120)),
        drawings: [...document.querySelectorAll("article figure svg")].filter(shown).map(svg =>
            svg.getBoundingClientRect().width),
        width: document.documentElement.scrollWidth,
        cramped: cramped.slice(0, 5).map(element => element.textContent.slice(0, 60)),
        wide: wide.slice(0, 5).map(element => `${element.tagName}.${element.className}: ${element.textContent.slice(0,
            60)}`),
    };
"""


@pytest.fixture(scope="module")
def book(shared_folder) -> Path:
    """The folder of the built pages."""
    if not executing.is_current() and not executing.can_build():
        pytest.skip("jupyter-book is not installed, and no current book is built")
    return executing.smoke_book(shared_folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium under chromedriver, with the network off; skips where one of them is absent."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        *FLAGS,
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver, env={**os.environ, "SE_OFFLINE": "true"}))
    try:
        found.execute_cdp_cmd("Network.enable", {})
        found.execute_cdp_cmd(
            "Network.emulateNetworkConditions",
            {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
        )
        yield found
    finally:
        found.quit()


def visit(browser, page: Path, size: tuple[int, int], theme: str = "light") -> tuple[dict, list[str]]:
    """What a page shows at a size, and everything that went wrong on the way: requests, console, scripts."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what an earlier page left
    browser.get(page.as_uri())
    browser.execute_async_script(SETTLE)
    seen = browser.execute_script(LOOK, width)
    wrong = [
        f"console: {entry['message']}"
        for entry in browser.get_log("browser")
        if entry["level"] in ("SEVERE", "WARNING")
    ]
    return seen, wrong + failures([json.loads(entry["message"])["message"] for entry in browser.get_log("performance")])


def failures(events: list[dict]) -> list[str]:
    """Requests that left the machine or failed."""
    urls = {
        e["params"]["requestId"]: e["params"]["request"]["url"]
        for e in events
        if e["method"] == "Network.requestWillBeSent"
    }
    left = [f"left the machine: {url}" for url in urls.values() if urlsplit(url).scheme not in LOCAL]
    broken = [e["params"] for e in events if e["method"] == "Network.loadingFailed"]
    return left + [f"failed: {urls.get(e['requestId'], '?')} ({e['errorText']})" for e in broken]


def place_of(book: Path, page: str) -> Path:
    return book / f"{page}.html"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole(book, browser, page, size):
    seen, wrong = visit(browser, place_of(book, page), size)
    assert not wrong
    assert seen["heading"]
    assert not seen["unset"] and not seen["broken"] and not seen["loose"]
    assert not seen["empty"]
    assert not seen["cramped"] and not seen["wide"] and seen["width"] <= size[0]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole_in_the_dark(book, browser, page):
    seen, wrong = visit(browser, place_of(book, page), DESKTOP, "dark")
    assert not wrong and seen["theme"] == "dark"


@pytest.mark.parametrize("path", executing.NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_and_formula_of_a_notebook_is_on_its_page(book, browser, path):
    seen, _ = visit(browser, book / "book" / "executed" / f"{path.stem}.html", DESKTOP)
    source = book / "_sources" / "book" / "executed" / path.name
    cells = nbformat.read(source, as_version=4).cells
    drawn = [o for cell in cells if cell.cell_type == "code" for o in cell.outputs if "image/png" in o.get("data", {})]
    assert seen["figures"] == len(drawn) > 0
    written = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert seen["formulas"] >= sum(len(re.findall(r"\$\$.+?\$\$", text, re.DOTALL)) for text in written)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_landing_page_shows_the_method_in_one_figure(book, browser, size):
    seen, _ = visit(browser, book / "book" / "intro.html", size)
    (width,) = seen["drawings"]
    assert 300 <= width <= size[0]


def test_the_checks_see_what_they_forbid(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><meta name='viewport' content='width=device-width'><title>x</title><main><article><h1>x</h1>"
        "<p class='math'>\\(x\\)</p><img src='absent.png'><img src='http://example.org/a.png'>"
        "<div style='width:2000px'>wide</div><p style='width:90px'>A column in which hardly a word fits on a line."
        "</p></article></main>",
        encoding="utf-8",
    )
    seen, wrong = visit(browser, page, PHONE)
    assert seen["unset"] == ["\\(x\\)"] and len(seen["loose"]) == 1 and len(seen["empty"]) == 2
    assert seen["wide"] and seen["width"] >= 2000 and len(seen["cramped"]) == 1
    assert any("left the machine: http://example.org/a.png" in line for line in wrong)
    assert any(line.startswith("failed: file://") for line in wrong)
    assert any(line.startswith("console: ") for line in wrong)


def test_every_built_page_is_tested(book):
    built = {
        path.relative_to(book).with_suffix("").as_posix()
        for path in book.rglob("*.html")
        if "_static" not in path.parts
    }
    assert built - {"index"} == set(PAGES)


def test_every_public_name_is_on_an_api_page(book):
    pages = [path.read_text(encoding="utf-8") for path in (book / "book" / "api").glob("*.html")]
    anchors, missing = set().union(*(Links(page).anchors for page in pages)), []
    for path in (executing.ROOT / "gradmm").glob("[!_]*.py"):
        room = importlib.import_module(f"gradmm.{path.stem}")
        defined = [
            node.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        public = [name for name in defined if name in getattr(room, "__all__", defined) and not name.startswith("_")]
        missing += [f"gradmm.{path.stem}.{name}" for name in public if f"gradmm.{path.stem}.{name}" not in anchors]
    assert not missing


class Links(HTMLParser):
    """The targets and the anchors of a page, what it loads by itself, and how many headings it begins with."""

    def __init__(self, text: str):
        super().__init__()
        self.targets, self.anchors, self.loaded, self.headings = set(), set(), set(), 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        held = dict(attributes)
        self.headings += tag == "h1"
        if tag in ("script", "img", "iframe", "source", "video", "audio"):
            self.loaded |= {held["src"]} if held.get("src") else set()
        elif tag == "link" and not {"canonical", "author"} & set((held.get("rel") or "").split()):
            self.loaded |= {held["href"]} if held.get("href") else set()
        self.anchors |= {held[name] for name in ("id", "name") if held.get(name)}
        if tag in ("a", "link", "script", "img"):
            self.targets |= {held[name] for name in ("href", "src") if held.get(name)}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_a_heading_and_loads_nothing_from_elsewhere(book, page):
    """Needs no browser, and so is asked wherever the book can be built."""
    found = Links(place_of(book, page).read_text(encoding="utf-8"))
    assert found.headings >= 1 and found.loaded
    assert not [
        target for target in found.loaded if urlsplit(target).netloc or urlsplit(target).scheme not in ("", "data")
    ]


def test_what_a_page_loads_is_seen():
    text = '<h1>x</h1><script src="https://a.org/x.js"></script><img src="b.png">'
    text += '<link rel="stylesheet" href="//c.org/d.css">'
    found = Links(text + '<a href="https://e.org"></a><link rel="canonical" href="https://f.org">')
    assert found.loaded == {"https://a.org/x.js", "b.png", "//c.org/d.css"} and found.headings == 1


def test_every_local_link_leads_somewhere(book):
    pages = [path for path in book.rglob("*.html") if "_static" not in path.parts]
    found = {path: Links(path.read_text(encoding="utf-8")) for path in pages}
    broken = []
    for path, links in found.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or target == "#":
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = found[place].anchors if place in found else None
            if not place.is_file() or (
                parts.fragment and anchors is not None and unquote(parts.fragment) not in anchors
            ):
                broken.append(f"{path.relative_to(book)}: {target}")
    assert not broken
