"""Where facts come from. Each source turns one model and one call into one :class:`~bnfix.types.Route`.

``exported``: the graph of ``torch.export``, the source there is today. ``symbolic`` (no example) and
``observed`` (a recorded run, for what export refuses) each become one more file with a ``trace`` of the
same form; ``graph.facts`` needs to know no more of them.
"""
