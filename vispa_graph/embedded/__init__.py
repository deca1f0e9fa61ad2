"""The embedded language model: weights, tokenizer, model card, profile, and its fitted directions."""
