"""Pictures of Pillow's as arrays of bytes: upright, opaque, 8 bits a channel."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from prunelab.data.arrays import MOST_CHANNELS, Array, array_of, is_array, note
from prunelab.errors import DataError

GROUND = 128
"""The gray that lies under transparent parts: white and black drawings both stand out on it."""

_TURNED = "pictures were turned upright, as their EXIF orientation says"
_COLOURED = "pictures are gray among coloured ones, and were taken as RGB"
_OPAQUE = f"pictures have transparent parts, which were laid on gray ({GROUND})"


def decoded(
    pictures: Iterable[tuple[str, Any]],
    *,
    where: str,
    resize: tuple[int, int] | None = None,
) -> Array:
    """Pictures of one shape, uint8 [N, C, H, W]; arrays as they are, [N, ...].

    Gray ones (with or without transparency) have one channel, all others are RGB; gray ones among
    others become RGB. The EXIF orientation is applied, transparent parts are laid on GROUND, and of
    an animation the first picture is taken.

    Args:
        pictures: the place of each, such as "row 3", and the bytes of a file, a picture of
            Pillow's, or an array.
        where: what warnings begin with.
        resize: height and width that each is brought to (bilinear, antialiased).

    Raises:
        DataError: no picture, one of more than 8 bits a channel, or shapes or types that differ.
    """
    seen: Counter[str] = Counter()
    sizes: set[tuple[int, ...]] = set()
    arrays: list[Array] = []
    are_pictures = True
    for place, picture in pictures:
        has_numbers = isinstance(picture, list | tuple) or is_array(picture)
        are_pictures = are_pictures and not has_numbers
        array = (
            array_of(picture, "images", place)
            if has_numbers
            else pixels(picture, place=place, seen=seen)
        )
        sizes.add(array.shape[-2:])
        arrays.append(array if resize is None else resized(array, resize, place=place))
        _check_alike(arrays, place, are_pictures=are_pictures)
    if not arrays:
        raise DataError(f"{where}: no samples")
    if resize is not None and len(sizes) > 1:
        # Without a number, so that two sides of one place say the same, which is shown once.
        note(f"{where}: pictures of several sizes were brought to {resize[0]}x{resize[1]}")
    channels = max(len(array) for array in arrays) if are_pictures else 0
    if are_pictures:
        seen[_COLOURED] = sum(len(array) < channels for array in arrays)
        arrays = [np.broadcast_to(array, (channels, *array.shape[1:])) for array in arrays]
    say_seen(seen, where)
    return np.stack(arrays)


def _check_alike(arrays: list[Array], place: str, *, are_pictures: bool) -> None:
    """Refuse the last one, unless it is like the first; pictures may differ in channels."""
    first, last = arrays[0], arrays[-1]
    skip = 1 if are_pictures else 0
    if (last.ndim, last.shape[skip:], last.dtype) != (first.ndim, first.shape[skip:], first.dtype):
        raise DataError(
            f"{place} is {last.dtype} of shape {last.shape}, the first {first.dtype} of "
            f"{first.shape}; all must be alike: bring them to one size by resize=32, for instance "
            "(--resize 32)"
        )


def resized(array: Array, size: tuple[int, int], *, place: str) -> Array:
    """An image [..., H, W] or [H, W, C], uint8 or float, at another size, [..., height, width].

    Raises:
        DataError: it has no height and width.
    """
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "uf":
        raise DataError(
            f"{place} is {array.dtype} of shape {array.shape}; only images of bytes or floats "
            "[C, H, W] or [H, W] can be resized"
        )
    if array.ndim == 3 and array.shape[0] > MOST_CHANNELS >= array.shape[2]:
        array = np.moveaxis(array, 2, 0)
    rows, columns = (_shares(*sides) for sides in zip(array.shape[-2:], size, strict=True))
    found: Array = rows @ array.astype(np.float64) @ columns.T
    if array.dtype == np.uint8:
        # Sums in another order are other bits far behind the point, and must not turn a half.
        found = np.rint(found.round(6)).clip(0, 255)
        return found.astype(np.uint8)
    return found.astype(np.float32)


@lru_cache(maxsize=8)
def _shares(size: int, wanted: int) -> Array:
    """How much of each old pixel a new one takes along one side, float64 [wanted, size].

    A triangle as wide as two new pixels (two old ones, where those are larger), as torch and Pillow
    have it: bilinear with antialiasing.
    """
    scale = size / wanted
    width = max(scale, 1.0)
    centres = (np.arange(wanted)[:, None] + 0.5) * scale
    distances = np.abs(np.arange(size) + 0.5 - centres) / width
    shares = np.maximum(0.0, 1.0 - distances)
    normalised: Array = shares / shares.sum(1, keepdims=True)
    return normalised


def is_picture(value: Any) -> bool:
    """Whether it is a picture of Pillow's."""
    return hasattr(value, "convert") and hasattr(value, "mode")


def pixels(picture: Any, *, place: str, seen: Counter[str]) -> Array:
    """One picture, uint8 [C, H, W]; what was done to it is counted in `seen`.

    Raises:
        DataError: as `decoded`.
    """
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

    if not isinstance(picture, Image.Image):
        if not isinstance(picture, bytes):
            raise DataError(
                f"{place} holds a {type(picture).__name__}, expected the bytes of a picture's "
                "file (paths are not followed); write them into the column"
            )
        try:
            with Image.open(io.BytesIO(picture)) as opened:
                return pixels(opened, place=place, seen=seen)
        except DataError:
            raise
        except UnidentifiedImageError:
            raise DataError(f"{place} is not a picture of a kind that Pillow knows") from None
        except Exception as error:  # whatever Pillow's readers raise on damaged files
            raise DataError(f"{place} is not a picture ({error})") from None
    if picture.mode.startswith(("I", "F")):
        # Pillow would clip such pixels to 255.
        raise DataError(
            f"{place} has more than 8 bits a channel; scale it to 8 bits, or give float arrays"
        )
    array = _opaque(_upright(picture, seen), seen)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def say_seen(seen: Counter[str], where: str) -> None:
    """A line for each thing that was done to pictures."""
    for what, count in (+seen).items():
        note(f"{where}: {count} {what}")


def _upright(picture: Any, seen: Counter[str]) -> Any:
    from PIL import ExifTags, ImageOps  # noqa: PLC0415

    picture.load()
    if picture.getexif().get(ExifTags.Base.Orientation, 1) not in range(2, 9):
        return picture
    seen[_TURNED] += 1
    return ImageOps.exif_transpose(picture)


def _opaque(picture: Any, seen: Counter[str]) -> Array:
    """uint8 [H, W] or [H, W, 3]."""
    mode = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    if not picture.has_transparency_data:
        return np.asarray(picture.convert(mode))
    whole = np.asarray(picture.convert(f"{mode}A")).astype(np.int32)
    colours, alpha = whole[..., :-1], whole[..., -1:]
    if (alpha < 255).any():
        seen[_OPAQUE] += 1
    mixed = (colours * alpha + GROUND * (255 - alpha) + 127) // 255
    return mixed.astype(np.uint8).squeeze(-1) if mode == "L" else mixed.astype(np.uint8)
