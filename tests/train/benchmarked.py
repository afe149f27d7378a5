"""What test_benchmark.py looks at, in one process, for starting takes longer than measuring.

    python benchmarked.py FOLDER DATA key=value …

Two runs of the command, of which the second finds no memory for one of its peers; the weights after
steps with and without the engine; and whether a model is gone once it is measured. Processes are
joined once: DeepSpeed keeps the groups that it found first.
"""

import gc
import itertools
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from train.benchmark import __main__ as command
from train.benchmark import cases, measure, parts, peers, plain
from train.loader import Loader, StepMaker
from train.loop import accumulate, make_ready
from train.ranks import Ranks
from train.resolve import Run
from train.schedule import Progress

CPU = torch.device("cpu")
FIRST = ["ours", "ours, without engine", "Hugging Face sdpa"]
RULES = {
    "stable_adamw": ["optimizer.name=stable_adamw", "optimizer.gradient_clipping=0.5"],
    "adamw in bf16": ["optimizer.name=adamw", "precision=bf16"],
}
SECOND = ["Hugging Face sdpa", "Hugging Face sdpa, sparse"]


def main() -> None:
    folder, data, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    end = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: None
    one = ["--case", "tiny", "shards", "--data", data, "--repeats", "2", "--who", *FIRST]
    one += ["--json", str(folder / "first.json"), "--plot", str(folder / "first.png")]
    first_code = command.main([*one, *words])

    found = {
        "first_code": first_code,
        "weights": {name: differences([*words, *more]) for name, more in RULES.items()},
        **freed(words),
    }

    # What the first run set: the second starts as a process of its own would.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
        del os.environ[name]
    command.join = lambda ranks, device: None
    found["asked_for"] = without_memory()
    two = ["--case", "tiny", "--repeats", "1", "--json", str(folder / "second.json")]
    found["second_code"] = command.main([*two, "--who", *SECOND, *words])
    (folder / "found.json").write_text(json.dumps(found))
    end()


def without_memory() -> list[int]:
    """Let there be none for peers that are not sparse; the sizes of batches they ask for."""
    real, asked_for = peers._measure, []

    def measure_it(peer: peers.Peer, *arguments: Any) -> Any:
        if peer.sparse:
            return real(peer, *arguments)
        asked_for.append(arguments[-1])
        raise torch.cuda.OutOfMemoryError("no room")

    peers._measure = measure_it
    return asked_for


def differences(words: list[str]) -> dict[str, float]:
    """How far weights move in three steps, and how far apart they are with and without engine.

    The steps are watched, so that a label which the parts of a step are told by is missed here.
    """
    run = cases.resolve_case(cases.TINY, None, words, 1, on_gpu=False)
    weights = [flat(make_ready(run, CPU)[0])]
    for start in (measure.with_engine, plain.without_engine):
        model, _ = make_ready(run, CPU)
        engine = start(model, run)
        plans = list(itertools.islice(run.plans(Progress()), 3))
        own = dict(vars(engine))
        with Loader(StepMaker(run, 0), plans, pin=False) as loader, parts.labelled(engine):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for loaded in loader:
                    accumulate(engine, loaded, Ranks(), CPU)
                    measure.step(engine, loaded.plan.rates, want_norms=False)
        assert vars(engine).keys() == own.keys()
        assert engine.optimizer_step is own["optimizer_step"]
        names = [event.name for event in profiler.events()]
        for label in parts.LABELS:
            assert any(label in name for name in names), label
        weights.append(flat(model))
        engine.destroy()
    before, ours, theirs = weights
    return {"moved": float((ours - before).norm()), "apart": float((ours - theirs).norm())}


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def freed(words: list[str]) -> dict[str, Any]:
    """Whether a model is gone after its measurement, and how many steps were timed."""
    models = []

    def start(model: nn.Module, run: Run) -> Any:
        models.append(weakref.ref(model))
        return measure.with_engine(model, run)

    run = cases.resolve_case(cases.TINY, None, words, 1, on_gpu=False)
    effort = measure.Effort(2)
    steps = len(measure.measure(run, Ranks(), CPU, start, effort).seconds)
    gc.collect()
    return {"steps": steps, "freed": models[0]() is None}


if __name__ == "__main__":
    main()
