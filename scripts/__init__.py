"""What the older guides call by these names, translated into EyeTune (docs/older-guides.md)."""
