"""A ResNet-18 of torchvision from conversion to ONNX: trained by Lightning, logged, plotted, exported.

python docs/examples/your_resnet.py --out runs/resnet18
python docs/examples/your_resnet.py --devices 4 --strategy ddp --epochs 20 --out runs/resnet18
tensorboard --logdir runs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torchvision.models import resnet18

import neuralode_coupled as nc
from neuralode_coupled.figures import filters_over_time
from neuralode_coupled.train import Classifier, ImageData, WeightLog


class Log(pl.Callback):
    """The curves, the evolution coefficients and pictures of filters, for TensorBoard."""

    def __init__(self, model: nn.Module, epochs: int) -> None:
        self.weights = WeightLog(model, epochs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write an epoch."""
        epoch = trainer.current_epoch + 1
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}  # by all processes
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.log_metrics(measured, epoch)
            self.weights.write(trainer.logger.experiment, epoch)


def export(model: nn.Module, images: torch.Tensor, path: Path) -> float:
    """Write the model as ONNX for any batch size; returns how far onnxruntime is from it, with one image and with all.

    An export is for the one batch size of its images unless ``dynamic_shapes`` says which axis is free.
    """
    free = ({0: torch.export.Dim("batch", min=1)},)
    # From opset 21 on onnxruntime computes GroupNorm inexactly.
    torch.onnx.export(
        nc.bake(model.eval()), (images,), path, dynamic_shapes=free, opset_version=20, dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    differences = []
    for some in (images[:1], images):
        (found,) = session.run(None, {"x": some.numpy()})
        with torch.no_grad():
            differences.append(float((torch.as_tensor(found) - model(some)).abs().max()))
    return max(differences)


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--limit", type=int, help="use only so many images")
    for name in ("accelerator", "devices", "strategy"):
        parser.add_argument(f"--{name}", default="auto", help="Lightning's")
    chosen = parser.parse_args()

    pl.seed_everything(0)
    model = resnet18(num_classes=10)  # load your state dict here
    nc.couple(model, "layer*.1", nc.ReactionDiffusionAdvection(), steps=2)
    trainer = pl.Trainer(
        max_epochs=chosen.epochs,
        accelerator=chosen.accelerator,
        devices=chosen.devices,
        strategy=chosen.strategy,
        logger=TensorBoardLogger(chosen.out, name="", version="tensorboard"),
        callbacks=[Log(model, chosen.epochs)],
        use_distributed_sampler=False,  # ImageData shares the images out itself
    )
    data = ImageData("digits", limit=chosen.limit)
    trainer.fit(Classifier(model, epochs=chosen.epochs, lr=0.02), data)
    if not trainer.is_global_zero:
        return

    layer = nc.models.coupled_layers(model)["layer1.1.coupled"]
    filters_over_time(layer).savefig(chosen.out / "filters.png")
    model = model.cpu()
    difference = export(model, torch.randn(8, 3, 32, 32), chosen.out / "model.onnx")
    accuracy = float(trainer.callback_metrics["test/accuracy"])
    print(f"test accuracy {100 * accuracy:.1f}%; onnxruntime differs by {difference:.1e}; see {chosen.out}")


if __name__ == "__main__":
    main()
