"""A classifier as Lightning trains it: the paper's optimiser and schedule, stopped when the loss breaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from neuralode_coupled._extras import needs
from neuralode_coupled.models import coupled_layers
from neuralode_coupled.train import weights_file
from neuralode_coupled.train.schedules import learning_rate

with needs("train"):
    import numpy as np
    import pytorch_lightning as pl

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
_CHECK_EVERY = 50
"""Steps between looks at the loss on devices that compute ahead of the host, which a look makes wait."""

_NEVER = torch.iinfo(torch.int64).max


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(
            f"the loss became NaN or infinite in epoch {epoch}, at step {step} of the run: "
            "try a smaller learning rate (checkpoints of earlier epochs are kept)"
        )
        self.epoch, self.step = epoch, step

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.epoch, self.step)


class Classifier(pl.LightningModule):
    """Cross entropy by SGD with momentum 0.9 and weight decay 5e-4, and one of `SCHEDULES` of the learning rate.

    Logs ``train/loss``, ``train/accuracy``, ``test/loss`` and ``test/accuracy`` (means over the images of an epoch).
    All random numbers of an epoch follow from the seed and the number of the epoch.

    Args:
        model: images (batch, 3, 32, 32) to logits (batch, classes).
        epochs: the length of the schedule. After it the learning rate stays that of its last batch.
        lr: the highest learning rate.
        evolution_lr: the factor on it for the parameters of the evolution operators.
        seed: of dropout and augmentation.
        schedule: of the learning rate, see `learning_rate`.
        origin: what the model is; checkpoints keep it, see `weights_file`.

    Raises:
        Diverged: in training, once the loss is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        epochs: int,
        lr: float = 0.1,
        evolution_lr: float = 1.0,
        seed: int = 0,
        schedule: str = "steps",
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.origin = dict(origin or {})
        self.model = model
        self.epochs, self.lr, self.evolution_lr, self.seed = epochs, lr, evolution_lr, seed
        self.schedule = schedule
        self._first_bad_step: Tensor | None = None

    def forward(self, images: Float[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, a scalar."""
        loss = self._measure(batch, "train")
        self._watch(loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measures a batch of test images."""
        self._measure(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD over all parameters, those of the evolution operators in a group of their own."""
        return torch.optim.SGD(self._groups(), self.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def _groups(self) -> list[dict[str, Any]]:
        layers = coupled_layers(self.model).values()
        coefficients = {id(p): p for layer in layers for p in layer.field.evolution.parameters()}
        others = [p for p in self.parameters() if id(p) not in coefficients]
        return [
            {"params": parameters, "factor": factor}
            for parameters, factor in ((others, 1.0), ([*coefficients.values()], self.evolution_lr))
            if parameters
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Momentum of a coefficient that had no axis in an earlier version gets one, as the coefficient does.

        A parameter of the user's own may be without an axis to this day.
        """
        parameters = [p for group in self._groups() for p in group["params"]]
        for optimizer in checkpoint.get("optimizer_states", ()):
            numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
            for number, parameter in zip(numbers, parameters, strict=False):  # that they fit is looked at elsewhere
                state = optimizer["state"].get(number, {})
                momentum = state.get("momentum_buffer")
                if isinstance(momentum, Tensor) and momentum.ndim == 0 and parameter.ndim == 1:
                    state["momentum_buffer"] = momentum.reshape(1)

    def on_train_epoch_start(self) -> None:
        """Set the random state, which depends on the epoch alone."""
        entropy = np.random.SeedSequence([self.seed, self.current_epoch, self.global_rank])
        torch.manual_seed(int(entropy.generate_state(1)[0]))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate.

        Not by a scheduler: Lightning saves checkpoints before it steps those, and theirs would not know of a run that
        is extended.
        """
        batches = self.trainer.num_training_batches
        # The last batch of the schedule, in epochs after it.
        epoch, batch_idx = min((self.current_epoch, batch_idx), (self.epochs - 1, int(batches) - 1))
        rate = learning_rate(self.lr, epoch, self.epochs, self.schedule, batch_idx / batches)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["factor"] * rate

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the weights belong to."""
        checkpoint[weights_file.ORIGIN] = self.origin

    def _measure(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = functional.cross_entropy(logits, labels)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        self.log_dict(
            {f"{split}/loss": loss.detach(), f"{split}/accuracy": accuracy},
            on_step=False,
            on_epoch=True,  # summed on the device, and read once per epoch
            logger=False,  # `EpochLog` writes one row per epoch
            sync_dist=True,
            batch_size=len(labels),
        )
        return loss

    def _watch(self, loss: Tensor) -> None:
        """Remember on the device which step broke; look from time to time, and on the CPU always."""
        step = self.global_step + 1
        if self._first_bad_step is None:
            self._first_bad_step = torch.full((), _NEVER, device=loss.device)
        first = self._first_bad_step
        self._first_bad_step = torch.where(loss.isfinite(), first, first.clamp(max=step))
        if _looks(loss.device.type, step) or self.trainer.is_last_batch:
            # All devices stop together, or some would wait for the others forever.
            worst = int(self.trainer.strategy.reduce(self._first_bad_step, reduce_op="min"))
            if worst != _NEVER:
                raise Diverged(self.current_epoch + 1, worst)


def _looks(kind: str, step: int) -> bool:
    """Whether a step on such a device reads the loss."""
    return kind == "cpu" or step % _CHECK_EVERY == 0
