"""Rules: each reads :class:`~bnfix.types.Evidence` and returns findings. One file in ``codes/`` is one rule."""

from bnfix.rules.baseline import Baseline, read_baseline
from bnfix.rules.config import Config, check_codes, check_thresholds, read_config
from bnfix.rules.judging import Selection, all_rules, judge, near_codes, rule_of, unknown_codes
from bnfix.rules.pages import index_of, page_of_rule, thresholds_of
from bnfix.rules.rule import Case, Rule

__all__ = [
    "Baseline",
    "Case",
    "Config",
    "Rule",
    "Selection",
    "all_rules",
    "check_codes",
    "check_thresholds",
    "index_of",
    "judge",
    "near_codes",
    "page_of_rule",
    "read_baseline",
    "read_config",
    "rule_of",
    "thresholds_of",
    "unknown_codes",
]
