"""A network as its jaxpr shows it: its layers in order of execution, and taps on what they compute."""

from ecjax.graph.layers import NO_LAYERS, Layer, Layers, as_patterns, chain, chosen
from ecjax.graph.layout import Layout, as_leaf, as_matrices
from ecjax.graph.reading import Reading, read
from ecjax.graph.taps import tap_dtype, tapped, zero_taps

__all__ = [
    "NO_LAYERS",
    "Layer",
    "Layers",
    "Layout",
    "Reading",
    "as_leaf",
    "as_matrices",
    "as_patterns",
    "chain",
    "chosen",
    "read",
    "tap_dtype",
    "tapped",
    "zero_taps",
]
