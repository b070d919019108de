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
HOLD = 10  # frames at rest


def story(explorer: Explorer) -> Iterator[None]:
    """Move one step, and let a frame be taken; end as it began."""
    x = [-1 + i * 0.25 for i in range(29)]  # log2 of the scale: x0.5 to x64

    def scale(log2: float) -> None:
        explorer.choose("scale", log2, "input")

    def moves(script: str, n: int) -> Iterator[None]:
        for i in range(n):
            explorer.run(script, i / (n - 1))
            yield

    for log2 in x[:21]:
        scale(log2)
        yield
    yield from moves("", HOLD)
    yield from moves("x.view.setWipe(0.5 + 0.45 * Math.sin(2 * Math.PI * arguments[0]))", 18)
    zoom = "const z = 10 ** arguments[0]; x.view.look([0.5 - 0.12 * (1 - 1 / z), 0.5], z)"
    yield from moves(zoom, 16)
    for log2 in x[21:]:
        scale(log2)
        yield
    yield from moves("x.view.setWipe(0.5 + 0.45 * Math.sin(2 * Math.PI * arguments[0]))", 18)
    yield from moves(zoom.replace("arguments[0]", "(1 - arguments[0])"), 10)
    for log2 in x[:3:-3]:
        scale(log2)
        yield


def main() -> None:
    """Record into the file named."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "data/explorer.webp")
    frames = []
    with tempfile.TemporaryDirectory() as name, served("page", Path(name)) as address:
        with chromium(Path(name)) as browser:
            explorer = Front(browser, "page", f"{address}/").explorer("generate")
            box = explorer.run("return x.root.getBoundingClientRect()")
            page = explorer.run("return [scrollX, scrollY]")
            clip = {"x": box["x"] + page[0], "y": box["y"] + page[1], "scale": 1}
            clip |= {"width": min(box["width"], 820), "height": box["height"]}
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
