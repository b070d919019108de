"""The rest of the explorer's front, in JupyterLab, and the page's visitors: `make browser`."""

import numpy as np
import pytest
from fronts import ROOT, Front, opened
from PIL import Image
from selenium.webdriver import Keys

pytestmark = pytest.mark.browser
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


def test_nonsense_is_refused_and_the_image_stays(explorer):
    explorer.type("typed", "many")
    assert "'many'" in explorer.status
    assert explorer.size == "474x474"
    explorer.type("typed", "3.7")
    assert "474 x 474 px" in explorer.status


@pytest.mark.parametrize(("text", "size"), [("x2", "256x256"), ("96x96", "96x96")])
def test_a_size_is_typed(explorer, text, size):
    explorer.type("typed", text)
    assert explorer.size == size


def test_each_control_has_a_name_and_the_keyboard_reaches_them_in_order(front, explorer):
    order = "canvas wipe scale typed rival seed to_seed mix steps sampler draw reset save-view"
    explorer.run("x.find('canvas').focus()")
    for name in f"{order} save-whole copy".split():
        focused = front.browser.switch_to.active_element
        assert focused == explorer.find(name)
        assert focused.accessible_name
        explorer.actions().send_keys(Keys.TAB).perform()


def test_a_double_click_shows_the_whole(explorer):
    explorer.press("canvas", "+")
    explorer.until(lambda: explorer.zoom == 1.5)
    explorer.actions().move_to_element_with_offset(explorer.find("canvas"), 60, 60).perform()
    explorer.actions().double_click().perform()
    explorer.until(lambda: explorer.zoom == 1)
    explorer.rest()


def test_two_fingers_zoom(front, explorer):
    box = explorer.run("return x.view.canvas.getBoundingClientRect()")
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def touch(kind: str, apart: float) -> None:
        points = [{"x": middle[0] + s * apart, "y": middle[1], "id": s + 1} for s in (-1, 1)]
        event = {"type": kind, "touchPoints": [] if kind == "touchEnd" else points}
        front.browser.execute_cdp_cmd("Input.dispatchTouchEvent", event)

    touch("touchStart", 30)
    for apart in (45, 60, 90):
        touch("touchMove", apart)
    touch("touchEnd", 0)
    explorer.until(lambda: explorer.zoom == pytest.approx(3, rel=0.1))
    explorer.find("reset").click()
    explorer.until(lambda: explorer.zoom == 1)
    explorer.rest()


def test_the_right_side_is_chosen(explorer):
    explorer.run("x.view.setWipe(0)")
    before = explorer.pixels()
    explorer.choose("rival", "nearest")
    explorer.until(lambda: "nearest" in explorer.find("right").text)
    explorer.rest()
    assert not np.array_equal(before, explorer.pixels())
    explorer.run("x.view.setWipe(0.5)")


def test_draw_shows_estimates_and_then_another_image(front, explorer):
    before = explorer.pixels()
    explorer.type("steps", "30")
    explorer.type("seed", "11")
    explorer.until(lambda: explorer.run("return x.find('strip').childElementCount") >= 1)
    explorer.rest()
    assert not np.array_equal(before, explorer.pixels())
    front.shot("drawn")


def test_drawing_is_cancelled(front, explorer):
    before = explorer.pixels()
    explorer.choose("steps", 1000)
    explorer.until(lambda: "of 1000" in explorer.find("doing").text)
    front.shot("drawing")
    explorer.find("cancel").click()
    explorer.until(lambda: "cancelled" in explorer.status)
    assert np.array_equal(before, explorer.pixels())


def test_the_second_slider_goes_to_another_seed(explorer):
    explorer.type("steps", "4")
    before = explorer.pixels()
    explorer.choose("mix", 0.5, "input")
    explorer.until(lambda: not np.array_equal(before, explorer.pixels()))
    explorer.rest()
    assert "mixed_latent" in explorer.run("return x.answer.code")


def test_another_aspect_ratio_is_drawn_anew(front, explorer):
    explorer.type("typed", "90x160")
    explorer.until(lambda: explorer.size == "90x160")
    box = explorer.find("view").rect
    assert box["width"] / box["height"] == pytest.approx(16 / 9, rel=0.02)
    front.shot("wide")
    explorer.type("typed", "128x128")
    explorer.until(lambda: explorer.size == "128x128")
    explorer.rest()


@pytest.mark.parametrize(("part", "side"), [("whole", 474), ("view", 316)])
def test_an_image_is_saved(front, explorer, part, side):
    explorer.type("typed", "3.7")
    explorer.press("canvas", "+")
    explorer.rest()
    file = front.browser.downloads / f"arbscale-474x474{'-view' if part == 'view' else ''}.png"
    explorer.find(f"save-{part}").click()
    explorer.until(file.exists)
    assert Image.open(file).size == (side, side)
    explorer.press("canvas", "0")
    explorer.rest()


def test_the_python_is_copied(front, explorer):
    allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    front.browser.execute_cdp_cmd("Browser.grantPermissions", allowed)
    explorer.find("copy").click()
    explorer.until(lambda: "clipboard" in explorer.status)
    code = explorer.run("return x.answer.code")
    assert "model.decode(" in code
    assert front.later("return await navigator.clipboard.readText()") == code


def test_300_quick_moves_end_on_the_last(explorer):
    explorer.run("""
        const slider = x.find("scale");
        const move = (value) => {
            slider.value = value;
            slider.dispatchEvent(new Event("input"));
        };
        for (let i = 0; i < 300; i++) {
            move(Math.sin(i) * 2 + 1);
            if (i % 10 === 0) await new Promise((f) => setTimeout(f, 5));
        }
        move(2);
    """)
    explorer.until(lambda: explorer.size == "512x512")
    explorer.rest()
    assert explorer.size == "512x512"


def test_a_dropped_file_is_read(front):
    explorer = front.explorer("enlarge")
    explorer.run("""
        const data = new DataTransfer();
        data.items.add(new File(["no image"], "dropped.png"));
        for (const type of ["dragover", "drop"])
            x.find("view").dispatchEvent(new DragEvent(type, {dataTransfer: data, bubbles: true}));
    """)
    explorer.until(lambda: "dropped.png" in explorer.status and "damaged" in explorer.status)
    # A folder has a size, but nothing can be read from it.
    explorer.run("""
        const lost = () => Promise.reject(new Error("a folder"));
        const part = { arrayBuffer: lost };
        x.upload({ name: "folder", size: 4096, slice: () => part, ...part });
    """)
    explorer.until(lambda: "folder: empty" in explorer.status)


def test_narrow_pages_wrap(front, explorer):
    explorer.run("x.root.parentElement.style.width = '380px'")
    explorer.rest()
    view, panel = explorer.find("view").rect, explorer.find("panel").rect
    assert panel["y"] >= view["y"] + view["height"]
    assert view["width"] <= 380
    front.shot("narrow")
    explorer.run("x.root.parentElement.style.width = ''")
    explorer.rest()


def test_the_dark_theme_is_followed(front, explorer):
    theme = "{theme: 'JupyterLab Dark'}"
    front.later(f"await jupyterapp.commands.execute('apputils:change-theme', {theme})")
    color = "return getComputedStyle(x.root).backgroundColor"
    explorer.until(lambda: max(map(int, explorer.run(color)[4:-1].split(","))) < 60)
    front.shot("dark")


def test_the_console_was_quiet(front):
    assert not front.faults()


def test_two_visitors_of_the_page_do_not_meet(browser, page):
    sizes = dict(zip(opened(browser, page, 2), ("96x96", "160x160"), strict=True))
    for first in (True, False):
        for window, size in sizes.items():
            browser.switch_to.window(window)
            explorer = Front(browser, "page").explorer("generate")
            if first:
                explorer.type("typed", size)
            assert explorer.size == size


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_its_first_cell_to_its_last(browser, notebooks, name):
    front = Front(browser, "lab", f"{notebooks}/lab/tree/notebooks/{name}?reset")
    front.run_all()
    cells = "jupyterapp.shell.currentWidget.content.widgets"
    left = f"{cells}.filter((c) => c.model.type === 'code' && c.model.executionState !== 'idle')"
    front.until(lambda: front.run(f"return {left}.length") == 0, 900)
    assert not front.run("return document.querySelectorAll('[data-mime-type$=error]').length")
    links = """const here = (a) => a.origin === location.origin && a.pathname !== location.pathname;
        const links = [...document.querySelectorAll(".jp-RenderedMarkdown a[href]")].filter(here);
        return await Promise.all(links.map(async (a) => [a.href, (await fetch(a)).status]))"""
    answers = front.later(links)
    assert len(answers) >= 2 and all(status == 200 for _, status in answers), answers
    front.shot(name)
    assert not front.faults()
