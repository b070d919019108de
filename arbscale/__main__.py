"""The command line: `python -m arbscale COMMAND`; `--help` lists the commands."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from arbscale import bench as benchmark
from arbscale import evaluation
from arbscale.coords import Size, check_size, scaled_size
from arbscale.images import load_image, resize, to_pil
from arbscale.model import ArbitraryScaleModel, pick_device

MAX_PIXELS = 400_000_000  # of an output file; more than a picture viewer opens


def demo(args: argparse.Namespace) -> None:
    """Draw a scene at four sizes and enlarge a photograph x3.7, into one contact sheet."""
    from arbscale.data import sample_photos
    from arbscale.viz import contact_sheet

    scenes, photos = ArbitraryScaleModel.load("scenes"), ArbitraryScaleModel.load("photos-tiny")
    items = []
    for size in (32, (75, 100), 200, 512):
        height, width = check_size(size)
        picture = scenes.generate(1, size, args.seed)[0]
        items.append((picture, f"one seed at {height} x {width}"))
    cat = sample_photos()["cat"][:, 20:280, 90:350]  # (3, 260, 260), the face
    low = resize(cat, (70, 70))
    size = scaled_size((70, 70), 3.7)
    items += [
        (low, "photograph, 70 x 70"),
        (resize(low, size), f"bicubic x3.7, {size[0]} x {size[1]}"),
        (photos.upscale(low, size=size, seed=args.seed), f"ours x3.7, {size[0]} x {size[1]}"),
        (resize(cat, size), "the original at that size"),
    ]
    _write(contact_sheet(items, columns=4, box=300), args.output)


def generate(args: argparse.Namespace) -> None:
    """Draw pictures from noise at any size; more than one are numbered."""
    model = ArbitraryScaleModel.load(args.model).to(pick_device())
    _check_output(args.output, args.size)
    with tqdm(total=args.steps, unit="step") as bar:
        pictures = model.generate(
            args.number, args.size, args.seed, args.steps, args.sampler, lambda *_: bar.update()
        )
    for i, picture in enumerate(pictures):
        stem = args.output.stem + (f"-{i:03d}" if args.number > 1 else "")
        _write(to_pil(picture), args.output.with_stem(stem))


def upscale(args: argparse.Namespace) -> None:
    """Enlarge a photograph (JPEG, PNG, ...) by any factor or to any size."""
    model = ArbitraryScaleModel.load(args.model).to(pick_device())
    image = to_pil(load_image(args.image))
    size = args.size or scaled_size((image.height, image.width), args.scale)
    _check_output(args.output, size)
    with tqdm(unit="step") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        picture = model.upscale(
            image, None, size, args.seed, args.steps, args.sampler, progress=progress
        )
    _write(picture, args.output)


def evaluate(args: argparse.Namespace) -> None:
    """Score a model beside its baselines on unseen pictures; print a table, write JSON."""
    from arbscale.data import open_dataset

    model = ArbitraryScaleModel.load(args.model).to(pick_device())
    images = None
    if model.preset.low_size:
        images = open_dataset(args.data, args.split)
        images = list(images.values()) if isinstance(images, dict) else images
    n = args.number or (len(images) if images is not None else 32)
    report = evaluation.evaluate(model, images, args.scales, n, args.seed)
    report["protocol"]["data"] = f"{args.data}, {args.split}" if images is not None else "scenes"
    report["command"] = "python -m arbscale " + " ".join(sys.argv[1:])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(evaluation.table(report))


def bench(args: argparse.Namespace) -> None:
    """Time LIIF.render beside the usual form on this machine's CPU."""
    rows = benchmark.compare(args.repeats)
    print(f"256 x 256 from 64 x 64 x 128, 4 x 256 hidden; {torch.get_num_threads()} threads")
    for name, median, spread in rows:
        print(f"{name:56} {1000 * median:7.0f} ms (spread {1000 * spread:.0f} ms)")
    print(f"{rows[0][1] / rows[1][1]:.2f} times faster")


def train(args: argparse.Namespace) -> None:
    """Train a preset through its four stages; `train --help` lists every number."""
    from arbscale import train_command

    train_command.train(train_command.parse(args.words))


def _check_output(path: Path, size: Size) -> None:
    """Refuse what cannot be written before anything is computed."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path}: name a picture file, such as {path.stem or 'out'}.png")
    height, width = size
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"{height} x {width} is over {MAX_PIXELS // 10**6} million pixels; take a smaller "
            "scale, or render windows of it from Python"
        )


def _write(picture: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(f"wrote {path} ({picture.height} x {picture.width})")


def _size(text: str) -> Size:
    """Read "256" or "75x100" (height x width)."""
    try:
        numbers = [int(n) for n in text.lower().split("x")]
        return check_size(numbers[0] if len(numbers) == 1 else tuple(numbers))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; wanted one like 256 or 75x100 (height x width)"
        ) from None


def _scale(text: str) -> float:
    try:
        scaled_size((1, 1), float(text))
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no scale; wanted a positive number such as 3.7"
        ) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a whole number of at least 1")
    return int(text)


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> Any:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    main = OneLine(prog="python -m arbscale", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Any) -> argparse.ArgumentParser:
        text = function.__doc__
        sub = commands.add_parser(function.__name__, help=text, description=text)
        sub.set_defaults(function=function)
        if function is not bench:
            sub.add_argument("--seed", type=int, default=0, help="decides everything; default 0")
        return sub

    def sampling(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--steps", type=_count, default=20, help="denoising steps; default 20")
        sub.add_argument("--sampler", default="dpm_solver_pp", help="or ddim, or ddpm")
        sub.add_argument("-o", "--output", type=Path, required=True, help="a picture file")

    sub = command(demo)
    sub.add_argument("-o", "--output", type=Path, default=Path("outputs/demo.png"))

    sub = command(generate)
    sub.add_argument("model", nargs="?", default="scenes", help="name or folder; default scenes")
    sub.add_argument("-n", "--number", type=_count, default=1, help="of pictures; default 1")
    sub.add_argument("--size", type=_size, default=(256, 256), help="256 or 75x100")
    sampling(sub)

    sub = command(upscale)
    sub.add_argument("image", type=Path, help="a picture file")
    sub.add_argument("--model", default="photos-tiny", help="name or folder; default photos-tiny")
    wanted = sub.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--scale", type=_scale, help="a positive number such as 3.7")
    wanted.add_argument("--size", type=_size, help="1080 or 1080x1920 (height x width)")
    sampling(sub)

    sub = command(evaluate)
    sub.add_argument("model", help="name or folder")
    sub.add_argument(
        "--data", default="photos", help="'photos', a folder or a name; not for scenes"
    )
    sub.add_argument("--split", default="val", help="train, val or test")
    sub.add_argument("--scales", type=_scale, nargs="+", default=[2, 3.7, 6])
    sub.add_argument("-n", "--number", type=_count, help="of pictures; default all, or 32 scenes")
    sub.add_argument("-o", "--output", type=Path, help="a JSON file")

    sub = command(bench)
    sub.add_argument("--repeats", type=_count, default=5)

    commands.add_parser("train", help=train.__doc__, add_help=False).set_defaults(function=train)
    return main


def main(argv: list[str] | None = None) -> int:
    """Run a command; an expected error is one line and exit status 2."""
    args, words = parser().parse_known_args(argv)
    if args.function is train:
        args.words = words  # read by a library that knows every field
    elif words:
        parser().error(f"unrecognized arguments: {' '.join(words)}")
    try:
        args.function(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"arbscale: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
