"""Encode the shipped phrases, solve for their pull, and write both into the package; vectors that are there already are kept.

python -m training.phrase_vectors
"""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save_file

from vispa_graph.taxonomy_index import SentenceEncoder, Taxonomy
from vispa_graph.taxonomy_index.index import index_name, phrases_of, solve_pull
from vispa_graph.taxonomy_index.precomputed import FILE, PULL, digest, encode_phrases


def main() -> None:
    taxonomies = [Taxonomy.load(), Taxonomy.load(bioethics=True)]
    texts = sorted({phrase.text for taxonomy in taxonomies for phrase in phrases_of(taxonomy)})
    encoder = SentenceEncoder(adapted=True)
    digests = digest(texts)
    order = np.argsort(digests)
    vectors = encode_phrases(texts, encoder).astype(np.float16)
    # As they are read back.
    place = {text: number for number, text in enumerate(texts)}
    unit = vectors.astype(np.float32) / np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    pulls = {
        f"{PULL}{index_name(taxonomy, encoder)}": solve_pull(taxonomy, unit[[place[p.text] for p in phrases_of(taxonomy)]]).astype(np.float16)
        for taxonomy in taxonomies
    }
    save_file({"digests": digests[order], "vectors": vectors[order]} | pulls, FILE, metadata={"encoder": encoder.fingerprint})
    print(f"{len(texts)} phrases, {FILE.stat().st_size / 2**20:.1f} MiB: {FILE}")


if __name__ == "__main__":
    main()
