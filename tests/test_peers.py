"""The benchmarks of peers: one problem for all candidates, ratios of one round, a page that says what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure

import neuralode_coupled as nc
from benchmarks import gradients as gradients_benchmark
from benchmarks import memory, peers, peers_page, rounds
from benchmarks.candidates import ADAPTIVE, CANDIDATES, HAND, build, chosen, missing
from benchmarks.common import METHODS, start
from benchmarks.evolution_cost import CASES
from benchmarks.gradients import errors, gradients

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


def test_the_gradients_of_all_methods_that_take_the_ode_form_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
    monkeypatch.setattr(gradients_benchmark, "FIGURE", tmp_path / "gradients.png")
    monkeypatch.setattr(gradients_benchmark, "start", partial(start, shape=SMALL))
    gradients_benchmark.main(["--steps", "2", "--solvers", "euler"])
    found = json.loads((tmp_path / "gradients.json").read_text())["relative_errors"]["euler"]
    assert set(found) == {HAND, *METHODS} - {"ReversibleAdjoint, own weights"}
    exact = set(found) - {"ContinuousAdjoint"}
    assert all(max(found[name]["2"].values()) < 1e-3 for name in exact)
    assert (tmp_path / "gradients.png").stat().st_size > 10_000


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
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
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


def test_ratios_are_taken_within_a_round(monkeypatch):
    """A machine that gets slower and slower does not show in them, by a clock that the steps move."""
    clock = {"now": 0.0, "pace": 1.0}
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock["now"])

    def takes(factor):
        def step():
            clock["now"] += factor * clock["pace"]

        return step

    def slows_down():
        clock["pace"] *= 1.0001
        clock["now"] += clock["pace"]

    found = peers.measure({HAND: takes(1), "twice": takes(2), "slower": slows_down}, 7, HAND)
    assert found[HAND]["median"] == 1.0
    assert found["twice"]["median"] == pytest.approx(2, rel=1e-3)
    assert found["twice"]["lower_quartile"] <= found["twice"]["median"] <= found["twice"]["upper_quartile"]
    assert found["twice"]["seconds"] == pytest.approx(2, rel=1e-2)


def test_a_gpu_is_waited_for_on_both_sides_of_a_step(monkeypatch):
    """By a clock that goes on only where somebody waits: the device is behind the host."""
    clock, queued = {"now": 0.0}, []

    def waits(device):
        assert device == "cuda"
        clock["now"] += sum(queued)
        queued.clear()

    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(rounds, "wait", waits)
    steps = {HAND: lambda: queued.append(1.0), "twice": lambda: queued.append(2.0)}
    found = peers.measure(steps, 3, HAND, "cuda")
    assert (found["twice"]["seconds"], found["twice"]["median"]) == (2.0, 2.0)


def test_what_a_gpu_cannot_run_is_left_out_with_its_words(capsys):
    def refuses():
        raise RuntimeError("not on\nthis device")

    assert peers.possible("a", "cuda", refuses) is None
    assert "a does not run on cuda, and is left out: not on this device" in capsys.readouterr().out
    with pytest.raises(RuntimeError):
        peers.possible("a", "cpu", refuses)


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
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
    monkeypatch.setattr(peers, "chosen", lambda solver, compiled=False: [HAND, "DiscreteAdjoint"])
    peers.main(["--device", "cuda", "--steps", "2", "--solvers", "euler", "--rounds", "2", "--parts", *peers.PARTS[:3]])
    parts = peers.read("peers_cuda")["parts"]
    assert all(set(parts[part]["euler"]["2"]) == {HAND, "DiscreteAdjoint"} for part in peers.PARTS[:3])
    assert parts["memory"]["euler"]["2"]["DiscreteAdjoint"] > 2 * 2**20
    assert max(parts["gradients"]["euler"]["2"]["DiscreteAdjoint"].values()) < 1e-4


def test_a_training_step_starts_from_no_gradients():
    layer, run = build("Backprop", 2, "euler")
    step = peers.once(layer, run)
    step()
    first = [p.grad.clone() for p in layer.parameters()]
    step()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, layer.parameters(), strict=True))


RESULTS = {
    "time": {
        "euler": {
            "5": {
                HAND: {"median": 1.0, "lower_quartile": 1.0, "upper_quartile": 1.0},
                "Backprop": {"median": 0.98, "lower_quartile": 0.97, "upper_quartile": 1.02},
                "DiscreteAdjoint": {"median": 1.3, "lower_quartile": 1.2, "upper_quartile": 1.4},
            }
        }
    },
    "memory": {"euler": {"50": {"DiscreteAdjoint": 100 * 2**20}}},
    "gradients": {"euler": {"5": {HAND: dict.fromkeys(peers_page.GROUPS, 1e-6)}}},
}


def test_every_target_stands_beside_what_was_reached(tmp_path, monkeypatch):
    """On a page of its own; what was not measured is said to be missing, and no target is left out."""
    where = {"device": "cpu", "cores": 2, "python": "3", "load_average": None}
    runs = [{"command": f"python -m {name}", "environment": where} for name in ("old", "benchmarks.peers")]
    contents = {"peers": {"environment": where, "parts": RESULTS, "runs": runs, "made_by": {"time": 1}}}
    monkeypatch.setattr(peers_page, "read", lambda name: contents.get(name, {}))
    page = tmp_path / "page.md"
    names = ("targets", "time", "memory", "accuracy", "adaptive")
    page.write_text("\n".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->" for name in names))
    peers_page.main(["--page", str(page), "--figure", str(tmp_path / "peers.png")])
    text = page.read_text()
    assert "old" not in text
    assert "On cpu, torch's threads 2, Python 3, . By `python -m benchmarks.peers`." in text
    assert all(target.what in text for target in peers_page.TARGETS)
    assert "| time: `DiscreteAdjoint()`, Euler, 5 steps | 1.25 | 1.3 | no |" in text
    assert "| time: `Backprop()`, Euler, 5 steps | 1 | 0.98 | yes |" in text
    assert "| memory: `DiscreteAdjoint()`, Euler, 50 steps | 112 MiB | 100 MiB | yes |" in text
    assert "| time: the same, compiled | 0.9 | not measured | |" in text
    assert "| DiscreteAdjoint | 1.30 (1.20 to 1.40) |" in text
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_a_page_without_results_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(peers_page, "read", lambda name: {})
    with pytest.raises(SystemExit):
        peers_page.main([])
    assert "there are no results yet: run python -m benchmarks.peers" in capsys.readouterr().err


def test_targets_name_candidates_that_there_are():
    """A misspelt name would read as not measured for ever."""

    class Recorder(dict):
        def __missing__(self, key):
            asked.append(key)
            raise KeyError(key)

    for target in peers_page.TARGETS:
        asked: list[str] = []
        leaf = Recorder()
        tree = {
            part: {s: {str(n): leaf for n in (0, 5, 20, 50)} for s in ("euler", "rk4", ADAPTIVE)}
            for part in ("time", "memory", "gradients")
        }
        stack = Recorder()
        tree["inference"] = {"euler": {"5": stack}}
        tree["evolution"] = stack
        with pytest.raises(KeyError):
            target.value(tree)
        assert asked[0] in CANDIDATES or asked[0] in ("coupled layer", "baked layer", *CASES), target.what


def test_the_memory_table_leaves_out_what_was_not_measured():
    peaks = {"a": {5: 3 * 2**20, 10: 5 * 2**20}, "b": {5: 2**20}}
    lines = memory.table(peaks, {"a": 0.2, "b": 0.0}).splitlines()
    assert lines == [
        "| steps | 5 | 10 | states a step |",
        "|---|---:|---:|---:|",
        "| a | 3 | 5 | 0.20 |",
        "| b | 1 |  | 0.00 |",
    ]


def test_one_methods_memory_is_measured_again_and_only_where_the_others_were(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
    for name in ("FIGURE", "PAGE"):
        monkeypatch.setattr(memory, name, tmp_path / name)
    (tmp_path / "PAGE").write_text("<!-- memory -->\n<!-- end of memory -->\n")
    monkeypatch.setattr(memory.plotting, "memory_against_steps", lambda *arguments: Figure())
    monkeypatch.setattr(memory, "in_a_process", lambda name, solver, n: n * 2**20)
    memory.main(["--steps", "5", "10"])
    monkeypatch.setattr(memory, "in_a_process", lambda name, solver, n: 7 * n * 2**20)
    memory.main(["--steps", "5", "10", "--only", "disk, own"])
    found = json.loads((tmp_path / "memory.json").read_text())["peak_bytes"]
    assert {name for name, peaks in found.items() if peaks["5"] == 35 * 2**20} == {"DiscreteAdjoint, disk, own weights"}
    assert list(found) == [HAND, *METHODS]
    assert "| DiscreteAdjoint, disk, own weights | 35 | 70 |" in (tmp_path / "PAGE").read_text()
    with pytest.raises(ValueError, match=r"'euler'.*'rk4'.*leave --only out"):
        memory.main(["--solver", "rk4", "--only", "disk, own"])


def test_memory_of_one_method_needs_no_others_but_a_name_that_exists(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
    assert memory.others("euler") == {}
    with pytest.raises(SystemExit) as stop:
        memory.main(["--only", "tape"])
    assert stop.value.code == 2
    assert (
        "--only tape: no method has this in its name; they are hand-written loop, Backprop," in capsys.readouterr().err
    )


def test_findings_are_saved_as_they_come(tmp_path, monkeypatch):
    """A run that breaks off, or one part measured again, leaves the other findings where they were."""
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
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
