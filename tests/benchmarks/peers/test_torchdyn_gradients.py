"""The benchmark of torchdyn's sensitivities, at its smallest size."""

from __future__ import annotations

import json

import pytest

from benchmarks.lib import results
from benchmarks.peers import torchdyn_gradients

pytestmark = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect")


def test_the_smallest_run_writes_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- tables of torchdyn_gradients -->\n<!-- end of tables of torchdyn_gradients -->\n")
    arguments = ["--steps", "4", "8", "--tolerances", "1e-3", "--order-steps", "8", "16", "--page", str(page)]
    torchdyn_gradients.main(arguments)
    found = json.loads((tmp_path / "torchdyn_gradients.json").read_text())
    assert found["torchdyn"]
    errors = found["relative_errors"]
    for solver in ("euler", "midpoint", "rk4"):
        assert max(errors[solver]["`nc.odeint_dto`"].values()) < 1e-13
        # Autograd is exact for what torchdyn computes; for rk4 this confirms at which times it evaluates the stages.
        assert max(errors[solver]["torchdyn `autograd`"].values()) < 1e-13
        assert errors[solver]["torchdyn `adjoint`"]["8"] > 1e-4
    orders = found["orders_of_rk4"]
    assert orders["torchdyn `rk4`"]["depends on t"] == pytest.approx(1, abs=0.2)
    assert orders["torchdyn `rk4`"]["does not"] == pytest.approx(4, abs=0.3)
    assert orders["`nc.odeint_dto`, `rk4_classic`"]["depends on t"] == pytest.approx(4, abs=0.3)
    assert "| rk4 | torchdyn `adjoint` |" in page.read_text()
    assert "| euler |" in capsys.readouterr().out
