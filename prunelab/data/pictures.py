"""Pictures of Pillow's as arrays of bytes: upright, opaque, 8 bits a channel."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from prunelab.data.checked import Array, note
from prunelab.errors import DataError

GROUND = 128
"""The gray that lies under transparent parts: white and black drawings both stand out on it."""

_TURNED = "pictures were turned upright, as their EXIF orientation says"
_COLOURED = "pictures are gray among coloured ones, and were taken as RGB"
_OPAQUE = f"pictures have transparent parts, which were laid on gray ({GROUND})"


def decoded(pictures: Iterable[tuple[str, Any]], *, where: str) -> Array:
    """Pictures of one shape, uint8 [N, C, H, W].

    Gray ones (with or without transparency) have one channel, all others are RGB; gray ones among
    others become RGB. The EXIF orientation is applied, transparent parts are laid on GROUND, and of
    an animation the first picture is taken.

    Args:
        pictures: the place of each, such as "row 3", and the bytes of a file or a picture of
            Pillow's.
        where: what warnings begin with.

    Raises:
        DataError: no picture, one of more than 8 bits a channel, or shapes that differ.
    """
    seen: Counter[str] = Counter()
    arrays: list[Array] = []
    for place, picture in pictures:
        array = pixels(picture, place=place, seen=seen)
        if arrays and array.shape[1:] != arrays[0].shape[1:]:
            raise DataError(
                f"the picture of {place} has shape {array.shape}, the first {arrays[0].shape}; "
                "all must be alike: bring them to one size"
            )
        arrays.append(array)
    channels = max(map(len, arrays))
    seen[_COLOURED] = sum(len(array) < channels for array in arrays)
    say_seen(seen, where)
    return np.stack([np.broadcast_to(array, (channels, *array.shape[1:])) for array in arrays])


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
