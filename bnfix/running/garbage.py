"""The garbage collector while much is made and little is thrown away."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def young_garbage_only() -> Iterator[None]:
    """Inside, collections look only at what was made inside; garbage in cycles still goes.

    With torch and a model library loaded, a full collection walks a million objects and takes longer than a forward.
    """
    if gc.get_freeze_count():  # somebody else's freeze is not to be undone
        yield
        return
    try:
        gc.freeze()
        yield
    finally:
        gc.unfreeze()
