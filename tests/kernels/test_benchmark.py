"""What of the benchmark runs anywhere: its layouts, its tables, and what it says on a CPU."""

from pathlib import Path

import pytest
import torch

from kernels import benchmark
from kernels.benchmark_attention import candidates, seen_pairs
from kernels.benchmark_layouts import Case, layouts
from kernels.local_attention import NARROW


@pytest.mark.parametrize("tokens", [65_536, 16_384, 1000])
def test_layouts_fill_the_tokens(tokens: int) -> None:
    for name, lengths in layouts(tokens).items():
        assert min(lengths) > 0, name
        assert sum(lengths) == tokens or name == "skewed"
    assert 20 < tokens / len(layouts(tokens)["code titles"]) < 32


def test_skewed_is_skewed() -> None:
    lengths = layouts(65_536)["skewed"]
    assert sorted(set(lengths)) == [16, 8192]
    assert sum(lengths) == 65_536


def test_share_of_the_roofline_and_files(tmp_path: Path) -> None:
    table = benchmark.Table(benchmark.Roofline(copy=4e12, product=800e12))
    case = Case(
        "geglu", "any", [], {}, {"forward": 4_000_000, "both": 4_000_000}, {"both": 8 * 10**9}
    )
    table.add(case, "forward", "ours", 2.0, 2**29)
    table.add(case, "both", "ours", 20.0, None)
    first, second = table.rows
    assert (first["tb_per_s"], first["share_of_roofline"], first["gib"]) == ("2.00", "0.50", "0.50")
    assert (second["tflop_per_s"], second["share_of_roofline"]) == ("400", "0.50")
    benchmark.write_csv(tmp_path / "new" / "results.csv", table.rows, "one GPU")
    lines = (tmp_path / "new" / "results.csv").read_text().splitlines()
    assert lines[0] == "# one GPU"
    assert lines[1] == ",".join(benchmark.COLUMNS)
    assert len(lines) == 4
    benchmark.plot(tmp_path, table.rows, "one GPU")
    assert (tmp_path / "geglu.png").stat().st_size > 1000


def test_a_cpu_is_told_what_it_cannot_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        benchmark.main([])


@pytest.mark.parametrize(("length", "window"), [(1, 0), (7, 2), (7, 6), (7, 64), (130, 64)])
def test_pairs_within_a_window(length: int, window: int) -> None:
    near = [abs(i - j) <= window for i in range(length) for j in range(length)]
    assert seen_pairs(length, window) == sum(near)


def test_tuning_compares_with_what_is_in_use() -> None:
    tunings = list(candidates())
    assert tunings[0] == NARROW
    assert {tuning.together for tuning in tunings} == {False, True}
