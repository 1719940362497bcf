"""Where norms with several call sites start: calls that do not wait for one another's results, taken apart.

A network that is called once for each view (``[model(v) for v in views]``, the encoder of a Siamese net) has norms that
belong to all of these calls, and each call is over before the next begins. Taking over what a run has measured settles
one norm more with each run. But where the inputs of the calls do not depend on such norms, one plain pass collects
them, and then the calls go from norm to norm together, as samples do. The iteration starts with what that gives: it
confirms it at once, and where the inputs do depend on more than was seen, it goes on from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from bnfix.calibration.chunks import Chunk
from bnfix.calibration.ledger import Ledger
from bnfix.calibration.listening import Stats
from bnfix.calibration.scouting import Scouted, scout
from bnfix.calibration.session import Session
from bnfix.calibration.staged import MemoryFullError, forward_of
from bnfix.calibration.strands import StuckError
from bnfix.errors import CalibrationError
from bnfix.running import Call

Through = Callable[[Sequence[Chunk], Callable[[], nn.Module], Scouted], Ledger]
"""One run of chunks through all norms of what makes modules; what was watched of it before."""
Calls = dict[str, list[tuple[Chunk, Call]]]
"""The calls of modules, by path: the chunk whose forward made each, and its inputs."""


def start(session: Session, chunks: Sequence[Chunk], scouted: Scouted | None, through: Through) -> dict[int, Stats]:
    """Statistics for norms with several call sites, to be confirmed by a run; none where calls can't be taken apart."""
    if scouted is None or session.ranks.world > 1 or session.draws or session.options.spill_dir is not None:
        return {}
    counts = Counter(key for key, _ in scouted.route)
    several = {key: n for key, n in counts.items() if n > 1 and not session.norms.by_key(key).why}
    if not several:
        return {}
    repeats = session.norms.repeats
    room = session.budget
    try:
        inside = _inside(session, scouted.chunk, several)
        calls = _calls(session, chunks, inside, room) if inside else {}
        found: dict[int, Stats] = {}
        for path, keys in inside.items():
            given = _together(session, calls[path], path, through, room)
            found |= {key: given[key] for key in keys if key in given}
        return found
    except (CalibrationError, StuckError, MemoryFullError):  # the iteration says what is wrong, if anything is
        return {}
    finally:
        session.norms.repeats = repeats
        session.rewind()


def _inside(session: Session, chunk: Chunk, several: dict[int, int]) -> dict[str, list[int]]:
    """The outermost modules that are called as often as norms in them, with these; where no input depends on them."""
    norms = {key: session.norms.by_key(key) for key in several}
    paths = {prefix for norm in norms.values() for prefix in _prefixes(norm.path)}
    seen = _calls(session, [chunk], paths)
    with session.using({key: (n.mean + n.var.sqrt(), 2 * n.var) for key, n in norms.items()}):
        again = _calls(session, [chunk], paths)
    found: dict[str, list[int]] = {}
    for key, norm in norms.items():
        path = next((p for p in _prefixes(norm.path) if len(seen[p]) == several[key]), None)
        if path is not None and _same(seen[path], again[path]):
            found.setdefault(path, []).append(key)
    return found


def _prefixes(path: str) -> list[str]:
    """``a.b`` lies in the root, in ``a`` and in itself."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def _same(a: Sequence[tuple[Chunk, Call]], b: Sequence[tuple[Chunk, Call]]) -> bool:
    given = [[t for _, call in calls for t in call.tensors()] for calls in (a, b)]
    return len(given[0]) == len(given[1]) and all(map(torch.equal, *given))


def _calls(session: Session, chunks: Iterable[Chunk], paths: Iterable[str], room: int | None = None) -> Calls:
    """The calls of some modules in a plain forward of each chunk.

    Raises:
        CalibrationError: a forward fails.
        MemoryFullError: their inputs take more than ``room`` bytes.
    """
    found: Calls = {path: [] for path in paths}
    replica = session.replicate()
    current: list[Chunk] = []
    taken = 0

    def listen(path: str, module: nn.Module) -> None:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal taken
            call = Call(args, kwargs).private()
            taken += call.nbytes
            if room is not None and taken > room:
                raise MemoryFullError(f"the inputs of calls take more than {room} bytes")
            found[path].append((current[-1], call))

        module.register_forward_pre_hook(note, with_kwargs=True)

    for path in found:
        listen(path, replica.get_submodule(path))
    for chunk in chunks:
        current[:] = [chunk]
        with forward_of(chunk), torch.no_grad():
            chunk.run(replica)
    return found


def _together(
    session: Session, calls: Sequence[tuple[Chunk, Call]], path: str, through: Through, room: int
) -> dict[int, Stats]:
    """What norms in the module at ``path`` get where all of its calls go from norm to norm together."""
    chunks = [Chunk(call, chunk.samples, chunk.origin, chunk.mask) for chunk, call in calls]

    def make() -> nn.Module:
        return session.replicate().get_submodule(path)

    watched = scout(chunks[0], make(), session.norms)
    if watched.parked * sum(c.samples for c in chunks) > room:
        return {}
    ledger = through(chunks, make, watched)
    return {key: stats for key, stats in ledger.final().items() if key not in ledger.iterated}
