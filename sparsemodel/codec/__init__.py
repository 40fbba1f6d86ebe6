"""The wire and disk format of masks, changes of masks and sparse tensors.

FORMAT.md beside this file is its specification.
"""

from sparsemodel.codec.deltas import decode_mask_delta, encode_mask_delta
from sparsemodel.codec.entries import decode_entries, encode_entries
from sparsemodel.codec.entropy import mask_delta_entropy_bytes, mask_entropy_bytes
from sparsemodel.codec.frame import FrameInfo, Kind, Limits, peek
from sparsemodel.codec.masks import decode_mask, encode_mask
from sparsemodel.codec.tensors import decode_tensors, decode_values, encode_tensors

__all__ = [
    "FrameInfo",
    "Kind",
    "Limits",
    "decode_entries",
    "decode_mask",
    "decode_mask_delta",
    "decode_tensors",
    "decode_values",
    "encode_entries",
    "encode_mask",
    "encode_mask_delta",
    "encode_tensors",
    "mask_delta_entropy_bytes",
    "mask_entropy_bytes",
    "peek",
]
