"""The explorer in a real browser, behind each of its doors: JupyterLab, Notebook 7 and the page."""

import base64
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180  # seconds for what a kernel does, on a machine with other work
# What the console holds whatever the notebook does: requests of the fronts themselves, a page that
# is left unsaved, and, without a network, Voila's icons and the notebooks' badges.
KNOWN = (
    *("favicon", "/api/", "/static/", "/lab/extensions", "preload"),
    *("beforeunload", "fontawesome", "badge"),
)
DOORS = {
    "lab": "/lab/tree/notebooks/page.ipynb?reset",
    "notebook": "/notebooks/notebooks/page.ipynb",
    "page": "/",
}


@contextlib.contextmanager
def served(target: str, folder: Path, *options: str) -> Iterator[str]:
    """Run `make lab` or `make page` in this environment; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = " ".join(["--no-browser", f"--port={port}", *options])
    command = ["make", "-o", ".venv/.ready", target, f"PY={sys.executable}", f"ARGS={words}"]
    log = folder / f"{target}.log"
    settings = os.environ | {"JUPYTER_CONFIG_DIR": str(folder)}  # not the user's own
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=file, stderr=file, start_new_session=True
        )
    until = time.monotonic() + PATIENCE
    try:
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"make {target}: " + log.read_text()[-500:])
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        below = psutil.Process(server.pid).children(recursive=True)
        os.killpg(server.pid, signal.SIGTERM)
        for process in psutil.wait_procs(below, timeout=10)[1]:
            process.kill()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def jupyter(folder: Path) -> Iterator[str]:
    """Serve a copy of the notebooks by JupyterLab and Notebook 7; yield the address of both."""
    tree = folder / "tree"
    shutil.copytree(ROOT / "notebooks", tree / "notebooks")
    for text in (ROOT / "README.md", *ROOT.glob("data/**/*.md")):  # what the notebooks link to
        copy = tree / text.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(text, copy)
    (tree / "outputs").mkdir()
    settings = folder / "lab/user-settings/@jupyterlab/notebook-extension"
    settings.mkdir(parents=True)
    whole = '{"windowingMode": "none"}'  # draws every cell, not only those in sight
    (settings / "tracker.jupyterlab-settings").write_text(whole)
    options = f"--allow-root --IdentityProvider.token= --ServerApp.root_dir={tree}"
    options += " --expose-app-in-browser --JupyterNotebookApp.expose_app_in_browser=True"
    with served("lab", folder, options) as address:
        yield address


@contextlib.contextmanager
def chromium(downloads: Path) -> Iterator[webdriver.Chrome]:
    """Start a browser without a window."""
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.add_argument("--window-size=1300,1100")
    options.add_argument("--enable-precise-memory-info")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(
        options, webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    )
    driver.set_script_timeout(PATIENCE)
    driver.command_executor.client_config.timeout = 2 * PATIENCE  # for a page whose kernel starts
    driver.downloads = downloads
    try:
        yield driver
    finally:
        driver.quit()


def opened(browser: webdriver.Chrome, address: str, n: int) -> list[str]:
    """Open an address in `n` windows at once; return them without waiting for their pages."""
    before = browser.window_handles
    for _ in range(n):
        browser.execute_script("window.open(arguments[0], '_blank', 'noopener')", address)
    return [window for window in browser.window_handles if window not in before]


class Front:
    """A browser that has opened a door, or whose window has."""

    def __init__(self, browser: webdriver.Chrome, door: str, address: str = ""):
        self.browser, self.door = browser, door
        if address:
            browser.get(address)

    def run(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def later(self, script: str, *arguments):
        """Run a script that may await, and return what it returns."""
        return self.run(
            f"return (async (...arguments) => {{ {script} }})(...arguments)", *arguments
        )

    def tried(self, script: str):
        """As `later`, but None where the script fails."""
        return self.later(f"try {{ {script} }} catch {{ return null }}")

    def until(self, true, seconds: float = PATIENCE):
        return WebDriverWait(self.browser, seconds, poll_frequency=0.1).until(lambda _: true())

    def run_all(self) -> None:
        """Run every cell; the page has done so by itself."""
        if self.door == "page":
            return
        status = "return jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"
        self.until(lambda: self.tried(status) == "idle")
        self.run("jupyterapp.commands.execute('notebook:run-all-cells')")

    def restart(self) -> None:
        """Restart the kernel; on the page, where no one can, end it."""
        session = "jupyterapp.shell.currentWidget.sessionContext.session"
        if self.door != "page":
            self.later(f"await {session}.kernel.restart()")
            return
        config = "return JSON.parse(document.getElementById('jupyter-config-data').text).kernelId"
        name = f"kernel-{self.run(config)}.json"
        [kernel] = [p for p in psutil.process_iter(["cmdline"]) if name in str(p.info["cmdline"])]
        kernel.kill()

    def faults(self) -> list[str]:
        """Return the console's errors but those that are known."""
        log = [e["message"] for e in self.browser.get_log("browser") if e["level"] == "SEVERE"]
        return [message for message in log if not any(word in message for word in KNOWN)]

    def shot(self, name: str) -> None:
        """Keep a screenshot where the environment asks for one; it is never compared."""
        if folder := os.environ.get("ARBSCALE_SHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.browser.save_screenshot(f"{folder}/{self.door}-{name}.png")

    def explorer(self, kind: str) -> "Explorer":
        """Return the explorer of one kind once its image is there."""
        found = Explorer(self, f'.ax[data-kind="{kind}"]')
        self.until(lambda: self.run(f"return !!document.querySelector('{found.place}[data-size]')"))
        self.run(f"document.querySelector('{found.place}').scrollIntoView({{block: 'center'}})")
        found.rest()
        return found


class Explorer:
    """One explorer, used as a reader does."""

    def __init__(self, front: Front, place: str):
        self.front, self.place = front, place

    def run(self, script: str, *arguments):
        """Run a script that may await; `x` is the explorer."""
        start = f"const x = document.querySelector('{self.place}').explorer;"
        return self.front.later(start + script, *arguments)

    def until(self, true):
        return self.front.until(true)

    def find(self, name: str):
        return self.front.browser.find_element(By.CSS_SELECTOR, f"{self.place} .ax-{name}")

    @property
    def size(self) -> str:
        return self.run("return x.root.dataset.size")

    @property
    def status(self) -> str:
        return self.run("return x.find('status').textContent")

    @property
    def zoom(self) -> float:
        return self.run("return x.view.zoom")

    @property
    def centre(self) -> list[float]:
        return self.run("return x.view.centre")

    @property
    def wipe(self) -> float:
        return self.run("return x.view.wipe")

    def rest(self) -> None:
        """Wait until nothing is asked any more and what is shown has full density."""
        quiet = """return x.waiting === 0 && !x.wanted && x.root.dataset.draft === 'false'
            && !x.root.classList.contains('ax-busy')"""
        self.until(lambda: self.run(quiet))

    def press(self, name: str, *keys: str) -> None:
        """Focus a part and press keys."""
        self.run(f"x.find('{name}').focus()")
        self.actions().send_keys(*keys).perform()

    def type(self, name: str, text: str) -> None:
        self.find(name).send_keys(Keys.CONTROL, "a", Keys.NULL, text, Keys.ENTER)
        time.sleep(0.2)
        self.rest()

    def choose(self, name: str, value: object, event: str = "change") -> None:
        """Set a control's value, as a script does."""
        self.run(
            "const node = x.find(arguments[0]); node.value = arguments[1];"
            "node.dispatchEvent(new Event(arguments[2]))",
            *(name, value, event),
        )

    def actions(self) -> ActionChains:
        return ActionChains(self.front.browser)

    def scroll(self, x: int, y: int, amount: int) -> None:
        """Turn the wheel at a place of the image, counted from its middle."""
        origin = ScrollOrigin.from_element(self.find("canvas"), x, y)
        self.actions().scroll_from_origin(origin, 0, amount).perform()

    def drag(self, name: str, start: tuple[int, int], by: tuple[int, int]) -> None:
        """Drag with the mouse, from a place counted from the part's middle."""
        chain = self.actions().move_to_element_with_offset(self.find(name), *start)
        chain.click_and_hold().move_by_offset(*by).release().perform()

    def pixels(self) -> np.ndarray:
        """Return what the canvas shows, (H, W, 4)."""
        time.sleep(0.1)  # a frame
        url = self.run("return x.view.canvas.toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
