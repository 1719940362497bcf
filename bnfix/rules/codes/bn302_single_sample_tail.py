from __future__ import annotations

from collections.abc import Iterator

from bnfix.rules.measured import by_path, learns, not_for_training
from bnfix.rules.reading import listed
from bnfix.rules.rule import Case, Rule
from bnfix.types import DataEvidence, Evidence, Finding, Fix, Skipped


class SingleSampleTail(Rule):
    """A training loader whose last batch is a single sample.

    ## What it does

    Divides the number of samples by the batch size, where the loader says both (or looks at the last batch, where it
    was read to its end), and looks for a layer that gets one value a channel and sample.

    ## Why is this bad

    At the end of the first epoch training stops: *Expected more than 1 value per channel when training*. Where a norm
    accepts one value, it normalises it to 0 and takes a variance of 0 into its running statistics.

    ## Example

    ```python
    DataLoader(dataset, batch_size=32, shuffle=True)                  # bad with 1,281 samples
    DataLoader(dataset, batch_size=32, shuffle=True, drop_last=True)  # good
    ```

    ## Fix

    `drop_last=True`, or another batch size: a change of your own code.
    """

    code = "BN302"
    name = "single-sample-tail"
    needs = ("norms", "data")

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding, with the layers that can't take it."""
        data = evidence.data
        assert data is not None
        if data.role != "train":
            yield not_for_training(self.code)
            return
        norms = by_path(evidence)
        single = [s.path for s in data.sites if s.positions == 1 and learns(norms.get(s.path))]
        if not single:
            return
        tail = self._tail(data)
        if tail is None:
            yield Skipped(self.code, "the loader does not say how its last batch comes out", "a loader with a length")
            return
        if tail != 1:
            return
        names = tuple(dict.fromkeys(p or "(root)" for p in single))
        size, total = data.loader.batch_size or max(data.sizes), data.loader.dataset
        of = f"{total:,} samples in batches of {size} leave" if total else "the loader ends with"
        yield self.found(
            "error",
            f"{of} a last batch of one: no variance for {listed(names)}, where training stops",
            names,
            fix=Fix("code", "drop_last=True in the DataLoader, or another batch size"),
            samples=total,
            batch_size=size,
        )

    def _tail(self, data: DataEvidence) -> int | None:
        """The size of the last batch; 0 for one like the others, None where nobody knows."""
        if max(data.sizes) < 2:
            return 0  # each batch is one sample: BN301 has that
        loader = data.loader
        if loader.drop_last:
            return 0
        if data.whole:
            return data.sizes[-1]
        if loader.dataset is None or loader.batch_size is None or loader.drop_last is None:
            return None
        return loader.dataset % loader.batch_size

    def bad(self) -> Case:
        """193 samples in batches of 16."""
        return self._case(16 * 24 + 1)

    def good(self) -> Case:
        """192."""
        return self._case(16 * 24)

    def _case(self, count: int) -> Case:
        from torch.utils.data import DataLoader

        from bnfix.rules.data_cases import fit, head_net, images

        x = images(count)
        return Case(fit(head_net(), [x]), data=DataLoader(x, batch_size=16))  # type: ignore[arg-type]
