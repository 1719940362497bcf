"""One file a target norm; found by walking. Each defines a :class:`~bnfix.swaps.target.Target`."""
