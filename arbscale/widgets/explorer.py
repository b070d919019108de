"""The scale explorer: one image at any scale and zoom.

The browser asks for the window that it shows. The kernel renders only this window (`view`) of what
is explored (`subjects`, `sources`), and runs long work in a `Worker`. The front is
`explorer.html`, `view.js` and `explorer.js`, joined into one module.
"""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

try:
    import anywidget
except ImportError:
    raise ImportError("the explorer needs anywidget: pip install anywidget") from None
import traitlets
from torch import Tensor

from arbscale.autoencoder import FirstStage
from arbscale.coords import Size, check_size, scaled_size
from arbscale.model import ArbitraryScaleModel, Progress
from arbscale.samplers import SAMPLERS, UPSCALING, Sampling
from arbscale.store import InputError
from arbscale.widgets.recipe import Settings
from arbscale.widgets.sources import Photo, encoded, read_photo, rendered_png
from arbscale.widgets.subjects import Generator, Subject, extra_rivals, given, larger, opened
from arbscale.widgets.view import View, bounded, parse_size
from arbscale.widgets.worker import Cancelled, Check, Worker

BOX = 420  # longer side of the view, CSS pixels
LIVE_SECONDS = 0.04  # of rendering while something moves; the full density follows at rest
MAX_UPLOAD = 64 * 1024**2  # bytes of a photograph's file
MAX_SAVED = 70_000_000  # pixels of a saved PNG: x64 of 128 x 128
ESTIMATE_SECONDS = 0.25  # at least, between two estimates that are shown while sampling


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


class ScaleExplorer(anywidget.AnyWidget):
    """Show an image at any scale: zoom in, compare, draw anew, enlarge a photograph of your own.

    Parameters
    ----------
    model
        A generator, a super-resolution model (with `image`), or a first stage (with `features`).
    image
        The photograph to enlarge: a path, a PIL image, an array, or a tensor (3, H, W).
    features
        (1, C, h, w) from `first_stage.features`, shown as they are.
    size
        (height, width) or side. Of features, what scale 1 stands for, by default the encoder's
        factor for each of theirs; of a generator, the aspect ratio to draw.
    scale
        Where the slider starts, 0.5 to 64.
    seed, steps, sampler
        As in `samplers.Sampling`; by default 20 steps for a generator, 2 for super-resolution.
    truth
        What the output should be, if it is known: an image, or a function `(size, window)` that
        returns (3, height, width), such as `render_scenes` of a scene.
    other
        Another model of the same kind, from the same seed; or an image or function as `truth`.
    limit
        Longest side of a photograph; a larger one is reduced, and the original is the truth.

    """

    _esm = "\n".join(
        [
            f"const PAGE = {json.dumps(_file('explorer.html'))};",
            _file("view.js"),
            _file("explorer.js"),
        ]
    )
    _css = _file("explorer.css")

    left = traitlets.Bytes(b"").tag(sync=True)  # the rendered window: a PNG file, a draft's is JPEG
    right = traitlets.Bytes(b"").tag(sync=True)  # the same window of what it is compared with
    answer = traitlets.Dict().tag(sync=True)  # what the two are
    work = traitlets.Dict().tag(sync=True)  # what the worker does, {} while it rests
    estimate = traitlets.Bytes(b"").tag(sync=True)  # PNG: of z_0, small, while sampling
    options = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        model: ArbitraryScaleModel | FirstStage,
        *,
        image: Any = None,
        features: Tensor | None = None,
        size: int | Size | None = None,
        scale: float = 3.7,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        truth: Any = None,
        other: Any = None,
        limit: int = 192,
    ):
        super().__init__()
        self.kind, self.model = _kind(model, image, features), model
        usual = UPSCALING if self.kind == "enlarge" else Sampling()
        how = steps or usual.steps, sampler or usual.sampler
        self._settings = Settings(seed, seed + 1, 0.0, *how)
        self._lock, self._worker = threading.RLock(), Worker()
        self._limit, self._parts = limit, []
        self._coming: Settings | None = None  # what the worker draws
        self._rate = 1e6  # pixels rendered a second, so far
        extra = extra_rivals(truth, other)
        other = other if isinstance(other, ArbitraryScaleModel) else None
        if self.kind == "generate":
            ratio = check_size(size or model.preset.image_size)
            self._settings = replace(self._settings, size=ratio)
            self._generator = Generator(model, other, extra)
            self._subject = self._generator.subject(self._settings)
        elif self.kind == "enlarge":
            self._photo = opened(image, limit, extra)
            self._enlarged = partial(larger, model, other)
            self._subject = self._enlarged(self._photo, self._settings)
        else:
            self._subject = given(model, features, size, extra)
        self.options = {
            "kind": self.kind,
            "max_upload": MAX_UPLOAD,
            "samplers": list(SAMPLERS),
            **self._settings.shown,
        }
        base = self._subject.source.base
        self._question = {"scale": scale, "screen": scaled_size(base, BOX / max(base)), "view": ""}
        self._publish()
        if error := self.answer.get("error"):  # there is no image to go on from
            raise InputError(error)
        self.on_msg(self._hear)

    # Questions and answers ------------------------------------------------------------------------

    def _hear(self, _: Any, message: dict, buffers: list) -> None:
        """Do what a browser asks; what goes wrong is told, as a callback's exception is lost."""
        known: dict[Any, Callable[[], None]] = {
            "view": lambda: self._view(message),
            "draw": lambda: self._draw(Settings.read(message, self._settings.size)),
            "photo": lambda: self._upload(message, buffers),
            "save": lambda: self._save(message.get("what") == "whole"),
            "cancel": self._cancel,
        }
        try:
            known[message.get("kind")]()
        except Exception as error:
            self._tell(error=_said(error))

    def _view(self, question: dict) -> None:
        with self._lock:
            self._question = question
            self._publish()

    def _publish(self) -> None:
        """Answer the last question: both images, and what they are, in one message."""
        with self._lock:
            try:
                left, right, answer = self._answer(self._question)
            except Exception as error:
                left, right, answer = self.left, self.right, {"error": _said(error)}
            about = {name: self._question.get(name) for name in ("serial", "view", "typed")}
            if "error" in answer:
                self._question["typed"] = None  # or it would be refused again after each draw
            with self.hold_sync():
                self.left, self.right = left, right
                self.answer = {**about, **answer, "at": time.time()}

    def _answer(self, question: dict) -> tuple[bytes, bytes, dict]:
        """Render what a question asks for."""
        subject, view, size = self._subject, View.read(question), self._size(question)
        typed = self.kind == "generate" and question.get("typed")
        if typed and self._other_grid(size, self._settings):
            if self._coming is None or self._other_grid(size, self._coming):
                self._draw(replace(self._coming or self._settings, size=size))
            return self.left, self.right, {"pending": "drawing for another aspect ratio"}
        budget = LIVE_SECONDS * self._rate if question.get("live") else math.inf
        shown, window = view.rendered(size, budget)
        started = time.perf_counter()
        left = subject.source.render(shown, window)
        seconds = time.perf_counter() - started
        key = subject.rival(question.get("rival"))
        right = subject.rivals[key][1].render(shown, window)
        rate = window[2] * window[3] / seconds
        if window[2] * window[3] > 4096:
            self._rate += 0.5 * (rate - self._rate)
        base = subject.source.base
        scale = size[0] / base[0]
        answer = {
            "subject": subject.number,
            "size": size,
            "scale": scale,
            "stretched": abs(scale * base[1] - size[1]) > scale + 1,  # beyond rounding
            "shown": shown,
            "window": window,
            "draft": shown != view.rendered(size)[0],
            "ms": 1000 * seconds,
            "rate": rate / 1e6,
            "rival": key,
            "rivals": [[key, label] for key, (label, _) in subject.rivals.items()],
            "note": subject.note,
            "code": subject.code(size, view.window(size)),
        }
        draft = answer["draft"]
        return encoded(left, draft), encoded(right, draft), answer

    def _size(self, question: dict) -> Size:
        """Return the output's size: as typed, as kept since it was typed, or by the scale."""
        base = self._subject.source.base
        if text := question.get("typed"):
            return parse_size(str(text), base)
        if size := question.get("size"):
            return bounded(check_size(tuple(size)))
        return bounded(scaled_size(base, float(question.get("scale", 1.0))))

    def _other_grid(self, size: Size, settings: Settings) -> bool:
        """Whether a size has an aspect ratio that is drawn on another latent grid."""
        return self.model.latent_grid(size) != self.model.latent_grid(settings.size)

    # What takes long ------------------------------------------------------------------------------

    def _tell(self, **facts: Any) -> None:
        """Say what the worker does, or what went wrong; nothing at all while it rests."""
        with self._lock:
            self.work = {**facts, "at": time.time()} if facts else {}

    def _run(self, title: str, work: Callable[[Progress], Subject | None]) -> None:
        """Run `work(progress)` beside the kernel, tell how far it is, explore what it returns."""

        def run(check: Check) -> None:
            def progress(done: int, total: int) -> None:
                check()
                self._tell(text=title, done=done, total=total)

            try:
                progress(0, 1)
                subject = work(progress)
                check()
                if subject is not None:
                    self._explore(subject)
                self._tell()
            except Cancelled:
                self._tell(text=f"{title}: cancelled")
            except Exception as error:
                self._tell(error=_said(error))

        self._worker.start(run)

    def _explore(self, subject: Subject) -> None:
        """Explore something else from now on, seen as before."""
        with self._lock:
            self._subject = replace(subject, number=self._subject.number + 1)
            self._publish()

    def _draw(self, settings: Settings) -> None:
        """Sample anew."""

        def work(progress: Progress) -> Subject:
            self._coming = settings
            try:
                if self.kind == "generate":
                    subject = self._generator.subject(settings, self._watch(settings, progress))
                else:
                    subject = self._enlarged(self._photo, settings, progress)
            finally:
                self._coming = None
            with self._lock:
                self._settings, self.options = settings, self.options | settings.shown
            return subject

        if self.kind == "show":
            raise InputError("features are shown as they are")
        self._run("drawing" if self.kind == "generate" else "enlarging", work)

    def _cancel(self) -> None:
        """Stop what runs; a size that was typed for it must not start it again."""
        with self._lock:
            self._worker.cancel()
            if "pending" in self.answer:
                self._question["typed"] = None

    def _watch(
        self, settings: Settings, progress: Progress
    ) -> Callable[[int, Tensor, Tensor], None]:
        """Return a sampler's callback that shows estimates of z_0, decoded small."""
        base = self._generator.base(settings)
        small, last = scaled_size(base, 48 / max(base)), 0.0

        def callback(i: int, z_t: Tensor, z_0: Tensor) -> None:
            nonlocal last
            progress(i + 1, settings.steps)
            if time.perf_counter() - last > ESTIMATE_SECONDS:
                image = self.model.decode(z_0 / self.model.scale_factor, small)[0].cpu()
                with self._lock:
                    self.estimate = encoded(image)
                last = time.perf_counter()

        return callback

    def _upload(self, message: dict, buffers: list) -> None:
        """Collect the parts of a photograph's file; enlarge it when the last one is there."""
        if self.kind != "enlarge":
            raise InputError("this model takes no photograph; load a super-resolution model")
        self._parts = [*(self._parts if message["part"] else []), bytes(buffers[0])]
        if sum(map(len, self._parts)) > MAX_UPLOAD:
            self._parts = []
            raise InputError(f"a file of over {MAX_UPLOAD // 1024**2} MB; reduce the photograph")
        if message["part"] + 1 < message["parts"]:
            return
        content, name, self._parts = b"".join(self._parts), str(message.get("name")), []

        def work(progress: Progress) -> Subject:
            photo = Photo.reduced(read_photo(content, name), name, self._limit)
            subject = self._enlarged(photo, self._settings, progress)
            self._photo = photo
            return subject

        self._run("enlarging", work)

    def _save(self, whole: bool) -> None:
        """Render the view, or all, at the output's own pixels, and send it as a PNG file."""
        with self._lock:
            source, question = self._subject.source, self._question
            size = self._size(question)
        window = (0, 0, *size) if whole else View.read(question).window(size)
        if window[2] * window[3] > MAX_SAVED:
            most = f"{MAX_SAVED // 10**6} million pixels"
            raise InputError(f"{window[2]} x {window[3]} is over {most}; save a smaller view")

        def work(progress: Progress) -> None:
            content = rendered_png(source, size, window, progress)
            name = f"arbscale-{size[0]}x{size[1]}{'' if whole else '-view'}.png"
            with self._lock:
                self.send({"kind": "file", "name": name}, [content])

        self._run("saving", work)

    # Without a kernel -----------------------------------------------------------------------------

    _ipython_display_ = None  # ipywidgets 7, as on Colab, would show itself without an image

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """Add an image and a line of text for viewers without a kernel."""
        made = super()._repr_mimebundle_(**options)
        bundle, *rest = made if isinstance(made, tuple) else (made,)
        size = self.answer.get("size", (0, 0))
        label = self._subject.rivals[self._subject.rival(self.answer.get("rival"))][0]
        bundle["text/plain"] = f"{size[0]} x {size[1]} px: left rendered, right {label}"
        bundle["image/png"] = base64.b64encode(still(self.left, self.right)).decode()
        return (bundle, *rest) if rest else bundle


def still(left: bytes, right: bytes, box: int = BOX) -> bytes:
    """Lay two image files of one size half and half, a white line between, in a box of hard pixels.

    The longer side of the PNG file returned is `box`.
    """
    from PIL import Image

    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in (left, right)]
    width, height = images[0].size
    size = scaled_size((width, height), box / max(width, height))
    first, second = (image.resize(size, Image.Resampling.NEAREST) for image in images)
    middle = size[0] // 2
    first.paste(second.crop((middle, 0, *size)), (middle, 0))
    first.paste("white", (middle - 1, 0, min(middle + 1, size[0]), size[1]))
    buffer = io.BytesIO()
    first.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__  # a MemoryError says nothing


def _kind(model: Any, image: Any, features: Any) -> str:
    """Return "show", "enlarge" or "generate"; ValueError where something is missing."""
    if features is not None:
        if features.ndim != 4 or len(features) != 1:
            raise InputError(f"features are (1, C, h, w), got {tuple(features.shape)}")
        return "show"
    if not isinstance(model, ArbitraryScaleModel):
        raise InputError("a bare first stage needs features=first_stage.features(z)")
    if not model.preset.low_size:
        return "generate"
    if image is None:
        raise InputError(f"{model.preset.name} enlarges a photograph: give image=")
    return "enlarge"
