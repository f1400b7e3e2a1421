"""The paper's networks: `build("resnet4", "anodev2-1")`."""

from neuralode_coupled.models.named import KERNELS, evolution_named, kernel_named
from neuralode_coupled.models.variants import ADJOINTS, EVOLUTIONS, NETWORKS, VARIANTS, build, by_name, coupled_layers

__all__ = [
    "ADJOINTS",
    "EVOLUTIONS",
    "KERNELS",
    "NETWORKS",
    "VARIANTS",
    "build",
    "by_name",
    "coupled_layers",
    "evolution_named",
    "kernel_named",
]
