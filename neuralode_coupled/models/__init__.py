"""The paper's networks: `build("resnet4", "anodev2-1")`."""

from neuralode_coupled.models.build import NETWORKS, VARIANTS, build, coupled_layers

__all__ = ["NETWORKS", "VARIANTS", "build", "coupled_layers"]
