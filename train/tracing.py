"""A profiler's trace of a few steps, where the key `profile` asks for it.

    deepspeed train/main.py --config FILE profile.first_step=50

`RUN/profile/rank_0_steps_50_to_52.json.gz` opens in https://ui.perfetto.dev or chrome://tracing. It
holds names, times and sizes of operations; no tensor's content.
"""

import contextlib
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from train.config import Profile


def no_trace(settings: Profile, step: int, last_step: int) -> str | None:
    """What to say where no step that `settings` name is still to be taken; None where one is.

    step: the last that has been taken; last_step: that of the run.
    """
    first, last = settings.first_step, settings.first_step + settings.steps - 1
    if step < min(last, last_step) and first <= last_step:
        return None
    ahead = f"steps {step + 1:,} to {last_step:,} are" if step < last_step else "none is"
    return (
        f"profile: no trace is made: steps {first:,} to {last:,} are asked for, {ahead} ahead; "
        "set profile.first_step"
    )


class Tracer:
    """Records the steps that `settings` name on the rank that it names; None records nothing.

    A context manager: leaving it writes a trace that has begun.
    """

    def __init__(self, settings: Profile | None, run_dir: Path, rank: int) -> None:
        self._settings = settings if settings is not None and settings.rank == rank else None
        self._folder = run_dir / "profile"
        self._profile: profile | None = None
        self._span = contextlib.ExitStack()
        self._steps: list[int] = []

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def begin_step(self, step: int) -> None:
        """Called before anything of a step is done."""
        if self._settings is None:
            return
        if step >= self._settings.first_step + self._settings.steps:
            self._end()
        elif step >= self._settings.first_step:
            if self._profile is None:
                activities = [ProfilerActivity.CPU]
                if torch.cuda.is_available():
                    activities.append(ProfilerActivity.CUDA)
                self._profile = profile(activities=activities)
                self._profile.start()
            self._span.close()
            self._span.enter_context(record_function(f"step {step}"))
            self._steps.append(step)

    def _end(self) -> None:
        if self._profile is None or self._settings is None:
            return
        self._span.close()
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        first, last = self._steps[0], self._steps[-1]
        name = f"rank_{self._settings.rank}_steps_{first}_to_{last}.json.gz"
        self._profile.export_chrome_trace(str(self._folder / name))
        self._profile = None
