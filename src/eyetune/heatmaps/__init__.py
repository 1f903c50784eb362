"""Heat maps: where a trained network looked, on the square it saw.

    found = explain(run, "eye.jpg")              # values float32[P, P] in 0..1, square, method, class
    picture = overlay(found.square, found.values)
    sanity_check(run, paths).passed              # do the maps depend on what was learnt?

A heat map is a hint for people who look for mistakes. It is no finding, and it does not say why.
"""

from eyetune.heatmaps.explain import HeatMap, explain, explain_square, heat_map, on_photograph
from eyetune.heatmaps.maps import METHODS, Method, choose_method
from eyetune.heatmaps.pictures import overlay, save_png, side_by_side
from eyetune.heatmaps.sanity import THRESHOLD, Sanity, sanity_check

__all__ = [
    "METHODS",
    "THRESHOLD",
    "HeatMap",
    "Method",
    "Sanity",
    "choose_method",
    "explain",
    "explain_square",
    "heat_map",
    "on_photograph",
    "overlay",
    "sanity_check",
    "save_png",
    "side_by_side",
]
