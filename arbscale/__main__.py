"""The command line: `python -m arbscale COMMAND`; `--help` lists the commands."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from tqdm.auto import tqdm
from tyro.conf import Positional, arg

from arbscale import compat, store
from arbscale.coords import Size, check_size, scaled_size
from arbscale.data import batches
from arbscale.data import output as output_files
from arbscale.evaluation.command import ablate, bench, evaluate, table
from arbscale.evaluation.resume import wait_for_all
from arbscale.model import ArbitraryScaleModel
from arbscale.samplers import UPSCALING, Sampling
from arbscale.store import InputError
from arbscale.unet import launched, pick_device

MAX_PIXELS = 400_000_000  # of an output file; more than an image viewer opens
MAX_SIDE = 100_000  # pixels
LARGE = 16_000_000  # pixels; from here on a TIFF file is written in bands
BATCH, BATCH_PIXELS, MAX_NUMBER = 16, 4_000_000, 10**9  # generated at a time, and in all
Output = Annotated[Path, arg(aliases=["-o"], help="an image file")]
Folder = Annotated[Path, arg(aliases=["-o"], help="a folder that arbscale.load reads")]
Model = Annotated[str, arg(help="name or folder")]
Named = Positional[Model]
Quality = Annotated[int, arg(help="of JPEG, WebP and AVIF, 1 to 100")]
Drawn = Annotated[Sampling, arg(name="")]
BAR = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"
USUAL = Sampling()


def _edge(words: list[str], most: int = MAX_PIXELS) -> int | Size:
    """Read "256" as an integer and "75x100" as a Size."""
    numbers = [int(n) for n in words[0].lower().split("x")]
    size = _check_size(check_size(numbers[0] if len(numbers) == 1 else tuple(numbers)), most)
    return numbers[0] if len(numbers) == 1 else size


def _spec(read: Callable[[list[str]], Any]) -> tyro.constructors.PrimitiveConstructorSpec:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="SIZE",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int | tuple),
        str_from_instance=lambda size: [
            str(size) if isinstance(size, int) else "{}x{}".format(*size)
        ],
    )


Edge = Annotated[int | Size, _spec(lambda words: _edge(words, MAX_SIDE**2))]
AnySize = Annotated[Size, _spec(lambda words: check_size(_edge(words, MAX_SIDE**2)))]


def demo(output: Output = Path("outputs/demo.png"), seed: int = 0) -> None:
    """Generate a cat at four sizes and enlarge a photograph x3.7, on one contact sheet."""
    from arbscale.data import resize, sample_photos
    from arbscale.viz import contact_sheet

    _check_output(output)
    cats, photos = ArbitraryScaleModel.load("cats"), ArbitraryScaleModel.load("photos")
    items = []
    for size in (32, (75, 100), 200, 512):
        height, width = check_size(size)
        items.append((cats.generate(1, size, seed)[0], f"one seed at {height} x {width}"))
    cat = sample_photos()["cat"][:, 20:280, 90:350]  # (3, 260, 260), the face
    low = resize(cat, (70, 70))
    size = scaled_size((70, 70), 3.7)
    items += [
        (low, "photograph, 70 x 70"),
        (resize(low, size), f"bicubic x3.7, {size[0]} x {size[1]}"),
        (photos.upscale(low, size=size, seed=seed), f"ours x3.7, {size[0]} x {size[1]}"),
        (resize(cat, size), "the original at that size"),
    ]
    _write(contact_sheet(items, columns=4, box=300), output)


def generate(
    model: Named = "cats",
    *,
    output: Output,
    number: Annotated[int, arg(aliases=["-n"], help="of images")] = 1,
    size: Annotated[AnySize, arg(help="256, or 75x100 (height x width)")] = (256, 256),
    sheet: Annotated[bool, arg(help="write all on one sheet")] = False,
    quality: Quality = output_files.QUALITY,
    sampling: Drawn = USUAL,
) -> None:
    """Generate images from noise at any size; several are numbered.

    A large TIFF file is written in bands, in little memory; rerun the same command to resume.
    Processes that accelerate or torchrun launched together each make a share.
    """
    from arbscale.data import to_pil
    from arbscale.viz import contact_sheet

    bands = _is_large(output, size) and not sheet
    _check_output(output, size, quality, MAX_SIDE**2 if bands else MAX_PIXELS)
    if not 1 <= number <= MAX_NUMBER:
        raise InputError(f"--number is from 1 to {MAX_NUMBER:,}, got {number}")
    if sheet:
        _check_size((math.ceil(number / 4) * max(size), 4 * max(size)))
    rank, ranks = launched()
    if sheet and rank:  # one process makes all
        return
    loaded = ArbitraryScaleModel.load(model).to(pick_device())
    batch = 1 if bands else max(1, min(BATCH, BATCH_PIXELS // math.prod(size)))
    starts = range(0, number, batch)
    share = starts if sheet else starts[rank::ranks]
    if number > batch and not rank:
        megabytes = 3 * number * size[0] * size[1] / 1e6
        print(f"{number} images, {batch} at a time, at most {megabytes:.0f} MB")
    generator, items = sampling.generator(), []

    def path(i: int) -> Path:
        digits = max(3, len(str(number - 1)))
        return output.with_stem(output.stem + (f"-{i:0{digits}d}" if number > 1 else ""))

    with tqdm(unit="step", total=sampling.steps * len(share), disable=rank > 0) as bar:
        for first in starts:
            n, before = min(batch, number - first), bar.n
            if first not in share:
                loaded.start_noise(n, loaded.latent_grid(size), generator)  # for another process
                continue
            more = {
                "generator": generator,
                "progress": lambda i, _, n=before: bar.update(n + i - bar.n),
            }
            if bands:
                z = loaded.sample(n, **vars(sampling), grid=loaded.latent_grid(size), **more)
                loaded.render_to(path(first), z, size)
                tqdm.write(f"wrote {path(first)} ({size[0]} x {size[1]})")
                continue
            for i, image in enumerate(loaded.generate(n, size, **vars(sampling), **more), first):
                if sheet:
                    items.append((image, f"{i}"))
                else:
                    _write(to_pil(image), path(i), quality)
    if sheet:
        _write(contact_sheet(items, columns=4, box=max(size)), output, quality)


def upscale(
    images: Annotated[Positional[tuple[Path, ...]], arg(help="image files, or folders of them")],
    *,
    output: Annotated[Path, arg(aliases=["-o"], help="an image file; a folder for several images")],
    model: Model = "photos",
    scale: Annotated[float | None, arg(help="a positive number such as 3.7")] = None,
    size: Annotated[
        Edge | None, arg(help="480x640 (height x width), or the longer side alone: 640")
    ] = None,
    quality: Quality = output_files.QUALITY,
    sampling: Drawn = UPSCALING,
    precision: Annotated[
        Literal["auto", "float32"], arg(help="auto: bfloat16 where it is faster")
    ] = "auto",
) -> None:
    """Enlarge images by any factor or to any size: give --scale or --size.

    Several images keep their names, in the folder --output. Unusable images are named and left out.
    A large TIFF file is written in bands, in little memory, without EXIF or transparency. Rerun the
    same command to resume. Processes that accelerate or torchrun launched each make a share.
    """
    if (scale is None) == (size is None):
        raise InputError("give either --scale, such as 3.7, or --size, such as 480x640")
    pairs = batches.targets(images, output)
    first = pairs[0][1]
    _check_output(output if first == output else first.with_suffix(".png"), quality=quality)
    loaded = ArbitraryScaleModel.load(model).to(pick_device())
    options = {**vars(sampling), "precision": precision}
    facts = loaded.manifest, scale, size, quality, options
    finished = batches.Finished(facts) if first != output else None
    factor = size if scale is None else scale
    rank, ranks = launched()
    share, left_out = pairs[rank::ranks], []
    bar = tqdm(total=len(share), bar_format=BAR, leave=False, disable=rank > 0 or None)
    with store.resumable() if finished else contextlib.nullcontext(), bar:
        for i, (source, target) in enumerate(share):
            if not (finished and finished.holds(source, target)):
                try:
                    low, to_size, exif = _read(source, target, factor, quality)
                except (InputError, FileNotFoundError) as error:
                    if not finished:
                        raise
                    left_out.append(str(source))
                    why = f"{source}: {error}".replace(f"{source} cannot", "cannot")
                    bar.write(f"left out: {why}", file=sys.stderr)
                else:
                    to = target if _is_large(target, to_size) else None

                    def progress(done: int, total: int, before: int = i) -> None:
                        bar.update(before + done / total - bar.n)

                    large = loaded.upscale(low, size=to_size, **options, progress=progress, to=to)
                    if not to:
                        output_files.write_image(large, target, quality, exif)
                    if finished:
                        finished.add(source, target)
                    bar.write("wrote {} ({} x {})".format(target, *to_size))
            bar.update(i + 1 - bar.n)
    wait_for_all()  # a process that fails ends the others
    if left_out:
        raise InputError(f"{len(left_out)} images were left out: {', '.join(left_out[:3])}")


def _read(
    source: Path, target: Path, factor: float | Size, quality: int
) -> tuple[Any, Size, bytes]:
    """Return an image as PIL has it, upright, the size that it is enlarged to, and its EXIF.

    `factor` is a scale, the longer side in pixels (an integer), or the size.
    """
    from arbscale.data.images import open_image, to_upright

    with open_image(source) as opened:
        low, notes = to_upright(opened)
        exif = output_files.kept_exif(opened)
    if isinstance(factor, int):
        factor = factor / max(low.size)
    size = factor if isinstance(factor, tuple) else scaled_size((low.height, low.width), factor)
    _check_output(target, size, quality, MAX_SIDE**2 if _is_large(target, size) else MAX_PIXELS)
    if notes:
        tqdm.write(f"{source}: {'; '.join(notes)}")
    return low, size, exif


def train(words: Positional[tuple[str, ...]]) -> None:
    """Train a preset through its four stages; `train NAME --help` lists every number."""
    from arbscale.training import command

    command.train(command.parse(list(words)))


def convert(
    checkpoint: Annotated[Positional[Path], arg(help="of the paper's code or of CompVis LDM")],
    *,
    config: Annotated[Path, arg(help="its YAML as published")],
    output: Folder,
) -> None:
    """Convert a published checkpoint to a folder that arbscale.load reads."""
    store.check_writable(output / store.MANIFEST)
    print(compat.convert(checkpoint, config, output))


def blend(a: Named, b: Named, *, output: Folder, share: float = 0.5) -> None:
    """Interpolate from the weights of A to those of B, trained on from A; --share is that of B."""
    from arbscale.training import command

    command.blend(a, b, output, share)


def guide(model: Named, weaker: Named, *, output: Folder, weight: float = 2.0) -> None:
    """Let a weaker model guide the sampling of another; a weight of 1 means no guidance."""
    from arbscale.training import command

    command.guide(model, weaker, output, weight)


def check(
    folder: Annotated[Positional[str], arg(help="a folder, or one below ARBSCALE_DATA")],
    *,
    list: Annotated[bool, arg(help="print a line for each file, too")] = False,
) -> None:
    """Read every image below a folder; print what is used, converted, skipped, and why."""
    from arbscale.data import find_folder
    from arbscale.data.folders import check_folder, splits

    report = check_folder(find_folder(folder))
    if list:
        print(report.listing())
    print(report.summary())
    if not report.used:
        raise InputError(f"no image in {report.root} can be used")
    print(f"splits:\n{splits(report.root)}")


def download(
    name: Annotated[Positional[str], arg(help="div2k, afhq or taesd")],
    *,
    output: Annotated[Path | None, arg(aliases=["-o"], help="a folder")] = None,
) -> None:
    """Download a public data set, or TAESD's encoder; finished files are kept.

    Without --output, data go to the folder that ARBSCALE_DATA names, TAESD to ARBSCALE_WEIGHTS.
    """
    from arbscale.data import download as downloads

    with store.resumable("stopped; finished files are kept: rerun the same command for the rest"):
        folders = downloads.download(name, output)
    for folder in folders:
        print(f"{folder} is complete")
    print(downloads.TERMS[name])


def _is_large(path: Path, size: Size) -> bool:
    """Tell whether an image is written as a TIFF file in bands."""
    return path.suffix.lower() in (".tif", ".tiff") and math.prod(size) > LARGE


def _check_output(
    path: Path, size: Size = (1, 1), quality: int = output_files.QUALITY, most: int = MAX_PIXELS
) -> None:
    """Refuse what cannot be written before anything is computed."""
    output_files.check_output(path, _check_size(size, most), quality)


def _check_size(size: Size, most: int = MAX_PIXELS) -> Size:
    """Return the size of an image; InputError for one that no viewer opens."""
    if math.prod(size) > most or max(size) > MAX_SIDE:
        limits = f"{MAX_PIXELS // 10**6} million pixels, or {MAX_SIDE} a side"
        text = "take a smaller scale, or write a .tif, which may have more pixels"
        raise InputError(f"{size[0]} x {size[1]} is over {limits}; {text}")
    return size


def _write(image: Any, path: Path, quality: int = output_files.QUALITY, exif: bytes = b"") -> None:
    output_files.write_image(image, path, quality, exif)
    tqdm.write(f"wrote {path} ({image.height} x {image.width})")  # above a bar


REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _size(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Read a Size as "256" or "75x100" (height x width)."""
    if (get_origin(info.type), get_args(info.type)) != (tuple, (int, int)):
        return None
    return _spec(lambda words: check_size(_edge(words)))


COMMANDS = (
    *(demo, generate, upscale, train, evaluate, table),
    *(check, bench, convert, blend, guide, download, ablate),
)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return 0; what the user can mend is one line and status 2.

    These are InputError, StateError, what the system refuses, and a full memory. Any other error is
    a bug: it propagates, so that Python prints its traceback and exits with 1.
    """
    words = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is escaped
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if words[:1] == ["train"]:  # its own parser knows the named preset's numbers
            train(tuple(words[1:]))
        else:
            tyro.extras.subcommand_cli_from_dict(
                {command.__name__: command for command in COMMANDS},
                prog="python -m arbscale",
                description=__doc__,
                args=words,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
                registry=REGISTRY,
            )
    except KeyboardInterrupt as stop:
        _say(stop.args[0] if stop.args else "stopped")
        return 130
    except (store.InputError, store.StateError, OSError) as error:
        text = str(error) or type(error).__name__
        if "in DataLoader worker process" in text:
            text = text.strip().splitlines()[-1].partition(": ")[2]  # above it is the traceback
        _say(text)
        return 2
    except (MemoryError, RuntimeError) as error:
        told = any(text in str(error) for text in ("out of memory", "can't allocate memory"))
        if not told and not isinstance(error, MemoryError):
            raise
        _say("out of memory; take a smaller size, number or batch")
        return 2
    return 0


def _say(text: str) -> None:
    for bar in list(tqdm._instances):
        bar.close()  # or the text would stand on its line
    print(f"arbscale: {' '.join(text.split())}", file=sys.stderr)


if __name__ == "__main__":
    if callable(signal.getsignal(signal.SIGINT)):  # not where Ctrl-C is ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    if callable(signal.getsignal(signal.SIGINT)):  # from here on nothing is lost
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)
