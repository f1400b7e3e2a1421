"""Whole blocks as vector fields: N steps are N applications; inputs, outputs, caches, runs of blocks, clear errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import neuralode_coupled as nc

ADJOINTS = [
    nc.Backprop(),
    nc.DiscreteAdjoint(),
    nc.DiscreteAdjoint(None),
    nc.DiscreteAdjoint(1),
    nc.DiscreteAdjoint(keep_last=1),
    nc.DiscreteAdjoint(None, weights="recomputed"),
]


class Block(nn.Module):
    """A block of the state and inputs in every position, which counts its calls."""

    calls: torch.Tensor

    def __init__(self, width: int = 6, outputs: bool = False) -> None:
        super().__init__()
        self.norm, self.net, self.other = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(3, width)
        self.outputs, self.keep = outputs, 1.0
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, c, mask=None, *, scale=1.0):
        self.calls += 1
        h = torch.tanh(self.net(self.norm(x)) + self.other(c))
        h = h if mask is None else h * mask
        y = self.keep * x + scale * h
        return (y, y.softmax(-1), {"keys": 2 * y[:, :2], "length": 3, "ids": y.argmax(-1)}) if self.outputs else y


def applied(block: nn.Module, times: int, x, *args, **kwargs):
    for _ in range(times):
        result = block(x, *args, **kwargs)
        x = result[0] if isinstance(result, tuple) else result
    return result


def loss(result) -> torch.Tensor:
    if not isinstance(result, tuple):
        return result.square().sum()
    z, weights, more = result
    return z.square().sum() + weights.square().sum() + more["keys"].sin().sum()


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_n_steps_are_n_applications_and_each_counts_once(adjoint, dtype, outputs):
    block = Block(outputs=outputs).to(dtype)
    block.keep = 0.01  # a state that shrinks is where subtracting and adding it again would lose digits
    original = copy.deepcopy(block)
    layer = nc.CoupledODE(nc.Block(block), steps=4, t=(0, 4), adjoint=adjoint)
    inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((20, 6), (20, 3), (20, 6))]
    found, expected = layer(*inputs, scale=0.5), applied(original, 4, *inputs, scale=0.5)
    mine, theirs = (r if outputs else (r,) for r in (found, expected))
    assert torch.equal(mine[0], theirs[0])
    if outputs:
        assert type(found) is tuple
        assert torch.equal(found[1], expected[1])
        assert {key: type(value) for key, value in found[2].items()} == {k: type(v) for k, v in expected[2].items()}
        assert torch.equal(found[2]["ids"], expected[2]["ids"])
    gradients = [
        torch.autograd.grad(loss(r), [*inputs, *m.parameters()]) for r, m in ((found, block), (expected, original))
    ]
    for g, h in zip(*gradients, strict=True):
        assert (g - h).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5) * h.abs().max()
    assert block.calls == 4
    with torch.no_grad():
        baked = layer.bake()(*inputs, scale=0.5)
        assert torch.equal(baked[0] if outputs else baked, mine[0])


def test_other_steps_subtract():
    block = Block().double()
    x, c = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    layer = nc.CoupledODE(nc.Block(block), steps=2, t=(0, 1))
    half = x + 0.5 * (block(x, c) - x)
    torch.testing.assert_close(layer(x, c), half + 0.5 * (block(half, c) - half), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer.bake()(x, c), layer(x, c), rtol=1e-13, atol=1e-13)
    fine = nc.CoupledODE(nc.Block(block), steps=64, method="rk4")(x, c)
    adaptive = nc.CoupledODE(nc.Block(block), method="dopri5", rtol=1e-8, atol=1e-8)(x, c)
    torch.testing.assert_close(adaptive, fine, rtol=1e-6, atol=1e-6)


def test_a_narrow_state_is_subtracted_in_float32():
    class Little(nn.Module):
        def forward(self, x):
            return (x.float() + 0.3).to(x.dtype)

    z = torch.full((2, 3), 1.0, dtype=torch.bfloat16)
    slope = nc.Block(Little())(z)
    assert slope.dtype == torch.float32
    assert torch.equal(slope, Little()(z).float() - 1)


def test_weights_evolve_from_application_to_application():
    block = Block().double()
    layer = nc.CoupledODE(nc.Block(block), nc.LinearEvolution("channels", rank=1), steps=3, t=(0, 3))
    for p in layer.field.evolution.parameters():
        nn.init.normal_(p, std=0.1)
    x, c = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    w = layer.weight_trajectory([0, 1, 2])
    expected = x
    for n in range(3):
        weights = {name.removeprefix("module."): path[n] for name, path in w.items()}
        expected = torch.func.functional_call(block, weights, (expected, c))
    assert not torch.equal(w["module.net.weight"][0], w["module.net.weight"][2])
    torch.testing.assert_close(layer(x, c), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_per_step_statistics_move_once_for_each_application(adjoint):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.net = nn.BatchNorm1d(6), nn.Linear(6, 6)

        def forward(self, x):
            return x + self.net(self.norm(x))

    model = nc.couple(nn.Sequential(Normed()), "0", branch="block", steps=3, t=(0, 3), adjoint=adjoint)
    model(torch.randn(8, 6)).square().sum().backward()
    (norms,) = [m for m in model.modules() if isinstance(m, nc.PerStep)]
    assert [int(norm.num_batches_tracked) for norm in norms.copies] == [1, 1, 1]


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
def test_a_run_of_blocks_becomes_one(kind):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if kind is nn.ModuleList:
                self.blocks = nn.ModuleList([Block() for _ in range(5)])
            else:
                self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5)])

        def forward(self, x, *inputs):
            if kind is nn.Sequential:
                return self.blocks(x)
            for block in self.blocks:
                x = block(x, *inputs)
            return x

    original = Model()
    model = nc.couple(copy.deepcopy(original), "blocks.[123]", branch="block", together=True, steps=2, t=(0, 2))
    assert len(model.blocks) == 3
    inputs = (torch.randn(5, 6), torch.randn(5, 3))
    expected = inputs[0]
    rest = inputs[1:] if kind is nn.ModuleList else ()
    for i in (0, 1, 2, 3, 1, 2, 3, 4):
        expected = original.blocks[i](expected, *rest)
    assert torch.equal(model(*inputs), expected)


def test_a_run_has_to_be_one():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)])
    before = dict(model.named_modules())
    for targets in (["0", "2"], ["1", "3", "4"]):
        with pytest.raises(ValueError, match="takes consecutive blocks of one nn"):
            nc.couple(model, targets, branch="block", together=True)
    with pytest.raises(ValueError, match="goes with branch='block'"):
        nc.couple(model, "[01]", together=True)
    assert dict(model.named_modules()) == before


def test_outputs_are_dropped_by_choice():
    block = Block(outputs=True)
    x, c = torch.randn(5, 6), torch.randn(5, 3)
    model = nc.couple(nn.ModuleList([copy.deepcopy(block)]), "0", branch="block", outputs="drop")
    z, *rest = model[0](x, c)
    assert torch.equal(z, block(x, c)[0])
    assert rest == [None, None]
    adaptive = nc.couple(
        nn.ModuleList([copy.deepcopy(block)]), "0", branch="block", method="dopri5", rtol=1e-3, atol=1e-3
    )
    with pytest.raises(ValueError, match=r"returns 3 values.*outputs='drop'"):
        adaptive[0](x, c)


class Attending(nn.Module):
    """Attention weights behind the state, a cache that may be filled, two sums."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(6, 6), nn.GELU())

    def forward(self, x, c, *, scale):
        a, weights = self.attn(x, x, x)
        x = x + a * scale
        x = x + self.mlp(x + c)
        return x, weights, None


@pytest.mark.parametrize("adjoint", ADJOINTS[:3], ids=repr)
def test_branches_of_blocks_with_inputs_and_outputs_are_found(adjoint):
    original = Attending().double()
    model = nc.couple(
        nn.ModuleList([copy.deepcopy(original)]), "0", nc.LinearEvolution("channels", rank=1), adjoint=adjoint
    )[0]
    assert len(nc.models.coupled_layers(model)) == 2
    x, c, scale = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 4, 6), (6,), (6,)))
    results = [m(x, c, scale=scale) for m in (model, original)]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found, expected = (
        torch.autograd.grad(z.square().sum() + weights.square().sum(), [x, c, scale]) for z, weights, _ in results
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_branch_may_be_given():
    block = Block()
    x, c = torch.randn(5, 6), torch.randn(5, 3)

    class Slope(nn.Module):
        def __init__(self, block) -> None:
            super().__init__()
            self.block = block

        def forward(self, z, c):
            return torch.tanh(self.block.net(self.block.norm(z)) + self.block.other(c)), c

    model = nc.couple(nn.ModuleList([copy.deepcopy(block)]), "0", branch=Slope)[0]
    z, more = model(x, c)
    torch.testing.assert_close(z, block(x, c))
    assert torch.equal(more, c)
    with pytest.raises(TypeError, match=r"gave Parameter: it must be an nn\.Module"):
        nc.couple(nn.ModuleList([block]), "0", branch=lambda block: block.net.weight)


class Cache:
    """As transformers' caches are: changed by the block that it is given to."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 6)

    def forward(self, x, cache):
        kept = cache if isinstance(cache, list) else cache.keys
        kept.append(self.net(x))
        return x + kept[-1]


def test_a_cache_among_the_inputs_moves_once_for_each_application_or_is_refused():
    x = torch.randn(5, 6)
    layer = nc.CoupledODE(nc.Block(Caching()), steps=3, t=(0, 3))
    cache = Cache()
    with torch.no_grad():
        layer(x, cache)
    assert len(cache.keys) == 3
    with pytest.raises(ValueError, match=r"changes an object among its inputs .*torch\.no_grad"):
        layer(x, Cache())
    with pytest.raises(ValueError, match=r"changes a container among its inputs"):
        layer(x, [x])
    layer.adjoint = nc.Backprop()
    cache = Cache()
    layer(x, cache).sum().backward()
    assert len(cache.keys) == 3


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.net, self.make = nn.Linear(6, 6), make

    def forward(self, x):
        return self.make(self.net(x), x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda y, x: {"h": y}, TypeError, "must return the state, or a tuple .*: a Returns returned dict"),
        (lambda y, x: (None, y), TypeError, r"whose first entry is the state: a Returns returned \(NoneType, a tensor"),
        (lambda y, x: (), TypeError, r"a Returns returned \(\)"),
        (lambda y, x: y.argmax(-1), TypeError, r"returned a tensor of torch\.int64"),
        (lambda y, x: y[:, :3], ValueError, r"must keep the shape of its input: a Returns made \(5, 3\) of \(5, 6\)"),
        (lambda y, x: (y[:3], y), ValueError, r"a Returns made \(3, 6\) of \(5, 6\)"),
    ],
)
def test_blocks_that_return_no_state_are_refused(make, error, message):
    layer = nc.CoupledODE(nc.Block(Returns(make)), steps=2, t=(0, 2))
    with pytest.raises(error, match=message):
        layer(torch.randn(5, 6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y, x: (y, x), "adds nothing to its own input: it computes net:Linear"),
        (lambda y, x: {"h": x + y}, r"takes \(x\) and returns a dict of h, not a state"),
        (lambda y, x: (None, x + y), r"returns \(None, add\(.*\), not a state"),
        (lambda y, x: (x := x + y, x.mean()), r"returns, after the state, mean\(.*which none of its residual"),
    ],
)
def test_what_was_found_in_place_of_a_state_and_something(make, message):
    with pytest.raises(ValueError, match=message):
        nc.couple(nn.ModuleList([Returns(make)]), "0")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"outputs": "first", "branch": "block"}, ValueError, "unknown outputs 'first'"),
        ({"branch": "blocks"}, ValueError, "unknown branch 'blocks'"),
        ({"branch": 3}, TypeError, "branch must be 'residual', 'block', a module"),
        ({"branch": "block", "skip": "around"}, ValueError, "skip='around' is about branch='residual'"),
    ],
)
def test_unknown_choices(options, error, message):
    with pytest.raises(error, match=message):
        nc.couple(nn.ModuleList([Block()]), "0", **options)


def test_wrong_blocks():
    with pytest.raises(ValueError, match="unknown outputs 'none'"):
        nc.Block(nn.Linear(2, 2), outputs="none")
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got function"):
        nc.Block(lambda x: x)
    with pytest.raises(ValueError, match="takes no time: leave takes_time=True out"):
        nc.CoupledODE(nc.Block(nn.Linear(2, 2)), steps=1, takes_time=True)
    layer = nc.CoupledODE(nc.Block(Block()), steps=1)
    with pytest.raises(TypeError, match="and c is missing"):
        layer(torch.randn(5, 6))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
    with pytest.raises(ValueError, match=r"asks its layers for their self_attn.*branch='residual'"):
        nc.couple(encoder, "layers.*", branch="block")


def test_optional_inputs_of_a_block_that_was_taken_apart():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, mask=None):
            x = x + self.a(x) if mask is None else x + self.a(x) * mask
            return x + self.b(x)

    original = Masked()
    model = nc.couple(nn.ModuleList([copy.deepcopy(original)]), "0")[0]
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x, mask=None), original(x))
    with pytest.raises(ValueError, match=r"taken apart with mask=None.*branch='block'"):
        model(x, torch.ones(6))


@pytest.mark.parametrize("outputs", ["last", "drop"])
def test_compiled_with_outputs(outputs):
    torch._dynamo.reset()
    layer = nc.CoupledODE(nc.Block(Returns(lambda y, x: (x + y, y.softmax(-1))), outputs), steps=3, t=(0, 3))
    x = torch.randn(5, 6, requires_grad=True)
    results = [f(x) for f in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer)]
    torch.testing.assert_close(*results)
    assert results[0][1] is None if outputs == "drop" else results[0][1].requires_grad
    losses = [sum(part.square().sum() for part in r if part is not None) for r in results]
    torch.testing.assert_close(*[torch.autograd.grad(loss, x) for loss in losses])


def test_further_outputs_have_a_double_backward_and_a_second_one():
    block = Returns(lambda y, x: (x + y.tanh(), y.softmax(-1))).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for adjoint in ADJOINTS[:4]:
        z, weights = nc.CoupledODE(nc.Block(block), steps=3, t=(0, 3), adjoint=adjoint)(x)
        value = z.square().sum() + weights.pow(3).sum()
        once, twice = (torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(once, twice)
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        found.append((once, torch.autograd.grad(slope.square().sum(), x)[0]))
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-12, atol=1e-12)


def test_a_decoder_layer_of_torch():
    original = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    apart = nc.couple(nn.ModuleList([copy.deepcopy(original)]), "0")[0]
    assert len(nc.models.coupled_layers(apart)) == 3
    torch.testing.assert_close(apart(x, memory), original(x, memory))
    whole = nc.couple(nn.ModuleList([copy.deepcopy(original)]), "0", branch="block")[0]
    assert torch.equal(whole(x, memory, tgt_mask=mask), original(x, memory, tgt_mask=mask))


@pytest.mark.parametrize("branch", ["residual", "block"])
def test_blocks_with_outputs_are_baked_saved_loaded_and_put_on_other_grids(branch, tmp_path):
    original = Attending().eval()
    model = nc.couple(nn.ModuleList([copy.deepcopy(original)]), "0", nc.LinearEvolution("channels", 1), branch=branch)
    for name, p in model.named_parameters():
        if ".evolution." in name:
            nn.init.normal_(p, std=0.1)
    model = nc.with_steps(model, 3).eval()
    x, c, scale = torch.randn(2, 4, 6), torch.randn(6), torch.randn(6)
    expected = model[0](x, c, scale=scale)
    torch.save(model, tmp_path / "model.pt")
    for other in (nc.bake(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        found = other[0](x, c, scale=scale)
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
        assert found[2] is None
    with torch.no_grad():
        for p in original.parameters():
            p.mul_(1.1)
    once = nc.load_plain(nc.with_steps(model, 1), nn.ModuleList([original]).state_dict())
    torch.testing.assert_close(once[0](x, c, scale=scale)[1], original(x, c, scale=scale)[1])


def test_a_block_that_stands_at_two_places_makes_no_loop_together():
    a, b, c = [nn.Linear(4, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=r"1 is the same block as 2, .*branch='block'"):
        nc.couple(nn.Sequential(a, b, b, c), "[12]", nc.Static(), branch="block", together=True, t=(0, 2), steps=2)
