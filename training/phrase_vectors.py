"""Encode the shipped phrases and write their vectors into the package; those that are there already are kept.

python -m training.phrase_vectors
"""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save_file

from vispa_graph.taxonomy_index import SentenceEncoder, Taxonomy
from vispa_graph.taxonomy_index.index import phrases_of
from vispa_graph.taxonomy_index.precomputed import FILE, digest, encode_phrases


def main() -> None:
    texts = sorted({phrase.text for phrase in phrases_of(Taxonomy.load(bioethics=True))})
    encoder = SentenceEncoder()
    digests = digest(texts)
    order = np.argsort(digests)
    vectors = encode_phrases(texts, encoder).astype(np.float16)[order]
    save_file({"digests": digests[order], "vectors": vectors}, FILE, metadata={"encoder": encoder.fingerprint})
    print(f"{len(texts)} phrases, {FILE.stat().st_size / 2**20:.1f} MiB: {FILE}")


if __name__ == "__main__":
    main()
