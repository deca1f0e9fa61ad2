"""The host's own nodes."""

from nodes.reply import reply
from nodes.triage import triage

__all__ = ["reply", "triage"]
