"""Rules: each reads :class:`~bnfix.types.Evidence` and returns findings. One file in ``codes/`` is one rule."""

from bnfix.rules.judging import Selection, all_rules, judge, rule_of
from bnfix.rules.rule import Case, Rule

__all__ = ["Case", "Rule", "Selection", "all_rules", "judge", "rule_of"]
