"""Measure the speed of training: whole steps, as `train/main.py` takes them, and Hugging Face's.

    python -m train.benchmark --json FILE --plot FILE                   # every case, one GPU
    python -m train.benchmark --case notes-8192 --who ours --label varlen attention=varlen
    python -m train.benchmark --case shards --data data/base/rows-1024
    deepspeed --num_gpus 2 --module train.benchmark --case accumulate-8 --json FILE
    python -m train.benchmark --case --json FILE --plot FILE            # only draw

Words `key=value` are keys of the `train:` section and go over what a case sets. Records replace
those of the same case, who, number of GPUs and words in FILE; a failure replaces no figures.
Without a GPU only the case tiny is measured, which shows that it runs. The exit code is 1 if
something could not be measured, with the reason in its record, and 2 for what the user can put
right.
docs/speed.md says what the figures mean.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed

from common.config import ConfigError
from common.files import write_json
from common.process import run_and_exit
from data_prep.shards import DataError
from train.benchmark import results
from train.benchmark.cases import GPU_CASES, TINY, Case, resolve_case, shard_cases
from train.benchmark.device import free_memory, product_rate
from train.benchmark.measure import (
    Effort,
    Measurement,
    StartEngine,
    measure,
    usual_effort,
    with_engine,
)
from train.benchmark.peers import measure_peer, peers
from train.benchmark.plain import without_engine
from train.flops import peak_flops
from train.prepare_model import set_deterministic
from train.ranks import Ranks, choose_device, find_ranks, join
from train.resolve import Run

Measure = Callable[[Run], Measurement]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for; its `key=value` are `overrides`."""
    parser = argparse.ArgumentParser(
        prog="python -m train.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(case.name for case in (*GPU_CASES, TINY))
    parser.add_argument(
        "--case",
        nargs="*",
        metavar="NAME",
        help=f"of {names}, and shards with --data; by default all that the machine can do; "
        "without a name nothing is measured",
    )
    parser.add_argument("--who", nargs="+", metavar="NAME", help="only who bears these names")
    parser.add_argument(
        "--label", help="ours is called `ours, LABEL` in the records: ours with these key=value"
    )
    parser.add_argument("--config", type=Path, help="a run's file: its model, optimizer, engine, …")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="real data sets")
    parser.add_argument("--json", type=Path, help="write the records here, over older ones")
    parser.add_argument("--plot", type=Path, help="draw the records of --json here")
    parser.add_argument(
        "--repeats",
        type=int,
        help="steps to time at least, by default 20, or 8 long ones; on a GPU 8 seconds, too",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_intermixed_args(arguments)
    # Options that take several names take the words behind them, too.
    for taken in (asked.case or [], asked.who or []):
        asked.overrides += [word for word in taken if "=" in word]
        taken[:] = [word for word in taken if "=" not in word]
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    asked = parse(arguments)
    try:
        ranks = find_ranks()
        device = choose_device(ranks)
        # All that may be wrong with the words, before anything is measured.
        records = [] if asked.json is None else results.read(asked.json)
        on_gpu = device.type == "cuda"
        runs = [
            (case, resolve_case(case, asked.config, asked.overrides, ranks.size, on_gpu))
            for case in chosen_cases(asked.case, asked.data, on_gpu)
        ]
        _check_words(asked, {case.name for case, _ in runs}, ranks.size, records)
    except (ConfigError, DataError) as error:
        return _fail(str(error))
    new: list[results.Record] = []
    try:
        join(ranks, device)
        _measure_all(asked, runs, ranks, device, records, new)
        if ranks.is_first:
            everything = results.merge(records, new)
            print("\n".join(results.comparisons(everything)), flush=True)
            if asked.plot is not None:
                results.plot(asked.plot, everything)
        code = int(any(record["error"] is not None for record in new))
    except ConfigError as error:
        code = _fail(str(error))
    # After a failure others may wait for this process, and it would wait for them: the launcher
    # ends them once it has ended.
    if ranks.size == 1 or code == 0:
        torch.distributed.destroy_process_group()
    return code


def _check_words(
    asked: argparse.Namespace, cases: set[str], gpus: int, records: Sequence[results.Record]
) -> None:
    """ConfigError where a record would take the place of one that was measured with other words."""
    ours = results.label_of(asked.label)
    for record in records:
        who, words = record["who"], record.get("words", [])
        is_other = not results.is_labelled(who)
        is_asked = asked.who is None or (results.OURS if who == ours else who) in asked.who
        is_place = record["case"] in cases and record["gpus"] == gpus and record["error"] is None
        if is_place and (who == ours or is_other) and is_asked and words != asked.overrides:
            raise ConfigError(
                f"{asked.json} has a record of {record['case']}, {who}, that was measured with "
                f"{' '.join(words) or 'no words'}; give another --label, which names ours alone "
                "(--who ours), or another file"
            )


def chosen_cases(names: Sequence[str] | None, data: Sequence[Path], on_gpu: bool) -> list[Case]:
    """The cases to measure; ConfigError for a name there is none of, DataError for bad data."""
    shards = shard_cases(data)
    if names is None:
        return [*GPU_CASES, *shards] if on_gpu else [TINY, *shards]
    known = {case.name: [case] for case in (*GPU_CASES, TINY, *shards)} | {"shards": shards}
    of_gpus = [] if on_gpu else [case.name for case in GPU_CASES if case.name in names]
    if of_gpus:
        raise ConfigError(
            f"--case {of_gpus[0]} needs a GPU, and this machine has none; without one there are "
            f"{TINY.name}, and shards with --data DIR"
        )
    for name in names:
        if not known.get(name):
            advice = "give --data DIR" if name.startswith("shards") else f"one of {sorted(known)}"
            raise ConfigError(f"--case {name}: there is no such case; {advice}")
    return [case for name in names for case in known[name]]


def _measure_all(
    asked: argparse.Namespace,
    runs: Sequence[tuple[Case, Run]],
    ranks: Ranks,
    device: torch.device,
    records: list[results.Record],
    new: list[results.Record],
) -> None:
    """Measure case after case into `new`, the file written after each."""
    peak: Peak | None = None
    for case, run in runs:
        if peak is None:
            # Before the first product, which is the peak's.
            set_deterministic(run.config.deterministic)
            peak = Peak(run, device)
            if ranks.is_first:
                commit = results.versions()["commit"] or "not known"
                print(f"{peak.machine.device}; the project's commit: {commit}", flush=True)
        least = asked.repeats or max(8, 20 // run.phases["main"].micro_steps)
        effort = usual_effort(least, device.type == "cuda")
        for who, measure_it in _everybody(case, ranks, device, effort).items():
            if asked.who is not None and who not in asked.who:
                continue
            name = results.label_of(asked.label) if who == results.OURS else who
            try:
                found, machine = peak.around(partial(measure_it, run))
                record = results.make_record(case, name, ranks.size, run, machine, found)
            except Exception as error:
                record = results.failed(case, name, ranks.size, peak.machine, error)
            new.append(record | {"words": asked.overrides})
            if ranks.is_first:
                print(results.line(record), flush=True)
                if warning := results.warning(record):
                    print(warning, flush=True)
                if asked.json is not None:
                    write_json(asked.json, results.merge(records, new))
            if ranks.size > 1 and record["error"] is not None:
                # The others wait for this one, which could not join them in what comes next.
                print(
                    f"error: rank {ranks.rank}, {case.name}: {record['error']}; with several "
                    "processes nothing goes on after a failure",
                    file=sys.stderr,
                    flush=True,
                )
                return


def _everybody(
    case: Case, ranks: Ranks, device: torch.device, effort: Effort
) -> dict[str, Measure]:
    """Who is measured on a case: several GPUs are for our engine alone."""

    def ours(start: StartEngine, run: Run) -> Measurement:
        return measure(run, ranks, device, start, effort)

    found: dict[str, Measure] = {results.OURS: partial(ours, with_engine)}
    if ranks.size > 1:
        return found
    if case.without_engine:
        found[results.PLAIN] = partial(ours, without_engine)
    if case.with_peers:
        for name, peer in peers(device.type == "cuda").items():
            found[name] = partial(measure_peer, peer, device=device, effort=effort)
    return found


class Peak:
    """The machine, and the product that it does before and after each measurement.

    What a GPU reaches differs between machines and, by its temperature, from minute to minute: a
    share of a peak compares only where both were measured close to each other.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self._device = device
        self._dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
        self._last: float | None = None
        self.machine = results.Machine("cpu")
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            datasheet = peak_flops(name) if run.precision == "bf16" else None
            self.machine = results.Machine(name, datasheet)

    def around(self, measure_it: Callable[[], Measurement]) -> tuple[Measurement, results.Machine]:
        """A measurement, and the machine with the products before and after it.

        The product after one is that before the next, unless something failed in between.
        """
        before, self._last = self._last, None
        if before is None:
            free_memory(self._device)
            before = product_rate(self._device, self._dtype)
        found = measure_it()
        free_memory(self._device)
        after = self._last = product_rate(self._device, self._dtype)
        if before is None or after is None:
            return found, self.machine
        return found, replace(self.machine, products=(before, after))


def _fail(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    run_and_exit(main)
