"""The steering engine: contract, Hugging Face engine, hooks, directions, store, batching, and a fake."""
