"""The optimizer's rule under every wrapper of DeepSpeed's, against the rule in one process.

The weights after each of twelve steps, under ZeRO 0 to 3, in fp32 and bf16, with two micro-steps a
step, on parameters that the borders between ranks cut in two, one of them used twice, one of one
element. Gradients leap now and then, so that updates are clipped; once they are infinite on a rank.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optimi
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import stepped
from gpus import ON_ONE_AND_TWO_GPUS

from train.ranks import Ranks

Steps = dict[str, np.ndarray]
"""(steps, elements) of each parameter"""
TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}


def reference(name: str, ranks: int) -> tuple[Steps, list[float], list[float]]:
    """Weights, norms of gradients and norms of updates, by implementations nobody here wrote."""
    model = stepped.Model()
    weights = {key: getattr(model, key).weight for key in stepped.SHAPES}
    decayed = [w for w in weights.values() if w.ndim > 1]
    plain = [w for w in weights.values() if w.ndim < 2]
    decay = stepped.DECAY
    common: dict[str, Any] = {"lr": stepped.PEAK, "betas": (0.9, 0.98), "eps": 1e-6}
    if "adamw" in name:
        decay /= stepped.PEAK
        rule: Any = torch.optim.AdamW
    else:
        rule = optimi.StableAdamW
        common |= {"decouple_lr": True, "max_lr": stepped.PEAK, "triton": False, "foreach": False}
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = rule(groups, **common)
    largest = stepped.CLIPPING if "clipped" in name else float("inf")
    found: list[dict[str, np.ndarray]] = []
    norms, updates = [], []
    for number in range(stepped.STEPS):
        before = torch.cat([w.detach().flatten().clone() for w in weights.values()])
        for key, gradient in stepped.full_gradients(number, ranks).items():
            weights[key].grad = gradient
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), largest)))
        for group in optimizer.param_groups:
            group["lr"] = stepped.lr_of(number)
        if number not in stepped.POISONED:
            optimizer.step()
        after = torch.cat([w.detach().flatten() for w in weights.values()])
        updates.append(float((after - before).norm()))
        found.append({key: w.detach().flatten().numpy().copy() for key, w in weights.items()})
    for number in stepped.POISONED:
        norms[number] = float("inf")
    return {key: np.stack([step[key] for step in found]) for key in weights}, norms, updates


def facts(folder: Path, name: str) -> list[dict[str, Any]]:
    """What is known of each step of a case."""
    return list(json.loads((folder / f"{name}.json").read_text()))


def check_case(folder: Path, name: str, ranks: int) -> None:
    """Weights after every step, what is logged, and the one step that was left out."""
    expected, norms, updates = reference(name, ranks)
    found = dict(np.load(folder / f"{name}.npz"))
    for key, weights in expected.items():
        np.testing.assert_allclose(found[key], weights, **TOLERANCE, err_msg=f"{name} {key}")
        for number in stepped.POISONED:
            before, after = found[key][number - 1 : number + 1]
            assert np.array_equal(before, after), "a step without a finite gradient changes nothing"
    known = facts(folder, name)
    # The first infinity in a step that is not logged, so one step late; the second in one that is.
    assert [step["skipped"] for step in known] == [0] * 7 + [1] * 2 + [2] * 3
    logged = {n: step["norms"] for n, step in enumerate(known) if step["norms"]}
    assert tuple(logged) == stepped.LOGGED
    for number, (gradient, update, skipped) in logged.items():
        assert gradient == pytest.approx(norms[number], rel=1e-5)
        assert update == pytest.approx(updates[number], rel=1e-4)
        assert skipped == (number in stepped.POISONED)


def orthogonalised(matrix: Tensor) -> Tensor:
    """By five steps of the quintic Newton-Schulz iteration of Jordan et al. 2024, "Muon: an
    optimizer for hidden layers in neural networks"."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide is matrix else x.T


def muon_reference(ranks: int) -> Steps:
    """Weights after each step up to the first infinity, undivided, in fp64, written out.

    Nesterov's momentum as the authors' code has it, steps of matrices longer by √(rows / columns)
    where that is above 1; AdamW for what is no matrix.
    """
    model, momentum, (beta_1, beta_2) = stepped.Model(), 0.95, (0.9, 0.98)
    weights = {key: getattr(model, key).weight.detach().double() for key in stepped.SHAPES}
    first, second = ({key: torch.zeros_like(w) for key, w in weights.items()} for _ in range(2))
    found: list[dict[str, np.ndarray]] = []
    for number in range(stepped.POISONED[0]):
        lr = stepped.lr_of(number)
        for key, gradient in stepped.full_gradients(number, ranks).items():
            gradient, weight = gradient.double(), weights[key]
            beta = momentum if weight.ndim > 1 else beta_1
            first[key] = beta * first[key] + (1 - beta) * gradient
            if weight.ndim > 1:
                rows, columns = weight.shape
                update = orthogonalised(momentum * first[key] + (1 - momentum) * gradient)
                step = 25 * lr * max(1, rows / columns) ** 0.5 * update
                weights[key] = weight * (1 - lr / stepped.PEAK * stepped.DECAY) - step
            else:
                second[key] = beta_2 * second[key] + (1 - beta_2) * gradient**2
                mean, square = (
                    moment[key] / (1 - beta ** (number + 1))
                    for moment, beta in ((first, beta_1), (second, beta_2))
                )
                weights[key] = weight - lr * mean / (square.sqrt() + 1e-6)
        found.append({key: w.flatten().numpy() for key, w in weights.items()})
    return {key: np.stack([step[key] for step in found]) for key in weights}


def check_muon(folder: Path, name: str, ranks: int) -> None:
    """Every element after each step, by how far the parameter has come.

    In bf16 ZeRO 1 and 2 hold the momentum and what comes of it in bf16.
    """
    tolerance = 0.02 if name in ("bf16_zero1_muon", "bf16_zero2_muon") else 1e-4
    found, model = np.load(folder / f"{name}.npz"), stepped.Model()
    for key, expected in muon_reference(ranks).items():
        start = getattr(model, key).weight.detach().flatten().numpy()
        for number, weights in enumerate(expected):
            way = np.abs(weights - start).max()
            off = np.abs(found[key][number] - weights).max()
            assert off <= tolerance * way, f"{name} {key}, step {number}"


@pytest.mark.parametrize("name", stepped.MUON_CASES)
def test_two_ranks_follow_muons_formula(two_ranks: Any, name: str) -> None:
    check_muon(two_ranks.folder / "steps", name, ranks=2)


def test_muons_formula_is_torchs() -> None:
    """To what torch rounds, which computes it in bf16."""
    gradient = stepped.full_gradients(0, 2)["long"]
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
    expected = -orthogonalised(gradient.double()) * (64 / 33) ** 0.5
    assert (weight.detach() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", stepped.CASES)
def test_two_ranks_follow_the_rule_of_one_process(two_ranks: Any, name: str) -> None:
    check_case(two_ranks.folder / "steps", name, ranks=2)


@pytest.mark.parametrize(
    ("what", "flat"), [("no clipping", False), ("one clipping for all parameters", True)]
)
def test_another_clipping_would_be_noticed(what: str, flat: bool) -> None:
    """The cases can fail: the rule without clipping, or flat, is far from the reference."""
    from train.stable_adamw import Layout, StableAdamW, whole

    expected, *_ = reference("fp32_zero1", ranks=2)
    model = stepped.Model()
    weights = [getattr(model, key).weight for key in stepped.SHAPES]
    start = torch.cat([w.detach().flatten() for w in weights]).requires_grad_()
    optimizer = StableAdamW([{"params": [start], "weight_decay": 0.0}], (0.9, 0.98), 1e-6)
    # As if the parameters were too large for any ratio to count.
    layout = whole(start) if flat else Layout(((0, start.numel()),), (10**12,), whole=True)
    optimizer.set_layouts({start: layout})
    for number in range(4):
        gradients = stepped.full_gradients(number, ranks=2)
        start.grad = torch.cat([gradients[key].flatten() for key in stepped.SHAPES])
        optimizer.param_groups[0]["lr"] = stepped.lr_of(number)
        optimizer.step()
    last = np.concatenate([expected[key][3] for key in stepped.SHAPES])
    assert np.abs(start.detach().numpy() - last).max() > 100 * TOLERANCE["atol"], what


def test_no_step_that_is_not_logged_waits_for_the_device(two_ranks: Any) -> None:
    """What travels to the host: nothing of ours; of DeepSpeed's what docs/training.md lists."""
    for name in stepped.CASES:
        for number, step in enumerate(facts(two_ranks.folder / "steps", name)):
            allowed = set()
            if "zero3" in name:
                # Of a number that is on the host already; and of the first step's trace.
                allowed = {"utils.py is_invalid_grad_norm"}
                if number == 0:
                    allowed |= {
                        "utils.py <listcomp>",
                        "utils.py assert_lst_len_same_as_other_ranks",
                    }
            assert set(step["places"]) <= allowed, f"{name}, step {number}"


@pytest.mark.parametrize(
    ("name", "sums", "reduced"),
    [
        ("fp32_zero1", "float32", "float32"),
        ("bf16_zero0_clipped", "bfloat16", "float32"),
        ("bf16_zero1_clipped", "float32", "float32"),
        ("bf16_zero1_in_bf16", "bfloat16", "bfloat16"),
        ("bf16_zero2", "float32", "float32"),
        ("bf16_zero3_clipped", "float32", "float32"),
    ],
)
def test_gradients_are_summed_in_the_dtypes_that_the_keys_say(
    two_ranks: Any, name: str, sums: str, reduced: str
) -> None:
    for step in facts(two_ranks.folder / "steps", name):
        assert step["sums"] == [f"torch.{sums}"]
        assert step["reduced"] == [f"torch.{reduced}"]


def check_bits(name: str, case: dict[str, Any]) -> None:
    """In every step, on every rank; only the sums of the one meant to be are not finite."""
    steps = range(len(stepped.SUM_MICRO_STEPS))
    for what in ("sums", "weights"):
        assert case[f"{what} differ"] == [0 for _ in steps], f"{name} {what}"
        for number, found in enumerate(case[f"{what} not finite"]):
            is_meant = what == "sums" and number == stepped.WITH_NAN
            assert (found > 0) == is_meant, f"{name} {what}, step {number}"


def check_sums(found: dict[str, dict[str, Any]]) -> None:
    """No bit depends on the passes that are left out, and some are."""
    for name, case in found.items():
        check_bits(name, case)
        for ours, theirs in zip(case["ours"], case["theirs"], strict=True):
            saved = sum(theirs.values()) - sum(ours.values())
            assert (saved == 0) == ("fp32" in name or theirs == FIRST_GRADIENTS), f"{name} {saved}"


# Of a stage 1's first micro-step on several ranks, where sums begin: six casts, in place of which
# ours write as often, and seven of the model's own.
FIRST_GRADIENTS = {"_to_copy": 13}


def test_fewer_passes_give_the_same_sums_on_two_ranks(two_ranks: Any) -> None:
    found = json.loads((two_ranks.folder / "steps" / "sums.json").read_text())
    assert found.keys() == stepped.SUMS.keys()
    check_sums(found)
    # Six parameters in three buckets, two of them cut in two: no cast, nothing is put together to
    # be reduced and copied back, no zeros to add to.
    first, *_, last = found["bf16_zero1"]["ours"]
    assert first == {"_to_copy": 7, "add.out": 6}
    assert last == {"_to_copy": 7, "add_": 6, "add.out": 4, "copy_": 5, "div_": 3}
    # Stage 2 has the sums of a rank's own parameters alone, from the first micro-step on.
    first, *_, last = found["bf16_zero2"]["ours"]
    assert "zeros" not in first
    assert (first["add.out"], last["add_"]) == (4, 4)


@pytest.mark.usefixtures("joined")
def test_one_rank_adds_each_gradient_up_in_one_operation(tmp_path: Path) -> None:
    found = stepped.compare_sums(Ranks(), ["bf16_zero1", "bf16_zero2"], tmp_path)
    for name, case in found.items():
        check_bits(name, case)
        first, *later = case["ours"]
        assert first == {"_to_copy": 7, "add.out": 6}
        assert later == [{"_to_copy": 7, "add_": 6}] * 2
    assert found["bf16_zero1"]["theirs"][1] == {"_to_copy": 7 + 6, "add_": 6}


@pytest.mark.parametrize("name", stepped.CHECKED)
def test_deepspeeds_checks_beside_ours_change_no_step(two_ranks: Any, name: str) -> None:
    """What is left out is counted once; the host waits for what docs/training.md says."""
    folder = two_ranks.folder / "steps"
    check_case(folder, name, ranks=2)
    waits = [set(step["places"]) for step in facts(folder, name) if step["norms"] is None]
    expected = {"utils.py is_invalid_grad_norm"}
    if "bf16" in name:
        expected.add("stage_1_and_2.py has_overflow")
    assert waits[0] == expected


@pytest.mark.slow
def test_three_ranks_follow_the_rule_and_take_it_up_again(launcher: Any) -> None:
    """All stages with all rules; going on from a checkpoint changes no bit."""
    script, folder = Path(__file__).parent / "launched.py", launcher.folder / "steps"
    done = launcher.run(3, f"steps:all:{folder}", script=script)
    assert done.code == 0, done.out + done.err
    check_sums(json.loads((folder / "sums.json").read_text()))
    for name in stepped.CASES | stepped.MORE_CASES | stepped.MUON_CASES:
        (check_muon if name in stepped.MUON_CASES else check_case)(folder, name, ranks=3)
        whole, resumed = (np.load(part / f"{name}.npz") for part in (folder, folder / "resumed"))
        for key in stepped.SHAPES:
            assert np.array_equal(whole[key], resumed[key]), f"{name} {key}"


@ON_ONE_AND_TWO_GPUS
def test_on_gpus_the_rule_is_the_same_and_ours_waits_for_nothing(gpus: int, launcher: Any) -> None:
    """And the sums are DeepSpeed's to the bit, also where they come by a stream of their own."""
    launcher.accelerator = "cuda"
    script, folder = Path(__file__).parent / "launched.py", launcher.folder / "steps"
    done = launcher.run(gpus, f"steps:plain:{folder}", script=script)
    assert done.code == 0, done.out + done.err
    for name, case in json.loads((folder / "sums.json").read_text()).items():
        check_bits(name, case)
    ours = {path.name for path in (Path(__file__).parents[2] / "train").glob("*.py")}
    ours |= {"stable_adamw.py"}
    for name in stepped.CASES:
        check_case(folder, name, ranks=gpus)
        # The first step puts tables on the device.
        for number, step in enumerate(facts(folder, name)[1:], start=1):
            waits = {place for place in step["places"] if place.split()[0] in ours}
            assert not waits, f"{name}, step {number}"


def test_a_wrapper_that_nobody_knows_is_refused() -> None:
    """The rule for whole parameters, on a flat stretch of them, would be another optimizer."""
    from train.zero import held

    with pytest.raises(TypeError, match="object is none of DeepSpeed"):
        held(object())


def test_the_end_of_backward_does_not_hold_up_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where DeepSpeed waits for the device, the streams wait for each other instead."""
    from deepspeed.accelerator import get_accelerator

    from train.zero import without_waits

    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            waits.append((self.name, other.name))

    class DeepSpeedZeroOptimizer:
        reduction_stream = Stream("reduction")

        def independent_gradient_partition_epilogue(self) -> None:
            get_accelerator().synchronize()

    accelerator = get_accelerator()
    held_up: list[bool] = []
    monkeypatch.setattr(type(accelerator), "synchronize", lambda self: held_up.append(True))
    monkeypatch.setattr(type(accelerator), "current_stream", lambda self: Stream("backward"))
    wrapper = DeepSpeedZeroOptimizer()
    without_waits(wrapper)
    wrapper.independent_gradient_partition_epilogue()
    assert waits == [("backward", "reduction"), ("reduction", "backward")]
    assert not held_up
    accelerator.synchronize()
    assert held_up, "elsewhere it is DeepSpeed's"
