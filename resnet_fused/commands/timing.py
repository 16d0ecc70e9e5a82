"""The one way in which this library times things: interleaved, warmed up, medians of many runs.

Providers take turns in one process, so that a machine whose speed drifts slows all of them alike
and their ratios hold.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

SHORTEST_SAMPLE_S = 1e-3  # a clock of some tens of nanoseconds is exact enough for this
# How long a GPU is kept busy, in its cycles, while the host queues one call: 1 to 2 ms.
HOLD_CYCLES = 2_000_000


class Timing(NamedTuple):
    """Milliseconds per call, and how many times faster than the first provider (paired)."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    speedup: float
    runs: int


def interleave(
    providers: Mapping[str, Callable[[], object]],
    seconds: float,
    device: torch.device | str = "cpu",
    flush: Callable[[], object] | None = None,
    minimum_runs: int = 5,
    warm_up: int = 2,
) -> dict[str, Timing]:
    """Time each provider for about `seconds` in total, all of them turn by turn.

    flush: called before each sample, outside the clock (to empty the caches). A sample repeats a
    call that is too short for the clock, unless `flush` is given. On a GPU the clock is its own
    (events), and with `flush` it starts when the host has queued the whole call, so that it shows
    the kernels alone; without, it shows whatever takes longer, host or GPU. The first provider is
    the baseline of `speedup`: the median over rounds of its time divided by the provider's time
    in that same round.
    """
    on_gpu = torch.device(device).type == "cuda"
    clock = _cpu_clock if not on_gpu else _cuda_kernel_clock if flush else _cuda_clock
    for call in providers.values():
        for _ in range(warm_up):
            call()
    repeats = {
        name: 1 if flush else max(1, round(SHORTEST_SAMPLE_S / max(clock(call, 1), 1e-7)))
        for name, call in providers.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < minimum_runs or time.perf_counter() < deadline:
        # Rotating the order spreads whatever one provider leaves behind (caches, spinning threads).
        for i in range(len(names)):
            name = names[(i + rounds) % len(names)]
            if flush:
                flush()
            samples[name].append(clock(providers[name], repeats[name]) * 1e3)
        rounds += 1
    baseline = samples[names[0]]
    return {name: _summary(times, baseline) for name, times in samples.items()}


def _cpu_clock(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_clock(call: Callable[[], object], repeats: int) -> float:
    torch.cuda.synchronize()
    return _between_events(call, repeats)


def _cuda_kernel_clock(call: Callable[[], object], repeats: int) -> float:
    torch.cuda.synchronize()
    torch.cuda._sleep(HOLD_CYCLES)
    return _between_events(call, repeats)


def _between_events(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / repeats


def _summary(times: list[float], baseline: list[float]) -> Timing:
    ordered = sorted(times)
    speedups = [base / own for base, own in zip(baseline, times, strict=True)]
    return Timing(
        median_ms=statistics.median(times),
        p20_ms=ordered[len(ordered) // 5],
        p80_ms=ordered[(len(ordered) * 4) // 5],
        speedup=statistics.median(speedups),
        runs=len(times),
    )
