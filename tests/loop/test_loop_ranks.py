"""Several processes: DDP, ranks that differ, ranks that never come. Nobody hangs."""

from __future__ import annotations

import loop_ranks
from loop_nets import bad, codes

from bnfix.rules.loop_cases import on_ranks


def test_ddp_with_one_forward_is_clean_on_every_rank() -> None:
    for rank, (log, report) in enumerate(on_ranks(loop_ranks.one_forward)):
        assert not report.findings
        assert (log.ranks.world, log.ranks.rank, log.ranks.ddp, log.ranks.broadcast) == (2, rank, True, True)
        assert log.steps == 20
        assert len(log.ranks.distances) == 3
        assert all(d.batches == 16 and d.stored < 0.1 for d in log.ranks.distances)
        assert not log.ranks.unseen


def test_ddp_forward_twice() -> None:
    """Rank 0 measures the branches. On the others DDP wrote into the buffers in between: there nothing is claimed."""
    (log0, report0), (log1, report1) = on_ranks(loop_ranks.two_forwards)
    for log, report in ((log0, report0), (log1, report1)):
        found = report.by_code("BN409")[0]
        assert found.severity == "warning"
        assert "model(images(64, shift=3.0))" in found.message
        steps = log.steps or 1  # the one that did not end
        assert found.measured["steps"] == steps
        assert log.ranks.forwards.updates == 2 * steps
    if not log0.steps:
        return
    assert log0.steps == 20
    assert "BN401" in bad(report0)
    assert max(p.shift for n in log0.norms for s in n.patterns for p in s.pairs) > 0.5
    assert not [p for n in log1.norms for s in n.patterns for p in s.pairs]
    assert "BN401" not in bad(report1)


def test_ddp_forward_twice_that_ends_the_training_is_named() -> None:
    for log, report in on_ranks(loop_ranks.two_forwards_and_an_end):
        assert log.steps == 0
        (found,) = report.by_code("BN409")
        assert "in 1 of 1 steps" in found.message
        assert log.ranks.forwards.updates == 2


def test_two_forwards_without_broadcast_are_no_fault_of_ddp() -> None:
    for _, report in on_ranks(loop_ranks.two_forwards_no_broadcast):
        assert "BN409" not in codes(report)


def test_accumulation_with_no_sync() -> None:
    for log, report in on_ranks(loop_ranks.accumulated):
        assert not report.findings
        assert log.norms[0].patterns[0].backwards == 3


def test_shards_that_differ_behind_a_broadcast() -> None:
    for log, report in on_ranks(loop_ranks.different_shards):
        assert bad(report) == {"BN407"}
        found = report.by_code("BN407")[0]
        assert found.measured["batch"] > 0.3
        assert all(d.batch is not None for d in log.ranks.distances)


def test_without_the_wrapper_the_report_says_what_it_needs() -> None:
    for _, report in on_ranks(loop_ranks.unwrapped_given):
        assert "BN409" not in codes(report)
        (skipped,) = [s for s in report.skipped if s.code == "BN409"]
        assert "ddp_model" in skipped.needs


def test_a_rank_that_fails_hangs_nobody() -> None:
    """The last step that both have told of is compared: 16."""
    (log, _), _ = on_ranks(loop_ranks.uneven)
    assert {d.step for d in log.ranks.distances} == {16}


def test_a_rank_that_never_watches_hangs_nobody() -> None:
    (log, report), _ = on_ranks(loop_ranks.never_comes)
    assert "1 of 2 ranks" in log.ranks.unseen
    assert any(s.code == "BN407" for s in report.skipped)


def test_four_samples_a_rank() -> None:
    for _, report in on_ranks(loop_ranks.small_batches):
        assert bad(report) == {"BN408"}
        assert report.by_code("BN408")[0].measured["values"] == 4
