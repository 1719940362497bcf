"""Engines that re-estimate the statistics of norms, and the transaction that takes it all back."""
