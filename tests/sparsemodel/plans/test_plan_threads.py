"""Models are traced, fused and planned in several threads as in one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch
import zoo
from torch import nn

from sparsemodel.kernels.cpu import native
from sparsemodel.layers.gate import FUSED_FORWARD
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.layers.tracing import trace_forward
from sparsemodel.plans.stepper import Stepper

THREADS = 6


def together(work: Callable[[int], object]) -> list[object]:
    """What `work` gives or raises in each of several threads that begin at one time."""
    found: list[object] = [None] * THREADS
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> None:
        barrier.wait()
        try:
            found[number] = work(number)
        except BaseException as error:  # shown by the assertion on what was found
            found[number] = error

    calls = nn.Module.__call__, nn.Module.__getattr__
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads come between each other
    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert (nn.Module.__call__, nn.Module.__getattr__) == calls  # torch.fx has left no patch
    return found


def dense() -> list[nn.Module]:
    """A model for each thread, drawn in one: the global generator is no thread's own."""
    return [zoo.build("net" if number % 2 else "plain", number) for number in range(THREADS)]


def sparse(model: nn.Module, number: int) -> nn.Module:
    return sparsify(model, zoo.mask_of_all(model, number))


def step(number: int, models: list[nn.Module]) -> tuple[float, bool, bool]:
    """Loss of a first step, whether a plan took it, and whether the model is fused."""
    torch.set_num_threads(1)
    model = sparse(models[number], number)
    stepper = Stepper(model, batch_size=5)
    loss, _ = stepper.step(*zoo.batch(number, model))
    return loss, stepper.plan(zoo.SHAPE) is not None, hasattr(model.forward, FUSED_FORWARD)


@pytest.mark.skipif(not native.loaded(), reason="no native kernels here")
def test_plans_are_made_in_several_threads_to_the_same_bits() -> None:
    models = dense()
    expected = [step(number, models) for number in range(THREADS)]
    assert all(planned and fused for _, planned, fused in expected)
    for _ in range(3):
        assert together(lambda number: step(number, models)) == expected


def test_other_threads_use_models_while_one_is_traced() -> None:
    """torch.fx patches nn.Module for all of them."""
    plain = dense()
    models = [sparse(model, number) for number, model in enumerate(plain)]
    expected = [zoo.run(model, 0, with_input=False)["loss"].item() for model in models]
    graphs = [str(trace_forward(model)) for model in models]

    def work(number: int) -> object:
        if number % 2:
            return {str(trace_forward(models[number])) for _ in range(5)}
        model = sparse(plain[number], number)
        images, labels = zoo.batch(0, model)
        return {nn.functional.cross_entropy(model(images), labels).item() for _ in range(20)}

    assert together(work) == [
        {graphs[number]} if number % 2 else {expected[number]} for number in range(THREADS)
    ]
