"""Every written-out backward against finite differences in float64, and matrix products against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from rlhf_core.engine import matmul
from rlhf_core.engine.attention import attend
from rlhf_core.engine.batches import collate
from rlhf_core.engine.blocks import AttentionIn, AttentionOut, FeedForward
from rlhf_core.engine.kernels import Gather, RMSNorm, Spread, SwiGLU, Take
from rlhf_core.engine.layout import layout_of
from rlhf_core.engine.projections import Product, interleaved, separated

# Two rows share a prompt and stand in one group of attention, a third shares it and stands in another.
LAYOUT = layout_of(collate([[5, 6], [5, 6], [7], [5, 6]], [[8], [9], [3], [2, 3, 4, 5, 6]], 0))
TOKENS = len(LAYOUT.source_T)
WIDTH, SIZE, HEADS = 4, 4, (2, 1)
EPS = 1e-3


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 17 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def turns() -> Tensor:
    angles = LAYOUT.positions_T[:, None, None].double() * torch.tensor([1.0, 0.1], dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles)


@pytest.fixture(params=["whole", "in pieces"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks cut tokens into pieces for oneDNN alone; here they do it in float64 too."""
    if request.param == "in pieces":
        monkeypatch.setattr(matmul, "PIECES", (4, 2))
        monkeypatch.setattr(
            "rlhf_core.engine.blocks.pieces",
            lambda count, like: [slice(start, min(start + 4, count)) for start in range(0, count, 4)],
        )


def test_the_layout_tests_what_it_should() -> None:
    assert [(group.rows, group.length) for group in LAYOUT.groups] == [(1, 2), (2, 3), (1, 7)]
    assert [len(group.again) for group in LAYOUT.groups] == [0, 2, 2]
    assert TOKENS == 2 + 1 + 1 + 2 + 5


def test_gradcheck_of_norm_activation_and_choice() -> None:
    assert gradcheck(lambda x, w: RMSNorm.apply(x, w, EPS), (random(3, 5), random(5)))
    assert gradcheck(SwiGLU.apply, (random(3, 6),))
    assert gradcheck(lambda x: Take.apply(x, torch.tensor([4, 0, 2])), (random(5, 3),))


def test_gradcheck_of_spreading_and_gathering() -> None:
    joined = random(TOKENS, sum(HEADS) * SIZE + SIZE)
    assert gradcheck(lambda x: Spread.apply(x.clone(), turns(), HEADS, LAYOUT.groups), (joined,))
    attended = [random(group.rows, 2, group.length, SIZE, seed=n) for n, group in enumerate(LAYOUT.groups)]
    assert gradcheck(lambda *parts: Gather.apply(LAYOUT.groups, *parts), attended)


def layers_of(rows: list[int], width: int, *, bias: bool, adapted: list[bool], seed: int) -> list[Tensor | None]:
    """Weights, biases, A and B of layers with `rows` outputs, as `Projection.tensors` has them; adapters of rank 2."""
    numbers = range(len(rows))
    return [
        *(random(rows[n], width, seed=seed + n) for n in numbers),
        *(random(rows[n], seed=seed + n) if bias else None for n in numbers),
        *(random(2, width, seed=seed + 5 + n) if adapted[n] else None for n in numbers),
        *(random(rows[n], 2, seed=seed + 8 + n) if adapted[n] else None for n in numbers),
    ]


ADAPTED = {"no adapters": [False] * 3, "all adapted": [True] * 3, "queries and values": [True, False, True]}


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("adapted", ADAPTED.values(), ids=ADAPTED)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_the_blocks(bias: bool, adapted: list[bool]) -> None:
    x, norm = random(TOKENS, WIDTH), random(WIDTH)
    heads = layers_of([2 * SIZE, SIZE, SIZE], WIDTH, bias=bias, adapted=adapted, seed=1)
    where, product = (turns(), HEADS, LAYOUT.groups), Product(torch.float64, (0.5, 2.0, 3.0))
    assert gradcheck(
        lambda x, norm, *tensors: AttentionIn.apply(x, norm, EPS, product, *where, *tensors), (x, norm, *heads)
    )
    attended = [random(group.rows, 2, group.length, SIZE, seed=n) for n, group in enumerate(LAYOUT.groups)]
    single = Product(torch.float64, (0.5,))
    out = layers_of([WIDTH], 2 * SIZE, bias=bias, adapted=adapted[:1], seed=20)
    assert gradcheck(lambda x, *tensors: AttentionOut.apply(x, single, LAYOUT.groups, *tensors), (x, *out, *attended))
    down = layers_of([WIDTH], 3, bias=bias, adapted=adapted[1:2], seed=30)
    gate_up = layers_of([3, 3], WIDTH, bias=bias, adapted=adapted[1:], seed=40)
    pair = Product(torch.float64, (2.0, 3.0))
    assert gradcheck(
        lambda x, norm, *tensors: FeedForward.apply(x, norm, EPS, pair, single, *tensors), (x, norm, *down, *gate_up)
    )


def test_frozen_weights_get_no_gradient_and_inputs_and_adapters_do() -> None:
    x, norm = random(TOKENS, WIDTH), random(WIDTH).detach()
    frozen = [random(3, WIDTH, seed=n).detach() for n in (3, 4)]
    down = random(WIDTH, 3).detach()
    a, b = random(2, WIDTH, seed=5), random(3, 2, seed=6)
    tensors = (down, None, None, None, *frozen, None, None, a, None, b, None)
    products = Product(torch.float64, (2.0, 1.0)), Product(torch.float64, (1.0,))
    FeedForward.apply(x, norm, EPS, *products, *tensors).sum().backward()
    expected, a_too, b_too = (tensor.detach().clone().requires_grad_() for tensor in (x, a, b))
    normed = F.rms_norm(expected, (WIDTH,), norm, EPS)
    gate = F.silu(normed @ frozen[0].t() + 2.0 * normed @ a_too.t() @ b_too.t())
    (expected + (gate * (normed @ frozen[1].t())) @ down.t()).sum().backward()
    for found, wanted in ((x, expected), (a, a_too), (b, b_too)):
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-12, rtol=0)
    assert norm.grad is None
    assert down.grad is None


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention_in_bfloat16_is_that_of_float64_but_for_its_rounding(heads: tuple[int, int]) -> None:
    """Values and gradients against torch's own attention in float64; bfloat16 keeps 8 bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads[0], 40, 16), (3, heads[1], 40, 16), (3, heads[1], 40, 16)]
    narrow = [torch.randn(*shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    weights = torch.randn(3, heads[0], 40, 16, generator=generator)
    found, expected = attend(*narrow, 0.25), attend(*wide, 0.25)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.01)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(narrow, wide, strict=True):
        assert one.grad.dtype == torch.bfloat16
        torch.testing.assert_close(one.grad.double(), other.grad, atol=0.05, rtol=0.02)


def test_interleaving_makes_a_rotation_of_halves_one_of_neighbours() -> None:
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    assert interleaved(rows, 8)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(separated(interleaved(rows, 8), 8), rows)
    assert torch.equal(interleaved(rows.t(), 8, 1), interleaved(rows, 8).t())


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 500, 1536, 1600])
def test_pieces_cover_all_tokens_once_and_have_few_lengths(count: int) -> None:
    like = torch.zeros(1)
    found = matmul.pieces(count, like)
    assert [token for piece in found for token in range(piece.start, piece.stop)] == list(range(count))
    lengths = [piece.stop - piece.start for piece in found]
    assert all(length in matmul.PIECES for length in lengths[:-1])
    assert all(length <= 128 for length in (p.stop - p.start for p in matmul.pieces(count, like, 128)))
    assert matmul.pieces(count, like.double()) == [slice(0, count)]


@pytest.mark.parametrize("rows", [0, 5, 64, 130])
def test_products_equal_those_of_torch(rows: int) -> None:
    """Transposed views too; the bound is a float32 sum of 130 matmul of numbers of size 1."""
    generator = torch.Generator().manual_seed(0)
    x_NK, weight_MK, bias_M = (torch.randn(*s, generator=generator) for s in ((rows, 130), (96, 130), (96,)))
    expected = x_NK @ weight_MK.t() + bias_M
    torch.testing.assert_close(matmul.linear(x_NK, weight_MK, bias_M), expected, atol=3e-5, rtol=0)
    grad_NM = torch.randn(rows, 96, generator=generator)
    torch.testing.assert_close(matmul.linear(grad_NM, weight_MK.t()), grad_NM @ weight_MK, atol=3e-5, rtol=0)
    torch.testing.assert_close(matmul.linear(grad_NM.t(), x_NK.t()), grad_NM.t() @ x_NK, atol=3e-5, rtol=0)
