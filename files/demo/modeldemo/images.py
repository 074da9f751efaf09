"""Turns untrusted uploads into RGB pictures, or into one line that says what is wrong with them."""

from __future__ import annotations

import base64
import binascii
import io
import re
import urllib.parse
import warnings
from typing import cast

from PIL import Image, ImageOps

from modeldemo.engine import BadRequest

MAX_BYTES = 20 * 1024 * 1024  # of the file
MAX_PIXELS = 64_000_000  # width times height, read from the header before any decoding
# Longer sides are reduced: the models see 224 pixels, and pictures wait in memory for their turn.
MAX_SIDE = 4096
SIDE_OF_SEVERAL = 1448  # of a conversation with up to eight pictures: together as large as one

# No format that runs another program (EPS) or holds a whole document (PDF, PSD).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # JPEG: MPO too
WANTED = "send a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF picture"

# Pillow warns of bombs and of odd EXIF by printing source lines; what matters is raised below.
warnings.filterwarnings("ignore", module="PIL")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class TooLarge(BadRequest):
    """An upload over a limit of this server."""


def decode(data: bytes, side: int = MAX_SIDE) -> Image.Image:
    """Decode a picture file into an upright RGB image of at most side × side pixels.

    Transparency is laid on white, animations give their first frame, 16-bit grey is scaled to 8.
    Raises TooLarge for a file over MAX_BYTES or MAX_PIXELS, BadRequest for anything else that is
    not a whole picture.
    """
    if not data:
        raise BadRequest(f"the picture is empty (0 bytes); {WANTED}")
    if len(data) > MAX_BYTES:
        raise TooLarge(
            f"the picture has {len(data) / 2**20:.1f} MiB, "
            f"the limit is {MAX_BYTES // 2**20} MiB; send a smaller one"
        )
    # Pillow's decoders raise almost anything for broken files, so each step catches everything.
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooLarge(_pixels("the picture")) from None
    except Exception:
        raise BadRequest(_not_a_picture(data)) from None
    if image.width * image.height > MAX_PIXELS:
        raise TooLarge(_pixels(f"the picture has {image.width} × {image.height} pixels and"))
    try:
        image.draft(None, (side, side))  # JPEG only: decodes large pictures reduced
        image.load()
        image = _upright(image)
        if max(image.size) > side:
            image.thumbnail((side, side))
        return _rgb(image)
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise BadRequest(
            f"the {image.format or 'picture'} file is damaged or cut off ({reason}); "
            "save it again and send it whole"
        ) from None


def decode_url(url: str, side: int = MAX_SIDE) -> Image.Image:
    """Decode a `data:` URL, or the bare base64 of a picture file.

    Raises BadRequest for an address: the server fetches nothing.
    """
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", url)
    if scheme and scheme[1].lower() != "data":
        raise BadRequest(
            f"image_url is a {scheme[1].lower()}: address and this server fetches nothing; "
            "send the picture itself as data:image/png;base64,..."
        )
    header, comma, payload = url.partition(",") if scheme else ("data:;base64", ",", url)
    if not comma:
        raise BadRequest("image_url has no comma; write data:image/png;base64,...")
    if len(payload) > 2 * MAX_BYTES:
        raise TooLarge(f"the picture is over the limit of {MAX_BYTES // 2**20} MiB; send less")
    raw = urllib.parse.unquote_to_bytes(payload)
    if not header.rstrip().lower().endswith(";base64"):
        return decode(raw, side)
    raw = b"".join(raw.split())
    try:
        # Many writers leave the padding out.
        data = base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except binascii.Error:
        raise BadRequest(
            "image_url holds no valid base64; write data:image/png;base64,..."
        ) from None
    return decode(data, side)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Broken EXIF around a sound picture: its pixels are still worth an answer.
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode in ("I", "F"):  # 32-bit grey has no fixed white
        low, high = cast("tuple[float, float]", image.getextrema())
        scale = 255 / (high - low) if high > low else 0.0
        image = image.point(lambda value: value * scale + (-low * scale)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _pixels(subject: str) -> str:
    return f"{subject} is over the limit of {MAX_PIXELS // 10**6} million pixels; send less"


def _not_a_picture(data: bytes) -> str:
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return f"HEIC pictures cannot be read here; {WANTED}"
    if data.lstrip()[:5].lower() in (b"<?xml", b"<svg ", b"<!doc", b"<html"):
        return f"the upload is markup (SVG or HTML), not pixels; {WANTED}"
    return f"the upload is not a picture; {WANTED}"
