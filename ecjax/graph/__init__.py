"""A network as its jaxpr shows it: its layers in order of execution, and taps on what they compute."""

from ecjax.graph.layers import Layer, Layers, chain
from ecjax.graph.layout import Layout, as_leaf, as_matrices
from ecjax.graph.reading import Reading, at_least_two, read
from ecjax.graph.taps import tapped, zero_taps

__all__ = [
    "Layer",
    "Layers",
    "Layout",
    "Reading",
    "as_leaf",
    "as_matrices",
    "at_least_two",
    "chain",
    "read",
    "tapped",
    "zero_taps",
]
