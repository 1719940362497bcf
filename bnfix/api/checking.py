"""What is wrong with a model, with evidence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from bnfix.api.asked import Progress, silent

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from bnfix.running.call import Forward
    from bnfix.types import Diagnosis


def check(
    model: nn.Module | ExportedProgram | Mapping[str, Any] | str | os.PathLike[str],
    example: Any = None,
    *,
    data: Iterable[Any] | None = None,
    role: Literal["train", "val"] = "train",
    against: Any = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    forward: Forward | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> Diagnosis:
    """Find what is wrong with the norms of ``model``: changes nothing, to the bit.

    Args:
        model: a module in any mode, an exported program, a state_dict, or a file of one of these or of ONNX. Of weights
            alone the values are judged, of ONNX what the graph says.
        example: what the model is called with, as for :func:`fold`; without it (and ``data``) there is no graph.
        against: a reference: another state of the same model (its average, what it was converted from), or a file of
            one. For an ONNX file the model that it should be equal to, compared on ``example``.
        select, ignore: codes of rules, or their beginnings: ``BN2``.
        trust: load a file that holds a pickled module, which runs its own code.

    Raises:
        LoadError: a file can't be read, or the reference has no norm in common with the model.
        TypeError: ``model`` is none of these.
    """
    from torch import nn
    from torch.export import ExportedProgram

    from bnfix import evidence, rules

    if not isinstance(model, (nn.Module, ExportedProgram, Mapping, str, os.PathLike)):
        raise TypeError(f"model is a module, an exported program, a state_dict or a file, not {type(model).__name__}")
    options: dict[str, Any] = {"trust": trust, "say": progress or silent, "forward": forward}
    if isinstance(model, nn.Module):
        options |= {"data": data, "role": role}
    gathered = (
        evidence.of(model, example, **options)
        if against is None
        else evidence.of_pair(model, against, example, **options)
    )
    return rules.judge(gathered, rules.Selection(tuple(select), tuple(ignore)))
