"""Sparse models: masks, criteria, truly sparse layers, native training plans, a wire format.

Needs only torch, numpy and safetensors.

>>> import sparsemodel
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
>>> mask = sparsemodel.prune(model, density=0.25)
>>> sparse = sparsemodel.sparsify(model, mask)
>>> path = getfixture("tmp_path") / "tiny.safetensors"
>>> sparsemodel.save(sparse, path)
>>> [(name, p.numel()) for name, p in sparsemodel.load(path, model).named_parameters()]
[('0.weight', 128), ('0.bias', 16), ('2.values', 16), ('2.bias', 4)]
"""

from typing import TYPE_CHECKING

from sparsemodel._lazy import lazy

if TYPE_CHECKING:
    from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLinear
    from sparsemodel.layers.sparsify import densify, mask_of, sparsify
    from sparsemodel.loops.callback import MaskCallback
    from sparsemodel.loops.hold import HeldMask
    from sparsemodel.masks.mask import Mask
    from sparsemodel.masks.prune import prune
    from sparsemodel.optim import SparseAdam, SparseSGD
    from sparsemodel.plans.plan import TrainingPlan
    from sparsemodel.plans.program import program_of
    from sparsemodel.plans.stepper import Stepper
    from sparsemodel.runtime.program import Program
    from sparsemodel.runtime.trainer import Trainer
    from sparsemodel.storage.export import export
    from sparsemodel.storage.models import load, save
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "sparsemodel.layers.linear_and_conv": "SparseConv2d SparseLinear",
            "sparsemodel.layers.sparsify": "densify mask_of sparsify",
            "sparsemodel.loops.callback": "MaskCallback",
            "sparsemodel.loops.hold": "HeldMask",
            "sparsemodel.masks.mask": "Mask",
            "sparsemodel.masks.prune": "prune",
            "sparsemodel.optim": "SparseAdam SparseSGD",
            "sparsemodel.plans.plan": "TrainingPlan",
            "sparsemodel.plans.program": "program_of",
            "sparsemodel.plans.stepper": "Stepper",
            "sparsemodel.runtime.program": "Program",
            "sparsemodel.runtime.trainer": "Trainer",
            "sparsemodel.storage.export": "export",
            "sparsemodel.storage.models": "load save",
        },
    )

__all__ = [
    "HeldMask",
    "Mask",
    "MaskCallback",
    "Program",
    "SparseAdam",
    "SparseConv2d",
    "SparseLinear",
    "SparseSGD",
    "Stepper",
    "Trainer",
    "TrainingPlan",
    "densify",
    "export",
    "load",
    "mask_of",
    "program_of",
    "prune",
    "save",
    "sparsify",
]
