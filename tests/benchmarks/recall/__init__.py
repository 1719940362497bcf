"""The benchmark of recall in parts: eight small nets, what they are trained on, and faults to be put in."""
