"""Every upload becomes an upright RGB picture or one line that says why not."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from typing import Any

import pytest
from modeldemo.engine import BadRequest
from modeldemo.images import MAX_BYTES, MAX_PIXELS, MAX_SIDE, TooLarge, decode, decode_url
from PIL import Image

RED = (214, 38, 44)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(color: Any = RED, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> bytes:
    return encoded(Image.new(mode, size, color), "PNG")


def near(pixel: Any, color: tuple[int, int, int]) -> bool:
    return all(abs(a - b) <= 6 for a, b in zip(pixel, color, strict=True))


def refusal(data: bytes) -> str:
    with pytest.raises(BadRequest) as refused:
        decode(data)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 250
    return message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO"])
def test_every_common_format_is_read(kind: str) -> None:
    image = decode(encoded(Image.new("RGB", (40, 30), RED), kind))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert near(image.getpixel((20, 15)), RED)


@pytest.mark.parametrize(
    ("mode", "clear", "half"),
    [("RGBA", (*RED, 0), (0, 0, 0, 128)), ("LA", (0, 0), (0, 128))],
)
def test_transparency_is_laid_on_white(mode: str, clear: Any, half: Any) -> None:
    assert decode(png(clear, mode)).getpixel((0, 0)) == (255, 255, 255)
    assert near(decode(png(half, mode)).getpixel((0, 0)), (127, 127, 127))


def test_a_palette_keeps_its_colors_and_its_transparency() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        plain = decode(encoded(image, kind))
        assert plain.getpixel((0, 0)) == (0, 0, 0)
        assert plain.getpixel((2, 2)) == RED
        clear = decode(encoded(image, kind, transparency=0))
        assert clear.getpixel((0, 0)) == (255, 255, 255)
        assert clear.getpixel((2, 2)) == RED


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_black_and_white_become_rgb(mode: str) -> None:
    assert decode(png(255, mode)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(png(0, mode)).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    for value, shown in ((0, 0), (257 * 100, 100), (65535, 255)):
        data = encoded(Image.new("I;16", (4, 4), value), kind)
        assert decode(data).getpixel((0, 0)) == (shown,) * 3


def test_floating_point_grey_spans_black_to_white() -> None:
    image = Image.new("F", (2, 1), -3.0)
    image.putpixel((1, 0), 5.0)
    shown = decode(encoded(image, "TIFF"))
    assert shown.getpixel((0, 0)) == (0, 0, 0)
    assert shown.getpixel((1, 0)) == (255, 255, 255)


def test_cmyk_is_not_shown_inverted() -> None:
    paper = decode(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert near(paper.getpixel((4, 4)), (255, 255, 255))
    ink = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert near(ink.getpixel((4, 4)), (255, 0, 0))


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[274] = 6  # turn by 90° clockwise to see it upright
    upright = decode(encoded(image, "JPEG", exif=exif))
    assert upright.size == (20, 40)
    assert near(upright.getpixel((10, 5)), RED)
    assert near(upright.getpixel((10, 35)), (255, 255, 255))


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = encoded(Image.new("RGB", (40, 30), RED), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    assert decode(data).size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), "blue")
    data = encoded(first, kind, save_all=True, append_images=[second])
    assert near(decode(data).getpixel((8, 8)), RED)


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("RGB", "PNG"), ("I;16", "PNG")])
def test_long_sides_are_reduced(mode: str, kind: str) -> None:
    image = decode(encoded(Image.new(mode, (MAX_SIDE + 904, 100)), kind))
    assert image.mode == "RGB"
    assert image.width <= MAX_SIDE
    assert image.width / image.height == pytest.approx((MAX_SIDE + 904) / 100, rel=0.1)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims width × height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (30_000, 30_000), (2**31 - 1, 2)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(TooLarge, match=f"limit of {MAX_PIXELS // 10**6} million pixels"):
        decode(bomb(width, height))


def test_a_file_over_the_byte_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(TooLarge, match=r"20\.0 MiB, the limit is 20 MiB"):
        decode(b"\xff" * (MAX_BYTES + 1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_cut_off_anywhere_is_refused(kind: str) -> None:
    noise = Image.frombytes("RGB", (60, 40), random.Random(7).randbytes(60 * 40 * 3))
    whole = encoded(noise, kind)
    for share in (0.3, 0.6, 0.9):
        refusal(whole[: int(len(whole) * share)])
    assert "cut off" in refusal(encoded(noise, "PNG")[:4000])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not a picture at all", "not a picture"),
        (b"<html><body>404</body></html>", "markup"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "markup"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a picture"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(data: bytes, reason: str) -> None:
    message = refusal(data)
    assert reason in message
    assert "JPEG, PNG" in message


def test_random_damage_gives_a_picture_or_one_line_and_nothing_else() -> None:
    rng = random.Random(1)
    noise = Image.frombytes("RGB", (32, 32), rng.randbytes(32 * 32 * 3))
    files = [encoded(noise, k) for k in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")]
    refusals = []
    for _ in range(700):
        data = bytearray(rng.choice(files))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            image = decode(bytes(data))
        except BadRequest as error:
            refusals.append(str(error))
        else:
            assert image.mode == "RGB"
    assert len(refusals) > 50
    assert not any("\n" in line for line in refusals)


def test_data_urls_and_bare_base64_are_read() -> None:
    data = png()
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[i : i + 20] for i in range(0, len(text), 20))
    percent = "data:image/png," + "".join(f"%{byte:02X}" for byte in data)
    for url in (
        f"data:image/png;base64,{text}",
        f"data:image/jpeg;base64,{text}",  # the content decides, not the label
        f"DATA:;charset=x;BASE64,{wrapped}",
        f"data:image/png;base64,{text.rstrip('=')}",
        f"data:image/png;base64,{text.replace('+', '%2B').replace('/', '%2F')}",
        percent,
        text,
    ):
        assert decode_url(url).getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    "url",
    ["http://example.org/a.png", "https://example.org/a.png", "file:///etc/passwd", "ftp://x"],
)
def test_addresses_are_refused_because_the_server_fetches_nothing(url: str) -> None:
    with pytest.raises(BadRequest, match="fetches nothing; send the picture itself as data:"):
        decode_url(url)


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:image/png;base64,%%%%", "@@@", ""])
def test_broken_data_urls_are_refused_in_one_line(url: str) -> None:
    with pytest.raises(BadRequest) as refused:
        decode_url(url)
    assert "\n" not in str(refused.value)
