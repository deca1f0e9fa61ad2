"""`python -m vispa_graph` is the command `vispa`."""

from vispa_graph.cli import main

main(prog_name="vispa")
