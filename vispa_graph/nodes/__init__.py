"""The nodes of the graph: one file, one function, one graph name each."""

from vispa_graph.nodes.distributional import distributional
from vispa_graph.nodes.overton import overton
from vispa_graph.nodes.rerank import rerank
from vispa_graph.nodes.retrieve import retrieve
from vispa_graph.nodes.review import review
from vispa_graph.nodes.steer import steer
from vispa_graph.nodes.steerable import steerable

__all__ = ["distributional", "overton", "rerank", "retrieve", "review", "steer", "steerable"]
