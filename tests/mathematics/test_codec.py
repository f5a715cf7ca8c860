"""The codes of 8-bit states, masters of 24 bits and stochastic rounding, over every code, exponent and remainder.

What is expected is computed here with numpy, from the published definition and not from the package.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_optim.state import codec, masters

LEVELS = {torch.int8: 127, torch.uint8: 254}
EXPONENTS = {torch.int8: range(-112, 127), torch.uint8: range(-51, 64)}
FIRST = {torch.int8: 1, torch.uint8: 4}
each_code = pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=["mean", "root"])
LOWEST, HIGHEST = 0x00000000, 0xFFFFFFFF  # the words whose bits all codes read as their extremes


def word(number: int, like: Tensor) -> Tensor:
    return torch.full(like.shape, codec.signed(number), dtype=torch.int32)


def words_of(count: int, first: int = 0, seed: int = 5) -> Tensor:
    return codec.random_words(torch.arange(first, first + count), codec.random_key(seed, 1, 1, torch.device("cpu")))


def mixed(number: int) -> int:
    number = (number ^ number >> 16) * 0x7FEB352D & 0xFFFFFFFF
    number = (number ^ number >> 15) * 0x846CA68B & 0xFFFFFFFF
    return number ^ number >> 16


def test_random_words_are_the_published_ones() -> None:
    key = codec.random_key(1234, 1, 0, torch.device("cpu"))
    assert int(key) & 0xFFFFFFFF == 0x1C77F0A8
    found = codec.random_words(torch.arange(4), key)
    assert [int(one) & 0xFFFFFFFF for one in found] == [0x54C9BD95, 0x6872B828, 0xC4B05A9E, 0xCFA85315]


@pytest.mark.parametrize("index", [0, 1, 12345, 2**31, 2**32 - 1, 2**32, 5 * 2**32 + 7])
def test_a_random_word_is_its_places_alone(index: int) -> None:
    key = int(codec.random_key(7, 3, 2, torch.device("cpu"))) & 0xFFFFFFFF
    expected = mixed((index * 0x9E3779B9 + (key ^ mixed(index >> 32))) & 0xFFFFFFFF)
    for first in (index, max(index - 100, 0)):
        found = codec.random_words(torch.arange(first, index + 3), codec.random_key(7, 3, 2, torch.device("cpu")))
        assert int(found[index - first]) & 0xFFFFFFFF == expected


def test_a_step_on_a_device_has_the_same_key() -> None:
    cpu = torch.device("cpu")
    assert codec.random_key(9, torch.tensor(17.0, dtype=torch.float64), 4, cpu) == codec.random_key(9, 17.0, 4, cpu)


def every_group(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Groups that hold every code, for every exponent; the first of each group is the largest code."""
    largest, first = LEVELS[dtype], FIRST[dtype]
    codes = torch.arange(first, largest + 1)
    codes = torch.cat([codes, codes.new_full((-len(codes) % 31,), largest)]).view(-1, 31)
    codes = torch.cat([codes.new_full((len(codes), 1), largest), codes], dim=1)
    exponents = torch.tensor([k + 127 for k in EXPONENTS[dtype]])
    shape = (len(exponents), *codes.shape)
    groups = codes.expand(shape).reshape(-1, codec.GROUP)
    if dtype == torch.int8:
        groups = groups * torch.tensor([1, -1]).repeat(codec.GROUP // 2)
    return groups.to(dtype), exponents.repeat_interleave(len(codes)).to(torch.uint8).unsqueeze(1)


@each_code
@pytest.mark.parametrize("number", [LOWEST, codec.MIDDLE, HIGHEST], ids=hex)
def test_every_code_returns_to_itself(dtype: torch.dtype, number: int) -> None:
    codes, exponents = every_group(dtype)
    value = codec.decode(codes, exponents)
    again, scale = codec.encode(value, dtype, word(number, value))
    assert torch.equal(again, codes)
    assert torch.equal(scale, exponents)


@each_code
def test_a_code_is_what_the_definition_says(dtype: torch.dtype) -> None:
    codes, exponents = every_group(dtype)
    f = codes.numpy().astype(np.float32)
    unit = np.float32(1) / np.float32(LEVELS[dtype] ** 2)
    value = f * np.abs(f) * unit * np.exp2(exponents.numpy().astype(np.float64) - 127).astype(np.float32)
    if dtype == torch.uint8:
        value = value * value
    assert np.array_equal(codec.decode(codes, exponents).numpy(), value)


@each_code
def test_encoding_is_what_the_definition_says(dtype: torch.dtype) -> None:
    """Of numbers of many magnitudes, subnormal ones and zeros among them, element by element."""
    generator = np.random.default_rng(0)
    magnitude = np.exp2(generator.uniform(-20, 2, (400, 32)) + generator.uniform(-125, 60, (400, 1))).astype(np.float32)
    magnitude[generator.random((400, 32)) < 0.1] = 0
    magnitude[0], magnitude[1] = 0, np.float32(1e-45)
    signs = np.where(generator.random((400, 32)) < 0.5, 1, -1).astype(np.float32)
    value = magnitude if dtype == torch.uint8 else magnitude * signs
    words = words_of(value.size)
    h = words.numpy().view(np.uint32).reshape(400, 32)
    x = np.sqrt(value) if dtype == torch.uint8 else np.abs(value)
    random = ((h >> 16) & 0xFFFC) + 2 if dtype == torch.uint8 else ((h >> 8) & 255) * 256 + 128
    least, most = (k + 127 for k in (min(EXPONENTS[dtype]), max(EXPONENTS[dtype])))
    largest = x.max(axis=1, keepdims=True)
    e = np.clip((largest.view(np.uint32).astype(np.int64) + 0x7FFFFF) >> 23, least, most)
    y = np.sqrt(x * np.exp2(127.0 - e).astype(np.float32)) * np.float32(LEVELS[dtype])
    code = np.minimum(((y * 65536).astype(np.int64) + random) >> 16, LEVELS[dtype])
    if dtype == torch.uint8:
        code = np.where(x > 0, np.maximum(code, 4), code)
    code = np.where(largest > 0, code, 0) * np.where(value < 0, -1, 1)
    codes, scale = codec.encode(torch.from_numpy(value), dtype, words)
    assert np.array_equal(codes.numpy().astype(np.int64), code)
    assert np.array_equal(scale.numpy().astype(np.int64), np.where(largest > 0, e, 0))


@pytest.mark.parametrize("spread", [1, 3, 6])
@pytest.mark.parametrize("number", [LOWEST, HIGHEST, None])
def test_bounds_of_a_single_step(spread: int, number: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    count = codec.GROUP * 5000
    m = torch.randn(count, generator=generator) * torch.exp(spread * torch.randn(count, generator=generator))
    v = torch.exp(2 * spread * torch.randn(count, generator=generator))
    m, v = m.view(-1, 32), v.view(-1, 32)
    words = words_of(count) if number is None else word(number, m)
    mean, root = (codec.encode(value, dtype, words) for value, dtype in ((m, torch.int8), (v, torch.uint8)))
    m_again, v_again = codec.decode(*mean), codec.decode(*root)
    assert ((v_again > 0) == (v > 0)).all()
    assert (v.double() / v_again.double()).sqrt().max() < 1.5625
    q = mean[0].double().abs().clamp_min(((m.double().abs() / torch.exp2(mean[1].double() - 127)).sqrt() * 127).floor())
    assert ((m_again - m).double().abs() <= torch.exp2(mean[1].double() - 127) * (2 * q + 1) / 16129 * (1 + 1e-6)).all()


BINADES = range(-15, 0)  # of x beside a largest one of 1; what is smaller has the least code, or 0


def assert_codes_are_close(dtype: torch.dtype, x: Tensor, number: int) -> None:
    """Codes of numbers that rise, beside 1: as the definition says to one code, rising, within the promised bounds."""
    value = (x * x if dtype == torch.uint8 else x).view(-1, 31)
    groups = torch.cat([torch.ones(len(value), 1), value], dim=1)
    codes, exponents = codec.encode(groups, dtype, word(number, groups))
    assert (exponents == 127).all()
    found = codes[:, 1:].flatten().to(torch.float64)
    root = value.double().sqrt() if dtype == torch.uint8 else value.double()
    exact = root.flatten().sqrt() * LEVELS[dtype]
    least = 4 if dtype == torch.uint8 else 0
    assert ((found - exact.clamp_min(least)).abs() < 1.0001).all()
    assert (found[1:] >= found[:-1]).all()
    again = codec.decode(codes, exponents)[:, 1:].double()
    if dtype == torch.uint8:
        assert float((value / again).sqrt().max()) < 1.5625
    else:
        assert ((again - value).abs() <= (2 * exact.floor().view_as(value) + 1) / 16129 * (1 + 1e-6)).all()


@each_code
@pytest.mark.parametrize("number", [LOWEST, HIGHEST], ids=hex)
def test_numbers_of_every_binade_have_the_code_that_is_next_to_them(dtype: torch.dtype, number: int) -> None:
    for binade in BINADES:
        mantissas = 1 + torch.arange(0, 1 << 23, 677, dtype=torch.float64) / (1 << 23)
        x = (mantissas * 2.0**binade).float()
        assert_codes_are_close(dtype, x[: len(x) // 31 * 31], number)


@pytest.mark.slow
@each_code
@pytest.mark.parametrize("number", [LOWEST, HIGHEST], ids=hex)
@pytest.mark.parametrize("binade", BINADES)
def test_every_mantissa_has_the_code_that_is_next_to_it(dtype: torch.dtype, number: int, binade: int) -> None:
    bits = torch.arange(1 << 23, dtype=torch.int32) + (binade + 127 << 23)
    x = torch.cat([bits, bits[-1:].expand(-len(bits) % 31)]).view(torch.float32)
    assert_codes_are_close(dtype, x, number)


@each_code
def test_the_mean_over_all_words_is_the_number_to_half_of_1_in_256_of_a_code(dtype: torch.dtype) -> None:
    """Over every value that the bits of a word take that the code reads: no chance is left."""
    words = torch.arange(1 << 14) << 18 if dtype == torch.uint8 else torch.arange(256) << 8
    words = words.to(torch.int32).view(-1, 1).expand(-1, 32)
    value = torch.cat([torch.ones(1), torch.linspace(0.01, 0.99, 31)]).expand(len(words), 32)
    codes, _ = codec.encode(value.contiguous(), dtype, words.contiguous())
    mean = codes.double().mean(0)[1:]
    x = value[0, 1:].double()
    exact = (x.sqrt() if dtype == torch.uint8 else x).sqrt() * LEVELS[dtype]
    assert float((mean - exact).abs().max()) <= 1 / 512 + 1e-4


@each_code
def test_zeros_stay_zeros_and_what_is_not_finite_stays_with_its_element(dtype: torch.dtype) -> None:
    value = torch.full((3, 32), 1e-6)
    value[0] = 0
    value[1, 3], value[1, 4], value[1, 5] = float("inf"), float("nan"), 0
    value[2] = float("inf")
    for number in (LOWEST, HIGHEST, codec.MIDDLE):
        again = codec.decode(*codec.encode(value, dtype, word(number, value)))
        assert (again[0] == 0).all()
        assert (again[1, [3, 4]].isinf() if dtype == torch.uint8 else again[1, [3, 4]].isnan()).all()
        assert again[1, 5] == 0
        assert (again[1, 6:].isfinite() & (again[1, 6:] > 0)).all()
        assert not again[2].isfinite().any()


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1.1754944e-38, 3.4028234e38])
def test_subnormal_and_largest_numbers(value: float) -> None:
    """What is smaller than the least scale can say keeps its sign and is at most that; no number becomes NaN or 0."""
    whole = torch.full((1, 32), value)
    root = codec.decode(*codec.encode(whole, torch.uint8, word(LOWEST, whole)))
    assert (root > 0).all()
    assert root.isfinite().all()
    mean = codec.decode(*codec.encode(-whole, torch.int8, word(HIGHEST, whole)))
    assert ((mean <= 0) & mean.isfinite() & (mean >= -max(value, 2.0**-112))).all()


@each_code
def test_codes_are_right_on_average(dtype: torch.dtype) -> None:
    """The mean code over many words is the exact one to 1/256 of a code."""
    values = torch.rand(64, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05
    groups = torch.cat([torch.ones(64, 1), values.unsqueeze(1).expand(64, 31)], dim=1)
    count = 4096
    total = torch.zeros(64, dtype=torch.float64)
    for batch in range(count // 256):
        words = words_of(256 * 64 * 32, first=batch * 256 * 64 * 32)
        codes, _ = codec.encode(groups.repeat(256, 1), dtype, words)
        total += codes.double().view(256, 64, 32)[:, :, 1:].mean((0, 2)) / (count // 256)
    x = values.double().sqrt() if dtype == torch.uint8 else values.double()
    exact = x.sqrt() * LEVELS[dtype]
    assert (total - exact).abs().max() < 1 / 256 + 4 * 0.5 / (31 * count) ** 0.5


# Masters of 24 bits ---------------------------------------------------------------------------------------------


def every_pair() -> tuple[Tensor, Tensor]:
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return upper.repeat_interleave(256), torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).repeat(1 << 16)


def test_every_remainder_of_8_bits_is_read_or_guarded_and_returns_to_itself() -> None:
    param, remainder = every_pair()
    whole = masters.read(param, {"param_remainder": remainder}, "param_remainder")
    nan = torch.isnan(param)
    assert torch.equal(torch.isnan(whole), nan)
    ignored = (param == 0) | ~torch.isfinite(param)
    assert torch.equal(whole[ignored & ~nan], param.float()[ignored & ~nan])
    for number in (LOWEST, HIGHEST):
        again, rest = masters.remainder8_of(whole, word(number, whole))
        seen = masters.read(again, {"param_remainder": rest}, "param_remainder")
        assert torch.equal(seen.view(torch.int32)[~nan], whole.view(torch.int32)[~nan])
        assert torch.equal(rest[~ignored], remainder[~ignored])
        assert torch.equal(again.view(torch.int16)[~ignored], param.view(torch.int16)[~ignored])
    again, rest = masters.remainder8_of(whole[nan], words_of(int(nan.sum())))
    assert (again.view(torch.int16) == 0x7FC0).all()
    assert (rest == 0).all()


def test_a_master_of_24_bits_is_right_on_average() -> None:
    """Over the 256 words that there are, the sum is exact for every lower byte."""
    lower = torch.arange(256, dtype=torch.int32)
    bits = (0x3F912300 + lower).view(256, 1).expand(256, 256)
    words = torch.arange(256, dtype=torch.int32).expand(256, 256)
    param, rest = masters.remainder8_of(bits.contiguous().view(torch.float32), words.contiguous())
    seen = masters.read(param, {"param_remainder": rest}, "param_remainder").view(torch.int32)
    assert torch.equal((seen - bits).sum(1), torch.zeros(256, dtype=torch.int64))


def test_a_remainder_of_16_bits_has_the_same_guard() -> None:
    zero, infinite = torch.tensor([0.0, -0.0]).bfloat16(), torch.tensor([float("inf"), -float("inf")]).bfloat16()
    for param, remainder in ((zero, -1), (zero, -(1 << 15)), (infinite, 1), (infinite, (1 << 15) - 1)):
        state = {"param_remainder": torch.full((2,), remainder, dtype=torch.int16)}
        assert torch.equal(masters.read(param, state, "param_remainder"), param.float())


# Stochastic rounding --------------------------------------------------------------------------------------------

NARROW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_a_narrow_dtype_can_say_is_kept(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for number in (LOWEST, HIGHEST, codec.MIDDLE):
        rounded = codec.round_stochastically(every.float(), dtype, word(number, every))
        nan = torch.isnan(every)
        assert torch.equal(torch.isnan(rounded), nan)
        assert torch.equal(rounded.view(torch.int16)[~nan], every.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stochastic_rounding_goes_to_a_neighbour(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    value = torch.randn(100_000, generator=generator) * torch.exp(4 * torch.randn(100_000, generator=generator))
    value = value.clamp(-6e4, 6e4) * torch.where(torch.arange(100_000) % 7 == 0, 1e-7, 1.0)
    rounded = codec.round_stochastically(value, dtype, words_of(len(value))).float()
    nearest = value.to(dtype).float()
    step = torch.where(nearest.abs() > value.abs(), -1, 1)
    other = (value.to(dtype).view(torch.int16) + step).to(torch.int16).view(dtype).float()
    exact = nearest == value
    assert ((rounded == nearest) | ((rounded == other) & ~exact) | (nearest == 0)).all()


@pytest.mark.parametrize("number", [LOWEST, codec.MIDDLE, HIGHEST, 0x12345678], ids=hex)
def test_every_lower_half_rounds_up_as_often_as_it_should(number: int) -> None:
    """A float32 number goes up where its lower half and the word's 16 bits carry: so in as many of 2^16 words as the
    lower half says."""
    lower = torch.arange(1 << 16, dtype=torch.int32)
    random = (number * 0x9E3779B1 & 0xFFFFFFFF) >> 16
    for upper in (0x0000, 0x3F80, 0x7F7F, 0x8000, 0xC2FF):
        value = (lower + codec.signed(upper << 16)).view(torch.float32)
        rounded = (
            codec.round_stochastically(value, torch.bfloat16, word(number, value)).view(torch.int16).int() & 0xFFFF
        )
        assert torch.equal(rounded, upper + (lower + random >= 1 << 16).int())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 3e-5, 2e-7, 70.0])
def test_stochastic_rounding_is_right_on_average(dtype: torch.dtype, magnitude: float) -> None:
    fractions = torch.linspace(0, 1, 65)[:-1] + 1
    value = (fractions * magnitude).float().repeat_interleave(1 << 14)
    rounded = codec.round_stochastically(value, dtype, words_of(len(value)))
    mean = rounded.double().view(64, -1).mean(1)
    exact = value.double().view(64, -1)[:, 0]
    bits = rounded.view(64, -1)[:, 0]
    spacing = ((bits.view(torch.int16) + 1).to(torch.int16).view(dtype).double() - bits.double()).abs()
    assert ((mean - exact).abs() < spacing * (1 / 256 + 4 * 0.5 / 128)).all()


def test_the_odds_of_a_word_are_even() -> None:
    """Every bit that a code reads is set in half of the words, to five deviations."""
    words = words_of(1 << 20)
    for bit in range(32):
        share = Fraction(int(codec.shifted(words, bit).bitwise_and(1).sum()), 1 << 20)
        assert abs(share - Fraction(1, 2)) < Fraction(5, 2 * 1024)
