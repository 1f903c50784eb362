"""One local page: photographs in, what a model says of each out. Nothing leaves the machine, nothing stays on disk.

A request goes one way: `server` (connections) -> `guard` (who may ask) -> `app` (what is asked) -> `desk` (whose
photographs, in which order) -> `reader` (the same code as `eyetune predict`) -> `card` (plain words).
"""
