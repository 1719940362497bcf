"""Several processes with shards of the data: the same bits on all, those of one process on the whole; nobody hangs.

The four processes run all scenarios of ``calib_ranks`` in one go; the tests look at what they met.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import calib_ranks
import pytest
import torch
from calib_nets import residual
from ranks_common import SIZES, WORLDS, Iterated, Leaking, Met, Routes, bright_and_dark, data, made, net
from ranks_failing import BAD, FAILURES, SHARED
from torch import Tensor, nn

import bnfix

HANG = 240
"""Seconds after which they hang: usually all is done in 20, of which some are the start of four processes."""
Results = dict[tuple[str, int], list[Met]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """{(scenario, world): what each rank met}."""
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(calib_ranks.__file__))
    root = str(Path(bnfix.__file__).parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, script, str(folder)], env=env, stdout=said, stderr=said, start_new_session=True
        )
        try:
            code = process.wait(timeout=HANG)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    logs = "\n".join(f"rank {i}: {(folder / f'{i}.log').read_text()[-1500:]}" for i in range(max(WORLDS)))
    if code != 0:
        pytest.fail(f"{'hung' if code is None else 'failed'}; last scenarios:\n{logs}\n{(folder / 'said').read_text()}")
    found: Results = {}
    for rank in range(max(WORLDS)):
        for key, met in torch.load(folder / f"{rank}.pt", weights_only=False).items():
            if met is not None:
                found.setdefault(key, []).append(Met(**met))
    return found


def in_one_process(
    model: nn.Module, given: Sequence[Tensor], **options: Any
) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """The report, and the statistics of all norms, after one process had all of the data."""
    report = bnfix.recalibrate(model, given, group=False, **options)
    buffers = dict(model.named_buffers())
    means = [name for name in buffers if name.endswith("running_mean")]
    return report, [(buffers[name], buffers[name.replace("mean", "var")]) for name in means]


def distance(found: Sequence[tuple[Tensor, Tensor]], expected: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The worst over norms and channels: of means in standard deviations, of variances relative."""
    assert len(found) == len(expected)
    worst = 0.0
    for (m, v), (m0, v0) in zip(found, expected, strict=True):
        m, v, m0, v0 = m.double(), v.double(), m0.double(), v0.double()
        worst = max(worst, ((m - m0).abs() / v0.sqrt()).max().item(), (v / v0 - 1).abs().max().item())
    return worst


def with_statistics(model: nn.Module, met: Met) -> nn.Module:
    """``model`` with the statistics that a rank ended with."""
    means = [t for name, t in model.named_buffers() if name.endswith("running_mean")]
    variances = [t for name, t in model.named_buffers() if name.endswith("running_var")]
    for mean, var, (m, v) in zip(means, variances, met.stats, strict=True):
        mean.copy_(m)
        var.copy_(v)
    return model


def assert_same_figures(met: Met, expected: Any, world: int) -> None:
    """What two reports say of the first norm: float64, whatever the type of the model.

    Sums over one sample are in the type of the activations; PyTorch sums a batch of one in another order than larger
    ones. Standard errors come from sums about the mean of a chunk, in that type too.
    """
    exact = 1e-7 if 1 in SIZES[world] else 1e-12
    a, b = met.report["layers"][0], expected.layers[0]
    assert (a.n, a.samples) == (b.n, b.samples)
    for name, rtol in (("mean", exact), ("var", exact), ("se_mean", 1e-6), ("se_var", 1e-6)):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=rtol, abs=1e-14), name


GOOD = {
    "staged": 97,
    "staged_float64": 97,
    "population": 192,
    "online": 97,
    "iterated": 97,
    "routes": 64,
    "leaking": 400,
    "needed": 97,
    "wrapped": 97,
    "synchronised": 97,
    "used_up": 97,
    "stuck_on_one": 400,
    "full_on_one": 400,
    "full_in_proof": 400,
    "remembers_on_one": 400,
    "late": 97,
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", GOOD)
def test_all_ranks_end_with_the_same_bits(results: Results, name: str, world: int) -> None:
    mets = results[name, world]
    assert len(mets) == world
    assert [m.text for m in mets] == [""] * world
    assert len({m.digest for m in mets}) == 1
    assert not any(m.untouched for m in mets)
    for met in mets:
        assert met.report["changed"]
        assert met.report["ranks"] == world
        assert met.report["n"] == GOOD[name]
        assert met.report["layers"] == mets[0].report["layers"]


@pytest.mark.parametrize("world", WORLDS)
def test_float64_shards_give_what_one_process_gets_from_all(results: Results, world: int) -> None:
    _, expected = in_one_process(net(torch.float64), list(data(dtype=torch.float64).split(16)))
    met = results["staged_float64", world][0]
    assert distance(met.stats, expected) <= 1e-12
    assert met.report["method"] == "staged"
    for mine in results["staged_float64", world]:
        assert max(mine.report["residual"].mean, mine.report["residual"].var) <= 1e-12
        assert mine.report["residual_before"].mean > 0.1


@pytest.mark.parametrize("world", WORLDS)
def test_float32_shards_give_what_one_process_gets_from_all(results: Results, world: int) -> None:
    """Activations differ by some 1e-7 with the size of a chunk; the inputs of the first norm do not."""
    report, expected = in_one_process(net(), list(data().split(16)))
    met = results["staged", world][0]
    assert distance(met.stats, expected) <= 1e-6
    assert_same_figures(met, report, world)


@pytest.mark.parametrize("world", WORLDS)
def test_population_over_the_same_batches_is_the_same(results: Results, world: int) -> None:
    batches = list(data(192, torch.float64).split(64))
    _, expected = in_one_process(net(torch.float64), batches, method="population")
    met = results["population", world][0]
    assert distance(met.stats, expected) <= 1e-12
    assert met.report["method"] == "population"


@pytest.mark.parametrize("world", WORLDS)
def test_online_pools_over_all_ranks_in_the_end(results: Results, world: int) -> None:
    """Behind the first norm each rank normalises with what it has pooled itself: that is not what one process does."""
    report, _ = in_one_process(net(), list(data().split(16)), method="online")
    assert_same_figures(results["online", world][0], report, world)


@pytest.mark.parametrize("world", WORLDS)
def test_a_norm_with_two_call_sites_is_iterated_by_all_together(results: Results, world: int) -> None:
    report, expected = in_one_process(made(Iterated).double(), list(data(dtype=torch.float64).split(16)))
    for met in results["iterated", world]:
        assert met.report["iterations"] == report.iterations > 1
        assert distance(met.stats, expected) <= 1e-9  # rounding, through eight iterations


@pytest.mark.parametrize("world", WORLDS)
def test_norms_that_only_some_ranks_meet(results: Results, world: int) -> None:
    """The first rank never comes by the functional norm, the last one never by the other; the rest have no data."""
    batches = [b for part in bright_and_dark(world) for b in part]
    bright = [b for b in batches if b.flatten()[0] > 0]
    dark = [b for b in batches if b.flatten()[0] < 0]
    model: Any = with_statistics(made(Routes).double(), results["routes", world][0])
    pooled: list[Tensor] = []
    model.last.register_forward_pre_hook(lambda _module, args: pooled.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
        seen = {model.bright: bright, model.dark: [model.dark.conv(b) for b in dark], model.last: pooled}
    for norm, inputs in seen.items():
        x = torch.cat(inputs).transpose(0, 1).flatten(1)
        torch.testing.assert_close(norm.running_mean, x.mean(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norm.running_var, x.var(1), rtol=1e-9, atol=1e-9)
    assert [m.report["never_called"] for m in results["routes", world]] == [()] * world


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["leaking", "stuck_on_one"])
def test_where_chunks_do_not_keep_apart_on_one_rank_all_take_plain_passes(
    results: Results, name: str, world: int
) -> None:
    model = made(Leaking).double() if name == "leaking" else net(torch.float64)
    batches = list(data(400, torch.float64).split(50))
    for met in results[name, world]:
        assert met.report["engine"] == "plain passes"
        assert max(residual(with_statistics(model, met), batches)) <= 1e-9


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["full_on_one", "full_in_proof"])
def test_memory_full_on_one_rank_makes_all_stream(results: Results, name: str, world: int) -> None:
    for met in results[name, world]:
        assert met.report["method"] == "population"
        assert any("out of memory" in note for note in met.report["notes"])


@pytest.mark.parametrize("world", WORLDS)
def test_a_forward_that_remembers_on_one_rank_is_done_in_plain_passes_on_all(results: Results, world: int) -> None:
    for met in results["remembers_on_one", world]:
        assert met.report["engine"] == "plain passes"
        assert any("depends on earlier calls" in note for note in met.report["notes"])
        assert met.extra["calls"] == 0


@pytest.mark.parametrize("world", WORLDS)
def test_needed_is_decided_alike(results: Results, world: int) -> None:
    spoiled, healthy = results["needed", world], results["needed_by_none", world]
    assert {m.report["output_change"] for m in spoiled} == {spoiled[0].report["output_change"]}
    assert spoiled[0].report["output_null"] is not None
    assert [m.untouched for m in healthy] == [True] * world
    assert [m.report["changed"] for m in healthy] == [False] * world
    assert healthy[0].report["output_change"] < 1e-5


@pytest.mark.parametrize("world", WORLDS)
def test_dry_run_changes_nothing_on_any_rank(results: Results, world: int) -> None:
    for met in results["dry", world]:
        assert met.error == ""
        assert met.untouched
        assert max(met.report["residual"].mean, met.report["residual"].var) <= 1e-5
        assert met.report["layers"] == results["dry", world][0].report["layers"]


@pytest.mark.parametrize("world", WORLDS)
def test_max_samples_counts_on_each_rank(results: Results, world: int) -> None:
    expected = sum(min(size, 10 + rank) for rank, size in enumerate(SIZES[world]))
    assert [m.report["n"] for m in results["at_most", world]] == [expected] * world


@pytest.mark.parametrize("world", WORLDS)
def test_the_smallest_share_does_not_limit_the_others(results: Results, world: int) -> None:
    """All ranks took as many as the smallest had: 8 samples of 164, without a word."""
    mets = results["beyond_the_budget", world]
    assert len({m.digest for m in mets}) == 1
    (n,) = {m.report["n"] for m in mets}
    assert 4 + 20 * (world - 1) < n < 4 + 160 * (world - 1)


@pytest.mark.parametrize("world", WORLDS)
def test_buffers_beside_the_statistics_end_alike(results: Results, world: int) -> None:
    assert len({m.digest for m in results["counted_apart", world]}) == 1


@pytest.mark.parametrize("world", WORLDS)
def test_data_parallel_inside_of_a_model_does_not_hang(results: Results, world: int) -> None:
    for met, plain in zip(results["wrapped_inside", world], results["staged", world], strict=True):
        assert met.text == ""
        assert distance(met.stats, plain.stats) == 0


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_that_read_the_same_are_told(results: Results, world: int) -> None:
    for met in results["the_same_on_all", world]:
        assert any("begin with the same batch" in note for note in met.report["notes"])
    for met in results["staged", world]:
        assert not any("the same batch" in note for note in met.report["notes"])


@pytest.mark.parametrize("world", WORLDS)
def test_a_new_draw_on_one_rank_is_measured_on_all(results: Results, world: int) -> None:
    fresh = [m.report["residual_fresh"] for m in results["drawn_anew", world]]
    assert fresh[0] is not None
    assert fresh[0].mean > 0.1  # that rank's data is 1 higher the second time
    assert fresh == [fresh[0]] * world
    assert [m.report["residual_fresh"] for m in results["used_up", world]] == [None] * world


@pytest.mark.parametrize("world", WORLDS)
def test_wrappers_and_synchronised_norms_change_nothing(results: Results, world: int) -> None:
    plain = results["staged", world][0].digest
    assert results["wrapped", world][0].digest == plain
    assert results["synchronised", world][0].digest == plain
    assert any("DistributedDataParallel" in note for note in results["wrapped", world][0].report["notes"])


@pytest.mark.parametrize("world", WORLDS)
def test_one_rank_alone(results: Results, world: int) -> None:
    """``group=False``, while a default group is set up and the others do something else."""
    (met,) = results["alone", world]
    _, expected = in_one_process(net(), [data()])
    assert met.report["ranks"] == 1
    assert distance(met.stats, expected) == 0


@pytest.mark.parametrize("world", WORLDS)
def test_waiting_for_a_rank_that_does_not_come_is_said(results: Results, world: int) -> None:
    warned = [m.extra["warned"] for m in results["late", world]]
    assert warned[1] == []  # the late one itself
    assert all("every rank has to call recalibrate" in w[0] for rank, w in enumerate(warned) if rank != 1)


def test_a_process_outside_the_group(results: Results) -> None:
    (met,) = results["not a member", 4]
    assert met.error == "ValueError"
    assert "not in the group" in met.text
    assert met.untouched


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", FAILURES)
def test_a_rank_that_fails_makes_all_fail(results: Results, name: str, world: int) -> None:
    error, text = FAILURES[name]
    mets = results[name, world]
    assert [m.untouched for m in mets] == [True] * world
    assert len({m.digest for m in mets}) == 1
    for rank, met in enumerate(mets):
        if rank == BAD:
            assert met.error == error
            assert text in met.text
        else:
            assert met.error == "CalibrationError"
            assert f"rank {BAD} of {world} failed, so every rank's model is as it was: " in met.text
            assert (text or error) in met.text


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", SHARED)
def test_what_no_rank_can_go_on_from_is_told_alike_on_all(results: Results, name: str, world: int) -> None:
    for met in results[name, world]:
        assert met.error == "CalibrationError"
        assert SHARED[name] in met.text
        assert met.untouched


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["any_step", "any_exchange", "any_collective"])
def test_wherever_a_rank_is_interrupted_all_are_as_they_were(results: Results, name: str, world: int) -> None:
    """At each step that it tells of; before, in and after each exchange; as a collective begins."""
    mets = results[name, world]
    attempts = list(zip(*(m.extra["error"] for m in mets), strict=True))
    untouched = list(zip(*(m.extra["untouched"] for m in mets), strict=True))
    digests = list(zip(*(m.extra["digest"] for m in mets), strict=True))
    assert len(attempts) > 10
    for errors, kept, bits in zip(attempts, untouched, digests, strict=True):
        assert len(set(bits)) == 1
        if "" in errors:  # it came to its end on some rank, so on all; Ctrl-C came too late
            assert set(errors) <= {"", "KeyboardInterrupt"}
            assert not any(kept)
        else:
            assert sorted(errors) == ["CalibrationError"] * (world - 1) + ["KeyboardInterrupt"]
            assert all(kept)
    told = {text for m in mets for text in m.extra["text"]}
    assert not any("lost the others" in text or "different ways" in text for text in told)


def test_a_process_that_dies_makes_the_others_raise(results: Results) -> None:
    mets = results["dies", 4]
    assert len(mets) == 3
    for met in mets:
        assert met.error == "CalibrationError"
        assert "lost the others" in met.text
        assert met.untouched
