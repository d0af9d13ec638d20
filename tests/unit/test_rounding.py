"""Rounding to bfloat16 without bias."""

import torch

from tuneloop.models.rounding import PERIOD, fold, round_unbiased


def test_values_on_the_grid_stay():
    values = torch.randn(1000).bfloat16().float()
    assert torch.equal(round_unbiased(values, torch.bfloat16).float(), values)


def test_rounding_goes_to_a_neighbour_and_is_right_on_average():
    # 1 + 2^-10 lies an eighth of the way from 1 to the next bfloat16 value, 1 + 2^-7.
    values = torch.full((PERIOD // 2,), 1.0 + 2**-10)
    rounded = round_unbiased(values, torch.bfloat16).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert abs((rounded == 1.0 + 2**-7).double().mean().item() - 0.125) < 0.003


def test_small_updates_survive_where_rounding_to_nearest_loses_them():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator).bfloat16()
    a, b = torch.randn(4, 512, generator=generator), torch.randn(256, 4, generator=generator)
    scaling = 1e-4
    delta = scaling * (b @ a)
    nearest = (weight.float() + delta).bfloat16()
    unbiased = torch.empty_like(weight)
    fold(weight, a, b, scaling, unbiased)

    def kept(merged: torch.Tensor) -> float:
        return float(((merged.float() - weight.float()) * delta).sum() / delta.square().sum())

    assert kept(nearest) < 0.6
    assert abs(kept(unbiased) - 1.0) < 0.05


def test_rounding_depends_on_the_place_alone():
    values = torch.randn(10_000)
    whole = round_unbiased(values, torch.bfloat16)
    pieces = torch.cat([round_unbiased(values[i : i + 700], torch.bfloat16, i) for i in range(0, 10_000, 700)])
    assert torch.equal(whole, pieces)
    assert torch.equal(round_unbiased(values, torch.bfloat16, PERIOD), whole)


def test_other_dtypes_round_to_the_nearest():
    values = torch.randn(100)
    assert torch.equal(round_unbiased(values, torch.float16), values.half())
    assert round_unbiased(values, torch.float32).data_ptr() == values.data_ptr()
