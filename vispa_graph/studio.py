"""The graphs that `langgraph dev` serves; `langgraph.json` at the root of the repository names them.

The server imports this once and brings its own checkpointer. Models load when a graph first runs; settings come from VISPA_* variables.
"""

from vispa_graph.graph import create_graph

graph = create_graph()
reviewed = create_graph(resources=graph.resources, review=True)
