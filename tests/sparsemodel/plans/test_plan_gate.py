"""A plan does what the modules do, or refuses by name: for models of every kind, and later."""

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

from sparsemodel.errors import PlanError
from sparsemodel.kernels.cpu import native
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.masks.mask import Mask
from sparsemodel.plans.plan import TrainingPlan
from sparsemodel.plans.program import program_of

pytestmark = [
    pytest.mark.skipif(not native.loaded(), reason="no native kernels here"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]

# What plans know, and so do not refuse.
KNOWN = (
    *("nothing", "state hook", "torch's prune, removed", "more parameters", "more buffers"),
    *("more modules", "frozen weight", "frozen bias", "frozen norm", "momentum", "epsilon"),
    *("all but a norm in evaluation", "model in evaluation", "attributes of another width"),
    *("dilated afterwards", "cumulative momentum", "scale of the block", "in place"),
    *("another classifier", "a closure"),
)
# Tests of what is known now and then: a bias that is not there, two layers of one shape.
SOMETIMES = ("bias hook", "called twice", "scale of the block", "dilated afterwards", "in place")


def pair(body: str, seed: int, sparse: bool) -> tuple[nn.Module, nn.Module]:
    """A model, dense or with sparse layers, and its like to compare with."""
    models = []
    for fuse in (True, False):
        model = zoo.build(body, seed)
        everything = zoo.mask_of_all(model, seed)
        if sparse:
            mask = Mask({name: everything[name] for name in list(everything)[1:-1]})
            model = sparsify(model, mask, fuse=fuse)
        models.append(model)
    return models[0], models[1]


def differences(plan: TrainingPlan, model: nn.Module, like: nn.Module, seed: int) -> list[str]:
    """In what three steps of a plan differ from those of modules; PlanError as it comes."""
    found = []
    like.train()
    for module, other in zip(model.modules(), like.modules(), strict=True):
        other.training = module.training or not model.training
    for step in range(3):
        images, labels = zoo.batch(seed + step, model)
        zoo.seed_all(seed + step)
        loss, _ = plan.step(images, labels)
        expected = zoo.run(like, seed + step, with_input=False)
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        got |= {f"buffer {n}": b for n, b in model.named_buffers()}
        got["loss"] = torch.tensor(loss)
        expected.pop("logits")
        own = {n for n in expected if n.startswith("buffer")} & got.keys()
        names = own | {n for n in (expected.keys() | got.keys()) if not n.startswith("buffer")}
        found += [
            f"step {step}: {name}"
            for name in sorted(names)
            if name not in expected
            or name not in got
            or (
                (name.rpartition(".")[2] not in {"transposed", "bits", "blocks"})
                and not zoo.is_close(expected[name], got[name])
            )
        ]
    return found


def outcome(body: str, twists: tuple[str, ...], seed: int, *, sparse: bool) -> str:
    """ "same" or "refused"; fails on a difference, and on a refusal that names nothing."""
    with ExitStack() as cleanup:
        model, like = pair(body, seed, sparse)
        names = zoo.names_of(model)
        try:
            for one in (model, like):
                draw = random.Random(seed)
                for twist in twists:
                    if one is model or "global" not in twist:
                        zoo.TWISTS[twist](one, draw, cleanup)
        except (RuntimeError, ValueError, AttributeError, KeyError, TypeError, IndexError):
            return "impossible"  # torch itself refuses them together, or of a sparse layer
        try:
            plan = TrainingPlan(model, zoo.SHAPE, batch_size=5)
        except PlanError as error:
            return (
                "refused"
                if zoo.is_named(names + zoo.names_of(model), str(error))
                else f"unnamed: {error}"
            )
        assert differences(plan, model, like, seed) == []
        return "same"


@pytest.mark.parametrize("body", zoo.BODIES)
@pytest.mark.parametrize("twist", zoo.TWISTS)
def test_a_plan_computes_the_same_or_is_refused(twist: str, body: str) -> None:
    dense = {outcome(body, (twist,), seed, sparse=False) for seed in range(3)}
    sparse = {outcome(body, (twist,), seed, sparse=True) for seed in range(3)}
    assert dense | sparse <= {"same", "refused", "impossible"}
    if twist in KNOWN:
        assert dense == {"same"}
    elif twist not in SOMETIMES:
        assert dense == {"refused"}


@settings(max_examples=40 * FACTOR, deadline=None, derandomize=True)
@given(
    **zoo.SEVERAL_TWISTS,
    sparse=st.booleans(),
)
def test_so_do_several_twists_at_once(
    body: str, twists: list[str], seed: int, sparse: bool
) -> None:
    assert outcome(body, tuple(twists), seed, sparse=sparse) in {"same", "refused", "impossible"}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("body", zoo.BODIES)
@pytest.mark.parametrize("twist", zoo.TWISTS)
def test_a_plan_follows_what_changes_later_or_refuses(twist: str, body: str, sparse: bool) -> None:
    for seed in range(2):
        with ExitStack() as cleanup:
            model, like = pair(body, seed, sparse)
            plan = TrainingPlan(model, zoo.SHAPE, batch_size=5)
            plan.step(*zoo.batch(9, model))
            zoo.run(like, 9, with_input=False)
            try:
                zoo.TWISTS[twist](model, random.Random(seed), cleanup)
                if "global" not in twist:
                    zoo.TWISTS[twist](like, random.Random(seed), cleanup)
            except (RuntimeError, ValueError, AttributeError, KeyError, TypeError):
                continue  # of a sparse layer
            try:
                assert differences(plan, model, like, seed) == []
            except (PlanError, ValueError) as refusal:
                with pytest.raises(type(refusal)):  # and it stays refused
                    plan.step(*zoo.batch(9, model))


def test_programs_do_not_thaw_frozen_parameters() -> None:
    model = zoo.build("plain", 0)
    model[7].bias.requires_grad_(False)
    with pytest.raises(PlanError, match=r"'7\.bias' is frozen.*requires_grad_\(\)"):
        program_of(model, zoo.SHAPE)
    TrainingPlan(model, zoo.SHAPE, batch_size=5)  # which sees the parameter itself


def test_operations_are_refused_with_the_module_that_does_them() -> None:
    model = zoo.build("plain", 0)
    model[6] = zoo.Detached()
    with pytest.raises(PlanError, match=r"the method 'detach'.*, in the Detached '6'"):
        TrainingPlan(model, zoo.SHAPE, batch_size=5)
    model[6] = zoo.WithoutGradients()
    with pytest.raises(PlanError, match=r"a part under no_grad.*, in the WithoutGradients '6'"):
        TrainingPlan(model, zoo.SHAPE, batch_size=5)
    model[6] = zoo.CountsInPython()
    with pytest.raises(PlanError, match=r"the CountsInPython '6' changes .* \['calls'\]"):
        TrainingPlan(model, zoo.SHAPE, batch_size=5)
    assert model[6].calls == 1
