"""Print how long an image takes in the browser, and the memory after many moves.

`python tests/browser/measure.py [THOUSANDS]` opens the page that `make page` serves.
"""

import sys
import tempfile
import time
from pathlib import Path

import psutil
from fronts import Front, chromium, opened, served
from selenium import webdriver

VIEWS = [(0.5, 1), (2, 1), (3.7, 1), (8, 1), (64, 1), (64, 20)]  # scale, zoom
PAUSE = """
const pause = (ms) => new Promise((f) => setTimeout(f, ms));
const until = async (f) => { while (!f()) await pause(2); };
const rest = () => until(() => !x.waiting && !x.wanted && x.root.dataset.draft === 'false');
const move = (log2) => {
    x.find('scale').value = log2;
    x.find('scale').dispatchEvent(new Event('input'));
};
"""
MOVES = """
const [scale, zoom, n] = arguments, first = [], full = [];
x.view.look([0.5, 0.5], zoom);
for (let i = 0; i < n; i++) {
    await rest();
    const serial = x.serial + 1, start = performance.now();
    move(Math.log2(scale) + 0.01 * (i % 2));
    await until(() => +x.root.dataset.serial >= serial);
    first.push(performance.now() - start);
    await rest();
    full.push(performance.now() - start);
}
const median = (a) => a.sort((p, q) => p - q)[a.length >> 1];
return [median(first), median(full), x.view.canvas.width];
"""
MANY = """
const start = x.serial;
for (let i = 0; i < 1000; i++) {
    move(2.5 * Math.sin(i) + 2);
    if (i % 4 === 0) x.view.zoomAbout([0.4, 0.6], 2 ** Math.sin(i / 3));
    await pause(4);
}
return [x.serial - start, performance.memory.usedJSHeapSize / 2 ** 20];
"""


def first_images(browser: webdriver.Chrome, address: str, visitors: int) -> list[float]:
    """Open the page for several visitors at once; return the seconds until each has an image."""
    started = time.perf_counter()
    waiting, seconds = opened(browser, address, visitors), []
    while waiting:
        for window in waiting[:]:
            browser.switch_to.window(window)
            if browser.execute_script("return !!document.querySelector('.ax[data-size]')"):
                waiting.remove(window)
                seconds.append(time.perf_counter() - started)
    return seconds


def kernels() -> list[psutil.Process]:
    """Return the kernels below this process."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "ipykernel" in " ".join(process.cmdline())]


def rest() -> None:
    """Wait until the kernels that stand ready for the next visitors have nothing to do."""
    before = -1.0
    while (now := sum(sum(kernel.cpu_times()[:2]) for kernel in kernels())) > before + 0.1:
        before = now
        time.sleep(4)


def main() -> None:
    """Open the page, and move."""
    with tempfile.TemporaryDirectory() as name, served("page", Path(name)) as address:
        with chromium(Path(name)) as browser:
            rest()
            seconds = ", ".join(f"{s:.1f}" for s in first_images(browser, address, 2))
            print(f"two visitors at once: an image {seconds} s after they opened the page")
            explorer = Front(browser, "page").explorer("generate")
            rest()
            print("scale  zoom  first image  full density  (ms, medians of 15 moves)")
            for scale, zoom in VIEWS:
                first, full, side = explorer.run(PAUSE + MOVES, scale, zoom, 15)
                print(f"{scale:5} {zoom:5} {first:12.0f} {full:13.0f}  view of {side} px")
            for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
                browser.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
                answers, heap = explorer.run(PAUSE + MANY)
                most = max(kernel.memory_info().rss for kernel in kernels()) / 2**20
                print(f"1,000 moves, {answers} images: heap {heap:.1f} MB, kernel {most:.0f} MB")


if __name__ == "__main__":
    main()
