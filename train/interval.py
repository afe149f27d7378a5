"""What is measured over the steps between two records: loss and accuracy by source, speed, waits,
memory."""

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from train.batch import PackedBatch
from train.flops import peak_flops, training_flops
from train.loader import LoadedStep, Loader
from train.ranks import gather, of_all_ranks, sum_over_ranks
from train.resolve import RunPhase
from train.step_clock import PARTS, StepClock, event_maker

GIB = 2**30


def peak_of(device: torch.device, precision: str) -> float | None:
    """Dense FLOP/s of this rank's device by its datasheet, where both are known to match."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_flops(torch.cuda.get_device_name(device))


class Interval:
    """Loss, accuracy and speed over the steps since the last record.

    Loss and accuracy are exact: sums over all ranks and steps divided by their masked tokens. Steps
    whose loss is not finite are not in them: the optimizer leaves them out as well. Nothing is
    waited for until the interval is closed: sums stay on the device.
    """

    def __init__(self, loader: Loader, device: torch.device, peak: float | None) -> None:
        """peak: this rank's, see `peak_of`. Every rank calls this."""
        self._loader, self._device = loader, device
        peaks = gather(peak)
        self._peak = sum(peak for peak in peaks if peak is not None) if all(peaks) else None
        self._clock = StepClock(event_maker(device))
        self._paused = time.perf_counter()

    def restart(self, phase: RunPhase) -> None:
        """Begin the next interval, in `phase`, here; what lies between it and a close is no
        step's."""
        self._phase = phase
        # Of each step: this rank's sums, and the masked tokens of all ranks.
        self._sums: list[Tensor] = []
        self._masked: list[list[int]] = []
        self._steps = self._tokens = self._slots = 0
        self._flops = 0.0
        self._wait = self._loader.wait_seconds
        self._start = time.perf_counter()
        self._clock.start()

    def watch(self, loaded: LoadedStep) -> LoadedStep:
        """The same step; it is noted when its micro-batches come and when one is done with."""
        return replace(loaded, micro_batches=self._watched(loaded.micro_batches))

    def _watched(self, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        for batch in batches:
            self._clock.mark("data")
            self._flops += training_flops(
                self._phase.model_config, batch.lengths, batch.masked_tokens
            )
            yield batch
            self._clock.mark("forward_backward")

    def add(self, loaded: LoadedStep, sums: Tensor) -> None:
        """Add a step that has just been taken: what `train.loop.accumulate` returned."""
        self._clock.mark("optimizer")
        self._sums.append(sums)
        masked = loaded.counts.masked_by_source
        self._masked.append([masked.get(source, 0) for source in self._phase.shape.sources])
        self._steps += 1
        self._tokens += loaded.counts.tokens
        self._slots += loaded.plan.rows * self._phase.shape.row_tokens

    def close(self) -> dict[str, Any]:
        """Figures over all ranks; waits for the device. Every rank calls this."""
        sums = sum_over_ranks(torch.stack(self._sums)).cpu()
        parts = self._clock.read()
        now = time.perf_counter()
        seconds, pause = now - self._start, self._start - self._paused
        self._paused = now
        wait = self._loader.wait_seconds - self._wait
        mine = [wait, self._flops, *parts.values(), *_memory(self._device)]
        every = of_all_ranks(torch.tensor(mine, dtype=torch.float64))
        means, most = every.mean(0).tolist(), every.max(0).values.tolist()
        flops, part_s = means[1] * len(every), means[2 : 2 + len(PARTS)]
        on_gpu = self._device.type == "cuda"
        allocated, reserved, resident = most[2 + len(PARTS) :]
        return {
            **_figures(self._phase.shape.sources, sums, torch.tensor(self._masked)),
            "tok_per_s": self._tokens / seconds,
            "padded_tok_per_s": self._slots / seconds,
            "tflop_per_s": flops / seconds / 1e12,
            "mfu": None if self._peak is None else flops / seconds / self._peak,
            "step_s": seconds / self._steps,
            "step_parts_s": {
                part: total / self._steps for part, total in zip(PARTS, part_s, strict=True)
            },
            # A step takes as long as its slowest rank.
            "data_wait_s": most[0] / self._steps,
            "data_wait_rank": int(every[:, 0].argmax()),
            "pause_s": pause,
            "memory_allocated_gib": allocated if on_gpu else None,
            "memory_reserved_gib": reserved if on_gpu else None,
            "memory_resident_gib": resident,
        }


def _figures(sources: Sequence[str], sums: Tensor, masked: Tensor) -> dict[str, Any]:
    """Mean loss and accuracy of the steps whose loss is finite, and by source; None without one.

    sums: (steps, 2, sources), of cross-entropy and of tokens guessed right; masked: (steps,
    sources), all over all ranks.
    """
    finite = sums[:, 0].isfinite().all(1)
    (losses, right), counts = sums[finite].sum(0).tolist(), masked[finite].sum(0).tolist()

    def means(loss: float, right: float, count: int) -> dict[str, Any]:
        return {
            "loss": loss / count if count else None,
            "accuracy": right / count if count else None,
            "masked_tokens": count,
        }

    by_source = {
        name: means(*of_source)
        for name, *of_source in zip(sources, losses, right, counts, strict=True)
        if of_source[-1]
    }
    return {**means(sum(losses), sum(right), sum(counts)), "by_source": by_source}


def _memory(device: torch.device) -> list[float]:
    """GiB that this process has held at most: of the GPU, allocated and reserved, since it was last
    asked; and resident on the host, since its start."""
    on_gpu = [0.0, 0.0]
    if device.type == "cuda":
        held = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
        on_gpu = [size / GIB for size in held]
        torch.cuda.reset_peak_memory_stats(device)
    # Linux counts in KiB.
    return [*on_gpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB]
