"""Recycled errors: what is kept, what is injected, and that both follow from seed, step, sample and chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longvideo.checkpoint.tensors import Weights
from longvideo.errors import CheckpointError, ConfigError
from longvideo.flow.schedule import FlowSchedule, expand
from longvideo.train.error_recycling import ErrorBank, Injected
from longvideo.train.prediction_errors import noise_bucket, prediction_errors
from longvideo.train.recycling_config import GIB, ErrorRecyclingConfig

from .small import CPU

SCHEDULE = FlowSchedule(5.0)
CHUNK = (3, 2, 2, 4)  # C, F, H, W
ALWAYS = ErrorRecyclingConfig(
    buckets=5,
    entries=4,
    warmup_steps=0,
    clean_probability=0.0,
    context_probability=1.0,
    latent_probability=1.0,
    noise_probability=1.0,
)
BATCH, CHUNKS = 2, 3
LEVELS = torch.tensor([[0.99, 0.8, 0.3], [0.99, 0.5, 0.3]])


def bank(config: ErrorRecyclingConfig = ALWAYS, *, seed: int = 7) -> ErrorBank:
    return ErrorBank(config, SCHEDULE, chunk_shape=CHUNK, seed=seed, device=CPU)


def latents(seed: int, batch: int = BATCH, chunks: int = CHUNKS) -> Tensor:
    """Numbers that bfloat16 holds, so that what is stored is what was given."""
    shape = (batch, CHUNK[0], chunks * CHUNK[1], *CHUNK[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def zeros(batch: int = BATCH, chunks: int = CHUNKS) -> Tensor:
    return torch.zeros_like(latents(0, batch, chunks))


def by_chunk(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW.unflatten(2, (-1, CHUNK[1])).transpose(1, 2)


def fill(errors: ErrorBank, steps: Sequence[int], sigma: Tensor = LEVELS) -> None:
    for step in steps:
        shape = sigma.shape
        used_clean = torch.zeros(shape[0], dtype=torch.bool)
        errors.add(latents(2 * step, *shape), latents(2 * step + 1, *shape), sigma, used_clean=used_clean, step=step)


def factor_between(got: Tensor, stored: Tensor) -> float | None:
    """Return the factor if one tensor is the other times a number, in float32 to the last bit; else None."""
    number = (got.flatten()[0] / stored.float().flatten()[0]).item()
    return number if torch.allclose(got, stored.float() * number, rtol=1e-6, atol=0) else None


def tensors(injected: Injected) -> tuple[Tensor, ...]:
    return injected.context, injected.latents, injected.noise, injected.used_clean


def same(one: Injected, other: Injected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_empty_buckets_inject_nothing() -> None:
    clean, noise = latents(0), latents(1)
    injected = bank().inject(clean, noise, LEVELS, step=3)
    assert torch.equal(injected.context, clean) and torch.equal(injected.latents, clean)
    assert torch.equal(injected.noise, noise) and not injected.used_clean.any()


def test_warmup_injects_nothing_and_keeps_every_error() -> None:
    errors = bank(replace(ALWAYS, warmup_steps=10, clean_kept=0.0, entries=40))
    clean, noise = latents(0), latents(1)
    for step in range(10):
        injected = errors.inject(clean, noise, LEVELS, step=step)
        assert torch.equal(injected.context, clean) and torch.equal(injected.latents, clean)
        assert torch.equal(injected.noise, noise) and injected.used_clean.all()
        errors.add(latents(step), latents(step), LEVELS, used_clean=injected.used_clean, step=step)
    assert sum(errors.filled) == 10 * BATCH * CHUNKS
    after = errors.inject(clean, noise, LEVELS, step=10)
    assert not after.used_clean.any() and not torch.equal(after.context, clean)
    errors.add(clean, noise, LEVELS, used_clean=torch.tensor([True, True]), step=10)
    assert sum(errors.filled) == 10 * BATCH * CHUNKS


def test_injected_is_a_stored_error_of_the_own_bucket_times_its_factor() -> None:
    errors = bank()
    fill(errors, range(6))
    buckets, factors = noise_bucket(LEVELS, 5, shift=5.0), []
    for step in range(6, 16):
        injected = errors.inject(zeros(), zeros(), LEVELS, step=step)
        for got_BQ, stored in ((injected.latents, errors.latent_errors), (injected.noise, errors.noise_errors)):
            assert stored is not None
            for b in range(BATCH):
                for q in range(CHUNKS):
                    bucket = int(buckets[b, q])
                    got = by_chunk(got_BQ)[b, q]
                    matches = [factor_between(got, one) for one in stored[bucket, : errors.filled[bucket]]]
                    factors += [match for match in matches if match is not None]
    assert len(factors) == 2 * 10 * BATCH * CHUNKS
    assert 0.7 <= min(factors) < 0.75 and 1.25 < max(factors) <= 1.3


def test_without_modulation_the_error_itself_is_added() -> None:
    errors = bank(replace(ALWAYS, modulation=0.0, entries=1))
    fill(errors, [0], sigma=LEVELS[:1])
    clean, noise = latents(10, batch=1), latents(11, batch=1)
    injected = errors.inject(clean, noise, LEVELS[:1], step=1)
    assert torch.equal(injected.latents, clean + latents(0, batch=1))
    assert torch.equal(injected.noise, noise + latents(1, batch=1))


def test_context_gets_latent_errors_of_every_bucket() -> None:
    errors = bank(replace(ALWAYS, modulation=0.0, noise_probability=0.0))
    levels = SCHEDULE.sigmas[100::200].float()[None]  # one level in each of the five buckets
    fill(errors, range(3), sigma=levels)
    assert errors.filled == [3] * 5
    seen = torch.zeros(5, 3)
    for step in range(3, 123):
        got = by_chunk(errors.inject(zeros(1, 5), zeros(1, 5), levels, step=step).context)[0]
        for chunk in got:
            seen += (errors.latent_errors[:, :3].float() == chunk).flatten(2).all(2)
    assert seen.sum() == 600
    expected, deviation = 600 / 15, (600 * 1 / 15 * 14 / 15) ** 0.5
    assert ((seen - expected).abs() < 4 * deviation).all()


def test_bucket_of_a_noise_level_is_that_of_its_timestep() -> None:
    index = torch.arange(1000)
    for buckets in (1, 7, 50, 1000):
        for sigmas in (SCHEDULE.sigmas, SCHEDULE.sigmas.float()):
            assert torch.equal(noise_bucket(sigmas, buckets, shift=5.0), index * buckets // 1000)
    ends = torch.tensor([1.0, 0.99999, 0.001, 0.0])
    assert noise_bucket(ends, 50, shift=5.0).tolist() == [0, 0, 49, 49]
    assert noise_bucket(torch.tensor([0.5]), 10, shift=1.0).tolist() == [5]


def test_errors_go_to_the_buckets_of_their_levels() -> None:
    errors = bank()
    fill(errors, [0])
    assert noise_bucket(LEVELS, 5, shift=5.0).tolist() == [[0, 2, 4], [0, 4, 4]]
    assert errors.filled == [2, 0, 1, 0, 3]
    assert torch.equal(errors.latent_errors[2, 0].float(), by_chunk(latents(0))[0, 1])
    assert torch.equal(errors.latent_errors[4, :3].float(), by_chunk(latents(0))[[0, 1, 1], [2, 1, 2]])


def test_memory_stays_within_the_limit() -> None:
    numel = torch.Size(CHUNK).numel()
    for gib in (1.3e-5, 1e-4, 1e-3):
        for noise_probability in (0.0, 0.5):
            config = replace(ALWAYS, entries=500, memory_gib=gib, noise_probability=noise_probability)
            errors = bank(config)
            fill(errors, range(8))
            assert errors.nbytes == sum(t.nbytes for t in errors.state().values()) - 5 * 8
            assert errors.nbytes <= gib * GIB
            assert errors.entries == 500 or errors.nbytes + errors.nbytes // errors.entries > gib * GIB
            assert max(errors.filled) <= errors.entries
    assert ALWAYS.entries_within_memory(numel, pinned=False) == ALWAYS.entries
    with pytest.raises(ConfigError, match=r"memory_gib is 5e-07; expected at least .* each of recycling.buckets=5"):
        bank(replace(ALWAYS, memory_gib=5e-7))


def test_pinned_memory_stays_within_the_limit_when_rounded_up() -> None:
    numel = 48 * 8 * 44 * 80
    one_of_each = 2 * 50 * numel * 2
    for gib in (1.0, 7.9, 8.0, 12.0):
        entries = ErrorRecyclingConfig(memory_gib=gib).entries_within_memory(numel, pinned=True)
        rounded = 1 << (entries * one_of_each - 1).bit_length()
        assert entries >= 1 and rounded <= gib * GIB
    assert ErrorRecyclingConfig().entries_within_memory(numel, pinned=True) == 8 * GIB // one_of_each == 31


def test_full_buckets_have_random_entries_replaced() -> None:
    one, again, other = bank(), bank(), bank(seed=8)
    sigma = torch.full((1, 1), 0.9)
    for errors in (one, again, other):
        fill(errors, range(4), sigma=sigma)
    bucket = int(noise_bucket(sigma, 5, shift=5.0))
    replaced: list[list[int]] = [[], [], []]
    for step in range(4, 64):
        for errors, slots in zip((one, again, other), replaced, strict=True):
            before = errors.latent_errors[bucket].clone()
            fill(errors, [step], sigma=sigma)
            changed = (errors.latent_errors[bucket] != before).flatten(1).any(1).nonzero().flatten().tolist()
            assert len(changed) == 1 and errors.filled[bucket] == 4
            assert (errors.latent_errors[bucket, changed[0]].float() == by_chunk(latents(2 * step, 1, 1))[0, 0]).all()
            slots += changed
    assert torch.equal(one.errors, again.errors) and replaced[0] == replaced[1] != replaced[2]
    assert min(torch.bincount(torch.tensor(replaced[0]), minlength=4)) >= 5


def test_two_chunks_on_one_slot_leave_the_later_one_whole() -> None:
    errors = bank(replace(ALWAYS, entries=1))
    fill(errors, [0], sigma=torch.full((2, 3), 0.9))
    bucket = int(noise_bucket(torch.tensor(0.9), 5, shift=5.0))
    assert torch.equal(errors.latent_errors[bucket, 0].float(), by_chunk(latents(0))[1, 2])
    assert errors.noise_errors is not None
    assert torch.equal(errors.noise_errors[bucket, 0].float(), by_chunk(latents(1))[1, 2])


def run_steps(errors: ErrorBank, steps: Sequence[int]) -> list[Injected]:
    done = []
    for step in steps:
        sigma = SCHEDULE.sample_sigma((BATCH, CHUNKS), torch.Generator().manual_seed(step))
        injected = errors.inject(latents(step), latents(100 + step), sigma, step=step)
        # what a model would get wrong, made to depend on what it saw
        mistake = 0.1 * injected.context + 0.2 * injected.latents
        errors.add(mistake, mistake - injected.noise, sigma, used_clean=injected.used_clean, step=step)
        done.append(injected)
    return done


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    config = ErrorRecyclingConfig(buckets=3, entries=5, warmup_steps=4, clean_kept=0.5, noise_probability=0.5)
    whole, first, resumed = bank(config), bank(config), bank(config)
    reference_values = run_steps(whole, range(40))
    run_steps(first, range(17))
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    run_steps(first, range(17, 20))
    run_steps(resumed, range(2))
    resumed.load([Weights.of(saved)])
    got = run_steps(resumed, range(17, 40))
    assert all(same(a, b) for a, b in zip(got, reference_values[17:], strict=True))
    assert torch.equal(resumed.errors, whole.errors) and resumed.filled == whole.filled
    assert not same(reference_values[-1], run_steps(bank(config, seed=8), range(40))[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["host", "device"])
def test_on_a_gpu_the_same_without_waiting_for_it(storage: str) -> None:
    device, reference = torch.device("cuda"), bank()
    errors = ErrorBank(replace(ALWAYS, storage=storage), SCHEDULE, chunk_shape=CHUNK, seed=7, device=device)
    used_clean, blank, noise = torch.zeros(BATCH, dtype=torch.bool), zeros().to(device), latents(99).to(device)
    inputs = [[latents(2 * step + kind).to(device) for kind in range(2)] for step in range(8)]
    got = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, (latent_error, noise_error) in enumerate(inputs):
            got.append(errors.inject(blank, noise, LEVELS, step=step))
            errors.add(latent_error, noise_error, LEVELS, used_clean=used_clean, step=step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, injected in enumerate(got):
        reference_values = reference.inject(zeros(), noise.cpu(), LEVELS, step=step)
        fill(reference, [step])
        assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors(injected), tensors(reference_values), strict=True))
    assert torch.equal(errors.state()["errors"].cpu(), reference.errors) and errors.errors.is_pinned() == errors.pinned


def test_state_of_another_configuration_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"errors have shape \[2, 5, 4, 3, 2, 2, 4\]; expected \[2, 3, 4"):
        bank(replace(ALWAYS, buckets=3)).load([Weights.of(bank().state())])


def stored(errors: ErrorBank) -> list[list[bytes]]:
    """Return the latent and noise errors of every entry, bucket by bucket."""
    return [
        [errors.errors[:, bucket, slot].float().numpy().tobytes() for slot in range(count)]
        for bucket, count in enumerate(errors.filled)
    ]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_errors_are_dealt_out_in_turn_among_another_number_of_ranks(before: int, after: int) -> None:
    config = replace(ALWAYS, entries=40)
    written = [bank(config) for _ in range(before)]
    for number, errors in enumerate(written):
        fill(errors, range(10 * number, 10 * number + 3 + number))
    states = [Weights.of(errors.state()) for errors in written]
    read = [bank(config) for _ in range(after)]
    for rank, errors in enumerate(read):
        errors.load(states, rank=rank, world=after)
    for bucket in range(config.buckets):
        originals = sorted(entry for errors in written for entry in stored(errors)[bucket])
        parts = [stored(errors)[bucket] for errors in read]
        assert sorted(entry for own in parts for entry in own) == originals
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sum(sum(errors.filled) for errors in read) == sum(sum(errors.filled) for errors in written) > 0


def test_errors_that_find_no_place_are_left_out_of_all_ranks_alike() -> None:
    written = [bank(), bank()]
    for number, errors in enumerate(written):
        fill(errors, range(10 * number, 10 * number + 8))
    small = bank(replace(ALWAYS, entries=3))
    small.load([Weights.of(errors.state()) for errors in written])
    for bucket, own in enumerate(stored(small)):
        assert len(own) == min(3, sum(errors.filled[bucket] for errors in written))
        kept = [len(set(own) & set(stored(errors)[bucket])) for errors in written]
        assert len(own) < 3 or sorted(kept) == [1, 2]


def test_as_many_ranks_take_back_their_own_errors() -> None:
    written = [bank(), bank()]
    for number, errors in enumerate(written):
        fill(errors, range(10 * number, 10 * number + 3))
    states = [Weights.of(errors.state()) for errors in written]
    for rank, errors in enumerate(written):
        again = bank()
        again.load(states, rank=rank, world=2)
        assert torch.equal(again.errors, errors.errors) and again.filled == errors.filled


def test_decisions_and_choices_do_not_depend_on_the_split() -> None:
    config = replace(ALWAYS, clean_probability=0.3, context_probability=0.7, latent_probability=0.6)
    whole, parts = bank(config), [bank(config) for _ in range(4)]
    fill(whole, range(5))
    for part in parts:
        part.load([Weights.of(whole.state())])
    clean, noise = latents(50), latents(51)
    for step in range(5, 25):
        reference_values = whole.inject(clean, noise, LEVELS, step=step)
        for sample in range(BATCH):
            for part, (begin, end) in zip(parts, ((0, 1), (1, 3), (0, 2), (2, 3)), strict=True):
                rows, frames = slice(sample, sample + 1), slice(begin * CHUNK[1], end * CHUNK[1])
                got = part.inject(
                    clean[rows, :, frames],
                    noise[rows, :, frames],
                    LEVELS[rows, begin:end],
                    step=step,
                    samples=[sample],
                    chunks=range(begin, end),
                )
                assert torch.equal(got.context, reference_values.context[rows, :, frames])
                assert torch.equal(got.latents, reference_values.latents[rows, :, frames])
                assert torch.equal(got.noise, reference_values.noise[rows, :, frames])
                assert torch.equal(got.used_clean, reference_values.used_clean[rows])


def test_probabilities_hold() -> None:
    config = ErrorRecyclingConfig(
        buckets=1,
        entries=2,
        warmup_steps=0,
        clean_probability=0.25,
        clean_kept=0.1,
        context_probability=0.9,
        latent_probability=0.6,
        noise_probability=0.05,
    )
    errors = bank(config)
    sigma = torch.full((100, 1), 0.7)
    fill(errors, [0], sigma=sigma)
    counts = {"used": 0.0, "context": 0.0, "latents": 0.0, "noise": 0.0}
    blank, steps = zeros(100, 1), 40
    for step in range(1, 1 + steps):
        injected = errors.inject(blank, blank, sigma, step=step)
        used = ~injected.used_clean
        counts["used"] += used.sum().item()
        for name in ("context", "latents", "noise"):
            touched = (getattr(injected, name) != 0).flatten(1).any(1)
            assert not (touched & injected.used_clean).any()
            counts[name] += touched.sum().item()
    used = counts.pop("used")
    assert_share(used, 100 * steps, 0.75)
    for name, probability in {"context": 0.9, "latents": 0.6, "noise": 0.05}.items():
        assert_share(counts[name], int(used), probability)


def test_share_of_clean_errors_that_is_kept() -> None:
    errors = bank(replace(ALWAYS, buckets=1, entries=1000, clean_probability=1.0, clean_kept=0.1))
    sigma = torch.full((100, 1), 0.7)
    for step in range(30):
        errors.add(zeros(100, 1), zeros(100, 1), sigma, used_clean=torch.ones(100, dtype=torch.bool), step=step)
    assert_share(errors.filled[0], 3000, 0.1)


def assert_share(count: float, total: int, probability: float) -> None:
    assert abs(count / total - probability) < 3 * (probability * (1 - probability) / total) ** 0.5


def test_given_frames_stay_as_they_are() -> None:
    errors = bank()
    fill(errors, range(3))
    originals = torch.zeros(BATCH, CHUNKS * CHUNK[1])
    originals[0, 0] = 1
    clean, noise = latents(20), latents(21)
    free = errors.inject(clean, noise, LEVELS, step=3)
    held = errors.inject(clean, noise, LEVELS, step=3, given_BT=originals)
    for name, before in (("context", clean), ("latents", clean), ("noise", noise)):
        got, reference_values = getattr(held, name), getattr(free, name).clone()
        reference_values[0, :, 0] = before[0, :, 0]
        assert torch.equal(got, reference_values) and not torch.equal(getattr(free, name), reference_values)


def test_chunks_without_a_loss_are_not_kept() -> None:
    errors = bank()
    trained = torch.tensor([[False, True, True], [True, True, False]])
    arguments: dict[str, Any] = {"used_clean": torch.zeros(2, dtype=torch.bool), "step": 0, "trained_BQ": trained}
    errors.add(latents(0), latents(1), LEVELS, **arguments)
    assert errors.filled == torch.bincount(noise_bucket(LEVELS, 5, shift=5.0)[trained], minlength=5).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_an_error_that_is_not_finite_is_kept_as_zeros(bad: float) -> None:
    errors, broken = bank(replace(ALWAYS, modulation=0.0)), latents(0)
    broken[0, 1, 3, 0, 0] = bad
    errors.add(broken, latents(1), LEVELS, used_clean=torch.zeros(2, dtype=torch.bool), step=0)
    assert errors.errors.isfinite().all()
    bucket = int(noise_bucket(LEVELS, 5, shift=5.0)[0, 1])
    assert (errors.latent_errors[bucket] == 0).flatten(1).all(1).any()
    assert torch.equal(errors.latent_errors[0, 0].float(), by_chunk(latents(0))[0, 0])


def test_prediction_errors_are_those_of_latents_and_noise() -> None:
    """With v off by e, x0 is off by -sigma e, noise by (1 - sigma) e; of an injected error 1 - sigma is left in x0."""
    clean, noise, injected_error, mistake = (latents(seed) for seed in range(4))
    sigma = LEVELS.repeat_interleave(CHUNK[1], dim=1)
    sigma[0, 0], injected_error[0, :, 0] = 0, 0
    noisy = SCHEDULE.add_noise(clean + injected_error, noise, sigma)
    target = SCHEDULE.velocity(clean, noise)
    latent_error, noise_error = prediction_errors(target + mistake, target, noisy, clean, sigma)
    share = expand(sigma)
    torch.testing.assert_close(latent_error, (1 - share) * injected_error - share * mistake, atol=1e-5, rtol=1e-5)
    reference_values = (1 - share) * mistake
    reference_values[0, :, 0] = 0
    torch.testing.assert_close(noise_error, reference_values, atol=1e-5, rtol=1e-5)
    assert (latent_error[0, :, 0] == 0).all()


def test_a_bank_without_noise_errors_has_room_for_more_latent_errors() -> None:
    config = replace(ALWAYS, entries=500, memory_gib=1e-4)
    both, one = bank(config), bank(replace(config, noise_probability=0.0))
    assert one.noise_errors is None and one.entries // both.entries == 2
    fill(one, range(2))
    noise = latents(9)
    assert torch.equal(one.inject(zeros(), noise, LEVELS, step=2).noise, noise)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buckets": 0}, "buckets is 0; expected a number from 1 to 1000"),
        ({"buckets": 1001}, "buckets is 1001; expected a number from 1 to 1000"),
        ({"entries": 0}, "entries is 0; expected a number of at least 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1; expected a number of at least 0"),
        ({"memory_gib": 0.0}, "memory_gib is 0.0; expected a number above 0"),
        ({"memory_gib": float("nan")}, "memory_gib is nan; expected a finite number"),
        ({"clean_probability": 1.5}, "clean_probability is 1.5; expected a number from 0 to 1"),
        ({"noise_probability": -0.1}, "noise_probability is -0.1; expected a number from 0 to 1"),
        ({"modulation": 1.0}, "modulation is 1.0; expected a number of at least 0 and below 1"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(ALWAYS, **change)


def test_wrong_shapes_are_refused() -> None:
    errors = bank()
    with pytest.raises(ValueError, match=r"sigma is \[2, 2\]; expected .* with chunks of \[3, 2, 2, 4\]"):
        errors.inject(zeros(), zeros(), LEVELS[:, :2], step=0)
    with pytest.raises(ValueError, match="there are 1 sample and 3 chunk numbers; expected 2 and 3"):
        errors.inject(zeros(), zeros(), LEVELS, step=0, samples=[4])
    with pytest.raises(ValueError, match="sigma is on meta; expected the CPU"):
        errors.inject(zeros(), zeros(), LEVELS.to("meta"), step=0)
