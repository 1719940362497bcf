"""Pickles looked at without running them, and one that is run under guard."""
