"""Put a trained model into the package, with its directions fitted.

    python -m training.install build/embedded

How the directions are fitted is what `vispa_graph/embedded/profile.json` says.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

from vispa_graph.engine.directions import fit_directions
from vispa_graph.engine.store import DirectionStore, manifest_key
from vispa_graph.resources import Resources, embedded_folder
from vispa_graph.settings import Settings

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path, nargs="?", help="the folder that training.train wrote; without it only the directions are fitted")
    trained = parser.parse_args().trained
    folder = embedded_folder()
    for name in FILES if trained else ():
        shutil.copyfile(trained / name, folder / name)
    shutil.rmtree(folder / "directions", ignore_errors=True)
    accuracies: list[float] = []
    # Directions that are set against other values differ with the taxonomy: one file without, one with the bioethics family.
    for bioethics in (False, True):
        resources = Resources(Settings(bioethics=bioethics))
        with closing(resources), tempfile.TemporaryDirectory() as place:
            fit = resources.fit_settings()
            key = manifest_key(resources.engine, fit)
            fitted = DirectionStore(Path(place), key, model_name=resources.engine.name)
            directions = fit_directions(resources.engine, resources.taxonomy, fit, store=fitted)
            shipped = DirectionStore(folder / "directions", key, model_name=resources.engine.name)
            shipped.add_all([(directions[value], source) for value, source in fitted.sources])
            accuracies += [float(direction.accuracy.mean()) for direction in directions.values()]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Installed in {folder}: {size / 1e6:.1f} MB, mean accuracy of the directions {sum(accuracies) / len(accuracies):.3f}.")


if __name__ == "__main__":
    main()
