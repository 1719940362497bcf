"""Where facts come from. Each source turns one model into a :class:`~bnfix.types.Route` of the same form.

``exported``: the graph of ``torch.export`` on one call. ``observed``: a recorded run, for what export refuses;
``decisions`` notes what it decided on data. ``symbolic``: names instead of numbers, where no call is known.
``layout`` is what they share.
"""
