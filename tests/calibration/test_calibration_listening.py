"""What the listener asks of functions that are no norm: each of them once, since every chunk calls them all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnfix.calibration.listening import Listener, Seen
from bnfix.calibration.norms import find_norms


class _Counting(Listener):
    """Counts the functions that it looks at closely."""

    looked: Counter[Any]

    def _special(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        self.looked[func] += 1
        return super()._special(func, types, args, kwargs)


class _Net(nn.Module):
    """Functions of ``torch``, of ``torch._C._nn`` and of ``Tensor``, a norm, and one that writes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = F.gelu(x).add(torch.sigmoid(x)).add_(1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def test_functions_that_are_no_norm_are_looked_at_once() -> None:
    net = _Net().eval()
    heard: list[Seen] = []
    listener = _Counting(find_norms(net), heard.append)
    listener.looked = Counter()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = net(x)
        with listener:
            net(x)
        listener.looked.clear()
        with listener:
            found = net(x)
    assert torch.equal(found, expected)
    assert len(heard) == 2
    # Again only what has to be heard of each time: the norm, and what may write to a weight.
    assert listener.looked == {F.batch_norm: 1, Tensor.add_: 1}


@pytest.mark.parametrize("func", [torch.nonzero, torch.argwhere, torch.masked_select])
def test_functions_that_read_are_heard_each_time(func: Any) -> None:
    x = torch.tensor([0.0, 1.0, 2.0])
    args = (x, x > 0) if func is torch.masked_select else (x,)
    norms = find_norms(nn.BatchNorm1d(3))
    for _ in range(2):
        with Listener(norms, lambda _: None) as listener:
            assert not listener.reads
            func(*args)
            assert listener.reads
