"""What the older guides (docs/older-guides.md) name: their commands and their Python names, in our words."""

TICK, CROSS = "✓", "✗"
"""Before a line that says what went well, or did not: the guides' programs print them."""
