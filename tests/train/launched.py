"""What the tests start under a launcher, tasks one after another: `train:CONFIG`, `traced:CONFIG`
(compiled but for the code), `gradients:CONFIG:OUT.npz`, `steps:KIND:FOLDER` (stepped.py),
`waits:CONFIG`, `watched:CONFIG` (watched.py).

Runs share a start, for starting takes longer than training them.
"""

import contextlib
import gc
import sys
from pathlib import Path

import numpy as np
import torch

from common.config import load_config
from common.files import make_private
from common.process import run_and_exit
from train.config import Train
from train.ranks import Ranks, choose_device, find_ranks, join, sum_over_ranks
from train.resolve import Run, resolve
from train.schedule import Progress


def main() -> None:
    make_private()
    ranks = find_ranks()
    device = choose_device(ranks)
    join(ranks, device)

    import deepspeed.ops  # noqa: F401

    from train import prepare_model
    from train.loop import train

    # DeepSpeed collects garbage whenever an engine of ZeRO 3 starts, which takes half a second
    # where it looks through all that the imports have made.
    gc.freeze()
    for task in (word for word in sys.argv[1:] if not word.startswith("--local_rank")):
        kind, config, *out = task.split(":")
        if kind == "steps":
            import stepped

            stepped.main(ranks, Path(out[0]), config)
            continue
        run = resolve(load_config(Train, "train", Path(config)), ranks.size, device.type == "cuda")
        prepare_model.BACKEND = "aot_eager" if kind == "traced" else "inductor"
        if kind in ("train", "traced"):
            train(run, ranks, device)
        elif kind == "watched":
            import watched

            watched.main(run, ranks, device)
        elif kind == "waits":
            refuse_to_wait(run, ranks, device)
        else:
            save_gradients(run, ranks, device, out[0])


def save_gradients(run: Run, ranks: Ranks, device: torch.device, out: str) -> None:
    """The loss and the gradients of the first step; `mine` is rank 0's part of the sum."""
    from train.engine import start_engine
    from train.loader import Loader, StepMaker
    from train.loop import accumulate
    from train.start import make_model

    engine = start_engine(make_model(run.config, run.start), run.config, run.deepspeed)
    maker = StepMaker(run, ranks.rank)
    with Loader(maker, run.plans(Progress()), pin=False) as loader:
        loaded = next(iter(loader))
        loss = accumulate(engine, loaded, ranks, device)[0].sum()
    mine = float(loss)
    loss = float(sum_over_ranks(loss)) / loaded.counts.masked_tokens
    if ranks.is_first:
        gradients = {name: p.grad.numpy() for name, p in engine.module.named_parameters()}
        counts = [batch.masked_tokens for batch in maker.micro_batches(loaded.plan)]
        np.savez(out, loss=loss, mine=mine, counts=counts, **gradients)


def refuse_to_wait(run: Run, ranks: Ranks, device: torch.device) -> None:
    """Take steps that are not logged as the loop takes them, and say what waited in them.

    What waits is an error as far as waits.py sees it; numbers that are read on a CPU, which would
    wait on a GPU, are noted. The first steps are free to wait: they compile, and put tables on the
    device.
    """
    import stepped
    import waits

    from train.engine import start_engine, step
    from train.loader import Loader, StepMaker
    from train.loop import accumulate, make_ready

    on_gpu, places = device.type == "cuda", set()
    model, _ = make_ready(run, device)
    engine = start_engine(model, run.config, run.deepspeed)
    with Loader(StepMaker(run, ranks.rank), run.plans(Progress()), pin=on_gpu) as loader:
        for number, loaded in enumerate(loader):
            # A mode that looks at operations keeps layers from being compiled.
            watching = contextlib.nullcontext() if on_gpu else stepped.Watch()
            refusing = waits.refuse_waits(on_gpu) if number >= 6 else contextlib.nullcontext()
            with refusing, watching as watch:
                accumulate(engine, loaded, ranks, device)
                step(engine, loaded.plan.rates, want_norms=False)
            if watch is not None and number >= 6:
                places |= set(watch.places)
    print(f"waited: {sorted(places)}")


run_and_exit(main)
