"""What the older guides (docs/older-guides.md) name: their commands and their Python names, in our words."""
