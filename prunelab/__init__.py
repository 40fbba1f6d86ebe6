"""What both products share: data sets, networks by name, training, run folders, pages.

It knows nothing of pruning, but for how pruned models of transformers are saved.
"""

from typing import TYPE_CHECKING

from sparsemodel._lazy import lazy

if TYPE_CHECKING:
    from prunelab.pretrained import from_pretrained, pretrained_mask, save_pretrained
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {"prunelab.pretrained": "from_pretrained pretrained_mask save_pretrained"},
    )

__all__ = ["from_pretrained", "pretrained_mask", "save_pretrained"]
