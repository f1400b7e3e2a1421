"""The wheel: what it asks for, and that it works where nothing else is installed.

An environment here is a folder with links to installed distributions: those that some requirements bring, and no more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email import message_from_string
from email.message import Message
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import neuralode_coupled as nc
from neuralode_coupled._extras import MissingExtra, needs

ROOT = Path(__file__).parents[2]
EXTRAS = ["all", "dev", "docs", "export", "figures", "peers", "torchdyn", "train"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as content:
        (name,) = [name for name in content.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(content.read(name).decode())


def requirements(wheel: Path, extra: str = "") -> list[str]:
    """What pip installs for the extra besides the core's; without one, the core's."""
    every = [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist", [])]
    core = [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]
    chosen = [r for r in every if extra and r not in core and r.marker and r.marker.evaluate({"extra": extra})]
    return [str(Requirement(str(r).partition(";")[0])) for r in (chosen if extra else core)]


def closure(wanted: Iterable[str]) -> set[str]:
    """The installed distributions that requirements bring, by name."""
    pending, seen = [Requirement(text) for text in wanted], set()
    while pending:
        requirement = pending.pop()
        key = canonicalize_name(requirement.name), *sorted(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        extras = ("", *requirement.extras)
        inner = map(Requirement, distribution(requirement.name).requires or [])
        pending += [r for r in inner if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return {name for name, *_ in seen}


def environment(folder: Path, wheel: Path, extra: str = "") -> Path:
    """A folder with the wheel's content and what it requires, with an extra or without."""
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder)
    for name in closure([*requirements(wheel), *(requirements(wheel, extra) if extra else [])]):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(installed.locate_file(top))
    return folder


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the standard library and one folder."""
    code = f"import sys\nsys.path.append({str(folder)!r})\n{code}"
    chosen = {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(command, cwd=folder, env=os.environ | chosen, check=False, capture_output=True, text=True)


def works(folder: Path, code: str) -> str:
    done = run(folder, code)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("core"), wheel)


def test_the_wheel_asks_for_five_packages_and_offers_the_extras(wheel):
    names = {Requirement(text).name for text in requirements(wheel)}
    assert names == {"torch", "torchdiffeq", "einops", "checkpoint-schedules", "jaxtyping"}
    assert sorted(metadata(wheel).get_all("Provides-Extra", [])) == EXTRAS
    assert metadata(wheel)["Version"] == nc.__version__


def test_all_is_everything_that_a_user_may_want(wheel):
    parts = {text for extra in ("train", "figures", "torchdyn", "export") for text in requirements(wheel, extra)}
    assert set(requirements(wheel, "all")) == parts
    assert parts <= set(requirements(wheel, "dev"))


def test_the_hosted_workflow_runs_what_the_package_supports(wheel):
    """Every Python of the classifiers, the oldest torch that pip may take, and the newest."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]
    classifiers = metadata(wheel).get_all("Classifier", [])
    pythons = {name for text in classifiers if (name := text.rpartition(" :: ")[2]).startswith("3.")}
    assert {row["python"] for row in matrix} == pythons
    (torch,) = [Requirement(text) for text in requirements(wheel) if Requirement(text).name == "torch"]
    (oldest,) = [text for text in torch.specifier if text.operator == ">="]
    assert {row["torch"] for row in matrix} == {"torch", f"torch=={oldest.version}.*"}


def test_the_wheel_holds_the_package_and_its_marker_of_types(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    assert "neuralode_coupled/py.typed" in names
    assert {name.split("/")[0].removesuffix(f"-{nc.__version__}.dist-info") for name in names} == {"neuralode_coupled"}


CORE = """
import importlib.util
import torch
from torch import nn
import neuralode_coupled as nc

assert nc.__file__.startswith(sys.path[-1])
for name in ("matplotlib", "PIL", "pytorch_lightning", "rich", "typer", "torchvision", "sklearn", "torchdyn", "onnx"):
    assert importlib.util.find_spec(name) is None, name

branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
layer = nc.CoupledODE(branch, nc.ReactionDiffusionAdvection(), nc.SampleAndHold(2), steps=2, method="rk4")
z0 = torch.randn(2, 4, 6, 6)
layer(z0).square().mean().backward()
assert all(parameter.grad is not None for parameter in layer.parameters())
assert nc.solve(layer.field, z0, steps=2).z.shape == z0.shape
assert nc.kkt.check(layer.double(), z0.double()).exact

y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
t = torch.tensor([0.0, 1.0], dtype=torch.float64)
for options in ({"method": "rk4", "options": {"step_size": 0.1}}, {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}):
    y = nc.odeint_dto(lambda t, y: -y, y0, t, **options)[-1]
    (gradient,) = torch.autograd.grad(y.sum(), y0)
    torch.testing.assert_close(gradient, torch.exp(-t[1]).expand(3), rtol=1e-5, atol=0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv(x))


model = nn.Sequential(Block())
before = model(z0)
nc.couple(model, "0", nc.ReactionDiffusionAdvection(), steps=1)
torch.testing.assert_close(model(z0), before)
assert nc.models.build("resnet4", "anodev2-1")(torch.randn(2, 3, 32, 32)).shape == (2, 10)
"""


MISSING = """
def progress():
    with nc.progress():
        pass


def figures():
    from neuralode_coupled.figures import filters_over_time


def gallery():
    from neuralode_coupled.figures import gallery


def train():
    from neuralode_coupled.train import train


def data():
    from neuralode_coupled.train.data import ImageData


def transport():
    import neuralode_coupled.transport


def command_line():
    import neuralode_coupled.cli


for ask in (progress, figures, gallery, train, data, transport, command_line):
    try:
        ask()
    except ImportError as error:
        print("missing", ask.__name__, error)

from neuralode_coupled.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def in_core(core) -> subprocess.CompletedProcess[str]:
    """The core at work, then what it lacks, and the console script last."""
    return run(core, CORE + MISSING)


def test_the_core_works_where_only_its_requirements_are(in_core):
    assert "DTO" in in_core.stdout, in_core.stderr


def test_what_needs_an_extra_says_which_and_how_to_install_it(in_core):
    lines = [line for line in in_core.stdout.splitlines() if line.startswith("missing ")]
    said = dict(line.split(" ", 2)[1:] for line in lines)
    extras = {"progress": "train", "figures": "figures", "gallery": "figures", "train": "train", "data": "train"}
    extras |= {"transport": "figures", "command_line": "train"}
    assert said.keys() == extras.keys()
    for what, extra in extras.items():
        assert said[what].endswith(f' is not installed: run `pip install "neuralode-coupled[{extra}]"`')


def test_the_console_script_without_its_extra_says_what_to_install_in_one_line(core, in_core):
    (listed,) = core.glob("neuralode_coupled-*.dist-info/entry_points.txt")
    assert "\nneuralode-coupled = neuralode_coupled.__main__:main\n" in listed.read_text() + "\n"
    assert in_core.returncode == 2
    assert in_core.stderr == 'error: typer is not installed: run `pip install "neuralode-coupled[train]"`\n'
    assert in_core.stdout.splitlines()[-1].startswith("missing command_line ")


def test_a_package_that_is_there_and_broken_speaks_for_itself():
    with pytest.raises(ModuleNotFoundError, match="no part"), needs("train"):
        raise ModuleNotFoundError("no part", name="torchvision._C")
    with pytest.raises(RuntimeError, match="does not fit"), needs("train"):
        raise RuntimeError("does not fit")
    with pytest.raises(MissingExtra, match="gone is not installed") as caught, needs("train"):
        import gone  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert caught.value.name == "gone"


def test_importing_the_package_loads_nothing_of_the_extras():
    """Where they are installed, nor the compiler. A broken torchvision must not break ``import neuralode_coupled``."""
    extras = ("matplotlib", "PIL", "pytorch_lightning", "rich", "typer", "torchvision", "torchdyn", "sklearn")
    extras += ("tensorboard", "torch._dynamo")  # the compiler takes seconds
    code = f"import sys, neuralode_coupled; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


PROMISES = {
    "figures": """
from neuralode_coupled.figures import filters_over_time
layer = nc.CoupledODE(nn.Conv2d(2, 2, 3, padding=1), nc.ReactionDiffusionAdvection(), steps=2)
from neuralode_coupled.figures import gallery
filters_over_time(layer).savefig("filters.png")
""",
    "train": """
import runpy
sys.argv[1:] = ["train", "--variant", "anodev2-1", "--epochs", "1", "--limit", "64", "--accelerator", "cpu"]
sys.argv += ["--out", "run"]
try:
    runpy.run_module("neuralode_coupled", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
assert Path("run", "result.json").exists()
""",
    "torchdyn": """
from torchdyn.core import ODEProblem
field = nc.CoupledField(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nc.ReactionDiffusionAdvection())
z0 = torch.randn(8, 4)
flat = nc.FlatField(field, z0)
problem = ODEProblem(flat, "dopri5", sensitivity="adjoint", rtol=1e-5, atol=1e-5)
_, path = problem(flat.initial_state(z0), torch.linspace(0, 1, 3))
flat.unpack(path)[0][-1].square().mean().backward()
""",
    "export": """
import onnxruntime
layer = nc.CoupledODE(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nc.ReactionDiffusionAdvection(), steps=2)
z0 = torch.randn(3, 4)
torch.onnx.export(layer.eval().bake(), (z0,), "model.onnx", dynamo=True, verbose=False)
session = onnxruntime.InferenceSession("model.onnx")
(found,) = session.run(None, {session.get_inputs()[0].name: z0.numpy()})
torch.testing.assert_close(torch.from_numpy(found), layer(z0).detach(), rtol=1e-4, atol=1e-5)
""",
}


@pytest.mark.parametrize("extra", PROMISES)
def test_an_extra_brings_what_it_promises(wheel, extra, tmp_path):
    start = "from pathlib import Path\nimport torch\nfrom torch import nn\nimport neuralode_coupled as nc\n"
    works(environment(tmp_path, wheel, extra), start + PROMISES[extra])
