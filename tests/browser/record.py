"""Record the explorer from the page that `make page` serves, as a looped WebP for the README.

`python tests/browser/record.py [data/explorer.webp]`. Each frame waits for its image, so that the
recording is the same on a slow machine.
"""

import base64
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fronts import Explorer, Front, chromium, served
from PIL import Image

MS = 90  # a frame
WIDTH = 820  # of the recording


WIPE = "x.view.setWipe(0.5 + 0.45 * Math.sin(2 * Math.PI * arguments[0]))"
# Towards an eye of the cat of seed 0, to x4 at 1.
ZOOM = """const z = 4 ** arguments[0], s = 4 / 3 * (1 - 1 / z);
    x.view.look([0.5 + 0.07 * s, 0.5 - 0.11 * s], z)"""


def story(explorer: Explorer) -> Iterator[None]:
    """Move one step, and let a frame be taken; end as it began."""
    for log2 in range(-4, 17):  # x0.5 to x16
        explorer.choose("scale", log2 / 4, "input")
        yield
    for script, way in [(WIPE, 1), (ZOOM, 1), (WIPE, 1), (ZOOM, -1)]:
        for i in range(17):
            explorer.run(script, (i if way > 0 else 16 - i) / 16)
            yield
    for log2 in range(14, -4, -2):
        explorer.choose("scale", log2 / 4, "input")
        yield


def main() -> None:
    """Record into the file named."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "data/explorer.webp")
    frames = []
    with tempfile.TemporaryDirectory() as name, served("page", Path(name)) as address:
        with chromium(Path(name)) as browser:
            browser.set_window_size(WIDTH + 48, 1000)
            explorer = Front(browser, "page", f"{address}/").explorer("generate")
            box = explorer.run("return x.root.getBoundingClientRect()")
            page = explorer.run("return [scrollX, scrollY]")
            clip = {"x": box["x"] + page[0], "y": box["y"] + page[1], "scale": 1}
            clip |= {"width": min(box["width"], WIDTH), "height": box["height"]}
            for _ in story(explorer):
                explorer.rest()
                explorer.run("await new Promise(requestAnimationFrame)")
                shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
                frames.append(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))
    options = {"duration": MS, "loop": 0, "quality": 60, "method": 6, "minimize_size": True}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
