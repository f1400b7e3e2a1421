#!/usr/bin/env bash
# torch 2.14.1, static int8 quantization (torch.ao.quantization.quantize_fx): a layer that is used several times gets the
# scale of its last use.
#
# The guess: prepare_fx puts an observer behind every call, the calibration fills each of them, so every use of a weight-tied
#   layer (a recurrent cell, an Euler loop) has its own scale, and the error is that of a stack of copies.
# What happens: all observers are there and are filled, but the quantized layer holds one output scale, and convert_fx takes
#   the last call's. Where a loop contracts, that range is far too small for the first uses, whose outputs are clipped: an
#   error of more than 100%, where copies of the layer have 0.3%. Where it grows, the first uses have a coarse scale.
# Do this instead: unroll the loop into copies that share their weight (copy.deepcopy for each use) before prepare_fx.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - <<'PY'
import sys
import warnings

import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

warnings.simplefilter("ignore")
print("torch", torch.__version__)
engine = "fbgemm" if "fbgemm" in torch.backends.quantized.supported_engines else "qnnpack"
torch.backends.quantized.engine = engine
USES = 8


class Loop(nn.Module):
    """z + cell(z), eight times: by one cell, or by copies of it."""

    def __init__(self, cells):
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(self, z):
        for use in range(USES):
            z = z + self.cells[use % len(self.cells)](z)
        return z


def cell(rate):
    linear = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(rate * torch.eye(16))
    return linear


torch.manual_seed(0)
x = 1 + torch.rand(256, 16)
errors = {}
for rate in (-0.25, 0.5):
    for name, count in (("one cell", 1), ("copies", USES)):
        model = Loop([cell(rate) for _ in range(count)]).eval()
        with torch.no_grad():
            prepared = prepare_fx(model, get_default_qconfig_mapping(engine), (x,))
            prepared(x)
            quantized = convert_fx(prepared)
            error = float((quantized(x) - model(x)).norm() / model(x).norm())
        errors[rate, name] = error
        scales = ", ".join(f"{part.scale:.4f}" for part in quantized.cells.children())
        print(f"rate {rate:5}, {name:8}: error {error:7.2%}, scales of the cell's output: {scales}")

same = errors[-0.25, "one cell"] > 1 and errors[0.5, "one cell"] > 0.02
same = same and max(errors[-0.25, "copies"], errors[0.5, "copies"]) < 0.01
sys.exit(0 if same else "the behaviour has changed")
PY
