"""Programs: what they say of models, their text, and that any text is a program or an error."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from little_networks import pooled
from programs import SHAPES, described, masked
from torch import nn

from sparsemodel.errors import PlanError, ProgramError
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.bound import BoundProgram
from sparsemodel.runtime.program import Node, Program
from sparsemodel.runtime.program_text import ProgramLimits


def tiny() -> Program:
    """Convolution, norm with ReLU, average pool, flattening, linear layer."""
    return Program(
        (2, 4, 4),
        (
            Node("input"),
            Node("conv", (0,), "c", weight="c.weight", padding=(1, 1), groups=2),
            Node("norm", (1, 1), "n", weight="n.w", mean="n.m", variance="n.v", relu=True),
            Node("avg_pool", (2,), kernel=(2, 2), stride=(2, 2)),
            Node("flatten", (3,)),
            Node("conv", (4,), "f", weight="f.weight", bias="f.bias"),
        ),
        (
            ("c.weight", (6, 1, 3, 3)),
            *((name, (6,)) for name in ("n.w", "n.m", "n.v")),
            ("unused", ()),
            ("f.weight", (3, 24)),
            ("f.bias", (3,)),
        ),
    )


def test_shapes_and_sizes() -> None:
    program = tiny()
    assert program.results == ((2, 4, 4), (6, 4, 4), (6, 4, 4), (6, 2, 2), (24,), (3,))
    assert program.classes == 3
    assert program.layers() == {"c.weight": 1, "f.weight": 5}
    assert program.shapes()["f.weight"] == (3, 24)
    # 32 + 96 + 96 + 24 + 24 + 3 numbers, and the zeros around two planes of 4 x 4: 2 * 20.
    assert program.activation_bytes() == 4 * (275 + 40)


def test_the_text_is_read_back_and_names_the_program() -> None:
    program = tiny()
    again = Program.parse(program.text())
    assert again == program
    assert again.text() == program.text()
    assert Program.parse(json.dumps(json.loads(program.text()), indent=2).encode()) == program
    assert program.digest() == again.digest()
    assert len(program.digest()) == 32
    other = Program(program.input_shape, program.nodes, program.tensors[::-1])
    assert other.digest() != program.digest()


@pytest.mark.parametrize("name", SHAPES)
def test_dense_and_sparsified_models_have_one_program(name: str) -> None:
    model, mask = masked(name)
    program = program_of(model, SHAPES[name])
    for sparse in (sparsify(model, mask), sparsify(model, mask, fuse=False)):
        assert program_of(sparse, SHAPES[name]) == program
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if t.is_floating_point()}
    assert list(program.shapes().items()) == list(expected.items())
    assert Program.parse(program.text()) == program


def test_a_model_that_is_one_layer() -> None:
    program = program_of(nn.Linear(4, 3), (4,))
    assert program.shapes() == {"weight": (3, 4), "bias": (3,)}
    assert program.layers() == {"weight": 1}


def test_norms_say_what_they_have() -> None:
    layers = (nn.BatchNorm1d(4, eps=0.5, momentum=None, affine=False), nn.Linear(4, 2))
    norm = program_of(nn.Sequential(*layers), (4,)).nodes[1]
    assert (norm.weight, norm.bias, norm.eps, norm.momentum) == (None, None, 0.5, None)
    assert (norm.mean, norm.variance) == ("0.running_mean", "0.running_var")
    norm = program_of(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), layers[1]), (4,))
    assert norm.nodes[1].tensors() == ["0.weight", "0.bias"]


def test_models_without_a_program_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(PlanError, match=r"'2\.weight' and '0\.weight' share"):
        program_of(model, (4,))
    with pytest.raises(PlanError, match="float64"):
        program_of(nn.Linear(4, 3).double(), (4,))
    with pytest.raises(PlanError, match="Dropout"):
        program_of(nn.Sequential(nn.Dropout(), nn.Linear(4, 3)), (4,))


def changed(*path: Any, value: Any) -> str:
    """The text of `tiny` with one place changed; a value of Ellipsis takes it out."""
    content = json.loads(tiny().text())
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(content)


def with_node(node: dict[str, Any], *, last: bool = False) -> str:
    """The text of `tiny` with a node before its last one, or in its place."""
    content = json.loads(tiny().text())
    content["nodes"][5 : 6 if last else 5] = [node]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON"),
        (b"\xff", "UTF-8"),
        (7, "expected a text, got int"),
        ("[" * 100_000, "JSON"),
        ('{"a":1,"a":2}', "twice"),
        ("[NaN]", "finite"),
        ("[1" + "0" * 5000 + "]", "JSON"),
        ("[]", "expected an object"),
        ("\ud800", "JSON"),
        (changed("program", value=2), "version 1, got 2"),
        (changed("program", value=True), "version 1, got True"),
        (changed("extra", value=1), "extra"),
        (changed("nodes", value=[]), "expected nodes"),
        (changed("nodes", value={}), "nodes: expected a list"),
        (changed("nodes", 2, value=None), "node 2: expected an object"),
        (changed("nodes", 2, "kind", value="exec"), "node 2: .*kind"),
        (changed("nodes", 2, "kind", value=[]), "node 2: .*kind"),
        (changed("nodes", 1, "kind", value="input"), r"node 1 \(input\): missing or unknown"),
        (changed("nodes", 1, "bias", value=...), r"node 1 \(conv\): .*'bias'"),
        (changed("nodes", 1, "inputs", value=[1]), "node 1 .*reads node 1, which is not before"),
        (changed("nodes", 1, "inputs", value=[5]), "reads node 5, which is not before"),
        (changed("nodes", 1, "inputs", value=[-1]), "inputs: expected an integer of 0"),
        (changed("nodes", 1, "inputs", value=[0, 0]), "expected 1 to 1 inputs, got 2"),
        (changed("nodes", 1, "inputs", value=[0] * 9), "the limit is 2"),
        (changed("nodes", 1, "stride", value=[1, 0]), "stride: expected an integer of 1"),
        (changed("nodes", 1, "stride", value=[1, 1.0]), r"stride: .* got 1\.0"),
        (changed("nodes", 1, "stride", value=[1, 2**31]), "stride: .*2147483647"),
        (changed("nodes", 1, "stride", value=[2**30, 2]), "stride .* too large"),
        (changed("nodes", 1, "stride", value=[1]), "height and width"),
        (changed("nodes", 1, "padding", value=[2**30, 1]), "padding .* too large"),
        (changed("nodes", 1, "dilation", value=[9, 1]), "window .* does not fit its input"),
        (changed("nodes", 1, "groups", value=3), "in 3 groups"),
        (changed("nodes", 1, "weight", value=None), "needs a weight"),
        (changed("nodes", 1, "weight", value="x"), "no tensor 'x'"),
        (changed("nodes", 1, "weight", value="a\nb"), "printable"),
        (changed("nodes", 1, "weight", value="f.bias"), "does not fit an input"),
        (changed("nodes", 2, "variance", value=None), "only one of mean and variance"),
        (changed("nodes", 2, "variance", value="n.m"), "'n.m' is read a second time"),
        (changed("nodes", 2, "weight", value="f.bias"), r"expected 'f.bias' of shape \(6,\)"),
        (changed("nodes", 2, "eps", value=-1), "eps: expected a number of 0"),
        (changed("nodes", 2, "eps", value=10**400), "eps: expected a number"),
        (changed("nodes", 2, "momentum", value=1.5), r"momentum in \[0, 1\]"),
        (changed("nodes", 2, "relu", value=1), "true or false"),
        (changed("nodes", 2, "inputs", value=[1, 0]), "inputs of shapes"),
        (changed("nodes", 3, "kernel", value=[5, 5]), r"window \(5, 5\)"),
        (changed("nodes", 3, "padding", value=[2, 0]), "padding at most half"),
        (with_node({"kind": "relu", "inputs": [0], "name": ""}), r"node 5 .* result is not used"),
        (with_node({"kind": "relu", "inputs": [3], "name": ""}, last=True), "node 4 .*not used"),
        (changed("nodes", 5, "stride", value=[2, 1]), "linear layer"),
        (changed("input", value=[2, 4]), "expected input"),
        (changed("input", value=[2, 4, 0]), "input: expected an integer of 1"),
        (changed("tensors", 0, value=["c.weight"]), "a name and a shape"),
        (changed("tensors", 0, value=["n.w", [6]]), "a name occurs twice"),
        (changed("tensors", 4, 1, value=[1] * 9), "the limit is 8"),
        (changed("tensors", 4, 1, value=[2**31 - 1]), "the tensors have .* the limit"),
    ],
)
def test_what_is_no_program_is_said(text: Any, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        Program.parse(text)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (ProgramLimits(text_bytes=100), "the text has"),
        (ProgramLimits(nodes=5), "nodes: 6 of them; the limit is 5"),
        (ProgramLimits(tensors=5), "tensors: 7 of them"),
        (ProgramLimits(weights=100), "the limit is 100"),
        (ProgramLimits(activation_bytes=1259), "results of one sample take 1,260 bytes"),
    ],
)
def test_limits(limits: ProgramLimits, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        Program.parse(tiny().text(), limits=limits)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31 - 1, 2**31, 2**64, -(2**70), 10**300]),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["c.weight", "n.m", "f.bias", "conv", "norm", "relu", "add", "flatten"]),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4), max_leaves=6)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    inside = [path] if path else []
    keys = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in keys if isinstance(value, dict | list) else ():
        inside += places(inner, (*path, key)) if isinstance(inner, dict | list) else [(*path, key)]
    return inside


PLACES = places(json.loads(tiny().text()))


def assert_total(text: str | bytes) -> None:
    """A program that can be built and read back, or an error of the right kind."""
    limits = ProgramLimits(weights=10_000, activation_bytes=1 << 20)
    try:
        program = Program.parse(text, limits=limits)
    except ProgramError as error:
        assert str(error)  # noqa: PT017 - either is right
        assert len(str(error)) < 2000  # noqa: PT017
    else:
        assert Program.parse(program.text(), limits=limits) == program
        BoundProgram(program, batch_size=2)  # the native plan takes every node


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
def test_mutated_texts_are_programs_or_errors(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    content = json.loads(tiny().text())
    for path, value in changes:
        place = content
        try:
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
        except (TypeError, KeyError, IndexError):
            continue  # an earlier change took the place away
    assert_total(json.dumps(content))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.binary()))
def test_any_text_is_an_error(text: str | bytes) -> None:
    assert_total(text)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_programs_or_errors(data: st.DataObject) -> None:
    text = bytearray(tiny().text().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    assert_total(bytes(text[: data.draw(st.integers(0, len(text)))]))


def test_a_program_is_frozen_data() -> None:
    program, _ = described("resnet8")
    with pytest.raises(AttributeError):
        program.nodes = ()  # type: ignore[misc]
    assert {program: 1}[Program.parse(program.text())] == 1
    assert not any(isinstance(value, torch.Tensor) for value in vars(program).values())


def test_pooled_networks_say_their_windows() -> None:
    nodes = program_of(pooled(), SHAPES["pooled"]).nodes
    pool = next(node for node in nodes if node.kind == "avg_pool")
    assert (pool.kernel, pool.stride, pool.padding, pool.include_pad) == (
        *((2, 2), (1, 1), (1, 1), False),
    )
