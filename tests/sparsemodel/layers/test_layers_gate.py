"""Whatever a model does besides: a sparse one does it too, or it was refused by name."""

from __future__ import annotations

import random
from contextlib import ExitStack

import hypothesis.strategies as st
import pytest
import torch
import zoo
from hypothesis import given, settings
from long import FACTOR
from torch import nn

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.layers.sparsify import densify, sparsify
from sparsemodel.masks.mask import Mask

# Twists of one layer at least, of which a sparse layer would drop something.
DROPPED = (
    *("backward hook", "weight hook", "bias hook", "norm weight hook", "hook after accumulation"),
    *("state hook", "parametrised weight", "parametrised bias", "weight norm", "torch's prune"),
    *("weight norm by hooks", "tied weights", "tied biases", "weights in one memory"),
    *("more parameters", "more buffers", "more modules", "a closure", "forward of a norm"),
)
# Those that may meet a layer or another module.
ON_ANY = ("forward hook", "forward pre-hook", "backward pre-hook", "forward of an instance",
          "forward of an activation")  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

# Masks of dropout are drawn in the order of memory, which is another one.
IN_EVALUATION = ("dropout", "model in evaluation")


def outcome(body: str, twists: tuple[str, ...], seed: int, *, fuse: bool, execution: str) -> str:
    """ "same" or "refused"; fails on a difference, and on a refusal that names nothing."""
    with ExitStack() as cleanup:
        model = zoo.build(body, seed)
        mask = zoo.mask_of_all(model, seed)
        names, draw = zoo.names_of(model), random.Random(seed)
        try:
            for twist in twists:
                zoo.TWISTS[twist](model, draw, cleanup)
        except (RuntimeError, ValueError, AttributeError, KeyError, TypeError, IndexError):
            return "impossible"  # torch itself refuses the two together
        zoo.mask_again(model, mask)
        if set(twists) & set(IN_EVALUATION):
            model.eval()
        try:
            sparse = sparsify(model, mask, fuse=fuse, execution=execution)  # type: ignore[arg-type]
        except SparseModelError as error:
            return (
                "refused"
                if zoo.is_named(names + zoo.names_of(model), str(error))
                else f"unnamed: {error}"
            )
        assert zoo.differences(model, sparse, seed) == []
        return "same"


@pytest.mark.parametrize("body", zoo.BODIES)
@pytest.mark.parametrize("twist", zoo.TWISTS)
def test_a_sparse_model_computes_the_same_or_is_refused(twist: str, body: str) -> None:
    found = [
        outcome(body, (twist,), seed, fuse=fuse, execution=execution)
        for seed, (fuse, execution) in enumerate(
            [(True, "sparse"), (True, "auto"), (False, "auto")]
        )
    ]
    if twist in DROPPED and twist != "bias hook":  # not every layer that is drawn has one
        assert set(found) == {"refused"}
    elif twist not in DROPPED and twist not in ON_ANY:
        assert set(found) == {"same"}
    assert set(found) <= {"same", "refused"}


@settings(max_examples=40 * FACTOR, deadline=None, derandomize=True)
@given(
    **zoo.SEVERAL_TWISTS,
    fuse=st.booleans(),
    execution=st.sampled_from(["auto", "sparse", "dense"]),
)
def test_so_do_several_twists_at_once(
    body: str, twists: list[str], seed: int, fuse: bool, execution: str
) -> None:
    found = outcome(body, tuple(twists), seed, fuse=fuse, execution=execution)
    assert found in {"same", "refused", "impossible"}


@pytest.mark.parametrize("body", zoo.BODIES)
@pytest.mark.parametrize("twist", zoo.TWISTS)
def test_a_fused_model_follows_what_changes_later(twist: str, body: str) -> None:
    """Hooks, modules and settings that come after sparsify are obeyed as without fusing."""
    for seed in range(2):
        with ExitStack() as cleanup:
            model = zoo.build(body, seed)
            everything = zoo.mask_of_all(model, seed)
            mask = Mask({name: everything[name] for name in list(everything)[1:-1]})
            pair = sparsify(model, mask), sparsify(model, mask, fuse=False)
            zoo.run(pair[0], 0, with_input=False)
            zoo.run(pair[1], 0, with_input=False)
            zoo.TWISTS[twist](pair[0], random.Random(seed), cleanup)
            if "global" not in twist:
                zoo.TWISTS[twist](pair[1], random.Random(seed), cleanup)
            if twist in IN_EVALUATION:
                pair[0].eval(), pair[1].eval()
            for step in range(3):
                try:
                    expected = zoo.run(pair[1], step, with_input=step == 2)
                except RuntimeError:
                    break  # the twist itself fails on this body
                found = zoo.run(pair[0], step, with_input=step == 2)
                assert found.keys() == expected.keys()
                assert [n for n in found if not zoo.is_close(expected[n], found[n])] == []


def test_densify_gives_back_the_order_of_the_state() -> None:
    """torch's prune.remove leaves the bias before the weight."""
    model = zoo.build("net", 0)
    torch.nn.utils.prune.l1_unstructured(model.head[1], "weight", 0.2)
    torch.nn.utils.prune.remove(model.head[1], "weight")
    mask = zoo.mask_of_all(model, 0)
    back = densify(sparsify(model, mask))
    assert list(back.state_dict()) == list(model.state_dict())
    assert list(back.state_dict())[-4:-2] == ["head.1.bias", "head.1.weight"]
    names = [name for name, _ in sparsify(model, mask).named_parameters()]
    assert names[-4:-2] == ["head.1.bias", "head.1.values"]


def test_compiled_modules_are_copied_without_what_was_compiled() -> None:
    """module.compile() keeps a function of the module; torch.compile(module) would be called."""
    model = zoo.build("net", 0)
    mask = zoo.mask_of_all(model, 0)
    model.head[1].compile(backend="eager")
    assert zoo.differences(model, sparsify(model, mask), 0) == []
    whole = torch.compile(zoo.build("net", 0), backend="eager")
    pattern = {"_orig_mod.head.1.weight": mask["head.1.weight"]}
    with pytest.raises(SparseModelError, match=r"OptimizedModule '' holds a function in 'forward'"):
        sparsify(whole, Mask(pattern))  # type: ignore[arg-type]


def test_modules_in_lists_and_bound_methods_are_copied_along() -> None:
    """Unlike those in a closure; a changed copy computes with its own."""

    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.order, self.finish = [self.b, self.a], self.last

        def last(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.order[0](x)
            return y

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.finish(self.order[1](x))

    model = Ordered()
    mask = Mask({"a.weight": torch.eye(4).bool(), "b.weight": torch.ones(4, 4).bool()})
    sparse = sparsify(model, mask)
    mask.apply(model)
    x = torch.randn(3, 4)
    torch.testing.assert_close(sparse(x), model(x))
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    assert not sparse(x).any()
    assert model(x).any()


def test_messages_say_what_to_do() -> None:
    def refused(model: nn.Module, match: str) -> None:
        with pytest.raises(SparseModelError, match=match):
            sparsify(model, Mask({"1.weight": torch.ones(3, 3).bool()}))

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    hooked = model()
    hooked[1].bias.register_hook(lambda g: g)
    refused(hooked, r"the parameter '1\.bias' has hooks on its gradients.*remove them")
    hooked = model()
    hooked[1].register_full_backward_pre_hook(lambda *_: None)
    refused(hooked, r"layer of '1\.weight' has hooks \(full backward pre-hooks\); remove")
    tied = model()
    tied[1].bias = tied[0].bias
    refused(tied, r"the bias beside '1\.weight' is tied to \['0\.bias'\]; leave the layer out")
    shared = model()
    shared[1].weight = nn.Parameter(shared[0].weight.data)
    refused(shared, r"'0\.weight' and '1\.weight' are two parameters in the same memory")
    normed = model()
    nn.utils.parametrizations.weight_norm(normed[1])
    refused(normed, r"no parameter '1\.weight'.* is made anew at each call .*: remove that first")
    with pytest.raises(SparseModelError, match="has no size yet; run the model once"):
        sparsify(
            nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)),
            Mask({"1.weight": torch.ones(3, 3).bool()}),
        )
    odd = model()
    odd[1].register_buffer("step", torch.zeros(1))
    refused(odd, r"also has \['step'\], which its sparse form would drop")
    whole = model()
    whole[1].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))
    refused(whole, r"'1\.weight' is a Parameter of torch\.complex64; sparse layers take")
    with pytest.raises(MaskError, match=r"no parameter '2\.weight' that the mask names"):
        sparsify(model(), Mask({"2.weight": torch.ones(3, 3).bool()}))
