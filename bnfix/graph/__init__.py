"""Facts about a model, and surgery on it."""

from bnfix.graph.baking import Baked, bake, transfer
from bnfix.graph.channel_affine import ChannelAffine, affine_in_place_of
from bnfix.graph.copies import copy_model, unwrap
from bnfix.graph.facts import Binding, gather
from bnfix.graph.feeders import feeder_norms
from bnfix.graph.footprints import no_footprints
from bnfix.graph.mending import mend
from bnfix.graph.owners import Slot, find_owners
from bnfix.graph.recipe import replay
from bnfix.graph.reexport import drawn_example, exported, to_exported
from bnfix.graph.remodule import example_of, from_exported
from bnfix.graph.replicas import Replicator, replicator
from bnfix.graph.scripted import from_script
from bnfix.graph.sources.exported import quiet_export
from bnfix.graph.states import norm_states
from bnfix.graph.surgery import Surgeon, all_or_nothing, as_parameter, placeholder
from bnfix.graph.training import training_facts

__all__ = [
    "Baked",
    "Binding",
    "ChannelAffine",
    "Replicator",
    "Slot",
    "Surgeon",
    "affine_in_place_of",
    "all_or_nothing",
    "as_parameter",
    "bake",
    "copy_model",
    "drawn_example",
    "example_of",
    "exported",
    "feeder_norms",
    "find_owners",
    "from_exported",
    "from_script",
    "gather",
    "mend",
    "no_footprints",
    "norm_states",
    "placeholder",
    "quiet_export",
    "replay",
    "replicator",
    "to_exported",
    "training_facts",
    "transfer",
    "unwrap",
]
