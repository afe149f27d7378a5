"""Time the kernels against memory, against PyTorch and against whatever else is installed.

    python -m kernels.benchmark [--op NAME ...] [--tokens N ...] [--csv FILE] [--plot DIR]
    python -m kernels.benchmark --tune [--csv FILE]

Base sizes in bf16. A figure is the median of replays of a CUDA graph, so that launch time stays
out; input sets are rotated until they exceed the L2 cache several times. Bandwidth counts the bytes
that must move: each input read once, each output written once. The share of the roofline is the
time these bytes and the floating-point operations need at least, by the copy and the matrix product
measured in the same run, over the time taken.

`gib` is the peak of memory allocated beside the inputs. What cannot be captured in a graph, because
it waits for the GPU, is timed by events and marked "launched". --tune times the ways in which the
kernels of `kernels.local_attention_tiles` can be cut up (its `Tuning`) instead of everybody's:
block, step, warps, stages and registers of the forward, of ∂q and of ∂k and ∂v.

A CSV file that is there keeps the operations that were not measured now, and other numbers of
tokens of those that were, each under the line that says where and of which commit: a run may be cut
into pieces. Layouts say their number of tokens where it is not that of a micro-batch, 65,536.
--plot draws what the file then holds.
"""

import argparse
import csv
import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves

from common.commit import project_commit
from kernels import benchmark_cases as cases
from kernels import local_attention_tiles
from kernels.benchmark_attention import make_local, name_of, walks_here
from kernels.benchmark_layouts import Case, Outputs, version_of

COLUMNS = (
    "op",
    "layout",
    "direction",
    "who",
    "us",
    "tb_per_s",
    "tflop_per_s",
    "share_of_roofline",
    "gib",
)
_LINE = "{:22}{:22}{:9}{:44}{:>10}{:>7}{:>6}{:>6}{:>7}"
_TOKENS = 65_536
_PEERS = ("flash-attn-4", "flash-attn", "liger-kernel")
_REPLAYS = 15
_CALLS_A_GRAPH = 8


@dataclass(frozen=True)
class Roofline:
    """bytes and floating-point operations a second, measured."""

    copy: float
    product: float

    def least_us(self, moved: int, flops: int) -> float:
        """Microseconds that so many bytes and operations take at least."""
        return 1e6 * max(moved / self.copy, flops / self.product)


@dataclass
class Table:
    """The results, printed as they come."""

    roofline: Roofline
    rows: list[dict[str, str]] = field(default_factory=list)

    def add(
        self, case: Case, direction: str, who: str, microseconds: float, peak: int | None
    ) -> None:
        moved, flops = case.bytes[direction], case.flops.get(direction, 0)
        share = self.roofline.least_us(moved, flops) / microseconds
        values = (
            case.op,
            case.layout,
            direction,
            who,
            f"{microseconds:.1f}",
            f"{moved / microseconds / 1e6:.2f}",
            f"{flops / microseconds / 1e6:.0f}" if flops else "",
            f"{share:.2f}",
            "" if peak is None else f"{peak / 2**30:.2f}",
        )
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        print(_LINE.format(*values), flush=True)


def graph_time(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of one call, over replays of a graph of at least eight calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = -(-_CALLS_A_GRAPH // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return event_time(graph.replay) / (rounds * len(calls))


def event_time(call: Callable[[], object]) -> float:
    """Median microseconds between events around a call, launches included."""
    call()
    times = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def measure_roofline() -> Roofline:
    """A copy that moves 1 GiB and a bf16 product of 8192³, on random numbers.

    The copy is a kernel that adds nothing: as a node of a graph, a large `copy_` is given to
    another engine, which took 1.5 times as long on an H200.
    """
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    for _ in range(100):  # clocks rise under load
        a @ b
    sources = [torch.randn(2**28, device="cuda").bfloat16() for _ in range(2)]
    target = torch.empty_like(sources[0])
    copy_us = graph_time([partial(torch.add, source, 0, out=target) for source in sources])
    product_us = graph_time([partial(torch.mm, a, b)])
    return Roofline(2**30 * 1e6 / copy_us, 2 * 8192**3 * 1e6 / product_us)


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes allocated at most during a call, beside what was allocated before it.

    Garbage in cycles is collected first: given back during the call, it would make the peak too
    small. None, and a line that says so, where the peak is below what the call returned: something
    was given back all the same.
    """
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    returned = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    least = _new_bytes(returned, call)
    if peak < least:
        print(f"memory not measured: a peak of {peak} bytes, where {least} were returned")
        return None
    return peak


def _new_bytes(returned: object, call: Callable[[], object]) -> int:
    """Bytes of the tensors that a call returned and was not given, each memory counted once."""
    given = call.args if isinstance(call, partial) else ()
    old, new = (
        {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in tree_leaves(values)
            if isinstance(value, Tensor)
        }
        for values in (given, returned)
    )
    return sum(size for at, size in new.items() if at not in old)


def _directions(
    case: Case, function: Callable[..., Outputs]
) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """The calls of each direction the case has, one for each input set."""

    def forward(inputs: list[Tensor]) -> Outputs:
        with torch.set_grad_enabled("backward" in case.bytes):
            return function(*inputs)

    def both(inputs: list[Tensor], leaves: list[Tensor], grads: list[Tensor]) -> Outputs:
        return torch.autograd.grad(_outputs(function(*inputs)), leaves, grads)

    if "forward" in case.bytes:
        yield "forward", [partial(forward, inputs) for inputs in case.inputs]
    if "both" not in case.bytes:
        return
    leaves = [[value for value in inputs if value.requires_grad] for inputs in case.inputs]
    outputs = [_outputs(function(*inputs)) for inputs in case.inputs]
    grads = [[torch.randn_like(value) for value in values] for values in outputs]
    if "backward" in case.bytes:
        yield (
            "backward",
            [
                partial(torch.autograd.grad, *arguments, retain_graph=True)
                for arguments in zip(outputs, leaves, grads, strict=True)
            ],
        )
    del outputs
    yield (
        "both",
        [partial(both, *arguments) for arguments in zip(case.inputs, leaves, grads, strict=True)],
    )


def _outputs(value: Outputs) -> list[Tensor]:
    values = [value] if isinstance(value, Tensor) else list(value)
    return [one for one in values if one.requires_grad]


def run_case(case: Case, table: Table) -> None:
    """Measure everybody on one case; a failure of one is printed and does not stop the rest."""
    for who, function in case.who.items():
        try:
            for direction, calls in _directions(case, function):
                calls[0]()
                peak = peak_memory(calls[0])
                if who in case.waits:
                    table.add(case, direction, f"{who}, launched", event_time(calls[0]), peak)
                else:
                    table.add(case, direction, who, graph_time(calls), peak)
        except Exception as error:  # vendors' compilers raise classes of their own
            print(f"{case.op} {case.layout} {who}: not measured: {type(error).__name__}: {error}")
        torch.cuda.empty_cache()


def read_csv(path: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Rows of an earlier run, and for each operation where it was measured; none without a file."""
    if not path.exists():
        return [], {}
    lines = path.read_text().splitlines()
    notes = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    headers = {
        op: header
        for operations, _, header in (note.partition(": ") for note in notes)
        for op in operations.split(", ")
    }
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    unknown = {_measured(row) for row in rows} - headers.keys()
    if unknown:
        raise ValueError(f"{path} does not say where {sorted(unknown)} were measured: move it away")
    return rows, headers


def _measured(row: dict[str, str]) -> str:
    """What a run measures whole: an operation, at the usual number of tokens or another."""
    layout, _, count = row["layout"].rpartition(", ")
    return f"{row['op']} at {count}" if layout and count.endswith(" tokens") else row["op"]


def write_csv(path: Path, rows: list[dict[str, str]], headers: dict[str, str]) -> None:
    """Rows in the order of `headers`, which come first: a line for the operations of each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        for header in dict.fromkeys(headers.values()):
            operations = ", ".join(op for op, found in headers.items() if found == header)
            file.write(f"# {operations}: {header}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name in headers:
            writer.writerows(row for row in rows if _measured(row) == name)


def merge(
    old: tuple[list[dict[str, str]], dict[str, str]], rows: list[dict[str, str]], header: str
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Old rows and headers with all of what was measured anew replaced."""
    fresh = dict.fromkeys(_measured(row) for row in rows)
    kept = [row for row in old[0] if _measured(row) not in fresh]
    return [*kept, *rows], {**old[1], **dict.fromkeys(fresh, header)}


def plot(folder: Path, rows: list[dict[str, str]], headers: dict[str, str]) -> None:
    """One picture of what was measured whole, an operation at a number of tokens: share of the
    roofline of each direction and layout, by who."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(_measured(row) for row in rows):
        mine = [row for row in rows if _measured(row) == op]
        groups = list(dict.fromkeys((row["layout"], row["direction"]) for row in mine))
        people = list(dict.fromkeys(row["who"] for row in mine))
        figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.22 * len(mine)))
        height = 0.8 / len(people)
        for i, who in enumerate(people):
            found = [row for row in mine if row["who"] == who]
            places = [groups.index((row["layout"], row["direction"])) + i * height for row in found]
            axes.barh(places, [float(row["share_of_roofline"]) for row in found], height, label=who)
        labels = [" ".join(part for part in group if part) for group in groups]
        axes.set_yticks([place + 0.4 - height / 2 for place in range(len(groups))], labels)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.05)
        axes.set_xlabel("share of the roofline measured in the same run")
        axes.set_title(op)
        axes.legend(fontsize="small")
        axes.annotate(
            headers[op].replace("; ", ";\n"),
            (0, 0),
            (0, -36),  # points, below the axis and its label
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=6,
            va="top",
        )
        figure.savefig(folder / f"{op}.png", dpi=110, bbox_inches="tight")
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m kernels.benchmark")
    parser.add_argument("--op", choices=cases.OPERATIONS, nargs="+", help="these alone")
    parser.add_argument("--tokens", type=int, nargs="+", default=[_TOKENS], help="of a micro-batch")
    parser.add_argument("--tune", action="store_true", help="ways to cut up local_attention")
    parser.add_argument("--csv", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="write one picture an operation into this folder")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit(
            "kernels.benchmark needs a CUDA GPU: on a CPU the kernels run in Triton's interpreter, "
            "which shows whether they are right (pytest tests/kernels) and nothing of their speed"
        )
    old = results = read_csv(options.csv) if options.csv else ([], {})
    # Backward is measured by itself, on one forward's result, again and again.
    torch._functorch.config.donated_buffer = False
    # One stream for everything: backward runs where forward ran, and a graph captures one stream.
    with torch.cuda.stream(torch.cuda.Stream()):
        operations = ["local_attention"] if options.tune else options.op or cases.OPERATIONS
        for rows, header in measure(operations, options.tokens, options.tune):
            results = merge(old, rows, header)
            if options.csv:  # each time, so that a run that is cut off loses one operation
                write_csv(options.csv, *results)
    if options.plot:
        plot(options.plot, *results)


def describe_run(roofline: Roofline, peers: dict[str, str | None]) -> str:
    """One line on what measures and what is measured, down to how `local_attention` is cut up."""
    versions = "".join(f"{name} {number}, " for name, number in peers.items() if number)
    walks = "local_attention by walks, and " if walks_here() else ""
    return (
        f"{torch.cuda.get_device_name()}, commit {project_commit()}, "
        f"torch {torch.__version__}, triton {triton.__version__}, {versions}"
        f"copy {roofline.copy / 1e12:.2f} TB/s, "
        f"bf16 product {roofline.product / 1e12:.0f} TFLOP/s; "
        f"{walks}local_attention in tiles {name_of(local_attention_tiles.NARROW)}"
    )


def measure(
    operations: Sequence[str], tokens: Sequence[int], tune: bool
) -> Iterator[tuple[list[dict[str, str]], str]]:
    """After each operation, everybody's results so far and one line on where they were measured."""
    roofline = measure_roofline()
    found = {name: version_of(name) for name in _PEERS}
    header = describe_run(roofline, found)
    print(header)
    for name in (name for name, number in found.items() if number is None):
        print(f"{name} is not installed: not compared with")
    table = Table(roofline)
    print(_LINE.format(*COLUMNS[:5], "TB/s", "TF/s", "share", "GiB"))
    for count in tokens:
        for name in operations:
            torch._dynamo.reset()
            before = len(table.rows)
            try:
                for case in make_local(count, tune=True) if tune else cases.make(name, count):
                    if count != _TOKENS:
                        case.layout = f"{case.layout}, {count} tokens"
                    run_case(case, table)
            except (torch.OutOfMemoryError, ImportError) as error:  # of inputs, and of a peer
                print(f"{name}, {count} tokens: not measured: {type(error).__name__}: {error}")
                del table.rows[before:]  # a part would take the place of an earlier whole
            yield table.rows, header


if __name__ == "__main__":
    main()
