"""Reference images made cheap: their keys and values are reduced, image and text stay exact."""

import itertools

import pytest
import torch

import attngen
from attngen import AgentAttention, DownsampledKV, Plan, SoftmaxAttention, Stage
from attngen.hosts.families import FAMILIES
from attngen.hosts.family import Core
from attngen.hosts.product import Asked, attend
from attngen.hosts.references import log_counts, means, num_cells
from attngen.hosts.spec import SPEC, LayerSpec
from attngen.layers.call import Call
from tests.builders.zoo import ZOO
from tests.compare import assert_close, normal

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")

HALF = DownsampledKV(factor=2)
WITH = ["Flux2Transformer2DModel@references", "QwenImageTransformer2DModel@edit", "LongCatImageTransformer2DModel@edit"]
WITHOUT = ["Flux2Transformer2DModel", "QwenImageTransformer2DModel", "LongCatImageTransformer2DModel"]
GRIDS = ((5, 3), (2, 6))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def run(name, model, batch=1, **changed):
    tiny = ZOO[name]
    return tiny.drawn(model(**{**tiny.inputs(tiny.grids[0], batch), **changed}))


# The arithmetic


def by_hand(x, grids, factor):
    """Cell by cell: means of the tokens, and how many they are."""
    found, counts, start = [], [], 0
    for height, width in grids:
        for row, column in itertools.product(range(0, height, factor), range(0, width, factor)):
            rows, columns = range(row, min(row + factor, height)), range(column, min(column + factor, width))
            places = [start + r * width + c for r in rows for c in columns]
            found.append(x[:, :, places].double().mean(2))
            counts.append(len(places))
        start += height * width
    return torch.stack(found, 2), torch.tensor(counts)


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_cells(factor):
    x = normal(2, 3, 27, 4)
    want, counts = by_hand(x, GRIDS, factor)
    assert_close(means(x, GRIDS, factor).double(), want)
    assert_close(log_counts(GRIDS, factor, x).exp().flatten(), counts.float())
    assert num_cells(GRIDS, factor) == len(counts)
    assert means(x.bfloat16(), GRIDS, factor).dtype == torch.bfloat16


class Layer(torch.nn.Module):
    """An attention module with a spec, as a patch leaves it."""

    def __init__(self, method, references=(HALF,), rotary=False):
        super().__init__()
        self.processor = None
        setattr(self, SPEC, LayerSpec("a", "a", None, (method,), core=True, rotary=rotary, references=references))


def product(method, asked, text, references=(HALF,), rotary=False):
    """The product of a layer with text in front, an image of 4 x 6 and `GRIDS`."""
    call = Call("0", (4, 6), context=text, references=GRIDS)

    def exactly(asked):
        return torch.nn.functional.scaled_dot_product_attention(**asked._asdict())

    return attend(Layer(method, references, rotary), Core("*", "first"), call, asked, exactly)


def asked(text, size=8, seed=0, keys=2):
    tokens = text + 24 + 27
    return Asked(*(normal(2, heads, tokens, size, seed=seed + i) for i, heads in enumerate((2, keys, keys))))


def oracle(query, key, value, text, factor=2, scale=None):
    """Softmax over the keys of text and image and the cells of the references, weighed by their tokens; float64."""
    start = text + 24
    cells, counts = by_hand(key[:, :, start:], GRIDS, factor)
    values, _ = by_hand(value[:, :, start:], GRIDS, factor)
    key, value = (torch.cat([x[:, :, :start].double(), y], 2) for x, y in ((key, cells), (value, values)))
    weights = torch.cat([torch.ones(start), counts]).double()
    scale = query.shape[3] ** -0.5 if scale is None else scale
    exponents = (query.double() @ key.transpose(2, 3) * scale).exp() * weights
    return exponents / exponents.sum(3, keepdim=True) @ value


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("text", [0, 5])
def test_every_query_reads_the_cells_of_the_references(text, scale):
    given = asked(text)._replace(scale=scale)
    got = product(SoftmaxAttention(), given, text)
    assert_close(got.double(), oracle(*given[:3], text, scale=scale))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("method", [SoftmaxAttention(), AgentAttention(num_agents=4, shortcut=0.0), DownsampledKV(3)])
def test_constant_references_stay_exact(method, rotary):
    """The weights count the tokens of each cell, whatever the method for the image."""
    given = Asked(*(x.double() for x in asked(5)[:3]))
    for x in given[1:3]:
        x[:, :, 5 + 24 : 5 + 24 + 15] = x[:, :, 29:30]
        x[:, :, 5 + 24 + 15 :] = x[:, :, 50:51]
    want = product(method, given, 5, references=(), rotary=rotary)
    assert_close(product(method, given, 5, rotary=rotary), want, 1e-12)


def test_masks_of_text_and_grouped_heads():
    given = asked(5, keys=1)
    mask = torch.ones(2, 1, 1, 56, dtype=torch.bool)
    mask[0, ..., :2] = False
    got = product(SoftmaxAttention(), given._replace(attn_mask=mask, enable_gqa=True), 5)
    query, key, value = given.query, *(x.expand(-1, 2, -1, -1) for x in given[1:3])
    without = [x[:1, :, 2:] for x in (query, key, value)]
    assert_close(got[1:].double(), oracle(query[1:], key[1:], value[1:], 5))
    assert_close(got[:1, :, 2:].double(), oracle(*without, 3))


# Models


@pytest.mark.parametrize("name", WITHOUT)
def test_nothing_changes_without_references(name):
    model = ZOO[name].model()
    for method in ("softmax", AgentAttention(num_agents=4)):
        with attngen.apply(model, method):
            want = run(name, model)
        with attngen.apply(model, method, references=HALF) as handle:
            assert torch.equal(run(name, model), want)
            assert {stage.references for layer in handle.report().patched for stage in layer.stages} == {None}


@pytest.mark.parametrize("name", WITH)
def test_references_are_reduced_in_report_and_trace(name):
    model = ZOO[name].model()
    exact = run(name, model, 2)
    for method in ("softmax", AgentAttention(num_agents=4)):
        with attngen.apply(model, method):
            want = run(name, model, 2)
        with attngen.apply(model, method, references=HALF) as handle, handle.trace() as trace:
            got = run(name, model, 2)
            report = handle.report()
        assert got.isfinite().all() and not torch.equal(got, want)
        assert (got - want).norm() < (want.norm() if method == "softmax" else 2 * want.norm())
        assert {row.references for row in trace.rows} == {"kv 2"} and "references kv 2" in str(trace)
        assert {stage.references for layer in report.patched for stage in layer.stages} == {"kv 2"}
        assert "references kv 2" in str(report) and all(layer.is_active for layer in report.patched)
        with attngen.apply(model, method) as handle:
            run(name, model, 2)
            whole = handle.report()
        assert all(a < b for a, b in zip(report.flops, whole.flops, strict=True))
        assert report.flops_exact == whole.flops_exact
        assert torch.equal(run(name, model, 2), exact)


def test_operations_count_fewer_keys():
    """Every token asks fewer keys: both products, two operations a multiply-add."""
    name = WITH[0]
    model = ZOO[name].model()
    with attngen.apply(model, "softmax", references=HALF) as handle:
        run(name, model)
        (layer, *_) = handle.report().patched
    tokens, width = ZOO[name].inputs(ZOO[name].grids[0], 1)["hidden_states"].shape[1], layer.heads * layer.head_dim
    text = ZOO[name].inputs(ZOO[name].grids[0], 1)["encoder_hidden_states"].shape[1]
    grids = FAMILIES[ZOO[name].cls].references(model, ZOO[name].inputs(ZOO[name].grids[0], 1))
    everything = tokens + text
    fewer = sum(h * w for h, w in grids) - num_cells(grids, 2)
    assert tokens == layer.tokens + sum(h * w for h, w in grids)
    assert layer.flops_exact - layer.stages[0].flops == 4 * width * everything * fewer


@pytest.mark.parametrize("name", WITH)
def test_stages_of_references_are_their_own(name):
    model = ZOO[name].model()
    late = Plan((Stage(1.0, {"*": SoftmaxAttention()}), Stage(0.5, {"*": HALF})))
    early, after = ({"timestep": torch.tensor([value])} for value in (0.9, 0.3))
    exact = [run(name, model, **when) for when in (early, after)]
    with attngen.apply(model, "softmax", references=HALF):
        reduced = run(name, model, **after)
    handle = attngen.apply(model, "softmax", references=late)
    assert handle.plan == attngen.PRESETS["softmax"]
    assert torch.equal(run(name, model, **early), exact[0])
    assert torch.equal(run(name, model, **after), reduced) and not torch.equal(reduced, exact[1])
    rows = handle.report()
    assert rows.starts == (1.0, 0.5)
    assert [[s.references for s in layer.stages] for layer in rows.patched] == [[None, "kv 2"]] * len(rows.patched)
    handle.reapply()
    assert torch.equal(run(name, model, **after), reduced)
    some = Plan((Stage(1.0, {"*.0.*": HALF}),))  # the first block alone
    attngen.apply(model, "softmax", references=some)
    run(name, model)
    assert not torch.equal(run(name, model, **after), reduced)
    attngen.remove(model)
    assert torch.equal(run(name, model, **after), exact[1])


def test_grids_are_those_of_the_ids():
    wanted = {
        "Flux2Transformer2DModel@references": ((2, 12), (3, 5)),
        "QwenImageTransformer2DModel@edit": ((3, 5), (2, 4)),
    }
    for name, want in wanted.items():
        tiny = ZOO[name]
        inputs = tiny.inputs(tiny.grids[0], 2)
        found = FAMILIES[tiny.cls].references(None, inputs)
        assert found == want, name
        tokens = inputs["hidden_states"].shape[1]
        assert tokens == tiny.grids[0][1] * tiny.grids[0][2] + sum(h * w for h, w in found)


def test_one_graph():
    name = WITH[0]
    model = ZOO[name].model()
    torch._dynamo.reset()
    with attngen.apply(model, AgentAttention(num_agents=4), references=HALF):
        want = run(name, model)
        got = run(name, torch.compile(model, backend="eager", fullgraph=True))
    assert (got - want).norm() <= 1e-5 * want.norm()
    torch._dynamo.reset()


def test_what_cannot_be_reduced_is_refused():
    flux, wan = ZOO[WITH[0]].model(), ZOO["WanTransformer3DModel"].model()
    with pytest.raises(ValueError, match="WanTransformer3DModel; it does in those of Flux2Transformer2DModel"):
        attngen.apply(wan, "softmax", references=HALF)
    for wrong, message in (
        ("todo", "got 'todo'"),
        (AgentAttention(), "got AgentAttention"),
        (Plan((Stage(1.0, {"a*": AgentAttention()}),)), "for 'a\\*'"),
        (Plan.of(HALF, min_tokens=4), "min_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            attngen.apply(flux, "softmax", references=wrong)
    late = Plan((Stage(1.0, {"*": SoftmaxAttention()}), Stage(0.5, {"*": HALF})))
    switch = attngen.ChangeSchedule(warmup=1, ratios=(0.5,))
    with pytest.raises(ValueError, match="switch"):
        attngen.apply(flux, late, switch=switch, references=late)
    assert not flux._forward_pre_hooks
