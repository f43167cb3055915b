"""Denoising offline: seeds, solvers, guidance, combined conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise, initial_noise
from ditserve.model.sampling.prompt import combine_conditions
from ditserve.model.spec.diffusion import Schedule, make_schedule
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.grids import grid
from ditserve.model.spec.solvers import learned_log_variance, step_table, variance_bounds

Tiny = Callable[..., DiTConfig]
Make = Callable[..., DiT]


@pytest.fixture
def schedule() -> Schedule:
    return make_schedule("cosine", prediction="x0")


def final(denoiser: Denoiser, solver: str, steps: int, seeds: Sequence[int], **options: Any) -> Tensor:
    table = step_table(solver, grid("trailing", steps), denoiser.schedule, **options)
    *_, x0 = denoise(denoiser, table, seeds)
    return x0


def conditions(dit: DiT, *labels: list[int], rows: int = 1) -> list[Tensor]:
    return [dit.embed(torch.tensor([label])).expand(rows, -1) for label in labels]


def test_a_seed_means_the_same_noise_everywhere() -> None:
    expected = np.random.Generator(np.random.Philox(7)).standard_normal((3, 8, 8), dtype=np.float32)
    np.testing.assert_array_equal(initial_noise(7, (3, 8, 8)), expected)
    with pytest.raises(ValueError, match="a seed must be 0 or more, not -1"):
        initial_noise(-1, (3, 8, 8))


@pytest.mark.parametrize(
    ("solver", "options"), [("ddim", {}), ("dpmpp-2m", {}), ("ddpm", {}), ("ddim", {"eta": 0.5})]
)
def test_a_sample_does_not_depend_on_its_batch(
    network: Make, schedule: Schedule, solver: str, options: dict[str, Any]
) -> None:
    dit = network()
    three = Denoiser(dit, schedule, Conditions(tuple(conditions(dit, [1, 2], rows=3))), Guidance(2.0))
    one = Denoiser(dit, schedule, Conditions(tuple(conditions(dit, [1, 2]))), Guidance(2.0))
    together, alone = final(three, solver, 4, [5, 6, 7], **options), final(one, solver, 4, [6], **options)
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_ddim_by_hand(network: Make, schedule: Schedule) -> None:
    """Each step is x0 → noise → next x, as in arXiv:2010.02502 eq. 12, with guidance on the raw output."""
    dit = network()
    label, null = torch.tensor([[1, 2]]), torch.tensor([[5, 3]])
    x = torch.from_numpy(initial_noise(3, (3, 8, 8)))[None]
    steps = grid("trailing", 4)
    with torch.no_grad():
        for now, after in zip(steps, (*steps[1:], -1), strict=True):
            t = torch.tensor([float(now)])
            empty = dit(x, t, null)
            x0 = (empty + 1.7 * (dit(x, t, label) - empty)).clamp(-1, 1)
            epsilon = (x - schedule.alpha(now) * x0) / schedule.sigma(now)
            x = schedule.alpha(after) * x0 + schedule.sigma(after) * epsilon
    denoiser = Denoiser(dit, schedule, Conditions(tuple(conditions(dit, [1, 2]))), Guidance(1.7))
    assert torch.allclose(final(denoiser, "ddim", 4, [3]), x, atol=1e-4)


def test_learned_variance_scales_the_noise(tiny: Tiny, network: Make) -> None:
    """A DDPM step on a model of learned variance, written out, is the mean plus exp(log variance / 2) · z."""
    dit = network(tiny(learn_sigma=True))
    schedule = make_schedule("linear")
    table = step_table("ddpm", (900, 400), schedule)
    denoiser = Denoiser(dit, schedule, Conditions(tuple(conditions(dit, [1, 2]))))
    first, second = denoise(denoiser, table, [3])
    source = np.random.Generator(np.random.Philox(3))
    x, z = (torch.from_numpy(source.standard_normal((1, 3, 8, 8), dtype=np.float32)) for _ in range(2))
    with torch.no_grad():
        output, v = dit(x, torch.tensor([900.0]), torch.tensor([[1, 2]])).chunk(2, dim=1)
        x0 = (table.x0_x[0] * x + table.x0_out[0] * output).clamp(-1, 1)
        low, high = variance_bounds((900, 400), schedule)
        deviation = torch.exp(0.5 * learned_log_variance(v, low[0], high[0]))
        x = table.a[0] * x + table.b[0] * x0 + deviation * z
        output, _ = dit(x.float(), torch.tensor([400.0]), torch.tensor([[1, 2]])).chunk(2, dim=1)
    assert torch.allclose(first, x0.float(), atol=1e-4)
    assert torch.allclose(
        second, (table.x0_x[1] * x + table.x0_out[1] * output).clamp(-1, 1).float(), atol=1e-3
    )


def test_guidance_interval_and_channels(network: Make, schedule: Schedule) -> None:
    dit = network()
    x, parts = torch.randn(2, 3, 8, 8), Conditions(tuple(conditions(dit, [1, 2], rows=2)))

    def output(guidance: Guidance, t: int = 500) -> Tensor:
        return Denoiser(dit, schedule, parts, guidance)(x, t)

    plain, full = output(Guidance()), output(Guidance(3.0))
    assert torch.equal(output(Guidance(3.0, interval=(0.6, 1.0))), plain)
    assert torch.equal(output(Guidance(3.0, interval=(0.4, 1.0))), full)
    two = output(Guidance(3.0, channels=2))
    assert torch.equal(two[:, :2], full[:, :2])
    assert torch.equal(two[:, 2:], plain[:, 2:])
    assert not torch.allclose(output(Guidance(3.0, decay=2.0)), full)


def test_composition_is_a_sum_of_differences(network: Make, schedule: Schedule) -> None:
    dit = network()
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([500.0])
    cat, fox, empty = (dit(x, t, torch.tensor([label])) for label in ([0, 3], [2, 3], [5, 3]))
    parts = combine_conditions([e[0] for e in conditions(dit, [0, 3], [2, 3])], [3, 1], "compose", 1)
    got = Denoiser(dit, schedule, parts, Guidance(2.0))(x, 500)
    assert torch.allclose(got, empty + 2 * (0.75 * (cat - empty) + 0.25 * (fox - empty)), atol=1e-4)


def test_layers_and_mixes_differ_from_either(network: Make, schedule: Schedule) -> None:
    dit = network()
    x = torch.randn(1, 3, 8, 8)
    cat, fox = (e[0] for e in conditions(dit, [0, 3], [2, 3]))
    outs = [
        Denoiser(dit, schedule, combine_conditions(parts, [1] * len(parts), how, 1))(x, 500)  # type: ignore[arg-type]
        for parts, how in (
            ([cat], "linear"),
            ([fox], "linear"),
            ([cat, fox], "linear"),
            ([cat, fox], "spherical"),
            ([cat, fox], "layers"),
            ([cat, fox], "compose"),
        )
    ]
    for k, one in enumerate(outs):
        assert all(not torch.allclose(one, other, atol=1e-5) for other in outs[k + 1 :])
    same = Denoiser(dit, schedule, combine_conditions([cat, cat], [1, 1], "layers", 1))(x, 500)
    assert torch.allclose(same, outs[0], atol=1e-6)


def test_arguments_that_cannot_be_denoised_are_refused(network: Make, schedule: Schedule) -> None:
    dit = network()
    one = conditions(dit, [1, 2])[0]
    for make, message in (
        (lambda: Guidance(2.0, interval=(0.8, 0.2)), "interval must satisfy"),
        (lambda: Guidance(2.0, decay=30.0), "decay must be in"),
        (lambda: Guidance(2.0, channels=0), "channels must be 1 or more"),
        (lambda: Conditions(()), "one or more condition embeddings"),
        (lambda: Conditions((one, one[:, :3]), (1, 1)), "of one shape"),
        (lambda: Conditions((one, one)), "one weight for each"),
        (
            lambda: final(Denoiser(dit, schedule, Conditions((one,))), "ddim", 2, [1, 2]),
            "one seed for each of the 1 rows",
        ),
        (lambda: final(Denoiser(dit, schedule, Conditions((one,))), "ddim", 2, []), "one seed for each"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
