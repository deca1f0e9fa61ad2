"""How the embedded language model is made: the grammar of its text, its trainer, and the fitting of its directions."""
