"""Operators and kernels by name, with arguments, and by import path."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import neuralode_coupled as nc
from neuralode_coupled.models import EVOLUTIONS, KERNELS, evolution_named, kernel_named

OWN = """
import torch
from torch import nn
import neuralode_coupled as nc

number = 7


class Decay(nn.Module):
    def __init__(self, rate=0.0):
        super().__init__()
        self.rate = nn.Parameter(torch.full((), rate))

    def forward(self, t, w):
        return -self.rate * w


class Makers:
    by_pattern = staticmethod(lambda: {"*": Decay(0.5)})
    chooser = staticmethod(lambda: lambda name, weight: Decay(0.25))


instance = Decay()


class Timeless(nn.Module):
    def forward(self, w):
        return -w


def needs_one(rate):
    return Decay(rate)


def makes_text():
    return "decay"


def box():
    return nc.Box(0.5, learnable=True)
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """A module in the current folder, which is not on the path."""
    (tmp_path / "own_operators.py").write_text(OWN)
    (tmp_path / "broken_operators.py").write_text("def decay(:\n")
    (tmp_path / "ending_operators.py").write_text("raise SystemExit('bye')\n")
    (tmp_path / "wanting_operators.py").write_text("import no_such_package\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    yield "own_operators"
    sys.modules.pop("own_operators", None)


def test_the_names_of_operators_and_none():
    assert evolution_named(None) is None
    assert kernel_named(None) is None
    assert type(evolution_named("low-rank")) is type(EVOLUTIONS["low-rank"]())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dirac", "Dirac()"),
        ("sample-and-hold:2", "SampleAndHold(samples=2)"),
        ("sample-and-hold:samples=4", "SampleAndHold(samples=4)"),
        ("exponential:5", str(nc.Exponential(5))),
        ("exponential:5,learnable=true", str(nc.Exponential(5, learnable=True))),
        ("erlang:3, 2.5", str(nc.Erlang(3, 2.5))),
        ("erlang:3,rate=2.5,history=zero", str(nc.Erlang(3, 2.5, history="zero"))),
        ("box:width=0.5", str(nc.Box(0.5))),
    ],
)
def test_kernels_by_name_with_arguments(name, expected):
    assert str(kernel_named(name)) == expected


def test_every_kernel_of_numbers_has_a_name():
    public = [getattr(nc, name) for name in nc.__all__]  # all of them, which are loaded when they are first used
    named = {kind for kind in public if isinstance(kind, type) and issubclass(kind, nc.TimeKernel)}
    assert named - {nc.TimeKernel, nc.DensityKernel, nc.MatrixKernel} == set(KERNELS.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gauss", "unknown kernel 'gauss': choose one of dirac, sample-and-hold, exponential, erlang, box, with"),
        ("box", r"kernel 'box': missing 1 required .*'width' \(it is written box:WIDTH,learnable=false,history="),
        ("box:wide", r"kernel 'box:wide': .*width.*'wide'"),
        ("box:0.5,", r"kernel 'box:0.5,': .*positional"),
        ("exponential:-1", "kernel 'exponential:-1': rate must be positive"),
        ("erlang:2.5,3", "order must be a whole number of at least 1, got 2.5"),
        ("box:1,breadth=2", "unexpected keyword argument 'breadth'"),
        ("box:1,history=none", "unknown history 'none'"),
        ("dirac:3", r"kernel 'dirac:3': .* \(it takes no arguments\)"),
    ],
)
def test_kernels_that_cannot_be_made(name, message):
    with pytest.raises(ValueError, match=message):
        kernel_named(name)


def test_an_operator_and_a_kernel_of_ones_own_come_from_the_current_folder(own):
    operator = evolution_named(f"{own}:Decay")
    assert type(operator).__name__ == "Decay"
    assert operator is not evolution_named(f"{own}:Decay")
    kernel = kernel_named(f"{own}:box")
    assert isinstance(kernel, nc.Box)
    for path in ("Decay", "Makers.by_pattern", "Makers.chooser"):
        torch.manual_seed(0)
        model = nc.models.build("resnet4", "anodev2-1", evolution=evolution_named(f"{own}:{path}"), kernel=kernel)
        (layer,) = nc.models.coupled_layers(model).values()
        assert type(layer.field.operator("0.weight")).__name__ == "Decay"
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere_to_be_found:decay", "there is no module 'nowhere_to_be_found', in .* or among the installed ones"),
        ("own_operators.inner:decay", "cannot be imported: .*'own_operators.inner'"),
        ("own_operators:decay", "there is no 'decay' in .*own_operators.py, which has Decay, Makers"),
        ("own_operators:number", "is 7, of type int: name a class, or a function that takes no arguments"),
        ("own_operators:instance", r"is Decay\(\), of type Decay: name a class, or a function"),
        ("own_operators:needs_one", "called without arguments, raised TypeError: .*'rate'"),
        ("broken_operators:decay", "cannot be imported: broken_operators raised SyntaxError: .*line 1"),
        ("ending_operators:decay", "cannot be imported: ending_operators raised SystemExit: bye"),
        ("wanting_operators:decay", "cannot be imported: No module named 'no_such_package'"),
        ("own_operators:", "is no import path: write module:function"),
        ("own operators.py:decay", "is no import path: write module:function"),
        (":decay", "is no import path: write module:function"),
    ],
)
@pytest.mark.parametrize(("what", "named"), [("evolution", evolution_named), ("kernel", kernel_named)])
def test_what_cannot_be_imported_is_named(own, what, named, path, message):
    with pytest.raises(ValueError, match=message) as raised:
        named(path)
    assert str(raised.value).startswith(f"{what} {path!r}")


def test_what_makes_something_else_is_named(own):
    with pytest.raises(TypeError, match="own_operators:makes_text' made 'decay', of type str: it must return an op"):
        evolution_named(f"{own}:makes_text")
    with pytest.raises(TypeError, match=r"made Timeless\(\), whose forward is \(w\): it must take the time"):
        evolution_named(f"{own}:Timeless")
    with pytest.raises(TypeError, match=r"own_operators:Decay' made Decay\(\), of type Decay: it must return a kernel"):
        kernel_named(f"{own}:Decay")


def test_a_kernel_is_copied_for_each_block_and_left_out_where_nothing_evolves():
    kernel = nc.Exponential(4.0, learnable=True)
    layers = nc.models.coupled_layers(nc.models.build("resnet10", "anodev2-2", kernel=kernel)).values()
    kernels = [layer.field.kernel for layer in layers]
    assert [str(own) for own in kernels] == [str(kernel)] * 2
    assert len({id(own) for own in (kernel, *kernels)}) == 3
    assert len({id(p) for own in (kernel, *kernels) for p in own.parameters()}) == 3
    (plain,) = nc.models.coupled_layers(nc.models.build("resnet4", "anode", kernel=kernel)).values()
    assert isinstance(plain.field.kernel, nc.Dirac)
    with pytest.raises(TypeError, match=r"kernel must be a time kernel such as nc.Box\(0.5\), got 'box'"):
        nc.models.build("resnet4", "anodev2-1", kernel="box")


def test_a_kernel_changes_what_the_network_computes():
    images, results = torch.randn(2, 3, 32, 32), []
    for kernel in (None, nc.Dirac(), nc.Box(0.5)):
        torch.manual_seed(0)
        model = nc.models.build("resnet4", "anodev2-1", kernel=kernel, evolution=nc.LinearEvolution())
        for layer in nc.models.coupled_layers(model).values():
            for parameter in layer.field.evolution.parameters():
                nn.init.normal_(parameter, std=0.3)
        results.append(model(images))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])
