"""The benchmarks of peers: one problem for all candidates, and what becomes of each finding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import neuralode_coupled as nc
from benchmarks.lib.block import start
from benchmarks.lib.candidates import ADAPTIVE, HAND
from benchmarks.lib.gradients import errors, gradients
from benchmarks.peers import measure as peers
from benchmarks.peers.candidates import CANDIDATES, build, chosen, missing

SMALL = (2, 16, 6, 6)
INEXACT = {"ContinuousAdjoint", "ReversibleAdjoint"}
"""Of ours: these are exact for something else than the hand-written loop."""


def found(name: str, solver: str):
    layer, run = build(name, 3, solver, form="ode")
    layer.double()
    return gradients(layer, run, start(torch.float64, SMALL))


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_candidates_solve_the_same_problem(solver):
    """Exact methods to rounding; those that solve an adjoint ODE, or a scheme of their own, roughly."""
    expected = found(HAND, solver)
    for name in chosen(solver, form="ode"):
        exact = name not in INEXACT and not any(word in name for word in ("adjoint", "backsolve", "MALI", "reversible"))
        exact = exact and not (name.startswith("torchdyn") and solver == "rk4")
        allowed = 1e-10 if exact else 0.7 if "MALI" in name else 0.5  # MALI's scheme is another one forward too
        assert max(errors(found(name, solver), expected).values()) < allowed, name


def test_adaptive_candidates_solve_the_same_problem():
    """torchdiffeq's gradient goes through its choice of the first step too, ours holds all lengths fixed."""
    expected = found("odeint_dto", ADAPTIVE)
    assert max(errors(found(peers.REFERENCE, ADAPTIVE), expected).values()) < 1e-3
    for name in chosen(ADAPTIVE, form="ode"):
        assert max(errors(found(name, ADAPTIVE), expected).values()) < 0.5, name


def test_a_name_that_no_candidate_has_is_refused(capsys):
    with pytest.raises(SystemExit):
        peers.main(["--parts", "memory", "--only", "DiscreteAdjiont"])
    assert "--only DiscreteAdjiont: no candidate has this in its name" in capsys.readouterr().err


def test_who_is_not_installed_is_left_out_with_a_word(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing() == ["TorchDiffEqPack", "diffrax", "torchdyn"]
    assert not any("diffrax" in name for name in chosen("euler"))
    assert "torchdiffeq odeint" in chosen("euler")


def test_the_benchmark_says_who_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "diffrax" else name)
    monkeypatch.setattr(peers, "_measured", lambda *arguments: None)
    peers.main(["--parts", "time", "--steps", "5", "--solvers", "euler", "--rounds", "2"])
    assert "diffrax is not installed: left out" in capsys.readouterr().out


def test_a_release_without_what_is_measured_is_left_out_with_a_word(monkeypatch):
    """torchdiffeq stands for a package that is installed."""
    monkeypatch.setitem(CANDIDATES, "old", replace(CANDIDATES[HAND], package="torchdiffeq", attribute="absent"))
    monkeypatch.setitem(CANDIDATES, "new", replace(CANDIDATES[HAND], package="torchdiffeq", attribute="odeint"))
    assert "torchdiffeq.absent" in missing()
    assert "new" in chosen("euler")
    assert "old" not in chosen("euler")


def asynchronous_leapfrog(layer: nc.CoupledODE):
    """The state and its slope advance in turn, as a plain loop under autograd."""

    def run(z0):
        h, t = 1 / layer.grid.steps, torch.zeros((), dtype=z0.dtype)
        y = layer.field.initial_state(z0)
        v = layer.field(t, y)
        for _ in range(layer.grid.steps):
            middle = tuple(a + h / 2 * b for a, b in zip(y, v, strict=True))
            v = tuple(2 * a - b for a, b in zip(layer.field(t, middle), v, strict=True))
            y = tuple(a + h / 2 * b for a, b in zip(middle, v, strict=True))
        return y[0]

    return run


def test_mali_has_the_gradient_of_its_own_scheme():
    """In four steps: it keeps times in float32, in which 1/4 is exact."""
    pytest.importorskip("TorchDiffEqPack")
    layer, run = build("TorchDiffEqPack MALI", 4, "euler", form="ode")
    mali = gradients(layer.double(), run, start(torch.float64, SMALL))
    layer.zero_grad(set_to_none=True)
    expected = gradients(layer, asynchronous_leapfrog(layer), start(torch.float64, SMALL))
    assert max(errors(mali, expected).values()) < 1e-10


def test_some_are_timed_beside_what_all_are_timed_against(tmp_path, monkeypatch):
    """And leave what was found of others, with the command that found it."""
    monkeypatch.setattr("benchmarks.lib.results.RESULTS", tmp_path)
    monkeypatch.setattr(peers, "build", lambda *arguments, **options: arguments)
    monkeypatch.setattr(peers, "once", lambda *arguments: lambda: None)
    monkeypatch.setattr(peers, "chosen", lambda solver, compiled=False: [HAND, "Backprop", "Backprop, compiled"])
    arguments = ["--parts", "time", "--steps", "5", "--solvers", "euler", "--rounds", "2"]
    peers.main(arguments)
    peers.main([*arguments, "--only", "compiled"])
    found = peers.read("peers")
    assert {
        name: found["made_by"][f"time, euler, 5 steps, {name}"] for name in found["parts"]["time"]["euler"]["5"]
    } == {
        HAND: 1,
        "Backprop": 0,
        "Backprop, compiled": 1,
    }
    assert [run["command"].endswith("--only compiled") for run in found["runs"]] == [False, True]


def test_compiled_candidates_are_asked_for():
    assert "Backprop, compiled" in chosen("euler", compiled=True)
    assert not any("compiled" in name for name in chosen("euler"))
    assert not chosen("euler", compiled=True).count("odeint_dto")


def test_cuda_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        peers.main(["--device", "cuda"])
    assert stop.value.code == 2
    assert "--device cuda: torch finds no CUDA device here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["euler", ADAPTIVE])
def test_candidates_on_cuda_find_what_they_find_on_the_cpu(solver):
    for name in (name for name in chosen(solver) if not CANDIDATES[name].jitted):  # diffrax is for the CPU
        on_both = []
        for device in ("cpu", "cuda"):
            layer, run = build(name, 3, solver, form="ode", device=device)
            layer.double()
            found = gradients(layer, run, start(torch.float64, SMALL, device))
            on_both.append({group: [tensor.cpu() for tensor in tensors] for group, tensors in found.items()})
        assert max(errors(*on_both).values()) < 1e-6, name


@pytest.mark.gpu
def test_findings_on_cuda_have_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.lib.results.RESULTS", tmp_path)
    monkeypatch.setattr(peers, "chosen", lambda solver, compiled=False: [HAND, "DiscreteAdjoint"])
    peers.main(["--device", "cuda", "--steps", "2", "--solvers", "euler", "--rounds", "2", "--parts", *peers.PARTS[:3]])
    parts = peers.read("peers_cuda")["parts"]
    assert all(set(parts[part]["euler"]["2"]) == {HAND, "DiscreteAdjoint"} for part in peers.PARTS[:3])
    assert parts["memory"]["euler"]["2"]["DiscreteAdjoint"] > 2 * 2**20
    assert max(parts["gradients"]["euler"]["2"]["DiscreteAdjoint"].values()) < 1e-4


def test_findings_are_saved_as_they_come(tmp_path, monkeypatch):
    """A run that breaks off, or one part measured again, leaves the other findings where they were."""
    monkeypatch.setattr("benchmarks.lib.results.RESULTS", tmp_path)
    monkeypatch.setattr(peers, "chosen", lambda solver: ["a", "b", "c"])
    sizes = {"a": 1, "b": 2}
    monkeypatch.setattr(peers, "in_a_process", lambda name, solver, steps: sizes[name])
    with pytest.raises(KeyError):
        peers.main(["--parts", "memory", "--steps", "5", "--solvers", "euler"])
    sizes = {"a": 10, "c": 30}
    with pytest.raises(KeyError):
        peers.main(["--parts", "memory", "--steps", "5", "--solvers", "euler"])
    found = peers.read("peers")
    assert found["parts"]["memory"]["euler"]["5"] == {"a": 10, "b": 2}
    command = "python -m benchmarks.peers --parts memory --steps 5 --solvers euler"
    assert [run["command"] for run in found["runs"]] == [command]
    assert found["made_by"] == {f"memory, euler, 5 steps, {name}": 0 for name in "ab"}
