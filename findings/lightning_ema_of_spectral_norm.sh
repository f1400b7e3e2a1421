#!/usr/bin/env bash
# pytorch-lightning 2.6.6 with torch 2.14.1: EMAWeightAveraging, as it comes, and layers with spectral norm.
#
# The guess: the averaged model is a little better than the last one, and its weights keep the norm 1 that spectral norm gives
#   them, since they are divided by their norm whatever their values are.
# What happens: the callback averages buffers too (use_buffers=True by default, which BatchNorm wants). Spectral norm keeps the
#   singular vectors u and v of its power iteration there. They turn while the weights are trained, so that their averages are
#   shorter than 1, or nearly cancel; in eval mode the norm is u' W v with no further iteration, too small, and the weights are
#   too large by that: norms of 5 to 17 in place of 1, and three to seven times the loss of the last model. Training looks
#   healthy all the time. (Other programs with averages of their own have met the same.)
# Do this instead: use_buffers=False, and update_bn if there is BatchNorm; or, before the averaged model is used, run it a few
#   times in training mode without gradients: the iteration finds the vectors again.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.14.1 pytorch-lightning==2.6.6 numpy==2.4.6 2> "$work/log" || { cat "$work/log"; exit 2; }
cd "$work" && "$work/env/bin/python" -I - 2> "$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import logging
import sys
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
print("pytorch-lightning", pl.__version__, "torch", torch.__version__)


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = (8, 32, 32, 1)
        self.layers = nn.ModuleList(spectral_norm(nn.Linear(a, b)) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return 3 * self.layers[-1](x)

    def training_step(self, batch, index):
        x, y = batch
        return (self(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trained(seed, *callbacks):
    pl.seed_everything(seed, verbose=False)
    x = torch.randn(512, 8)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    model = Regression()
    trainer = pl.Trainer(
        max_epochs=40, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    return model, x, y


def measured(model, x, y):
    """The largest norm of a weight, and the loss, in eval mode."""
    model.eval()
    with torch.no_grad():
        norm = max(float(torch.linalg.matrix_norm(layer.weight, 2)) for layer in model.layers)
        return norm, float((model(x) - y).square().mean())


same = True
for seed in range(3):
    found = {
        "the last model": measured(*trained(seed)),
        "averaged, as it comes": measured(*trained(seed, EMAWeightAveraging(decay=0.99))),
        "averaged, use_buffers=False": measured(*trained(seed, EMAWeightAveraging(decay=0.99, use_buffers=False))),
    }
    model, x, y = trained(seed, EMAWeightAveraging(decay=0.99))
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(x)
    found["averaged, 20 passes later"] = measured(model, x, y)
    for name, (norm, loss) in found.items():
        print(f"seed {seed}, {name:27}: largest norm of a weight {norm:6.2f}, loss {loss:.3f}")
    same = same and found["averaged, as it comes"][0] > 1.5 and found["averaged, use_buffers=False"][0] < 1.3
    same = same and found["averaged, as it comes"][1] > 2 * found["the last model"][1]
sys.exit(0 if same else "the behaviour has changed")
PY
