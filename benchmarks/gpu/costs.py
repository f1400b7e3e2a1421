"""What a step costs beside its time: bytes moved, kernels, launches and synchronisations, memory."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.steps import Step
from benchmarks.lib import memory
from benchmarks.lib.clock import clocked
from benchmarks.lib.device import Device, wait


class Traffic(TorchDispatchMode):
    """Counts the bytes of what goes into and comes out of operations, see `benchmarks.gpu`."""

    ALLOCATIONS = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"})

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in {*self.ALLOCATIONS, "aten::_unsafe_view"}:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            # An expanded tensor is no larger than what it expands.
            self.bytes += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        return result


def traffic(step: Callable[[], None]) -> int:
    """Bytes a step, see `benchmarks.gpu`."""
    with Traffic() as counted:
        step()
    return counted.bytes


def copy_bandwidth(device: Device, size: int = 2**30, rounds: int = 20) -> float:
    """Bytes a second, read and written, of a copy of ``size`` bytes within the device's memory; the median."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    wait(device)
    seconds = [clocked(lambda: target.copy_(source), device) for _ in range(rounds)]
    return 2 * size / statistics.median(seconds)


WAITS = frozenset({"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"})
ON_HOST = ("cuda_runtime", "cuda_driver")


def counted(events: Sequence[dict[str, Any]]) -> Counter[str]:
    """Kernels and copies on the device, launches and synchronisations by the host, in the events of a trace."""
    found: Counter[str] = Counter()
    for event in events:
        kind, name = event.get("cat", ""), event.get("name", "")
        found["kernels"] += kind == "kernel"
        found["copies"] += kind in ("gpu_memcpy", "gpu_memset")
        found["launches"] += kind in ON_HOST and "Launch" in name
        found["synchronisations"] += kind in ON_HOST and name in WAITS
    return found


def trace(step: Callable[[], None], count: int, device: Device) -> list[dict[str, Any]]:
    """The events of so many steps, by torch.profiler."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.device(device).type == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(count):
            step()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def counts(step: Callable[[], None], device: Device) -> dict[str, float]:
    """`counted` a step; what the profiler does at its beginning and its end falls out of the difference."""
    one, three = (counted(trace(step, count, device)) for count in (1, 3))
    return {name: (three[name] - one[name]) / 2 for name in ("kernels", "copies", "launches", "synchronisations")}


def peak(step: Callable[[], None], device: Device) -> int:
    """Peak bytes above the level before the step, gradients included."""
    if isinstance(step, Step):
        step.optimizer.zero_grad(set_to_none=True)
    return memory.peak(step, device)
