"""The benchmark of a training step on a GPU: what it compares is the same step, and what it counts is what there is.

Everything but graphs and the counts of a device runs on the CPU too, at a tiny size.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import neuralode_coupled as nc
from benchmarks.gpu import command, costs
from benchmarks.gpu import measure as gpu
from benchmarks.gpu.measure import Measured
from benchmarks.gpu.steps import (
    FORMATS,
    MODES,
    PEER,
    SOLVERS,
    ByTorchdiffeq,
    Graph,
    Step,
    build,
    by_torchdiffeq,
    candidates,
    compiled,
    network,
)
from benchmarks.lib import clock
from benchmarks.lib.device import tf32
from benchmarks.lib.images import random_batch
from neuralode_coupled.models import coupled_layers
from tests.helpers import oracle

EAGER = [("recomputed", "eager"), (PEER, "eager")]


@pytest.fixture
def resnet4(monkeypatch):
    """The smaller network, where which one it is makes no difference."""
    monkeypatch.setattr("benchmarks.gpu.steps.MODEL", "resnet4")


def test_torchdiffeq_solves_the_very_model():
    """With the weights under the ODE that a vector field has; every step has its own BatchNorm."""
    ours = nc.models.build("resnet10", "anodev2-1", evolution=nc.ReactionDiffusionAdvection("ode")).double().train()
    for layer in coupled_layers(ours).values():
        oracle.randomize(layer)
    theirs = by_torchdiffeq(copy.deepcopy(ours))
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))
    found = []
    for model in (ours, theirs):
        logits = model(images)
        functional.cross_entropy(logits, labels).backward()
        gradients = [p.grad for p in model.parameters()]
        statistics = [buffer for name, buffer in model.named_buffers() if "running" in name]
        found.append([logits, *gradients, *statistics])
    assert len(found[0]) == len(found[1]) > 50
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_other_methods_than_eulers_are_not_for_the_peer():
    layer = nc.CoupledODE(nn.Linear(2, 2), steps=2, method="rk4")
    with pytest.raises(ValueError, match="as by 'euler', got a layer by 'rk4'"):
        ByTorchdiffeq(layer)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_train_in_every_format(resnet4, solver, form):
    step = Step(network(solver, "cpu"), FORMATS[form], random_batch(4, "cpu"))
    step.optimizer.param_groups[0]["lr"] = 0.02
    losses = []
    for _ in range(4):
        step()
        losses.append(float(step.loss))
    assert losses[-1] < losses[0]


def test_gradient_methods_take_the_same_step():
    first = []
    for solver in ("recomputed", "backprop"):
        step = build("float32", solver, "eager", random_batch(4, "cpu"))
        first.append(nn.utils.parameters_to_vector(step.model.parameters()).detach())
    torch.testing.assert_close(*first, rtol=1e-5, atol=1e-6)
    assert not torch.equal(first[0], nn.utils.parameters_to_vector(network("recomputed", "cpu").parameters()))


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step(resnet4):
    torch._dynamo.reset()
    batch = random_batch(2, "cpu")
    eager = Step(network("backprop", "cpu"), FORMATS["float32"], batch)
    other = compiled(Step(network("backprop", "cpu"), FORMATS["float32"], batch), "aot_eager")
    for _ in range(2):
        eager()
        other()
    torch.testing.assert_close(eager.loss, other.loss, rtol=1e-4, atol=1e-5)


def test_the_peer_is_eager_alone():
    assert list(candidates(SOLVERS, MODES)) == [
        *((solver, mode) for solver in ("recomputed", "backprop") for mode in MODES),
        (PEER, "eager"),
    ]


def test_bytes_are_those_of_what_goes_in_and_comes_out():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
    assert costs.traffic(x.relu) == 2 * 4 * x.numel()
    assert costs.traffic(lambda: x.view(-1)[3:]) == 0
    assert costs.traffic(lambda: torch.empty(100)) == 0
    assert costs.traffic(lambda: functional.conv2d(x, w, padding=1)) == 4 * (x.numel() + w.numel() + 2 * 5 * 64)
    wide = torch.randn(1).expand(1000)
    assert costs.traffic(lambda: wide + wide) == 4 * (1 + 1 + 1000)
    y = torch.randn(10, requires_grad=True)  # backward too: ones, and their product with a number
    assert costs.traffic(lambda: (y * 2).sum().backward()) > 4 * 4 * 10


def test_recomputation_moves_more():
    batch = random_batch(2, "cpu")
    moved = {s: costs.traffic(build("float32", s, "eager", batch)) for s in ("recomputed", "backprop")}
    assert 1.1 < moved["recomputed"] / moved["backprop"] < 1.5


def test_the_bandwidth_of_a_copy_counts_both_ways(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(now)))
    assert costs.copy_bandwidth("cpu", size=100, rounds=3) == 200.0


def event(kind: str, name: str) -> dict:
    return {"ph": "X", "cat": kind, "name": name}


STEP = [
    *[event("kernel", "gemm"), event("cuda_runtime", "cudaLaunchKernel")] * 3,
    event("kernel", "triton_fused"),
    event("cuda_driver", "cuLaunchKernelEx"),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)"),
    event("cuda_runtime", "cudaMemcpyAsync"),
    event("cuda_runtime", "cudaStreamSynchronize"),
    event("cuda_runtime", "cudaGraphLaunch"),
    event("cpu_op", "aten::conv2d"),
    event("gpu_user_annotation", "Optimizer.step#SGD.step"),
    {"ph": "s", "id": 3},
]
ONCE = [event("cuda_runtime", "cudaDeviceSynchronize"), event("kernel", "warm-up")]


def test_a_trace_is_counted_by_step(monkeypatch):
    monkeypatch.setattr(costs, "trace", lambda step, count, device: ONCE + count * STEP)
    found = costs.counts(lambda: None, "cuda")
    assert found == {"kernels": 4, "copies": 1, "launches": 5, "synchronisations": 1}


def test_a_step_on_the_cpu_has_a_trace_without_kernels():
    taken = []
    events = costs.trace(lambda: taken.append(torch.ones(3) + 1), 2, "cpu")
    assert len(taken) == 2
    assert sum(e.get("name") == "aten::add" for e in events) == 2
    assert costs.counted(events)["kernels"] == 0


def test_tf32_is_as_it_was_afterwards():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for allowed in (True, False):
        with tf32(allowed):
            assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (allowed, allowed)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_every_finding_is_saved_as_it_comes(resnet4, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.lib.results.RESULTS", tmp_path)

    results = Measured(2, "cpu", "the command")

    def broken(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "ratios", broken)
        with pytest.raises(KeyboardInterrupt):
            gpu.measured("bfloat16", EAGER, random_batch(2, "cpu"), 1e9, 2, results)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["environment"]["device"] == "cpu"
    assert set(found["commands"].values()) == {"the command"}
    half = found["batches"]["2"]
    assert set(half) == {"bfloat16, recomputed, eager", "bfloat16, torchdiffeq odeint, eager"}
    assert all(row["bytes"] > 0 and row["kernels"] == 0 and "time" not in row for row in half.values())

    gpu.measured("bfloat16", EAGER, random_batch(2, "cpu"), 1e9, 2, results)
    whole = json.loads((tmp_path / "gpu.json").read_text())["batches"]["2"]
    assert set(whole) == set(half)  # the reference is there for the ratios
    for row in whole.values():
        assert row["time"]["median"] > 0
        assert row["share_of_bandwidth"] == pytest.approx(row["bytes"] / row["time"]["seconds"] / 1e9)


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.lib.results.RESULTS", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command.main([])
    assert "no CUDA device here: nothing is measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("--rounds", "1"), ("--batch-size", "1")])
def test_too_little_is_refused(capsys, name, value):
    with pytest.raises(SystemExit) as stop:
        command.main([name, value])
    assert stop.value.code == 2
    assert f"{name} must be at least 2, got {value}" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("solver", ["recomputed", "backprop"])
def test_a_graph_trains_as_the_eager_step_does(solver, form):
    batch = random_batch(8, "cuda")
    eager = Step(network(solver, "cuda"), FORMATS[form], batch)
    graph = Graph(Step(network(solver, "cuda"), FORMATS[form], batch))  # has taken three steps
    for _ in range(3):
        eager()
    for _ in range(3):
        eager()
        graph()
    tolerance = 1e-4 if form == "float32" else 5e-2
    torch.testing.assert_close(eager.loss, graph.step.loss, rtol=tolerance, atol=tolerance)
    assert math.isfinite(float(eager.loss))


@pytest.mark.gpu
def test_ours_does_not_synchronise_and_a_graph_is_launched_at_once():
    batch = random_batch(8, "cuda")
    ours = costs.counts(build("float32", "recomputed", "eager", batch), "cuda")
    assert ours["synchronisations"] == 0
    assert min(ours["launches"], ours["kernels"]) > 100
    graph = costs.counts(build("float32", "recomputed", "graph", batch), "cuda")
    assert graph["launches"] <= 3  # torch may hand the graph the state of its random numbers too
    assert graph["synchronisations"] == 0
    peer = costs.counts(build("float32", PEER, "eager", batch), "cuda")
    assert peer["synchronisations"] >= 2 * 5


@pytest.mark.gpu
def test_the_benchmark_on_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.lib.results.RESULTS", tmp_path)
    command.main(["--batch-size", "4", "--rounds", "2", "--formats", "bfloat16", "--modes", "eager", "graph"])
    found = json.loads((tmp_path / "gpu.json").read_text())["batches"]["4"]
    assert found.pop("device")["copy_bytes_per_second"] > 1e10
    names = [f"bfloat16, {solver}, {mode}" for solver, mode in candidates(SOLVERS, ("eager", "graph"))]
    assert list(found) == names
    assert all(0 < row["share_of_bandwidth"] < 1 for row in found.values())
    assert found[names[0]]["peak_bytes"] > 0
