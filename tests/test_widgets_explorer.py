"""The explorer's kernel side: questions, answers and work, without a browser."""

import base64
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import arbscale
from arbscale import presets
from arbscale.data import render_scenes, sample_scenes, to_tensor
from arbscale.model import ArbitraryScaleModel

pytest.importorskip("anywidget")
from arbscale.widgets import ScaleExplorer  # noqa: E402
from arbscale.widgets.worker import Cancelled, Worker  # noqa: E402


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ArbitraryScaleModel(presets.tiny()).eval()


@pytest.fixture
def explorer(model):
    return ScaleExplorer(model, seed=4, steps=2, scale=2.0)


@pytest.fixture(scope="module")
def enlarger():
    return arbscale.load("photos")


def ask(explorer, kind: str = "view", buffers=(), **message) -> dict:
    """Send what a browser sends; return the answer once the worker rests."""
    explorer._hear(explorer, {"kind": kind, "serial": 7, "view": "v", **message}, list(buffers))
    explorer._worker.wait(60)
    return explorer.answer


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def size_of(explorer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return pixels(explorer.left).shape[:2], pixels(explorer.right).shape[:2]


def png(*shape: int) -> bytes:
    buffer = io.BytesIO()
    array = np.random.default_rng(0).integers(0, 255, (*shape, 3)).astype("uint8")
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


# Questions ----------------------------------------------------------------------------------------


def test_an_image_is_there_before_the_first_question(explorer, model):
    side = 2 * model.preset.image_size
    assert explorer.answer["size"] == (side, side)
    assert size_of(explorer) == ((side, side), (side, side))
    wanted = model.generate(1, side, seed=4, steps=2)[0]
    found = to_tensor(Image.open(io.BytesIO(explorer.left)))
    assert (found - wanted).abs().max() < 1 / 127


def test_viewers_without_a_kernel_get_an_image(explorer):
    made = explorer._repr_mimebundle_()
    bundle = made[0] if isinstance(made, tuple) else made
    assert pixels(base64.b64decode(bundle["image/png"])).shape == (420, 420, 3)
    assert "64 x 64 px" in bundle["text/plain"] and " ms" not in bundle["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert not callable(getattr(explorer, "_ipython_display_", None))  # would go before the bundle


def test_a_question_is_answered_in_one_message(explorer, monkeypatch):
    sent = []
    monkeypatch.setattr(explorer, "send_state", lambda key=None: sent.append(set(key)))
    answer = ask(explorer, scale=3.0, screen=[50, 50])
    assert sent == [{"left", "right", "answer"}]
    assert (answer["serial"], answer["view"]) == (7, "v")
    assert answer["shown"] == (50, 50) and not answer["draft"]


def test_only_the_window_is_rendered(explorer, monkeypatch):
    painted = []
    render = type(explorer.model.first_stage).render
    monkeypatch.setattr(
        type(explorer.model.first_stage),
        "render",
        lambda self, f, size, window=None: painted.append(window) or render(self, f, size, window),
    )
    answer = ask(explorer, scale=64, zoom=64, centre=[0.3, 0.9], screen=[100, 100])
    assert answer["size"] == (2048, 2048)
    assert all(height <= 34 and width <= 34 for *_, height, width in painted[:1])
    assert size_of(explorer)[0] == painted[0][2:]


def test_what_moves_is_rendered_within_a_budget_of_time(explorer):
    explorer._rate = 25_000  # pixels a second: 1,000 in 40 ms
    answer = ask(explorer, scale=64, live=True)
    assert answer["draft"] and answer["window"][2] * answer["window"][3] < 1_200
    assert Image.open(io.BytesIO(explorer.left)).format == "JPEG"
    assert not ask(explorer, scale=64)["draft"]
    assert Image.open(io.BytesIO(explorer.left)).format == "PNG"


@pytest.mark.parametrize(("text", "size"), [("3.7", (118, 118)), ("64x64", (64, 64))])
def test_a_size_is_typed(explorer, text, size):
    assert ask(explorer, typed=text)["size"] == size


def raises(error):
    def call(*args, **options):
        raise error

    return call


def test_a_fault_is_told_and_the_images_stay(explorer, monkeypatch):
    before = explorer.left
    assert "'many'" in ask(explorer, typed="many")["error"]
    assert explorer.left == before
    ask(explorer, "draw", seed=1)
    assert "whole numbers" in explorer.work["error"]
    ask(explorer, "draw", seed=1, to_seed=2, share=0, steps=2, sampler="magic")
    assert "magic" in explorer.work["error"]
    ask(explorer, "draw", seed=-1, to_seed=2, share=0, steps=-7, sampler="ddim")
    assert "got -7" in explorer.work["error"]
    ask(explorer, "nonsense")
    assert "error" in explorer.work
    assert "error" not in ask(explorer, scale=2)
    monkeypatch.setattr(explorer, "_run", raises(MemoryError()))
    ask(explorer, "save")
    assert explorer.work["error"] == "MemoryError"


@pytest.mark.parametrize("key", ["bicubic", "nearest", "truth", "other"])
def test_the_right_side_is_chosen(model, key):
    scenes = sample_scenes(1, seed=0)
    explorer = ScaleExplorer(
        model,
        steps=1,
        truth=lambda size, window: render_scenes(scenes, size, window),
        other=ArbitraryScaleModel(presets.tiny()).eval(),
    )
    answer = ask(explorer, scale=2, rival=key)
    assert answer["rival"] == key
    assert set(dict(answer["rivals"])) == {"bicubic", "nearest", "truth", "other"}
    if key == "truth":
        found = to_tensor(Image.open(io.BytesIO(explorer.right)))
        assert (found - render_scenes(scenes, 64)[0]).abs().max() < 1 / 127


def test_features_alone_are_enough(model):
    stage = model.first_stage
    features = stage.features(model.sample(1, steps=1))
    explorer = ScaleExplorer(stage, features=features, size=(32, 32), scale=1.5)
    assert explorer.answer["size"] == (48, 48)
    variables = {"first_stage": stage, "features": features}
    exec(explorer.answer["code"], variables)
    assert variables["view"].shape == (3, 48, 48)
    ask(explorer, "draw", seed=0, to_seed=1, share=0, steps=2, sampler="ddim")
    assert "error" in explorer.work


@pytest.mark.parametrize("options", [{"features": torch.zeros(2, 3, 4, 4)}, {}])
def test_what_is_missing_is_said(model, enlarger, options):
    with pytest.raises(ValueError, match="features"):
        ScaleExplorer(model.first_stage, **options)
    with pytest.raises(ValueError, match="image="):
        ScaleExplorer(enlarger)


def test_a_scale_that_cannot_be_shown_is_refused_at_once(model):
    with pytest.raises(ValueError, match=r"\d x \d"):
        ScaleExplorer(model, steps=2, scale=10_000_000)


# Work ---------------------------------------------------------------------------------------------


def test_a_draw_replaces_the_image(explorer, model):
    number = explorer.answer["subject"]
    answer = ask(explorer, "draw", seed=9, to_seed=10, share=0.5, steps=3, sampler="ddim")
    assert answer["subject"] == number + 1
    assert explorer.work == {}
    assert pixels(explorer.estimate).shape[:2] == (48, 48)
    assert 'mixed_latent(model, (9, 10), 0.5, steps=3, sampler="ddim")' in answer["code"]
    shown = {"seed": 9, "to_seed": 10, "mix": 0.5, "steps": 3, "sampler": "ddim"}
    assert explorer.options.items() >= shown.items()  # for a page that opens now


def test_the_code_makes_the_view(explorer, model, monkeypatch):
    monkeypatch.setattr(arbscale, "load", lambda name: model)
    for settings in ({"share": 0}, {"share": 0.25}):
        ask(explorer, "draw", seed=9, to_seed=1, steps=2, sampler="ddim", **settings)
        answer = ask(explorer, scale=4, zoom=2, centre=[0.2, 0.6])
        variables = {}
        exec(answer["code"], variables)
        found = to_tensor(Image.open(io.BytesIO(explorer.left)))
        assert (found - variables["view"]).abs().max() < 1 / 127


def test_the_code_loads_no_other_weights_of_the_same_preset():
    mine = ArbitraryScaleModel(replace(presets.tiny(), name="cats"))
    assert 'load("PATH")' in ScaleExplorer(mine, steps=1).answer["code"]


def test_another_aspect_ratio_is_drawn(explorer):
    answer = ask(explorer, typed="40x80")
    assert answer["size"] == (40, 80)
    assert "grid=" in answer["code"]
    assert pixels(explorer.estimate).shape[:2] == (25, 48)
    assert not answer["stretched"]


def test_another_aspect_ratio_keeps_what_is_being_drawn(explorer, monkeypatch):
    """A size that is typed while a drawing is under way is drawn from the seed of that drawing."""
    coming = explorer._settings.__class__(seed=5, steps=1, sampler="ddim", size=(32, 32))
    explorer._coming, drawn = coming, []
    monkeypatch.setattr(explorer, "_draw", drawn.append)
    ask(explorer, typed="24x48")
    assert [(one.seed, one.sampler, one.size) for one in drawn] == [(5, "ddim", (24, 48))]


@pytest.mark.slow
def test_a_size_that_was_refused_or_cancelled_is_forgotten(explorer):
    again = {"seed": 9, "to_seed": 1, "share": 0, "steps": 2, "sampler": "ddim"}
    ask(explorer, typed="many", scale=2.0)
    assert ask(explorer, "draw", **again)["size"] == (64, 64)
    ask(explorer, "draw", **again | {"steps": 500})  # so that there is time to cancel
    explorer._hear(explorer, {"kind": "view", "typed": "40x80", "scale": 2.0}, [])
    assert "pending" in explorer.answer
    ask(explorer, "cancel")
    assert ask(explorer, "draw", **again)["size"] == (64, 64)


@pytest.mark.slow
def test_latents_are_kept_within_bounds(model, explorer):
    for seed in range(40):
        explorer._generator.subject(explorer._settings.__class__(seed=seed, steps=1, size=(32, 32)))
    assert len(explorer._generator._latents) == 32


@pytest.mark.slow
def test_a_file_is_saved(explorer, monkeypatch):
    sent = []
    monkeypatch.setattr(explorer, "send", lambda message, buffers: sent.append((message, buffers)))
    ask(explorer, scale=4, zoom=2)
    ask(explorer, "save", what="whole")
    ask(explorer, "save", what="view")
    assert [pixels(buffers[0]).shape[:2] for _, buffers in sent] == [(128, 128), (64, 64)]
    assert sent[0][0]["name"] == "arbscale-128x128.png"
    ask(explorer, typed="20000")
    ask(explorer, size=[20_000, 20_000])
    ask(explorer, "save", what="whole")
    assert "million" in explorer.work["error"]


def test_a_photograph_is_enlarged_uploaded_refused_and_cancelled(enlarger, monkeypatch):
    explorer = ScaleExplorer(enlarger, image=np.zeros((20, 24, 3), "uint8"), steps=1, limit=32)
    assert set(dict(explorer.answer["rivals"])) == {"bicubic", "nearest", "own"}
    content = png(30, 64)
    for part, piece in enumerate((content[:900], content[900:])):
        answer = ask(explorer, "photo", [memoryview(piece)], name="mine.png", part=part, parts=2)
    assert explorer.work == {}
    assert "mine.png: 15 x 32 px" in answer["note"]
    assert "truth" in dict(answer["rivals"])
    for line in ('load("photos")', "resize(image, (15, 32))", "'mine.png'"):
        assert line in answer["code"]
    ask(explorer, "photo", [b"text"], name="text.png", part=0, parts=1)
    assert explorer.work["error"].startswith("text.png: ")
    monkeypatch.setattr("arbscale.widgets.explorer.MAX_UPLOAD", 10)
    ask(explorer, "photo", [bytes(11)], name="large.png", part=0, parts=2)
    assert "MB" in explorer.work["error"] and not explorer._parts
    steps = {"seed": 0, "to_seed": 1, "share": 0, "steps": 500, "sampler": "ddim"}
    explorer._hear(explorer, {"kind": "draw", **steps}, [])
    explorer._hear(explorer, {"kind": "cancel"}, [])
    explorer._worker.wait(60)
    assert "cancelled" in explorer.work["text"]
    assert "mine.png" in ask(explorer, scale=2)["note"]


@pytest.mark.slow
def test_what_a_photograph_was_compared_with_goes_with_it(enlarger):
    grey = np.zeros((20, 24, 3), "uint8")
    explorer = ScaleExplorer(enlarger, image=grey, steps=1, limit=32, truth=grey, other=grey)
    assert {"truth", "other"} < set(dict(explorer.answer["rivals"]))
    answer = ask(explorer, "photo", [png(20, 24)], name="small.png", part=0, parts=1)
    assert "small.png" in answer["note"]
    assert not {"truth", "other"} & set(dict(answer["rivals"]))
    ask(explorer, "photo", [png(30, 64)], name="large.png", part=0, parts=1)
    ask(explorer, scale=2.0, rival="truth")
    assert pixels(explorer.right).any()  # the original, not the grey image


def test_newer_work_cancels_the_older():
    worker, done, started = Worker(), [], threading.Event()

    def endless(check):
        started.set()
        try:
            while True:
                check()
        except Cancelled:
            done.append("cancelled")
            raise

    worker.start(endless)
    started.wait(10)
    worker.start(lambda check: done.append("skipped or done"))
    worker.start(lambda check: done.append("last"))
    worker.wait(10)
    assert done[0] == "cancelled" and done[-1] == "last"
