"""Elements, random bits and rotations: the grids, the exact probabilities, the order of operations."""

import shutil

import pytest
import torch

from hf_nvfp4 import Cast, quantize
from hf_nvfp4.formats import BF16, E2M1, E4M3, E5M2
from hf_nvfp4.rounding import (
    RHT_SIGNS,
    decode,
    draw_seed,
    encode,
    flip,
    pack_nibbles,
    random_bytes,
    rotate,
    round_to,
    unpack_nibbles,
)

NAN = float("nan")
BYTES = torch.arange(256, dtype=torch.uint8)


def seed(*values):
    return torch.tensor(values, dtype=torch.int32)


# ---------------------------------------------------------------------------- rounding


def test_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_to(ties, E2M1).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert round_to(-ties, E2M1).tolist() == [0, -1, -1, -2, -2, -4, -4]


@pytest.mark.parametrize("element", [E4M3, E5M2, BF16], ids=lambda e: e.name)
def test_rounding_equals_torchs_own_type(element):
    x = torch.randn(100_000) * 10 ** torch.randn(100_000)
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-9, -1e-9, element.min_normal / 3, element.max])])
    expected = x.clamp(-element.max, element.max).to(element.dtype).float()
    got = round_to(x, element)
    assert torch.equal(got, expected)
    nonzero = x != 0
    assert torch.equal(got.signbit()[nonzero], expected.signbit()[nonzero])


@pytest.mark.parametrize("element", [E2M1, E4M3, E5M2], ids=lambda e: e.name)
def test_grid_points_are_fixed_points_of_both_roundings(element):
    grid = torch.tensor(element.grid)
    for values in (grid, -grid):
        assert torch.equal(round_to(values, element), values)
        stochastic = round_to(values.expand(256, -1), element, BYTES[:, None].expand(-1, len(grid)))
        assert torch.equal(stochastic, values.expand(256, -1))
        assert torch.equal(decode(encode(values, element), element), values)


@pytest.mark.parametrize(("element", "code"), [(E2M1, 7), (E4M3, 0x7F), (E5M2, 0x7F)], ids=str)
def test_nan_has_one_code_and_its_sign_is_dropped(element, code):
    values = round_to(torch.tensor([NAN, -NAN, 1.0]), element)
    assert values[:2].isnan().all()
    assert encode(values, element)[:2].tolist() == [code, code]


def test_the_sign_bit_follows_the_rule():
    x = torch.zeros(1, 16)
    x[0, :4] = torch.tensor([-0.0, -1e-3, 1e-3, 6.0])
    codes = unpack_nibbles(quantize(x, Cast()).codes)[0]
    assert codes[:4].tolist() == [0, 8, 0, 7]


def test_the_even_column_is_in_the_low_nibble():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 1)
    assert pack_nibbles(codes)[0, :2].tolist() == [0x10, 0x32]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


# ---------------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("element", [E2M1, E4M3, E5M2], ids=lambda e: e.name)
def test_probabilities_are_exact_where_the_distance_is_a_256th_of_a_step(element):
    """Between every two neighbours of the grid, k of the 256 bytes round up from k/256 of the way."""
    low = torch.tensor(element.grid[:-1])[:, None, None]
    high = torch.tensor(element.grid[1:])[:, None, None]
    k = torch.arange(256)[:, None]
    x = low + (high - low) * (k / 256)
    for sign in (1, -1):
        got = sign * round_to(sign * x.expand(-1, -1, 256), element, BYTES.expand(len(low), 256, -1))
        assert ((got == low) | (got == high)).all()
        assert torch.equal((got == high).sum(2), k[:, 0].expand(len(low), -1))


def test_rounding_frequencies_pass_chi_square():
    """The hash's bytes against the probabilities k/256: 255 values, 4,096 draws each."""
    k = torch.arange(1, 256)
    x = (2 + k[:, None] / 256).expand(-1, 4096)  # from one grid point to the next
    up = (round_to(x, E2M1, random_bytes(x, seed(5, 6))) == 3).sum(1)
    p = k / 256
    chi2 = ((up - 4096 * p) ** 2 / (4096 * p * (1 - p))).sum()
    assert abs(chi2 - 255) < 5 * 510**0.5


def test_bytes_are_uniform_and_independent():
    """Of neighbours in a row and in a column, within a hashed word and across, and of seeds one bit apart."""
    shape, n = (1024, 1024), 2**20
    d = random_bytes(torch.empty(shape), seed(1, 2))
    counts = torch.bincount(d.flatten(), minlength=256)
    assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 5 * 510**0.5
    others = [random_bytes(torch.empty(shape), seed(*s)) for s in ((1, 3), (3, 2), (1 | 1 << 30, 2), (2, 1))]
    pairs = [(d[:, lag:], d[:, :-lag]) for lag in (1, 2, 3, 4, 16)]
    pairs += [(d[lag:], d[:-lag]) for lag in (1, 2, 16, 512)]
    pairs += [(d, other) for other in others] + [(d, d.T), (d[:, 0::4], d[:, 3::4])]
    for a, b in pairs:
        r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).float())[0, 1]
        assert abs(r) < 5 / a.numel() ** 0.5
    # Two rows and two words: hashes that only add a row's to a word's would cancel.
    sign = (d.view(1024, 256, 4)[:, :, 0] > 127).float() * 2 - 1
    corners = sign[:-1, :-1] * sign[1:, :-1] * sign[:-1, 1:] * sign[1:, 1:]
    assert abs(corners.mean()) < 5 / corners.numel() ** 0.5


def test_the_same_seed_gives_the_same_bits_wherever_the_element_stands():
    whole = random_bytes(torch.empty(1024, 1022), seed(1, 2))
    assert torch.equal(random_bytes(torch.empty(1024, 1022), seed(1, 2)), whole)
    assert torch.equal(random_bytes(torch.empty(24, 1022), seed(1, 2), first_row=1000), whole[1000:])
    assert torch.equal(random_bytes(torch.empty(1024, 37), seed(1, 2)), whole[:, :37])


def test_the_hash_is_this_one():
    """In Python's integers, so that kernels and this file can't drift apart unseen."""

    def mix(h):
        h = (h >> 16 ^ h) * 0x21F0AAAD & 0xFFFFFFFF
        h = (h >> 15 ^ h) * 0x735A2D97 & 0xFFFFFFFF
        return h >> 15 ^ h

    d = random_bytes(torch.empty(3, 9), seed(-7, 123456789), first_row=70)
    for row in range(3):
        for column in range(9):
            of_row = mix((70 + row) ^ (-7 & 0xFFFFFFFF))
            product = (of_row ^ mix(~(column // 4) & 0xFFFFFFFF ^ 123456789)) * 0x9E3779B1
            word = (product >> 32 ^ product) & 0xFFFFFFFF
            assert d[row, column] == word >> 8 * (0, 2, 1, 3)[column % 4] & 0xFF


def test_calls_and_orientations_draw_apart():
    """A cast of x and one of x's transpose, or two casts of x, share no rounding decisions."""
    x = torch.rand(512, 512) + 2  # from one grid point to the next
    a, b, c = (round_to(x, E2M1, random_bytes(x, draw_seed(x.device))) - x for _ in range(3))
    for other in (b, c.T):
        r = torch.corrcoef(torch.stack([a.flatten(), other.flatten()]))[0, 1]
        assert abs(r) < 5 / x.numel() ** 0.5


def test_ranks_seeded_alike_draw_different_numbers(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    seeds = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        seeds.append(draw_seed(torch.device("cpu"), torch.Generator().manual_seed(3)))
    assert torch.equal(seeds[0], seeds[2]) and not (seeds[0] == seeds[1]).any()
    a, b = (random_bytes(torch.empty(512, 512), s).flatten() for s in seeds[:2])
    assert abs(torch.corrcoef(torch.stack([a, b]).float())[0, 1]) < 5 / 512


def test_ranks_seeded_alike_rotate_with_the_same_signs(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    seeds = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        seeds.append(draw_seed(torch.device("cpu"), torch.Generator().manual_seed(3), by_rank=False))
    assert torch.equal(*seeds)


def test_redrawn_signs_are_even_and_independent():
    """Over 4,096 draws: each of 128 positions, and each pair of them."""
    cpu = torch.device("cpu")
    signs = torch.cat([flip(torch.ones(1, 128), draw_seed(cpu), 128, 1) for _ in range(4096)])
    assert set(signs.unique().tolist()) == {-1, 1}
    correlation = signs.T @ signs / 4096
    pairs = correlation.triu(1)[torch.ones(128, 128).triu(1) > 0]
    assert signs.mean(0).abs().max() < 5 / 64 and pairs.abs().max() < 5.5 / 64
    assert pairs.square().mean() * 4096 == pytest.approx(1, abs=0.08)  # 8,128 pairs, each 1 ± 1.4


def test_flipped_along_either_dimension_the_signs_begin_again_after_each_block(device):
    seed, x = draw_seed(device), torch.randn(40, 48, device=device).bfloat16()
    signs = flip(torch.ones(1, 16, device=device), seed, 16, 1)[0]
    assert signs.min() == -1 and signs.max() == 1
    assert torch.equal(flip(x, seed, 16, 1), x * signs.repeat(3).bfloat16())
    assert torch.equal(flip(x, seed, 16, 0), x * signs.repeat(3)[:40, None].bfloat16())


# ---------------------------------------------------------------------------- rotations


def test_the_hadamard_transform_equals_the_golden_one(golden):
    for name in ("randn_bf16", "outlier_bf16", "one_zero_block_bf16"):
        assert torch.equal(rotate(golden[f"in/{name}"].T.contiguous(), 16), golden[f"rht1d/{name}/rht_xT"])


@pytest.mark.parametrize("size", [1, 2, 16, 32, 128])
def test_the_butterfly_adds_in_the_prescribed_order(size):
    x = torch.randn(4, 2 * size) * 10 ** torch.randn(4, 2 * size)
    before = x.clone()
    got = rotate(x, size)
    assert torch.equal(x, before)
    columns = list((x.view(-1, size) * torch.tensor(RHT_SIGNS).repeat(8)[:size]).T)
    h = 1
    while h < size:
        for i in (i for i in range(size) if not i & h):
            columns[i], columns[i + h] = columns[i] + columns[i + h], columns[i] - columns[i + h]
        h *= 2
    expected = (torch.stack(columns, 1) * torch.tensor(size**-0.5)).bfloat16().view(x.shape)
    assert torch.equal(got, expected)


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
def test_a_compiled_rotation_is_rounded_to_bf16_too():
    x = torch.randn(64, 256)
    x[0, 0], x[0, 32] = NAN, torch.inf
    compiled = torch.compile(lambda x: rotate(x, 32).float() + 1.0, fullgraph=True)
    assert torch.equal(compiled(x).nan_to_num(nan=7.0), (rotate(x, 32).float() + 1.0).nan_to_num(nan=7.0))


def test_a_rotation_is_orthogonal_and_cancels_in_the_product():
    a, b = torch.randn(8, 256), torch.randn(8, 256)
    for size in (16, 32, 128):
        matrix = rotate(torch.eye(size), size).float()
        assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=0.01)
        ra, rb = rotate(a, size), rotate(b, size)
        assert ra.dtype == torch.bfloat16
        assert torch.allclose(ra.float() @ rb.float().T, a @ b.T, atol=0.3)
        assert not torch.allclose(ra.float(), a, atol=1.0)
        seed = draw_seed(torch.device("cpu"))
        ra, rb = (rotate(flip(t, seed, size, 1), size) for t in (a, b))
        assert torch.allclose(ra.float() @ rb.float().T, a @ b.T, atol=0.3)
    with pytest.raises(ValueError, match="size 32 does not divide"):
        rotate(torch.ones(2, 48), 32)
