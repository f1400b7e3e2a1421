"""What to cite: the paper, the package, and the methods in use, each once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from torch import nn

import neuralode_coupled as nc

ALWAYS = ["zhang2019anodev2", "neuralode_coupled"]


def keys(bibtex: str) -> list[str]:
    return re.findall(r"^@\w+\{(\w+),$", bibtex, re.MULTILINE)


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def made(**chosen) -> nc.CoupledODE:
    return nc.CoupledODE(branch(), **({"steps": 2} | chosen))


CASES = [
    (made(), ["gholami2019anode"]),
    (made(adjoint=nc.Backprop()), []),
    (made(adjoint=nc.DiscreteAdjoint(checkpoints=1)), ["gholami2019anode", "griewank2000revolve"]),
    (made(adjoint=nc.ReversibleAdjoint()), ["mccallum2024efficient"]),
    (made(steps=None, method="dopri5", adjoint=nc.ContinuousAdjoint()), ["dormand1980family", "chen2018neural"]),
    (made(steps=None, method="dopri8", adjoint=nc.Backprop()), ["prince1981high"]),
    (made(steps=None, method="bosh3", adjoint=nc.Backprop()), ["bogacki1989pair"]),
    (made(steps=None, method="fehlberg2", adjoint=nc.Backprop()), ["fehlberg1969low"]),
    (made(steps=None, method="tsit5", adjoint=nc.Backprop()), ["tsitouras2011runge"]),
    (made(adjoint=nc.ContinuousAdjoint(1e-5, 1e-5, "dopri5")), ["chen2018neural", "dormand1980family"]),
    (made(evolution=nc.HyperNetwork(2, 3), adjoint=nc.Backprop()), ["ha2017hypernetworks"]),
    (made(evolution=nc.ReactionDiffusionAdvection(), adjoint=nc.Backprop()), ["turing1952chemical"]),
]


@pytest.mark.parametrize(("layer", "expected"), CASES, ids=[",".join(expected) or "none" for _, expected in CASES])
def test_a_layer_cites_what_it_uses(layer, expected):
    assert keys(nc.citation(layer)) == ALWAYS + expected


def test_a_model_cites_what_its_layers_use_once():
    model = nn.Sequential(made(), nn.Linear(4, 4), made(adjoint=nc.ReversibleAdjoint()), made())
    assert keys(nc.citation(model)) == [*ALWAYS, "gholami2019anode", "mccallum2024efficient"]


def test_entries_are_bibtex():
    """Braces close, every field stands on a line of its own or goes on indented, and has a value."""
    entries = {entry for layer, _ in CASES for entry in nc.citation(layer).split("\n\n")}
    assert len(entries) == 13
    for entry in entries:
        assert entry.count("{") == entry.count("}")
        head, *lines, last = entry.splitlines()
        assert last == "}"
        body = re.sub(r"\n {8,}", " ", "\n".join(lines))
        fields = dict(re.fullmatch(r"  (\w+) = \{(.+)\},?", line).groups() for line in body.splitlines())
        assert {"title", "author", "version" if head.startswith("@software") else "year"} <= set(fields)


def test_without_a_layer_it_is_the_paper_and_the_package():
    assert keys(nc.citation()) == ALWAYS
    assert f"version = {{{nc.__version__}}}" in nc.citation()


def test_what_cannot_be_cited_is_refused():
    with pytest.raises(ValueError, match="Linear has no coupled layer"):
        nc.citation(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        nc.citation("resnet4")  # pyright: ignore[reportArgumentType]


def test_the_citation_file_says_the_same():
    root = Path(nc.__file__).parents[1]
    stated = yaml.safe_load((root / "CITATION.cff").read_text())
    assert stated["version"] == nc.__version__
    paper = stated["preferred-citation"]
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    entry = " ".join(nc.citation().split("\n\n")[0].split())
    assert f"author = {{{' and '.join(authors)}}}" in entry
    assert paper["title"] in entry.replace("{", "").replace("}", "")
