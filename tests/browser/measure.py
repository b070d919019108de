"""Print how long an image takes in the browser, and the memory after many moves.

`python tests/browser/measure.py [THOUSANDS]` opens the page that `make page` serves.
"""

import sys
import tempfile
import time
from pathlib import Path

import psutil
from fronts import Front, chromium, served

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


def kernel() -> float:
    """Return the resident memory (MB) of the largest kernel below this process."""
    below = psutil.Process().children(recursive=True)
    return max(p.memory_info().rss for p in below if "ipykernel" in " ".join(p.cmdline())) / 2**20


def main() -> None:
    """Open the page, and move."""
    with tempfile.TemporaryDirectory() as name, served("page", Path(name)) as address:
        with chromium(Path(name)) as browser:
            time.sleep(20)  # the first kernel is started before the first visitor comes
            started = time.perf_counter()
            front = Front(browser, "page", f"{address}/")
            explorer = front.explorer("generate")
            print(f"first image {time.perf_counter() - started:.1f} s after the page was opened")
            time.sleep(20)  # and the next one's, once he has come
            print("scale  zoom  first image  full density  (ms, medians of 15 moves)")
            for scale, zoom in VIEWS:
                first, full, side = explorer.run(PAUSE + MOVES, scale, zoom, 15)
                print(f"{scale:5} {zoom:5} {first:12.0f} {full:13.0f}  view of {side} px")
            for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
                browser.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
                answers, heap = explorer.run(PAUSE + MANY)
                print(
                    f"1,000 moves, {answers} images: heap {heap:.1f} MB, kernel {kernel():.0f} MB"
                )


if __name__ == "__main__":
    main()
