"""What a newcomer waits for: import, help, the first answer of a process, and the next one.

    python -m benchmarks.startup

Medians of three; the index is in the cache, as after the first use.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

QUERY = "Should my father, 84, have an operation he does not want?"
SECOND = f"""
import time
from vispa_graph import create_graph
graph = create_graph()
graph.invoke({{"query": "Is it right to lie to a patient?"}})
started = time.perf_counter()
graph.invoke({{"query": "{QUERY}"}})
print(time.perf_counter() - started)
"""
IMPORT = "import time; started = time.perf_counter(); import vispa_graph; print(time.perf_counter() - started)"


def wall(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def printed(code: str, environment: dict[str, str]) -> float:
    return float(subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    vispa = [sys.executable, "-m", "vispa_graph"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "VISPA_CACHE": cache}
        first = wall([*vispa, "ask", QUERY], environment)
        rows = {
            "import vispa_graph": lambda: printed(IMPORT, environment),
            "vispa --help": lambda: wall([*vispa, "--help"], environment),
            "vispa ask, new process": lambda: wall([*vispa, "ask", QUERY], environment),
            "the second graph.invoke of a process": lambda: printed(SECOND, environment),
        }
        table = Table(title=f"Seconds on {os.cpu_count()} cores")
        table.add_column("what")
        table.add_column("median", justify="right")
        table.add_row("vispa ask, nothing cached (builds the index)", f"{first:.2f}")
        for name, measure in rows.items():
            table.add_row(name, f"{statistics.median(measure() for _ in range(3)):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
