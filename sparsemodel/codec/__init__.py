"""The wire and disk format of masks, changes of masks, states and entries. It needs numpy alone.

FORMAT.md beside this file is its specification.
"""

from sparsemodel.codec.deltas import decode_mask_delta, encode_mask_delta
from sparsemodel.codec.entries import decode_entries, encode_entries
from sparsemodel.codec.entropy import mask_delta_entropy_bytes, mask_entropy_bytes
from sparsemodel.codec.frame import FrameInfo, Kind, Limits, peek
from sparsemodel.codec.masks import decode_mask, encode_mask
from sparsemodel.codec.states import decode_state, encode_state

__all__ = [
    "FrameInfo",
    "Kind",
    "Limits",
    "decode_entries",
    "decode_mask",
    "decode_mask_delta",
    "decode_state",
    "encode_entries",
    "encode_mask",
    "encode_mask_delta",
    "encode_state",
    "mask_delta_entropy_bytes",
    "mask_entropy_bytes",
    "peek",
]
