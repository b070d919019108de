"""Small image files of rare kinds, written byte by byte, and what their pixels must be read as."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, PngImagePlugin

RNG = np.random.default_rng(7)
HEIGHT, WIDTH = 6, 10
GREY = RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(RGB[:3, :4]).resize((WIDTH, HEIGHT), 3))


@dataclass(frozen=True)
class Case:
    """A file, and what it is: colours (H, W, 3) or None for a refusal, alpha, and a word of it."""

    data: bytes
    rgb: np.ndarray | None
    note: str = ""
    alpha: np.ndarray | None = None
    off: float = 1.01  # levels of 255


def tiff(
    pixels, bits=None, photometric=None, planar=1, kind=1, order="<", compressed=False, tags=()
):
    """Return a TIFF of one strip, or of one per plane; `kind` is the SampleFormat."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    bits = bits or pixels.dtype.itemsize * 8
    layers = [pixels] if planar == 1 else [pixels[..., i] for i in range(channels)]
    strips = [np.ascontiguousarray(x).astype(x.dtype.newbyteorder(order)).tobytes() for x in layers]
    if bits == 12:
        text = "".join(f"{v:012b}" for v in pixels.ravel())
        strips = [int(text, 2).to_bytes(len(text) // 8, "big")]
    if compressed:
        strips = [zlib.compress(x) for x in strips]
    photometric = (1 if channels == 1 else 2) if photometric is None else photometric
    entries = {
        256: (4, [pixels.shape[1]]),
        257: (4, [pixels.shape[0]]),
        258: (3, [bits] * channels),
    }
    entries |= {259: (3, [8 if compressed else 1]), 262: (3, [photometric]), 273: (4, None)}
    entries |= {
        277: (3, [channels]),
        278: (4, [pixels.shape[0]]),
        279: (4, [len(x) for x in strips]),
    }
    entries |= {284: (3, [planar]), 339: (3, [kind] * channels), **dict(tags)}
    base = 8 + 2 + 12 * len(entries) + 4
    extra, place = b"", {}
    start = base + 8 * 16  # room for what does not fit into an entry
    at = [start + sum(map(len, strips[:i])) for i in range(len(strips))]
    entries[273] = (4, at)
    body = b""
    for tag, (type_, values) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}{'HI'[type_ == 4]}", *values)
        if len(packed) > 4:
            place[tag] = base + len(extra)
            extra += packed
            packed = struct.pack(order + "I", place[tag])
        body += struct.pack(order + "HHI", tag, type_, len(values)) + packed.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    head += struct.pack(order + "H", len(entries)) + body + bytes(4) + extra
    assert len(head) <= start
    return head.ljust(start, b"\0") + b"".join(strips)


def chunk(kind, body):
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows, depth, colour, before=b"", after=b""):
    """Return a PNG of packed rows (bytes each); colour 0 is grey, 2 RGB, 3 a palette."""
    head = struct.pack(">IIBBBBB", WIDTH, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + before
        + chunk(b"IDAT", pixels)
        + after
        + chunk(b"IEND", b"")
    )


# Colour profiles

BRADFORD = {  # primaries as XYZ under D50, in columns red, green, blue
    "sRGB": [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]],
    "Adobe": [
        [0.60974, 0.20528, 0.14919],
        [0.31111, 0.62567, 0.06322],
        [0.01947, 0.06087, 0.74457],
    ],
    "P3": [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]],
}
GAMMA = 563 / 256  # of Adobe RGB (1998)


def profile(name, grey=False):
    """Return an ICC profile of version 2: three primaries and a gamma, or grey and a gamma."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256)) + b"\0\0"
    text = name.encode() + b"\0"
    said = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(4 + 4 + 2 + 1 + 67)
    tags = {b"desc": said, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz((0.9642, 1.0, 0.8249))}
    if grey:
        tags[b"kTRC"] = curve
    else:
        columns = np.array(BRADFORD[name]).T
        tags |= {
            bytes([c]) + b"XYZ": xyz(column) for c, column in zip(b"rgb", columns, strict=True)
        }
        tags |= {bytes([c]) + b"TRC": curve for c in b"rgb"}
    at, index, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        content = content.ljust(-(-len(content) // 4) * 4, b"\0")
        index += tag + struct.pack(">II", at + len(body), len(content))
        body += content
    space = b"GRAY" if grey else b"RGB "
    head = bytes(4) + b"lcms\x02\x40\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    head = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body
    return struct.pack(">I", len(head)) + head[4:]


def srgb(linear):
    """Return linear light as levels of sRGB, 0 to 255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def from_profile(levels, name):
    """Return levels (H, W, 3) in a profile's space as levels of sRGB, by its definition."""
    matrix = np.linalg.inv(BRADFORD["sRGB"]) @ BRADFORD[name]
    return srgb((levels / 255) ** GAMMA @ matrix.T)


def from_lab(lab):
    """Return L* (0 to 100), a*, b* (H, W, 3) under D50 as levels of sRGB."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1, 0.8249)
    return srgb(xyz @ np.linalg.inv(BRADFORD["sRGB"]).T)


def encoded(image, kind, **options):
    """Return a file that PIL writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(kind, orientation, pixels=RGB, **options):
    """Return a file whose tag tells how to turn it to see `pixels`."""
    turned = pixels.transpose(1, 0, 2)
    laid = {  # how the stored rows lie, for each orientation
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: turned,
        6: turned[::-1],
        7: turned[::-1, ::-1],
        8: turned[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(np.ascontiguousarray(laid)), kind, exif=exif, **options)


def grey(levels):
    """Return grey levels (H, W) as (H, W, 3)."""
    return np.repeat(np.asarray(levels, float)[..., None], 3, -1)


def packed(levels, bits):
    """Return rows of levels as bytes, `bits` each."""
    return [np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:]).tobytes() for row in levels]


def cases():
    """Return files by name, each with its reference."""
    deep, deep_rgb = GREY.astype("uint16") * 257, RGB.astype("uint16") * 257
    clear = np.where(GREY == GREY[2, 3], 0, 255)
    two = GREY >> 6
    lab = np.stack([GREY, RGB[..., 0] // 8, RGB[..., 1] // 8], -1).astype("uint8")
    lab_values = lab * np.array([100 / 255, 1, 1])
    adobe, display = ({"icc_profile": profile(name)} for name in ("Adobe", "P3"))
    smooth = Image.fromarray(SMOOTH)
    rgba = np.dstack([RGB, GREY])
    on_black = (255 - RGB.astype(float)) * (255 - GREY[..., None].astype(float)) / 255
    smooth_ink = np.dstack([SMOOTH, SMOOTH[..., 0]])
    straight = {338: (3, [2])}  # ExtraSamples: alpha that is not multiplied into the colours
    under = (RGB.astype(int) * (GREY | 128)[..., None] + 127) // 255
    indexed = Image.fromarray(GREY % 60)
    indexed.putpalette(RGB.tobytes())
    wide = PngImagePlugin.PngInfo()
    wide.add_text("long", "x" * (3 << 20), zip=True)
    late = chunk(b"zTXt", b"long\0\0" + zlib.compress(bytes(3 << 20)))
    large_profile = chunk(b"iCCP", b"large\0\0" + zlib.compress(bytes(3 << 20)))
    deep_rows = (RGB.reshape(HEIGHT, -1).astype("uint16") * 257).astype(">u2")
    first = struct.pack(">3H", *deep_rows[0, :3])
    once = np.where((RGB == RGB[0, 0]).all(-1), 0, 255)
    bit = GREY >> 7
    rows = [row.tobytes() for row in RGB]
    deep_rgba = [row.astype(">u2").tobytes() for row in rgba.astype("uint16") * 257]
    deep_pair = np.stack([deep, deep[::-1]], -1).astype(">u2")
    palette = chunk(b"PLTE", RGB[0, :4].tobytes()) + chunk(b"tRNS", bytes((0, 85, 170)))
    made = {
        "16-rgba.png": Case(png(deep_rgba, 16, 6), RGB, "transparency", GREY),
        "16-grey-alpha.png": Case(
            png([row.tobytes() for row in deep_pair], 16, 4),
            grey(GREY),
            "transparency",
            GREY[::-1],
        ),
        "8-rgb-trns.png": Case(
            png(rows, 8, 2, chunk(b"tRNS", struct.pack(">3H", *RGB[0, 0]))),
            RGB,
            "transparency",
            once,
        ),
        "palette-trns.png": Case(
            png(packed(two, 2), 2, 3, palette),
            RGB[0, :4][two],
            "transparency",
            np.array((0, 85, 170, 255))[two],
        ),
        "16-grey.png": Case(encoded(Image.fromarray(deep), "PNG"), grey(GREY), "16 bits"),
        "16-grey-trns.png": Case(
            png(
                [row.tobytes() for row in deep.astype(">u2")],
                16,
                0,
                chunk(b"tRNS", deep[2, 3].astype(">u2").tobytes()),
            ),
            grey(GREY),
            "transparency",
            clear,
        ),
        "16-rgb-trns.png": Case(
            png([row.tobytes() for row in deep_rows], 16, 2, chunk(b"tRNS", first)),
            RGB,
            "transparency",
            once,
        ),
        "2-grey-trns.png": Case(
            png(packed(two, 2), 2, 0, chunk(b"tRNS", b"\0\1")),
            grey(two * 85),
            "transparency",
            np.where(two == 1, 0, 255),
        ),
        "1-grey-trns.png": Case(
            png(packed(bit, 1), 1, 0, chunk(b"tRNS", b"\0\1")),
            grey(bit * 255),
            "transparency",
            np.where(bit == 1, 0, 255),
        ),
        "alpha.png": Case(encoded(Image.fromarray(rgba), "PNG"), RGB, "transparency", GREY),
        "alpha.webp": Case(
            encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
            RGB,
            "transparency",
            GREY,
        ),
        "text.png": Case(encoded(Image.fromarray(RGB), "PNG", pnginfo=wide), RGB, "1 MB"),
        "late-text.png": Case(png([r.tobytes() for r in RGB], 8, 2, after=late), RGB, "1 MB"),
        "text-and-profile.png": Case(
            encoded(smooth, "PNG", pnginfo=wide, **adobe),
            from_profile(SMOOTH, "Adobe"),
            "profile",
            off=2,
        ),
        "large-profile.png": Case(
            png([r.tobytes() for r in RGB], 8, 2, large_profile), RGB, "1 MB"
        ),
        "linear.png": Case(
            png([r.tobytes() for r in RGB], 8, 2, chunk(b"gAMA", struct.pack(">I", 100_000))),
            RGB,
            "gamma",
        ),
        "12-grey.tif": Case(tiff(deep >> 4, bits=12), grey(GREY), "12 bits"),
        "16-rgb.tif": Case(tiff(deep_rgb), RGB, "16 bits"),
        "16-rgb-big.tif": Case(tiff(deep_rgb, order=">"), RGB, "16 bits"),
        "8-planes.tif": Case(tiff(RGB, planar=2), RGB),
        "16-planes.tif": Case(tiff(deep_rgb, planar=2), None, "planes"),
        "16-planes-deflate.tif": Case(tiff(deep_rgb, planar=2, compressed=True), None, "planes"),
        "32-grey.tif": Case(tiff(GREY.astype("uint32")), None, "16 bits"),
        "32-signed.tif": Case(tiff(GREY.astype("int32"), kind=2), None, "16 bits"),
        "16-signed.tif": Case(tiff(GREY.astype("int16"), kind=2), None, "signed"),
        "8-signed.tif": Case(tiff(GREY.view("int8"), kind=2), None, "signed"),
        "float.tif": Case(tiff(GREY.astype("float32"), kind=3), None, "floats"),
        "lab.tif": Case(tiff(lab, photometric=8), from_lab(lab_values), "LAB", off=3),
        "cmyk.tif": Case(tiff(rgba, photometric=5), on_black, "CMYK", off=1.6),
        "16-cmyk.tif": Case(
            tiff(rgba.astype("uint16") * 257, photometric=5), on_black, "CMYK", off=1.6
        ),
        "cmyk.jpg": Case(
            encoded(Image.fromarray(smooth_ink, "CMYK"), "JPEG", quality=100, subsampling=0),
            (255 - SMOOTH.astype(float)) * (255 - SMOOTH[..., :1].astype(float)) / 255,
            "CMYK",
            off=3,
        ),
        "alpha.tif": Case(tiff(rgba, tags=straight), RGB, "transparency", GREY),
        "16-rgba.tif": Case(
            tiff(rgba.astype("uint16") * 257, tags=straight), RGB, "transparency", GREY
        ),
        "premultiplied.tif": Case(
            tiff(np.dstack([under, GREY | 128]).astype("uint8"), tags={338: (3, [1])}),
            RGB,
            "transparency",
            GREY | 128,
            off=2.01,
        ),
        "palette.tif": Case(encoded(indexed, "TIFF"), RGB.reshape(-1, 3)[GREY % 60], "palette"),
        "16-grey.pgm": Case(b"P5 10 6 65535\n" + deep.astype(">u2").tobytes(), grey(GREY), "16 b"),
        "10-grey.pgm": Case(
            b"P5 10 6 1023\n" + (GREY.astype("uint16") * 4).astype(">u2").tobytes(),
            grey(GREY * 1020.0 / 1023),
            "16 bits",
        ),
        "16-rgb.ppm": Case(b"P6 10 6 65535\n" + deep_rgb.astype(">u2").tobytes(), RGB, "16 bits"),
        "adobe.jpg": Case(
            encoded(smooth, "JPEG", quality=100, subsampling=0, **adobe),
            from_profile(SMOOTH, "Adobe"),
            "'Adobe', to sRGB",
            off=8,
        ),
        "adobe.png": Case(
            encoded(smooth, "PNG", **adobe), from_profile(SMOOTH, "Adobe"), "profile", off=2
        ),
        "p3-alpha.png": Case(
            encoded(Image.fromarray(np.dstack([SMOOTH, GREY])), "PNG", **display),
            from_profile(SMOOTH, "P3"),
            "profile",
            GREY,
            off=2,
        ),
        "p3.tif": Case(
            encoded(smooth, "TIFF", **display), from_profile(SMOOTH, "P3"), "profile", off=2
        ),
        "grey-profile.png": Case(
            encoded(Image.fromarray(GREY), "PNG", icc_profile=profile("dot gain", grey=True)),
            grey(srgb((GREY / 255) ** GAMMA)),
            "profile",
            off=2,
        ),
        "16-grey-profile.png": Case(
            encoded(Image.fromarray(deep), "PNG", icc_profile=profile("dot gain", grey=True)),
            grey(srgb((GREY / 255) ** GAMMA)),
            "profile",
            off=2,
        ),
        "damaged-profile.png": Case(
            encoded(Image.fromarray(RGB), "PNG", icc_profile=profile("P3")[:200]), RGB, "ignored"
        ),
        "grey-profile-on-rgb.png": Case(
            encoded(Image.fromarray(RGB), "PNG", icc_profile=profile("g", grey=True)),
            RGB,
            "ignored",
        ),
    }
    for compressed in (False, True):
        ending = "-deflate.tif" if compressed else ".tif"
        for bits in (8, 16):
            data = tiff(
                255 - GREY if bits == 8 else 65535 - deep, photometric=0, compressed=compressed
            )
            made[f"{bits}-white-is-zero{ending}"] = Case(
                data, grey(GREY), "grey" if bits == 8 else "16"
            )
        made[f"16-black-is-zero{ending}"] = Case(
            tiff(deep, compressed=compressed), grey(GREY), "16"
        )
    for i in range(1, 9):
        for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
            note = "EXIF" if i > 1 else ""
            made[f"orientation-{i}.{kind.lower()}"] = Case(oriented(kind, i, **options), RGB, note)
        data = oriented("JPEG", i, SMOOTH, quality=100, subsampling=0)
        made[f"orientation-{i}.jpg"] = Case(data, SMOOTH, note, off=8)
    return made
