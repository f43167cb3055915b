"""The DiT: parameter counts of the paper, the split, options, sizes, half precision, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ditserve.model.nets import rotary
from ditserve.model.nets.blocks import Block
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.layers import rotary_tables, sincos_positions
from ditserve.model.spec.dit_config import BLOCK_KINDS, DiTConfig, published_config

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]

VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {"blocks": kind} for kind in BLOCK_KINDS},
    "hybrid": {"blocks": ("adaln_zero", "adaln", "cross_attention")},
    "hybrid with tokens in context": {"blocks": ("in_context", "adaln", "adaln_zero")},
    "qk-norm": {"qk_norm": True},
    "norms by the mean square": {"qk_norm": True, "rms_norm": True},
    "rope": {"rope": True},
    "rope in context": {"rope": True, "blocks": "in_context"},
    "swiglu": {"swiglu": True},
    "learned sigma": {"learn_sigma": True},
    "fusion": {"fusion": "mlp"},
    "text": {"text_size": 6, "fusion": "mlp"},
    "text alone": {"text_size": 6, "classes": ()},
    "text tokens": {"text_size": 6, "text_tokens": 3, "qk_norm": True},
    "unconditional": {"classes": ()},
    "layout": {"layout_rank": 2},
    "layout with tokens": {"layout_rank": 2, "blocks": "cross_attention"},
    "conditional mean": {"mean_rank": 4, "mean_maps": 3, "text_size": 6, "text_tokens": 2},
    "conditional mean of one map, layout": {"mean_rank": 2, "layout_rank": 2},
    "convolutional head": {"head_channels": 6},
    "windows": {"attention": ("window:2", "window:2+1", "window:4+1"), "rope": True},
    "neighbourhoods": {"attention": "neighbourhood:1", "qk_norm": True},
    "axial and channel attention": {"attention": ("axial", "channel", "axial")},
    "linear attention": {"attention": "linear", "conv_mlp": True},
    "attention of low rank": {"attention": "low_rank:3", "qk_norm": True},
    "levels": {"levels": (0, 1, 0), "rope": True, "layout_rank": 2},
    "levels of every block": {"levels": 1, "attention": "window:2", "blocks": "cross_attention"},
    "merged tokens": {"merge_tokens": 0.5, "qk_norm": True},
    "shared modulation": {"shared_modulation": True},
    "shared modulation of adaln": {"shared_modulation": True, "blocks": "adaln"},
    "condition gate": {"condition_gate": True},
    "condition gate of adaln": {"condition_gate": True, "blocks": "adaln", "shared_modulation": True},
    "experts that choose": {"experts": 4, "rope": True},
    "tokens that choose": {"experts": 4, "top_k": 2, "routing": "token_choice", "shared_expert": True},
    "all at once": {"qk_norm": True, "rope": True, "swiglu": True, "layout_rank": 2, "head_channels": 6},
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, tiny: Tiny) -> DiTConfig:
    return tiny(**VARIANTS[request.param])


def inputs(config: DiTConfig, rows: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, config.in_channels, *config.image_size, generator=generator)
    t = torch.randint(1000, (rows,), generator=generator)
    columns = [torch.randint(count + 1, (rows, 1), generator=generator) for count in config.classes]
    labels = torch.cat([torch.zeros(rows, 0, dtype=torch.int64), *columns], dim=1)
    text = torch.randn(rows, config.text_width, generator=generator) if config.text_size else None
    return x, t, labels, text


def count(config: DiTConfig) -> int:
    with torch.device("meta"):
        dit = DiT(config)
    return sum(p.numel() for p in dit.parameters()) + dit.pos_embed.numel()


@pytest.mark.parametrize(("size", "parameters"), [("S", 32.96), ("B", 130.51), ("L", 458.10), ("XL", 675.13)])
def test_parameters_of_the_papers_sizes(size: str, parameters: float) -> None:
    assert count(published_config(f"DiT-{size}/2")) / 1e6 == pytest.approx(parameters, abs=0.005)


@pytest.mark.parametrize(
    ("kind", "millions"), [("in_context", 449), ("cross_attention", 598), ("adaln", 600), ("adaln_zero", 675)]
)
def test_parameters_of_the_papers_blocks(kind: str, millions: int) -> None:
    assert count(published_config("DiT-XL/2", blocks=kind)) / 1e6 == pytest.approx(millions, abs=0.8)


def test_published_element_count() -> None:
    """The released DiT-XL/2 at 256 px has 675,129,632 elements, positions included."""
    assert count(published_config("DiT-XL/2")) == 675_129_632


def test_split_is_forward_to_the_bit(variant: DiTConfig, network: Make) -> None:
    dit = network(variant)
    x, t, labels, text = inputs(variant)
    with torch.no_grad():
        whole = dit(x, t, labels, text)
        state = dit.modulate(t, dit.embed(labels, text))
        split = dit.backbone(x, state)
    assert whole.shape == (4, variant.out_channels, 8, 8)
    assert torch.equal(whole, split)
    assert [tuple(part.shape[1:]) for part in state] == [shape for _, shape in variant.state()]


def test_every_input_matters(variant: DiTConfig, network: Make) -> None:
    """No input of a variant is ignored: pixels, timestep, each factor, text."""
    dit = network(variant)
    x, t, labels, text = inputs(variant, rows=1)
    with torch.no_grad():
        base = dit(x, t, labels, text)
        changed = [dit(x + 1, t, labels, text), dit(x, (t + 500) % 1000, labels, text)]
        for factor, classes in enumerate(variant.classes):
            other = labels.clone()
            other[:, factor] = (other[:, factor] + 1) % (classes + 1)
            changed.append(dit(x, t, other, text))
        changed += [] if text is None else [dit(x, t, labels, -text), dit(x, t, labels)]
    for out in changed:
        assert (out - base).abs().max() > 1e-4


def test_padding_of_a_text_is_not_seen(tiny: Tiny, network: Make) -> None:
    """A text of two tokens gives the same picture in a network that has room for two and for five."""
    long = network(tiny(text_size=6, text_tokens=5))
    short = DiT(tiny(text_size=6, text_tokens=2)).eval()
    short.load_state_dict(long.state_dict())
    x, t, labels, text = inputs(short.config)
    assert text is not None
    with torch.no_grad():
        padded = long(x, t, labels, F.pad(text, (0, 3 * 6)))
        assert torch.allclose(padded, short(x, t, labels, text), atol=1e-5)
        assert not torch.allclose(padded, long(x, t, labels, F.pad(text[:, :12], (0, 4 * 6))), atol=1e-4)


def test_rows_are_independent(variant: DiTConfig, network: Make) -> None:
    """The output of a row hardly depends on its batch: no operation mixes rows."""
    dit = network(variant)
    x, t, labels, text = inputs(variant)
    with torch.no_grad():
        together = dit(x, t, labels, text)
        alone = dit(x[2:3], t[2:3], labels[2:3], None if text is None else text[2:3])
    assert torch.allclose(together[2:3], alone, atol=1e-5)


def test_learns(variant: DiTConfig) -> None:
    """From the published initialisation the loss of one batch falls, and every parameter gets a gradient."""
    torch.manual_seed(0)
    dit = DiT(variant)
    if dit.conditional_mean is not None:
        # Measured before training, and not learned.
        torch.nn.init.normal_(dit.conditional_mean.basis)
    x, t, labels, text = inputs(variant)
    labels[:] = torch.arange(4)[:, None] % torch.tensor([*variant.classes] or [1])
    target = torch.randn(4, variant.out_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(dit.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = F.mse_loss(dit(x, t, labels, text), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    still = [
        name for name, p in dit.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert [name for name in still if name != "y_embedder.no_text"] == []


@pytest.mark.parametrize(
    "name",
    [
        *("adaln_zero", "adaln", "hybrid", "hybrid with tokens in context", "text", "all at once"),
        *("windows", "axial and channel attention", "linear attention", "levels", "merged tokens"),
    ],
)
def test_compiles_without_graph_breaks(tiny: Tiny, network: Make, name: str) -> None:
    """Every kind of block and every option is in one of these variants."""
    config = tiny(**VARIANTS[name])
    dit = network(config)
    x, t, labels, text = inputs(config)
    # More variants than it keeps of one function.
    torch._dynamo.reset()
    compiled = torch.compile(dit, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x, t, labels, text), dit(x, t, labels, text), atol=1e-6)


def test_starts_as_zero() -> None:
    """Before training, every block of adaLN-Zero is the identity and the output is zero."""
    torch.manual_seed(0)
    config = DiTConfig(image_size=(8, 8), hidden_size=32, depth=2, num_heads=2)
    dit = DiT(config)
    x, t, labels, _ = inputs(config)
    with torch.no_grad():
        assert not dit(x, t, labels).any()
        state = dit.modulate(t, dit.embed(labels))
        h = torch.randn(4, 16, 32)
        assert torch.equal(dit.blocks[0](h, state[0]), h)


def test_block_is_the_papers_formula(tiny: Tiny, network: Make) -> None:
    """A block is x + gate·attn(LN(x)·(1 + scale) + shift), then the MLP; vectors in the published order."""
    block = network().blocks[0]
    assert isinstance(block, Block)
    h, state = torch.randn(2, 16, 32), torch.randn(2, 6, 32)
    vectors = [state[:, k : k + 1] for k in range(6)]

    def norm(z: Tensor) -> Tensor:
        return (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    with torch.no_grad():
        a = h + vectors[2] * block.attn(norm(h) * (1 + vectors[1]) + vectors[0])
        expected = a + vectors[5] * block.mlp(norm(a) * (1 + vectors[4]) + vectors[3])
        assert torch.allclose(block(h, state), expected, atol=1e-4)


@pytest.mark.parametrize("size", [(2, 2), (4, 10), (16, 8), (8, 8)])
@pytest.mark.parametrize("changes", [{}, {"rope": True}, {"blocks": "in_context", "rope": True}])
def test_any_multiple_of_the_patch(
    tiny: Tiny, network: Make, size: tuple[int, int], changes: dict[str, Any]
) -> None:
    config = tiny(**changes)
    _, t, labels, _ = inputs(config)
    x = torch.randn(4, 3, *size)
    assert network(config)(x, t, labels).shape == (4, 3, *size)


def test_compiles_at_other_sizes(tiny: Tiny, network: Make) -> None:
    config = tiny(depth=1, rope=True)
    dit = network(config)
    _, t, labels, _ = inputs(config)
    x = torch.randn(4, 3, 16, 12)
    compiled = torch.compile(dit, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x, t, labels), dit(x, t, labels), atol=1e-6)


def test_non_square_training_size(tiny: Tiny, network: Make) -> None:
    config = tiny(image_size=(4, 12), layout_rank=2)
    x, t, labels, _ = inputs(config)
    dit = network(config)
    assert dit(x, t, labels).shape == (4, 3, 4, 12)
    assert torch.equal(dit.pos_embed, sincos_positions(32, (2, 6)))


def test_tokens_are_row_major(tiny: Tiny, network: Make) -> None:
    """A change in the patch at row 0, column 2 changes token 2 and, without attention, nothing else."""
    dit = network(tiny(image_size=(4, 12)))
    x = torch.zeros(1, 3, 4, 12)
    y = x.clone()
    y[:, :, 0:2, 4:6] = 1
    changed = (dit.x_embedder(x) != dit.x_embedder(y)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2]


def test_symbolic_positions_are_the_same_numbers_with_the_same_weights(tiny: Tiny, network: Make) -> None:
    dit = network(tiny(rope=True))
    symbolic = dit.with_symbolic_positions()
    assert all(a is b for a, b in zip(symbolic.parameters(), dit.parameters(), strict=True))
    assert not dit.symbolic_positions
    _, t, labels, _ = inputs(dit.config)
    for size in ((8, 8), (16, 4)):
        x = torch.randn(4, 3, *size)
        with torch.no_grad():
            assert torch.allclose(symbolic(x, t, labels), dit(x, t, labels), atol=1e-5)


def test_larger_sizes_are_interpolated_into_the_base(tiny: Tiny, network: Make) -> None:
    dit = network()
    assert torch.equal(dit.positions((8, 4)), sincos_positions(32, (8, 4), (0.5, 1.0)))
    assert torch.equal(dit.positions((2, 3)), sincos_positions(32, (2, 3)))
    # Training goes on at 16×16: the table of the new model is the interpolated one, the function is the same.
    grown = DiT(tiny(image_size=(16, 16), base_size=(8, 8))).eval()
    grown.load_state_dict(dit.state_dict())
    x, t, labels, _ = inputs(grown.config)
    with torch.no_grad():
        assert torch.equal(grown(x, t, labels), dit(x, t, labels))


@pytest.mark.parametrize(
    ("x", "t", "labels", "message"),
    [
        ((4, 4, 8, 8), (4,), [0, 0], r"x must be \(N, 3, H, W\), not \(4, 4, 8, 8\)"),
        ((3, 8, 8), (4,), [0, 0], r"x must be \(N, 3, H, W\), not \(3, 8, 8\)"),
        ((4, 3, 8, 8), (), [0, 0], "one timestep per row"),
        ((4, 3, 8, 8), (4, 1), [0, 0], "one timestep per row"),
        ((4, 3, 8, 8), (3,), [0, 0], "one timestep per row"),
        ((4, 3, 8, 8), (4,), [0, 4], r"label 4 of factor 1 must be in 0\.\.3, 3 standing for none"),
        ((4, 3, 8, 8), (4,), [-1, 0], r"label -1 of factor 0 must be in 0\.\.5"),
        ((4, 3, 8, 8), (4,), [0], r"labels must be \(N, 2\)"),
    ],
)
def test_bad_inputs_are_refused(
    network: Make, x: tuple[int, ...], t: tuple[int, ...], labels: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        network()(torch.zeros(x), torch.zeros(t), torch.tensor([labels] * 4))


def test_a_state_of_another_network_is_refused(network: Make) -> None:
    dit = network()
    state = dit.modulate(torch.zeros(1), dit.embed(torch.zeros(1, 2, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"4 tensors \(block_0, block_1, block_2, final\), not 3"):
        dit.backbone(torch.zeros(1, 3, 8, 8), state[:-1])


@pytest.mark.parametrize("size", [(7, 8), (8, 9)])
def test_sizes_off_the_patch_are_refused(network: Make, size: tuple[int, int]) -> None:
    dit = network()
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} is not a multiple of the patch 2"):
        dit(torch.zeros(1, 3, *size), torch.zeros(1), torch.zeros(1, 2, dtype=torch.int64))


def test_layout_refuses_other_sizes(tiny: Tiny, network: Make) -> None:
    dit = network(tiny(layout_rank=2))
    with pytest.raises(ValueError, match="layout_rank fixes the size"):
        dit(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["adaln_zero", "in_context", "cross_attention", "all at once", "windows", "linear attention", "levels"],
)
def test_half_precision_inference(tiny: Tiny, network: Make, dtype: torch.dtype, name: str) -> None:
    config = tiny(**VARIANTS[name])
    x, t, labels, text = inputs(config)
    with torch.no_grad():
        full = network(config)(x, t, labels, text)
        half = network(config).to(dtype)(x.to(dtype), t, labels, text)
    assert half.dtype == dtype
    assert (half.float() - full).norm() / full.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)


class Dtypes(TorchDispatchMode):
    """A record of the dtypes of the first argument of each operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor):
            self.seen.setdefault(func.overloadpacket.__name__, set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_half_precision_keeps_islands_of_fp32(
    tiny: Tiny, network: Make, dtype: torch.dtype, kind: str
) -> None:
    """Timestep sinusoids and LayerNorm statistics are in fp32, all else in the dtype of the weights."""
    dit = network(tiny(blocks=kind)).to(dtype)
    x, t, labels, _ = inputs(dit.config)
    with torch.no_grad(), Dtypes() as watch:
        dit(x.to(dtype), t, labels)
    islands = {name: watch.seen[name] for name in ("exp", "cos", "sin", "native_layer_norm")}
    assert set.union(*islands.values()) == {torch.float32}
    assert watch.seen["addmm"] | watch.seen["convolution"] | watch.seen["gelu"] == {dtype}


def test_attention_is_sdpa(tiny: Tiny, network: Make) -> None:
    """Every block uses the fused operator, which is FlashAttention on devices that have it."""
    dit = network()
    x, t, labels, _ = inputs(dit.config)
    with mock.patch.object(
        F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention
    ) as operator:
        dit(x, t, labels)
    assert operator.call_count == 3
    assert all(call.args[0].shape == (4, 2, 16, 16) for call in operator.call_args_list)


def test_parameter_names_are_the_published(tiny: Tiny) -> None:
    names = {name for name, _ in DiT(tiny(classes=(5,), learn_sigma=True, depth=1)).named_parameters()}
    linear = (
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "blocks.0.adaLN_modulation.1",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
        "x_embedder.proj",
    )
    assert names == {f"{name}.{part}" for name in linear for part in ("weight", "bias")} | {
        "y_embedder.tables.0.weight"
    }


@pytest.mark.parametrize("size", [(8, 8), (16, 4)])
@pytest.mark.parametrize("changes", [{"blocks": "in_context"}, {"levels": (0, 1, 0)}])
def test_rotary_tables_are_built_once(
    tiny: Tiny, network: Make, changes: dict[str, Any], size: tuple[int, int]
) -> None:
    dit = network(tiny(rope=True, **changes))
    levels = 1 + max(dit.level_plan)
    _, t, labels, _ = inputs(dit.config)
    x = torch.randn(4, 3, *size)
    with mock.patch.object(rotary, "rotary_tables", wraps=rotary_tables) as build, torch.inference_mode():
        first, second = dit(x, t, labels), dit(x, t, labels)
        assert build.call_count == levels
        copied = copy.deepcopy(dit)(x, t, labels)
        assert build.call_count == levels
        fresh = network(dit.config)
        fresh.load_state_dict(dit.state_dict())
        built = fresh(x, t, labels)
        assert build.call_count == 2 * levels
    for output in (second, copied, built):
        assert torch.equal(first, output)
    assert not any("rotary" in name for name in dit.state_dict())
    # Tables of inference serve training as well, and those of one device are not taken for another's.
    dit(x, t, labels).sum().backward()
    meta = dit.to("meta")(x.to("meta"), t.to("meta"), labels.to("meta"))
    assert meta.is_meta


def test_rotary_tables_of_other_sizes_do_not_pile_up(tiny: Tiny, network: Make) -> None:
    """Captured kernels read the tables of the network's own size, so those outlive all others."""
    dit = network(tiny(rope=True))
    h = torch.zeros(1, 1, 1)

    def tables(rows: int) -> Tensor:
        found = dit.rotary((rows, 4), h.expand(1, rows * 4, 1))
        assert found is not None
        return found[0]

    own, other = tables(4), tables(5)
    assert tables(5) is other
    for rows in range(6, 6 + rotary.OTHERS_KEPT):
        tables(rows)
    assert tables(4) is own
    assert tables(5) is not other
    assert torch.equal(tables(5), other)
