"""What is looked at before the work begins: models that can't be run, norms that may not be touched, other ranks."""

from __future__ import annotations

import hashlib

from torch import nn

from bnfix.calibration.norms import FROZEN, Norms
from bnfix.calibration.session import Options
from bnfix.calibration.values import fingerprint
from bnfix.errors import CalibrationError


def refuse_sharded(model: nn.Module) -> None:
    """A forward of a sharded model waits for all ranks, and each has chunks of its own: it would hang, or crash.

    Raises:
        CalibrationError: it is one; says how a plain copy is made.
    """
    whole = ("FullyShardedDataParallel", "FSDPModule")
    path = next((n for n, m in model.named_modules() if any(k.__name__ in whole for k in type(m).__mro__)), None)
    if path is None:
        path = next((n for n, p in model.named_parameters() if type(p.data).__name__ == "DTensor"), None)
    if path is not None:
        raise CalibrationError(
            f"{path or 'the model'} is sharded over the ranks: its forward takes all of them in step",
            hint="recalibrate a plain copy that holds all of the weights:\n"
            "from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict\n"
            "plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))",
        )


def refuse_nothing(norms: Norms) -> None:
    """Refuse where no norm is to be done.

    Raises:
        CalibrationError: all are frozen, or none is selected.
    """
    todo = [n for n in norms.known.values() if not n.why]
    if todo or not norms.known:  # none known: functional ones may still turn up
        return
    frozen = [n.why for n in norms.known.values() if n.frozen]
    which = f"all {len(frozen)} norms" + " that are selected" * (len(frozen) < len(norms.known))
    if FROZEN in frozen:
        raise CalibrationError(
            f"{which} are frozen (in evaluation mode while the model is in training mode)",
            hint="include_frozen=True   recalibrates them; or model.eval() first: then none counts as frozen",
        )
    if frozen:
        raise CalibrationError(
            f"{which} are frozen: {frozen[0].partition(' (')[0]}",
            hint="include_frozen=True   recalibrates those that normalise through batch_norm",
        )
    raise CalibrationError("no norm is selected", hint=f"norms:  {norms.some}")


def asked(options: Options, norms: Norms) -> dict[str, object]:
    """What has to be the same on all ranks; data, ``max_samples`` and what concerns memory may differ."""
    todo = [(n.key, n.path, n.channels, n.eps, n.mean.dtype, n.var.dtype) for n in norms if not n.why]
    digest = hashlib.sha256(repr(todo).encode()).hexdigest()[:8]
    names = ("method", "when", "certify", "unbiased", "tol", "dry_run")
    facts = {name: getattr(options, name) for name in names}
    weights = fingerprint(norms.model.parameters())
    return {"the norms": f"{len(todo)} (digest {digest})", "the digest of the weights": weights, **facts}
