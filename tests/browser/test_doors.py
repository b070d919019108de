"""What a reader does first works behind each door."""

import urllib.request

import numpy as np
import pytest
from fronts import DOORS, Front
from PIL import Image
from selenium.webdriver import Keys

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=DOORS)
def door(request):
    return request.param


def test_the_first_image_fills_its_box(front, explorer):
    assert explorer.size == "474x474"
    assert explorer.pixels()[..., 3].min() == 255
    assert explorer.zoom == 1
    front.shot("first")


def test_the_scale_follows_keys_mouse_and_what_is_typed(front, explorer):
    explorer.press("scale", Keys.END)
    explorer.until(lambda: explorer.size == "8192x8192")
    explorer.press("scale", Keys.HOME)
    explorer.until(lambda: explorer.size == "64x64")
    explorer.press("scale", *[Keys.ARROW_RIGHT] * 10)
    explorer.until(lambda: explorer.size == "69x69")  # 2 ** (-1 + 10 * 0.01) * 128
    explorer.drag("scale", (0, 0), (40, 0))
    explorer.until(lambda: explorer.size not in ("69x69", "64x64"))
    explorer.type("typed", "3.7")
    assert explorer.size == "474x474"
    for fact in ("474 x 474 px", "scale x3.7", "zoom x1", " ms", "Mpx/s"):
        assert fact in explorer.status
    front.shot("typed")


def test_wheel_and_drag_move_the_view(front, explorer):
    explorer.scroll(-100, -100, -500)
    explorer.until(lambda: explorer.zoom > 1.5)
    explorer.rest()
    zoom, (y, x) = explorer.zoom, explorer.centre
    under = 0.5 - 100 / explorer.find("canvas").size["width"]  # what was under the cursor still is
    assert y + (under - 0.5) / zoom == pytest.approx(under, abs=0.01)
    assert y == pytest.approx(x, abs=0.01)
    assert explorer.pixels()[..., 3].min() == 255
    front.shot("zoomed")
    explorer.drag("canvas", (-80, 60), (-60, 40))
    explorer.rest()
    down, right = explorer.centre
    assert down < y and right > x
    explorer.press("canvas", Keys.ARROW_LEFT)
    explorer.until(lambda: explorer.centre[1] < right)
    explorer.press("canvas", "0")
    explorer.until(lambda: explorer.zoom == 1)
    explorer.rest()


def test_the_wipe_uncovers_the_other_side(front, explorer):
    explorer.drag("wipe", (0, 0), (120, 0))
    assert explorer.wipe > 0.7
    explorer.press("wipe", Keys.END)
    assert explorer.wipe == 1
    ours = explorer.pixels()
    explorer.press("wipe", Keys.HOME)
    assert explorer.wipe == 0
    assert not np.array_equal(ours, explorer.pixels())
    explorer.press("wipe", *[Keys.ARROW_RIGHT] * 25)
    assert explorer.wipe == pytest.approx(0.5)


def test_photographs_are_opened_and_refused(front, tmp_path):
    explorer = front.explorer("enlarge")
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    noise = np.random.default_rng(1).integers(0, 255, (24, 32, 3)).astype("uint8")
    Image.fromarray(noise).save(tmp_path / "mine.png")
    before = explorer.size
    for name, fact in {"text.png": "damaged", "bomb.png": "pixels"}.items():
        explorer.find("file").send_keys(str(tmp_path / name))
        explorer.until(lambda: name in explorer.status and fact in explorer.status)  # noqa: B023
        assert explorer.size == before
    explorer.type("steps", "1")
    explorer.find("file").send_keys(str(tmp_path / "mine.png"))
    explorer.until(lambda: explorer.size == "89x118")
    explorer.rest()
    assert "mine.png: 24 x 32 px" in explorer.status
    front.shot("photo")


def test_the_console_is_quiet(front):
    assert not front.faults()


def test_a_lost_kernel_is_noticed(front, explorer):
    front.restart()
    explorer.choose("scale", 2, "input")
    explorer.until(lambda: "run the cell above again" in explorer.status)
    front.shot("lost")


def test_lab_opens_the_quickstart_which_was_never_run_here(browser, notebooks):
    with urllib.request.urlopen(f"{notebooks}/") as answer:
        assert answer.url.endswith("/lab/tree/notebooks/00_quickstart.ipynb")
    first = Front(browser, "lab", f"{answer.url}?reset")
    cells = "const { widgets } = jupyterapp.shell.currentWidget.content;"
    image = """const is = (w) => w.model.sharedModel.source.startsWith("ScaleExplorer");
        const image = widgets.find(is).node.querySelector(".jp-OutputArea-output img");
        await image.decode();
        image.scrollIntoView({block: "center"});
        return image.naturalWidth"""
    first.until(lambda: first.tried(cells + image) == 420)
    first.shot("quickstart")
    link = """const last = widgets.at(-1).node;
        last.scrollIntoView();
        return last.querySelector("a[href*='README.md']").href"""
    first.until(lambda: first.tried(cells + link))
    href = first.tried(cells + link)
    assert "README.md" in href
    assert first.later("return (await fetch(arguments[0])).status", href) == 200
    names = "return (await (await fetch('/api/contents')).json()).content.map((f) => f.name)"
    assert set(first.later(names)) == {"README.md", "data", "notebooks"}
