"""BibTeX of the paper, of this package, and of the methods that a model uses."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from neuralode_coupled._checks import check_model
from neuralode_coupled._version import __version__
from neuralode_coupled.adjoint import ContinuousAdjoint, DiscreteAdjoint, ReversibleAdjoint
from neuralode_coupled.coupled.layer import CoupledODE
from neuralode_coupled.evolution import HyperNetwork, ReactionDiffusionAdvection

_ANODEV2 = """\
@inproceedings{zhang2019anodev2,
  title = {{ANODEV2}: A Coupled Neural {ODE} Framework},
  author = {Zhang, Tianjun and Yao, Zhewei and Gholami, Amir and Keutzer, Kurt and Gonzalez, Joseph and Biros, George
            and Mahoney, Michael W.},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {32},
  year = {2019},
  url = {https://arxiv.org/abs/1906.04596}
}"""

_SOFTWARE = """\
@software{neuralode_coupled,
  title = {neuralode_coupled: Coupled Neural {ODE}s for {PyTorch}},
  author = {{The neuralode_coupled authors}},
  version = {VERSION},
  license = {MIT}
}"""

_ANODE = """\
@inproceedings{gholami2019anode,
  title = {{ANODE}: Unconditionally Accurate Memory-Efficient Gradients for Neural {ODE}s},
  author = {Gholami, Amir and Keutzer, Kurt and Biros, George},
  booktitle = {Proceedings of the 28th International Joint Conference on Artificial Intelligence},
  pages = {730--736},
  year = {2019},
  url = {https://arxiv.org/abs/1902.10298}
}"""

_REVOLVE = """\
@article{griewank2000revolve,
  title = {Algorithm 799: Revolve: An Implementation of Checkpointing for the Reverse or Adjoint Mode of Computational
           Differentiation},
  author = {Griewank, Andreas and Walther, Andrea},
  journal = {ACM Transactions on Mathematical Software},
  volume = {26},
  number = {1},
  pages = {19--45},
  year = {2000},
  doi = {10.1145/347837.347846}
}"""

_NEURAL_ODE = """\
@inproceedings{chen2018neural,
  title = {Neural Ordinary Differential Equations},
  author = {Chen, Ricky T. Q. and Rubanova, Yulia and Bettencourt, Jesse and Duvenaud, David},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {31},
  year = {2018},
  url = {https://arxiv.org/abs/1806.07366}
}"""

_REVERSIBLE = """\
@misc{mccallum2024efficient,
  title = {Efficient, Accurate and Stable Gradients for Neural {ODE}s},
  author = {McCallum, Sam and Foster, James},
  year = {2024},
  url = {https://arxiv.org/abs/2410.11648}
}"""

_HYPERNETWORKS = """\
@inproceedings{ha2017hypernetworks,
  title = {{HyperNetworks}},
  author = {Ha, David and Dai, Andrew M. and Le, Quoc V.},
  booktitle = {International Conference on Learning Representations},
  year = {2017},
  url = {https://arxiv.org/abs/1609.09106}
}"""

_MORPHOGENESIS = """\
@article{turing1952chemical,
  title = {The Chemical Basis of Morphogenesis},
  author = {Turing, Alan M.},
  journal = {Philosophical Transactions of the Royal Society of London. Series B},
  volume = {237},
  number = {641},
  pages = {37--72},
  year = {1952},
  doi = {10.1098/rstb.1952.0012}
}"""


def _article(key: str, title: str, author: str, journal: str, place: str, year: int, doi: str) -> str:
    volume, number, pages = place.split(", ")
    lines = {"title": title, "author": author, "journal": journal, "volume": volume, "number": number, "pages": pages}
    lines |= {"year": str(year), "doi": doi}
    return f"@article{{{key},\n" + ",\n".join(f"  {name} = {{{value}}}" for name, value in lines.items()) + "\n}"


_METHODS = {
    "bosh3": _article(
        "bogacki1989pair",
        "A 3(2) Pair of {Runge--Kutta} Formulas",
        "Bogacki, Przemyslaw and Shampine, Lawrence F.",
        "Applied Mathematics Letters",
        "2, 4, 321--325",
        1989,
        "10.1016/0893-9659(89)90079-7",
    ),
    "dopri5": _article(
        "dormand1980family",
        "A Family of Embedded {Runge--Kutta} Formulae",
        "Dormand, John R. and Prince, Peter J.",
        "Journal of Computational and Applied Mathematics",
        "6, 1, 19--26",
        1980,
        "10.1016/0771-050X(80)90013-3",
    ),
    "dopri8": _article(
        "prince1981high",
        "High Order Embedded {Runge--Kutta} Formulae",
        "Prince, Peter J. and Dormand, John R.",
        "Journal of Computational and Applied Mathematics",
        "7, 1, 67--75",
        1981,
        "10.1016/0771-050X(81)90010-3",
    ),
    "tsit5": _article(
        "tsitouras2011runge",
        "{Runge--Kutta} Pairs of Order 5(4) Satisfying Only the First Column Simplifying Assumption",
        "Tsitouras, Charalampos",
        "Computers and Mathematics with Applications",
        "62, 2, 770--775",
        2011,
        "10.1016/j.camwa.2011.06.002",
    ),
    "fehlberg2": """\
@techreport{fehlberg1969low,
  title = {Low-Order Classical {Runge--Kutta} Formulas with Stepsize Control and Their Application to Some Heat
           Transfer Problems},
  author = {Fehlberg, Erwin},
  institution = {NASA},
  number = {TR R-315},
  year = {1969}
}""",
}
"""The methods known by their authors' names. Euler's, Heun's and Kutta's are in every textbook."""


def citation(layer: nn.Module | None = None) -> str:
    """BibTeX to cite: the paper, this package, and the methods that a layer uses.

    Args:
        layer: a coupled layer, or a model with coupled layers: their solvers, gradient methods and operators are added.
            None for the paper and the package alone.

    Returns:
        The entries, separated by empty lines; each once.

    Raises:
        TypeError: if layer is not a module.
        ValueError: if it is a model without a coupled layer.
    """
    entries = [_ANODEV2, _SOFTWARE.replace("VERSION", __version__)]
    if layer is not None:
        check_model(layer)
        layers = [module for module in layer.modules() if isinstance(module, CoupledODE)]
        if not layers:
            raise ValueError(f"{type(layer).__name__} has no coupled layer: nc.citation() gives the paper alone")
        entries += [entry for each in layers for entry in _used(each)]
    return "\n\n".join(dict.fromkeys(entries))


def _used(layer: CoupledODE) -> Iterator[str]:
    """The entries of the methods of one layer."""
    for method in (layer.method, layer.weight_method):
        if method in _METHODS:
            yield _METHODS[method]
    match layer.adjoint:
        case DiscreteAdjoint(checkpoints=checkpoints):
            yield _ANODE
            if isinstance(checkpoints, int):
                yield _REVOLVE
        case ContinuousAdjoint(method=method):
            yield _NEURAL_ODE
            if method in _METHODS:
                yield _METHODS[method]
        case ReversibleAdjoint():
            yield _REVERSIBLE
        case _:
            pass
    for operator in layer.field.evolution.modules():
        if isinstance(operator, HyperNetwork):
            yield _HYPERNETWORKS
        if isinstance(operator, ReactionDiffusionAdvection):
            yield _MORPHOGENESIS
