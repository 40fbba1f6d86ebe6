"""Little networks as programs and states, for the tests of the runtime."""

import numpy as np
from little_networks import pooled, random_mask
from plan_networks import NETWORKS, network
from torch import nn

from sparsemodel.masks.mask import Mask
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState

SHAPES = {**dict.fromkeys(NETWORKS, (3, 16, 16)), "pooled": (3, 9, 11)}


def masked(name: str, density: float = 0.3, seed: int = 1) -> tuple[nn.Module, Mask]:
    """A masked dense network; in larger ones neither stem nor classifier are in the mask."""
    model = pooled() if name == "pooled" else network(name)
    mask = random_mask(model, density, seed)
    some = {n: p for n, p in mask.items() if not n.endswith(("conv1.weight", "fc.weight"))}
    mask = Mask(some if len(some) > 4 else dict(mask.items()))
    mask.apply(model)
    return model, mask


def state_of(model: nn.Module, mask: Mask | None) -> SparseState:
    """The state of a masked dense model, in arrays of its own."""
    patterns = None if mask is None else mask.csr()
    values = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            array = tensor.numpy()
            if patterns is not None and name in patterns:
                array = array.reshape(-1)[patterns[name].positions()]
            values[name] = np.array(array)
    return SparseState(values, patterns)


def described(name: str, density: float = 0.3) -> tuple[Program, SparseState]:
    """The program of a network and its state."""
    model, mask = masked(name, density)
    return program_of(model, SHAPES[name]), state_of(model, mask)


def samples(size: int, seed: int = 0, shape: tuple[int, ...] = (3, 16, 16)) -> tuple:
    """Images and labels of 5 classes."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((size, *shape)).astype(np.float32)
    return images, rng.integers(0, 5, size)
