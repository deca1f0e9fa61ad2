"""The host's own prompts."""

GREETING = "Thank you. Here is how people with different values see your question:"
