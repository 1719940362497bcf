"""Facts about a model, and surgery on it."""

from bnfix.graph.baking import Baked, bake, transfer
from bnfix.graph.channel_affine import ChannelAffine, affine_in_place_of
from bnfix.graph.copies import copy_model, unwrap
from bnfix.graph.facts import Binding, gather
from bnfix.graph.feeders import feeder_norms
from bnfix.graph.footprints import no_footprints
from bnfix.graph.mending import mend
from bnfix.graph.norm_layers import (
    FrozenBatchNorm,
    build_norm,
    describe_norm,
    inner_name,
    norm_modules,
    stand_in,
    type_of,
)
from bnfix.graph.outside import Outside
from bnfix.graph.owners import Slot, find_owners
from bnfix.graph.per_call import FunctionalNorm, NormPerCall
from bnfix.graph.recipe import replay
from bnfix.graph.reexport import drawn_example, exported, to_exported
from bnfix.graph.remodule import example_of, from_exported
from bnfix.graph.replicas import Replicator, replicator
from bnfix.graph.scripted import from_script
from bnfix.graph.sources.exported import quiet_export
from bnfix.graph.states import norm_states
from bnfix.graph.surgery import Surgeon, all_or_nothing, as_parameter, placeholder
from bnfix.graph.training import training_facts
from bnfix.graph.unsharing import take_apart

__all__ = [
    "Baked",
    "Binding",
    "ChannelAffine",
    "FrozenBatchNorm",
    "FunctionalNorm",
    "NormPerCall",
    "Outside",
    "Replicator",
    "Slot",
    "Surgeon",
    "affine_in_place_of",
    "all_or_nothing",
    "as_parameter",
    "bake",
    "build_norm",
    "copy_model",
    "describe_norm",
    "drawn_example",
    "example_of",
    "exported",
    "feeder_norms",
    "find_owners",
    "from_exported",
    "from_script",
    "gather",
    "inner_name",
    "mend",
    "no_footprints",
    "norm_modules",
    "norm_states",
    "placeholder",
    "quiet_export",
    "replay",
    "replicator",
    "stand_in",
    "take_apart",
    "to_exported",
    "training_facts",
    "transfer",
    "type_of",
    "unwrap",
]
