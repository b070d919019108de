"""The explorer as a reader uses it: JupyterLab in a real browser, by keyboard, mouse and touch.

`python tests/test_browser.py` prints how long an image takes, and the memory after many moves.
"""

import base64
import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(
    not shutil.which("chromedriver"), reason="no chromedriver: install Chromium and its driver"
)

CELLS = {
    "generator": """
import arbscale
from arbscale.widgets import ScaleExplorer
ScaleExplorer(arbscale.load("cats"), seed=3, steps=6, scale=2)
""",
    "photo": """
import arbscale, numpy as np
from arbscale.widgets import ScaleExplorer
image = np.random.default_rng(0).integers(0, 255, (40, 30, 3)).astype("uint8")
ScaleExplorer(arbscale.load("photos"), image=image, steps=1, scale=2, limit=40)
""",
}
# What Lab and its server say in the console whatever the notebook holds.
KNOWN = ("favicon", "/api/", "/static/", "/lab/extensions", "Deprecat", "preload")


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder of notebooks by JupyterLab; yield its address."""
    for name, source in CELLS.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = "-m jupyterlab --no-browser --allow-root --expose-app-in-browser"
    words += f" --port={port} --IdentityProvider.token="
    log = folder / "lab.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, *words.split(), f"--notebook-dir={folder}"], stderr=file
        )
    until = time.monotonic() + 120
    try:
        while "is running at" not in log.read_text():
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError("JupyterLab did not start: " + log.read_text()[-500:])
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree"
    finally:
        server.terminate()
        server.wait(timeout=30)


@contextlib.contextmanager
def chromium(downloads: Path):
    """Start a browser without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.add_argument("--window-size=1300,1000")
    options.add_argument("--enable-precise-memory-info")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(
        options, webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    )
    driver.downloads = downloads
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("lab")) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("downloads")) as driver:
        yield driver


class Page:
    """One explorer in the browser."""

    def __init__(self, browser, address: str):
        from selenium.webdriver.support.wait import WebDriverWait

        self.browser = browser
        self._wait = WebDriverWait(browser, 90, poll_frequency=0.1)
        browser.get(f"{address}?reset")  # one panel: no other explorer to be found in its place
        kernel = "return jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
        self.until(lambda: self.run(f"try {{ {kernel} }} catch {{ return null }}") == "idle")
        self.run("jupyterapp.commands.execute('notebook:run-all-cells')")
        self.until(lambda: self.run("return !!document.querySelector('.ax')?.dataset.size"))
        self.rest()

    def run(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, true):
        return self._wait.until(lambda _: true())

    def find(self, name: str):
        from selenium.webdriver.common.by import By

        return self.browser.find_element(By.CSS_SELECTOR, f".ax-{name}")

    def data(self, name: str) -> str:
        return self.run(f"return document.querySelector('.ax').dataset.{name}")

    @property
    def size(self) -> str:
        return self.data("size")

    @property
    def status(self) -> str:
        return self.find("status").text

    def rest(self) -> None:
        """Wait until nothing is asked any more and what is shown has full density."""
        quiet = """const x = document.querySelector('.ax');
            return x.explorer.waiting === 0 && !x.explorer.wanted && x.dataset.draft === 'false'
                && !x.classList.contains('ax-busy')"""
        self.until(lambda: self.run(quiet))

    def state(self, name: str):
        return self.run(f"return document.querySelector('.ax').explorer.state.{name}")

    def actions(self):
        from selenium.webdriver import ActionChains

        return ActionChains(self.browser)

    def type(self, name: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.find(name).send_keys(Keys.CONTROL, "a")
        self.find(name).send_keys(text, Keys.ENTER)
        time.sleep(0.2)
        self.rest()

    def pixels(self) -> np.ndarray:
        """Return what the canvas shows, (H, W, 4)."""
        time.sleep(0.1)  # a frame
        url = self.run("return document.querySelector('.ax-canvas').toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))

    def shot(self, name: str) -> None:
        """Keep a screenshot where the environment asks for one; it is never compared."""
        if folder := os.environ.get("ARBSCALE_SHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.browser.save_screenshot(f"{folder}/{name}.png")


@pytest.fixture(scope="module")
def page(lab, browser):
    return Page(browser, f"{lab}/generator.ipynb")


def test_the_first_image_fills_its_box(page):
    assert page.size == "128x128"
    assert page.pixels()[..., 3].min() == 255
    assert page.state("zoom") == 1
    page.shot("first")


def test_arrow_keys_move_the_scale(page):
    from selenium.webdriver.common.keys import Keys

    slider = page.find("scale")
    page.run("arguments[0].focus()", slider)
    page.actions().send_keys(Keys.END).perform()
    page.until(lambda: page.size == "4096x4096")
    page.actions().send_keys(Keys.HOME).perform()
    page.until(lambda: page.size == "32x32")
    page.actions().send_keys(*[Keys.ARROW_RIGHT] * 10).perform()
    page.until(lambda: page.size == "34x34")  # 2 ** (-1 + 10 * 0.01) * 64
    page.rest()


def test_a_dragged_slider_is_followed_while_it_moves(page):
    slider = page.find("scale")
    page.actions().click_and_hold(slider).move_by_offset(40, 0).perform()
    page.until(lambda: page.size not in ("34x34", "32x32"))
    page.actions().release().perform()
    page.rest()


@pytest.mark.parametrize(
    ("text", "size"),
    [("3.7", "237x237"), ("x2", "128x128"), ("96x96", "96x96"), ("64", "4096x4096")],
)
def test_a_scale_or_size_is_typed(page, text, size):
    page.type("typed", text)
    assert page.size == size
    if text == "3.7":
        assert abs(page.state("scale") - 3.7) < 0.01
        for fact in ("237 x 237 px", "scale x3.7", "zoom x1", " ms", "Mpx/s"):
            assert fact in page.status
        page.shot("typed")


def test_nonsense_is_refused_and_the_image_stays(page):
    page.type("typed", "3.7")
    page.type("typed", "many")
    page.until(lambda: "'many'" in page.status)
    assert page.size == "237x237"
    page.type("typed", "3.7")


def test_the_wheel_zooms_about_the_cursor_and_a_double_click_resets(page):
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    canvas = page.find("canvas")
    corner = ScrollOrigin.from_element(canvas, -100, -100)
    page.actions().scroll_from_origin(corner, 0, -500).perform()
    page.until(lambda: page.state("zoom") > 1.5)
    page.rest()
    zoom, (y, x) = page.state("zoom"), page.state("centre")
    box = canvas.size["width"]
    under = 0.5 - 100 / box  # what was under the cursor is there still
    assert y + (under - 0.5) / zoom == pytest.approx(under, abs=0.01)
    assert y == pytest.approx(x, abs=0.01)
    assert page.pixels()[..., 3].min() == 255
    page.shot("zoomed")
    page.actions().double_click(canvas).perform()
    page.until(lambda: page.state("zoom") == 1)
    page.rest()


def test_a_drag_pans(page):
    from selenium.webdriver.common.keys import Keys

    canvas = page.find("canvas")
    page.run("arguments[0].focus()", canvas)
    page.actions().send_keys("+++").perform()
    page.until(lambda: page.state("zoom") == pytest.approx(1.5**3))
    start = page.actions().move_to_element_with_offset(canvas, -80, 60)
    start.click_and_hold().move_by_offset(60, -40).release().perform()
    page.rest()
    y, x = page.state("centre")
    assert x < 0.5 < y
    page.run("arguments[0].focus()", canvas)
    page.actions().send_keys(Keys.ARROW_LEFT).perform()
    page.until(lambda: page.state("centre")[1] < x)
    page.actions().send_keys("0").perform()
    page.until(lambda: page.state("zoom") == 1)
    page.rest()


def test_two_fingers_zoom(page):
    box = page.find("canvas").rect
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def touch(kind: str, apart: float) -> None:
        points = [{"x": middle[0] + s * apart, "y": middle[1], "id": s + 1} for s in (-1, 1)]
        event = {"type": kind, "touchPoints": [] if kind == "touchEnd" else points}
        page.browser.execute_cdp_cmd("Input.dispatchTouchEvent", event)

    touch("touchStart", 30)
    for apart in (45, 60, 90):
        touch("touchMove", apart)
    touch("touchEnd", 0)
    page.until(lambda: page.state("zoom") == pytest.approx(3, rel=0.1))
    page.find("reset").click()
    page.until(lambda: page.state("zoom") == 1)
    page.rest()


def test_the_wipe_uncovers_the_other_side(page):
    from selenium.webdriver.common.keys import Keys

    page.type("typed", "8")
    wipe = page.find("wipe")
    page.actions().drag_and_drop_by_offset(wipe, 120, 0).perform()
    assert page.state("wipe") > 0.7
    page.run("arguments[0].focus()", wipe)
    page.actions().send_keys(Keys.END).perform()
    assert page.state("wipe") == 1
    ours = page.pixels()
    page.actions().send_keys(Keys.HOME).perform()
    assert page.state("wipe") == 0
    other = page.pixels()
    assert not np.array_equal(ours, other)
    page.run(
        "arguments[0].value = 'nearest'; arguments[0].dispatchEvent(new Event('change'))",
        page.find("rival"),
    )
    page.until(lambda: "nearest" in page.find("right").text)
    page.rest()
    assert not np.array_equal(other, page.pixels())
    page.actions().send_keys(*[Keys.ARROW_RIGHT] * 25).perform()
    page.shot("wipe")
    page.type("typed", "3.7")


def test_draw_shows_estimates_and_then_another_image(page):
    before = page.pixels()
    page.type("steps", "30")
    page.type("seed", "11")
    page.until(lambda: page.run("return document.querySelectorAll('.ax-strip canvas').length") >= 1)
    page.rest()
    assert not np.array_equal(before, page.pixels())
    page.shot("drawn")


def test_the_second_slider_goes_to_another_seed(page):
    page.type("steps", "4")
    before = page.pixels()
    mix = "arguments[0].value = 0.5; arguments[0].dispatchEvent(new Event('input'))"
    page.run(mix, page.find("mix"))
    page.until(lambda: not np.array_equal(before, page.pixels()))
    page.rest()
    assert "mixed_latent" in page.run("return document.querySelector('.ax').explorer.answer.code")


def test_another_aspect_ratio_is_drawn_anew(page):
    page.type("typed", "90x160")
    page.until(lambda: page.size == "90x160")
    box = page.find("view").rect
    assert box["width"] / box["height"] == pytest.approx(16 / 9, rel=0.02)
    page.shot("wide")
    page.type("typed", "128x128")
    page.until(lambda: page.size == "128x128")
    page.rest()


def test_the_view_is_downloaded(page):
    page.type("typed", "3.7")
    page.find("save-whole").click()
    page.until(lambda: list(page.browser.downloads.glob("*.png")))
    [file] = page.browser.downloads.glob("*.png")
    assert Image.open(file).size == (237, 237)
    page.rest()


def test_300_quick_moves_end_on_the_last(page):
    script = """
        const slider = document.querySelector('.ax-scale');
        for (let i = 0; i < 300; i++) {
            slider.value = Math.sin(i) * 2 + 1;
            slider.dispatchEvent(new Event('input'));
            if (i % 10 === 0) await new Promise((f) => setTimeout(f, 5));
        }
        slider.value = 2;
        slider.dispatchEvent(new Event('input'));
    """
    page.browser.set_script_timeout(60)
    page.run(f"return (async () => {{ {script} }})()")
    page.until(lambda: page.size == "256x256")
    page.rest()
    assert page.size == "256x256"


def test_narrow_pages_wrap(page):
    page.run("document.querySelector('.ax').parentElement.style.width = '380px'")
    page.rest()
    view, panel = page.find("view").rect, page.find("panel").rect
    assert panel["y"] >= view["y"] + view["height"]
    assert view["width"] <= 380
    page.shot("narrow")
    page.run("document.querySelector('.ax').parentElement.style.width = ''")
    page.rest()


def test_the_dark_theme_is_followed(page):
    page.run(
        "return jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    color = "return getComputedStyle(document.querySelector('.ax')).backgroundColor"
    page.until(lambda: max(map(int, page.run(color)[4:-1].split(","))) < 60)
    page.shot("dark")


def test_the_console_is_quiet(page):
    log = [e for e in page.browser.get_log("browser") if e["level"] == "SEVERE"]
    assert not [e["message"] for e in log if not any(word in e["message"] for word in KNOWN)]


def test_a_restarted_kernel_is_noticed(page):
    page.run("jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.until(lambda: "run the cell above again" in page.status)
    page.shot("restarted")


def test_photographs_are_opened_and_refused(lab, browser, tmp_path):
    page = Page(browser, f"{lab}/photo.ipynb")
    assert page.size == "80x60"
    (tmp_path / "text.png").write_text("no image")
    page.find("file").send_keys(str(tmp_path / "text.png"))
    page.until(lambda: "text.png" in page.status and "damaged" in page.status)
    bomb = Image.new("1", (20_000, 20_000))
    bomb.save(tmp_path / "bomb.png")
    page.find("file").send_keys(str(tmp_path / "bomb.png"))
    page.until(lambda: "bomb.png" in page.status and "pixels" in page.status)
    noise = np.random.default_rng(1).integers(0, 255, (75, 100, 3)).astype("uint8")
    Image.fromarray(noise).save(tmp_path / "large.png")
    page.find("file").send_keys(str(tmp_path / "large.png"))
    page.until(lambda: page.size == "60x80")
    page.rest()
    assert "large.png" in page.status and "ground truth" in page.find("rival").text
    page.shot("photo")
    drop = """
        const data = new DataTransfer();
        data.items.add(new File(['no image'], 'dropped.png'));
        const event = (type) => new DragEvent(type, {dataTransfer: data, bubbles: true});
        const view = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden) .ax-view');
        for (const type of ['dragover', 'drop']) view.dispatchEvent(event(type));
    """
    page.run(drop)
    page.until(lambda: "dropped.png" in page.status)
    assert page.size == "60x80"


# Measurements -------------------------------------------------------------------------------------

MOVES = """
const [scale, zoom, n] = arguments, x = document.querySelector('.ax').explorer;
const pause = (ms) => new Promise((f) => setTimeout(f, ms));
const until = async (f) => { while (!f()) await pause(2); };
const rest = () => until(() => !x.waiting && !x.wanted && x.root.dataset.draft === 'false');
const first = [], full = [];
x.look([0.5, 0.5], zoom);
for (let i = 0; i < n; i++) {
    await rest();
    const serial = x.serial + 1, start = performance.now();
    x.find('scale').value = Math.log2(scale) + 0.01 * (i % 2);
    x.find('scale').dispatchEvent(new Event('input'));
    await until(() => +x.root.dataset.serial >= serial);
    first.push(performance.now() - start);
    await rest();
    full.push(performance.now() - start);
}
const median = (a) => a.sort((p, q) => p - q)[a.length >> 1];
return [median(first), median(full), x.canvas.width, x.find('status').textContent];
"""
MANY = """
const x = document.querySelector('.ax').explorer, start = x.serial;
for (let i = 0; i < arguments[0]; i++) {
    x.find('scale').value = 2.5 * Math.sin(i) + 2;
    x.find('scale').dispatchEvent(new Event('input'));
    if (i % 4 === 0) x.zoomAbout([0.4, 0.6], 2 ** Math.sin(i / 3));
    await new Promise((f) => setTimeout(f, 4));
}
return [x.serial - start, performance.memory.usedJSHeapSize / 2 ** 20];
"""


def _main() -> None:
    """Print the measurements."""
    import tempfile

    with tempfile.TemporaryDirectory() as name, serve(Path(name)) as address:
        with chromium(Path(name)) as browser:
            browser.set_script_timeout(600)
            page = Page(browser, f"{address}/generator.ipynb")
            print("scale  zoom  first image  full density  (ms, medians of 15 moves)")
            for scale, zoom in [(0.5, 1), (2, 1), (3.7, 1), (8, 1), (64, 1), (64, 20)]:
                run = f"return (async (...arguments) => {{ {MOVES} }})(...arguments)"
                first, full, side, status = page.run(run, scale, zoom, 15)
                print(f"{scale:5} {zoom:5} {first:12.0f} {full:13.0f}  {side} px: {status}")
            for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
                run = f"return (async (...arguments) => {{ {MANY} }})(...arguments)"
                browser.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
                answers, heap = page.run(run, 1000)
                memory = f"heap {heap:.1f} MB, kernel {_kernel():.0f} MB"
                print(f"1,000 moves, {answers} images: {memory}")


def _kernel() -> float:
    """Return the resident memory (MB) of the largest kernel below this process."""
    import psutil

    below = psutil.Process().children(recursive=True)
    return max(p.memory_info().rss for p in below if "ipykernel" in " ".join(p.cmdline())) / 2**20


if __name__ == "__main__":
    _main()
