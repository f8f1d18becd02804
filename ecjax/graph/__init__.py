"""A network as its jaxpr shows it: its layers, taps on what they compute, its groups of units, the same with fewer."""

from ecjax.graph.flops import Flops, count_flops
from ecjax.graph.groups import Group, Groups, Place
from ecjax.graph.layers import Layer, Layers, chain
from ecjax.graph.layout import Layout, as_leaf, as_matrices
from ecjax.graph.reading import Reading, at_least_two, read
from ecjax.graph.smaller import without_units, zeroed
from ecjax.graph.taps import tapped, zero_taps

__all__ = [
    "Flops",
    "Group",
    "Groups",
    "Layer",
    "Layers",
    "Layout",
    "Place",
    "Reading",
    "as_leaf",
    "as_matrices",
    "at_least_two",
    "chain",
    "count_flops",
    "read",
    "tapped",
    "without_units",
    "zero_taps",
    "zeroed",
]
