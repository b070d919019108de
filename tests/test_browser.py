"""The slider as a reader moves it: JupyterLab in a real browser, with the keyboard."""

import shutil
import socket
import subprocess
import sys
import time

import nbformat
import pytest

pytestmark = pytest.mark.skipif(
    not shutil.which("chromedriver"), reason="no chromedriver: install Chromium and its driver"
)

CELL = """
import torch
import arbscale
from arbscale.widgets import scale_slider

model = arbscale.load("scenes")
with torch.no_grad():
    features = model.first_stage.features(model.sample(1, steps=2))
scale_slider(model.first_stage, features, (64, 96), scale=2.0, max_scale=4.0)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Start JupyterLab over a folder with one notebook; return the notebook's address."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "slider.ipynb")
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
    until = time.monotonic() + 60
    while "is running at" not in log.read_text():
        if server.poll() is not None or time.monotonic() > until:
            raise RuntimeError("JupyterLab did not start: " + log.read_text()[-500:])
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/lab/tree/slider.ipynb"
    server.terminate()
    server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.add_argument("--window-size=1200,900")
    driver = webdriver.Chrome(
        options, webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    )
    yield driver
    driver.quit()


def test_the_keyboard_moves_the_slider_and_the_picture_follows(lab, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    wait = WebDriverWait(browser, 60)
    browser.get(lab)
    kernel = (
        "return window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
    )
    wait.until(lambda b: b.execute_script(kernel) == "idle")
    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def picture(name: str) -> list[int]:
        """Return the true size of a picture, [width, height], [0, 0] before it is there."""
        script = (
            f"const i = document.querySelector('img.arbscale-{name}, .arbscale-{name} img');"
            "return i ? [i.naturalWidth, i.naturalHeight] : [0, 0]"
        )
        return browser.execute_script(script)

    wait.until(lambda _: picture("whole") == [192, 128])
    assert picture("middle") == [48, 32]
    box = "return document.querySelector('img.arbscale-whole').getBoundingClientRect().width"
    width = browser.execute_script(box)
    handle = browser.find_element(By.CSS_SELECTOR, ".arbscale-scale .noUi-handle")

    def press(key: str, size: list[int]) -> None:
        browser.execute_script("arguments[0].focus()", handle)
        ActionChains(browser).send_keys(key).perform()
        wait.until(lambda _: picture("whole") == size)

    press(Keys.END, [384, 256])
    assert picture("middle") == [96, 64]
    press(Keys.HOME, [48, 32])
    assert browser.execute_script(box) == width  # the resolution alone has changed
    status = browser.find_element(By.CSS_SELECTOR, ".arbscale-status").text
    assert status.startswith("32 x 48 px in ")
