"""Feed mutated image files to the readers: `python tests/data/fuzz_images.py --number 2000`.

Case i of a seed is always the same file. Whatever it holds, `load_image` gives an image or one of
its two documented errors, `ImageFolder` goes on with what is readable, `check_file` says the
same, and nothing takes longer than `SECONDS`. After a failure, a crash or a hang (which ends the
run, with a trace) the files stay in the temporary folder. What libtiff prints is its own. The files
are mutations of `image_formats.cases`, whose references `test_pixels.py` checks, and of others.
"""

import argparse
import collections
import faulthandler
import io
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from image_formats import cases
from PIL import Image
from tqdm import tqdm

from arbscale.data import ImageFolder, load_image
from arbscale.data.folders import check_file

SECONDS = 60  # of one group of files; far above what any needs
GROUP = 50
ENDINGS = {"JPEG": "jpg", "TIFF": "tif"}


def originals() -> list[tuple[str, bytes]]:
    """Return small valid files of every format, many modes and options, with their endings."""
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    rgba = Image.fromarray(small).resize((61, 47), Image.Resampling.BICUBIC)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    made = [
        (rgb, "JPEG", {"exif": exif, "quality": 90}),
        (rgb, "JPEG", {"progressive": True, "icc_profile": bytes(300)}),
        (grey, "JPEG", {}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {"exif": exif}),
        (rgba, "PNG", {}),
        (deep, "PNG", {}),
        (rgb.quantize(16), "PNG", {"transparency": 3}),
        (rgb, "PNG", frames),
        (rgb, "GIF", frames),
        (grey, "GIF", {"transparency": 7}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (rgba, "TIFF", {"compression": "tiff_deflate", "exif": exif}),
        (deep, "TIFF", frames | {"append_images": [deep]}),
        (rgb.convert("CMYK"), "TIFF", {"compression": "packbits"}),
        (grey.convert("1"), "TIFF", {"compression": "group4"}),
        (rgb, "WEBP", {"quality": 80}),
        (rgba, "WEBP", {"lossless": True, "exif": exif}),
        (rgb, "WEBP", frames),
        (rgb, "BMP", {}),
        (rgb.quantize(8), "BMP", {}),
        (rgb, "PPM", {}),
    ]
    files = []
    for image, kind, options in made:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append((ENDINGS.get(kind, "png" if kind == "PPM" else kind.lower()), buffer))
    for name, case in cases().items():
        ending = name.rpartition(".")[2]
        files.append((ending if ending[0] != "p" else "png", io.BytesIO(case.data)))
    return [(ending, buffer.getvalue()) for ending, buffer in files]


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """Return a damaged copy: bits flipped, bytes or words set, cut, a stretch moved or repeated."""
    damaged = bytearray(data)
    for _ in range(generator.integers(1, 5)):
        header = generator.random() < 0.5  # half of the damage goes where the structure is
        end = min(len(damaged), 200) if header else len(damaged)
        place = int(generator.integers(max(1, end)))
        kind = generator.integers(6)
        if kind == 0:
            damaged[place : place + 1] = bytes([int(generator.integers(256))])
        elif kind == 1:
            for _ in range(generator.integers(1, 20)):
                damaged[int(generator.integers(len(damaged)))] ^= 1 << int(generator.integers(8))
        elif kind == 2:
            extreme = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
            damaged[place : place + 4] = extreme[generator.integers(4)]
        elif kind == 3:
            del damaged[max(1, place) :]
        elif kind == 4:
            del damaged[place : place + int(generator.integers(1, 40))]
        else:
            stretch = damaged[place : place + int(generator.integers(1, 400))]
            other = int(generator.integers(len(damaged)))
            damaged[other:other] = stretch
        if not damaged:
            break
    return bytes(damaged)


def fuzz(number: int, seed: int, folder: Path) -> collections.Counter:
    """Run `number` cases and count their outcomes; AssertionError or a stray error ends it."""
    files, outcomes = originals(), collections.Counter()
    for first in tqdm(range(0, number, GROUP), unit="group", disable=number <= GROUP):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        readable = set()
        for i in range(first, min(first + GROUP, number)):
            generator = np.random.default_rng((seed, i))
            ending, data = files[i % len(files)]
            path = folder / f"{i:06d}.{ending}"
            path.write_bytes(mutate(data, generator))
            outcome = read(path)
            outcomes[outcome] += 1
            if outcome == "read":
                readable.add(path.name)
        reports = [check_file(folder, path.name) for path in folder.iterdir()]
        usable = {report.name for report in reports if not report.problem}
        assert usable == readable, f"seed {seed}, from {first}: {usable ^ readable}"
        if readable:
            read_folder(folder, len(readable))
        faulthandler.cancel_dump_traceback_later()
    return outcomes


def read(path: Path) -> str:
    """Return "read", or the kind of error below the documented one."""
    try:
        image = load_image(path)
    except ValueError as error:
        assert str(path) in str(error), f"{path}: {error} does not name the file"
        assert not isinstance(error.__cause__, MemoryError), path
        return type(error.__cause__).__name__
    assert image.shape[0] == 3 and image.numel() and bool((image.abs() <= 1).all()), path
    return "read"


def read_folder(folder: Path, count: int) -> None:
    """Go through a folder as training does: every item is an image, every bad file counted."""
    images = ImageFolder(folder, substitute=True)
    assert all(images[i].shape[0] == 3 for i in range(len(images)))
    assert len(images.skipped) + count == len(list(folder.iterdir())), folder


def main() -> None:
    """Run, and print what became of the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=2000, help="of mutated files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # PIL's, and ours about each file
    folder = Path(tempfile.mkdtemp()) / "files"
    outcomes = fuzz(args.number, args.seed, folder)
    for outcome, count in outcomes.most_common():
        print(f"{count:6} {outcome}")
    print(f"{args.number} files, seed {args.seed}: no unhandled exception; Pillow", end=" ")
    print(sys.modules["PIL"].__version__)
    shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
