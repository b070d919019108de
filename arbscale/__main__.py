"""The command line: `python -m arbscale COMMAND`; `--help` lists the commands."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from arbscale import evaluation
from arbscale.coords import Size, check_size, scaled_size
from arbscale.data import load_image, resize, to_pil
from arbscale.evaluation import Partial, reports
from arbscale.evaluation import bench as benchmark
from arbscale.model import ArbitraryScaleModel, pick_device

MAX_PIXELS = 400_000_000  # of an output file; more than a picture viewer opens


def demo(args: argparse.Namespace) -> None:
    """Draw a cat at four sizes and enlarge a photograph x3.7, into one contact sheet."""
    from arbscale.data import sample_photos
    from arbscale.viz import contact_sheet

    cats, photos = ArbitraryScaleModel.load("cats"), ArbitraryScaleModel.load("photos")
    items = []
    for size in (32, (75, 100), 200, 512):
        height, width = check_size(size)
        picture = cats.generate(1, size, args.seed)[0]
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
    if args.sheet:
        from arbscale.viz import contact_sheet

        items = [(picture, f"{i}") for i, picture in enumerate(pictures)]
        return _write(contact_sheet(items, columns=4, box=max(args.size)), args.output)
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
    started = time.perf_counter()
    _check_report(args.output)
    model = ArbitraryScaleModel.load(args.model).to(pick_device())
    task = args.task or ("upscale" if model.preset.low_size else "reconstruct")
    usual = "photos" if model.preset.low_size else model.manifest.get("data", "scenes")
    args.data = args.data or usual
    run = _evaluate_generation if task == "generate" else _evaluate_pairs
    try:
        report, partial = run(args, model, task)
    except KeyboardInterrupt:
        kept = (
            "the same command goes on from here" if args.output else "with -o it could be resumed"
        )
        raise RuntimeError(f"stopped; {kept}") from None
    report["timing"] = {"seconds": round(time.perf_counter() - started, 3)}
    _report(report, args.output)
    partial.finish()


def _evaluate_pairs(
    args: argparse.Namespace, model: ArbitraryScaleModel, task: str
) -> tuple[dict, Partial]:
    from arbscale.data import open_dataset
    from arbscale.evaluation import get_protocol
    from arbscale.evaluation.features import fingerprint

    if task == "upscale" and not model.preset.low_size:
        raise ValueError(f"{args.model} is a generator; take --task reconstruct or generate")
    split = args.split or ("test" if args.data == "scenes" else "val")
    images = open_dataset(args.data, split)
    n = args.number or (32 if args.data == "scenes" else len(images))
    if n > len(images):
        raise ValueError(f"{args.data}, {split} has {len(images)} pictures, fewer than {n}")
    rule, sampling = get_protocol(args.protocol), _sampling(args, task)
    with_lpips = evaluation.lpips_or_why_not()
    choices = evaluation.pair_protocol(rule, images, task, n, sampling, with_lpips)
    report = reports.header(model, task, {"data": args.data, "split": split, **choices})
    partial = _partial(args, report, fingerprint(images))

    def rows(index: int, scale: float) -> evaluation.Rows:
        if task == "reconstruct":
            return evaluation.reconstruction_rows(model, images, index, scale, rule)
        return evaluation.upscaling_rows(model, images[index], scale, rule, sampling, index)

    report["results"] = evaluation.evaluate_pairs(rows, rule, args.scales, n, partial, with_lpips)
    return report, partial


def _evaluate_generation(
    args: argparse.Namespace, model: ArbitraryScaleModel, task: str
) -> tuple[dict, Partial]:
    from arbscale.data import ContinuousScenes, open_dataset
    from arbscale.evaluation import sets
    from arbscale.evaluation.features import fingerprint

    if model.preset.low_size:
        raise ValueError(f"{args.model} is a super-resolution model; take --task upscale")
    n = args.number or 1000
    split = args.split or "train"
    others = "test" if split != "test" else "train"
    if args.data == "scenes":  # there are as many as are asked for
        count = max(n, args.reference or n)
        real, unseen = (ContinuousScenes(count, split=s) for s in (split, others))
    else:
        real, unseen = (open_dataset(args.data, s) for s in (split, others))
    side = model.preset.image_size
    job = sets.Job(
        model,
        sets.RealPictures(real, min(args.reference or n, len(real))),
        sets.RealPictures(unseen, min(n, len(unseen))),
        tuple(args.sizes or [(side, side), (2 * side, 2 * side)]),
        n,
        args.features,
        _sampling(args, task),
    )
    sets.check(job, args.allow_few)
    choices = {"data": args.data, "split": split, "others' split": others}
    report = reports.header(model, task, choices | sets.protocol(job))
    partial = _partial(args, report, fingerprint(real) + fingerprint(unseen))
    report["results"] = sets.evaluate_generation(job, partial)
    return report, partial


def _sampling(args: argparse.Namespace, task: str) -> evaluation.Sampling:
    steps = args.steps or (5 if task == "upscale" else 20)
    return evaluation.Sampling(args.sampler, steps, args.seed)


def _partial(args: argparse.Namespace, report: dict, pictures: str) -> Partial:
    """Keep finished pieces beside the output, for this report and these pictures alone."""
    folder = args.output and args.output.with_suffix(".partial")
    return Partial(folder, {**report, "command": None, "fingerprint": pictures})


def _check_report(path: Path | None) -> None:
    if path and (path.is_dir() or path.suffix.lower() != ".json"):
        raise ValueError(f"{path}: name a JSON file, such as results/{path.stem or 'scores'}.json")


def _report(report: dict, output: Path | None) -> None:
    if output:
        reports.write(report, output)
    print(reports.table(report))


def table(args: argparse.Namespace) -> None:
    """Print the results in JSON files of evaluate, bench and ablate as a markdown document."""
    print(reports.document(args.reports))


def bench(args: argparse.Namespace) -> None:
    """Time a model per size, end to end and for decoding alone, beside the usual forms."""
    _check_report(args.output)
    model = ArbitraryScaleModel.load(args.model).to(pick_device())
    seconds = 0.0 if args.quick else args.seconds
    report = benchmark.measure(model, args.sizes, args.batch, args.steps, seconds)
    _report(report, args.output)


def ablate(args: argparse.Namespace) -> None:
    """Train denoisers with and without a transformer at equal cost; print tables, write JSON."""
    from arbscale.evaluation import ablation

    settings = ablation.Settings(
        tuple(args.compare or ablation.Settings().comparisons),
        args.seeds,
        args.steps,
        args.pool,
        args.number,
        args.features,
    )
    _report(ablation.ablate(settings, ablation.open_folder(args.folder)), args.output)


def train(args: argparse.Namespace) -> None:
    """Train a preset through its four stages; `train --help` lists every number."""
    from arbscale.training import command

    command.train(command.parse(args.words))


def check(args: argparse.Namespace) -> None:
    """Read every picture below a folder; print what is used, converted, skipped, and why."""
    from arbscale.data import find_folder
    from arbscale.data.check import check_folder, splits

    root = find_folder(args.folder)
    report = check_folder(root)
    if args.list:
        _print(report.listing())
    _print(report.summary())
    if not report.used:
        raise ValueError(f"no picture in {root} can be used")
    _print(f"splits:\n{splits(root)}")


def download(args: argparse.Namespace) -> None:
    """Fetch DIV2K or AFHQ's cats; what an earlier call left unfinished is gone on with."""
    from arbscale.data import data_root
    from arbscale.data import download as downloads

    for folder in downloads.download(args.name, args.output or data_root()):
        _print(f"{folder} is complete")
    print(downloads.TERMS[args.name])


def _print(text: str) -> None:
    """Print names of files, which may hold what the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


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
        if function not in (bench, table, check, download, ablate):
            sub.add_argument(
                "--seed", type=int, default=0, help="decides everything; default %(default)s"
            )
        return sub

    def sampling(sub: argparse.ArgumentParser, steps: int) -> None:
        text = "denoising steps; default %(default)s"
        sub.add_argument("--steps", type=_count, default=steps, help=text)
        sub.add_argument("--sampler", default="dpm_solver_pp", help="or ddim, or ddpm")
        sub.add_argument("-o", "--output", type=Path, required=True, help="a picture file")

    sub = command(demo)
    sub.set_defaults(seed=34)
    sub.add_argument("-o", "--output", type=Path, default=Path("outputs/demo.png"))

    sub = command(generate)
    sub.add_argument("model", nargs="?", default="cats", help="name or folder; default cats")
    sub.add_argument("-n", "--number", type=_count, default=1, help="of pictures; default 1")
    sub.add_argument("--size", type=_size, default=(256, 256), help="256 or 75x100")
    sub.add_argument("--sheet", action="store_true", help="write all on one sheet")
    sampling(sub, 20)

    sub = command(upscale)
    sub.add_argument("image", type=Path, help="a picture file")
    sub.add_argument("--model", default="photos", help="name or folder; default photos")
    wanted = sub.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--scale", type=_scale, help="a positive number such as 3.7")
    wanted.add_argument("--size", type=_size, help="1080 or 1080x1920 (height x width)")
    sampling(sub, 5)

    sub = command(evaluate)
    sub.add_argument("model", help="name or folder")
    sub.add_argument(
        "--task",
        choices=("reconstruct", "upscale", "generate"),
        help="default: upscale for a super-resolution model, else reconstruct",
    )
    sub.add_argument("--data", help="'scenes', 'photos', a folder, or a name")
    sub.add_argument("--split", help="train, val, test or all; default val, train to generate")
    sub.add_argument("--scales", type=_scale, nargs="+", default=[2, 3.7, 6])
    sub.add_argument("--sizes", type=_size, nargs="+", help="to generate at: 128 or 75x100")
    sub.add_argument("-n", "--number", type=_count, help="of pictures; default all, or 1000")
    sub.add_argument(
        "--reference", type=_count, help="real pictures to generate against; default as many"
    )
    sub.add_argument("--protocol", default="whole", help="whole, benchmark, div2k, paper_faces ...")
    sub.add_argument(
        "--features",
        default="encoder",
        help="of the distances: encoder, alexnet, vgg16, or inception (FID); default encoder",
    )
    sub.add_argument("--allow-few", action="store_true", help="FID of fewer than 2048 pictures")
    sub.add_argument("--steps", type=_count, help="denoising steps; default 20, 5 to upscale")
    sub.add_argument("--sampler", default="dpm_solver_pp", help="or ddim, or ddpm")
    sub.add_argument("-o", "--output", type=Path, help="a JSON file")

    sub = command(table)
    sub.add_argument("reports", type=Path, nargs="+", help="JSON files, or folders of them")

    sub = command(bench)
    sub.add_argument("model", nargs="?", default="cats", help="name or folder; default cats")
    sub.add_argument("--sizes", type=_size, nargs="+", default=[(64, 64), (128, 128), (256, 256)])
    sub.add_argument("--batch", type=_count, default=1, help="pictures a call; default 1")
    sub.add_argument("--steps", type=_count, default=20, help="denoising steps; default 20")
    sub.add_argument("--seconds", type=float, default=2.0, help="a row's time; default 2")
    sub.add_argument("--quick", action="store_true", help="time each row once")
    sub.add_argument("-o", "--output", type=Path, help="a JSON file")

    sub = command(ablate)
    sub.add_argument("--compare", nargs="+", metavar="TITLE", help="default: the first three")
    sub.add_argument("--seeds", type=_count, default=3, help="runs of each; default %(default)s")
    sub.add_argument("--steps", type=_count, default=500, help="of a run; default %(default)s")
    sub.add_argument("--pool", type=_count, default=4096, help="encoded pictures of a run")
    sub.add_argument("-n", "--number", type=_count, default=256, help="of pictures to measure on")
    sub.add_argument("--features", default="encoder", help="of the distances, as for evaluate")
    text = "finished pieces, from which a stopped comparison goes on; default %(default)s"
    sub.add_argument("--folder", type=Path, default=Path("runs/ablation"), help=text)
    sub.add_argument("-o", "--output", type=Path, required=True, help="a JSON file")

    sub = command(check)
    sub.add_argument("folder", help="a folder, or one below ARBSCALE_DATA")
    sub.add_argument("--list", action="store_true", help="print a line for each file, too")

    sub = command(download)
    sub.add_argument("name", help="div2k or afhq")
    sub.add_argument("-o", "--output", type=Path, help="a folder; default ARBSCALE_DATA")

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
