"""Every chart of miDiscover, once: Altair charts from plain tables, and their PNG and SVG.

The same chart is drawn in the report (by Vega in the browser), in frontier.png and in a notebook. Equal tables give
equal JSON, byte for byte. Knows neither torch nor pandas, and draws nothing that needs a network.

    tradeoff.py  frontier_chart, foreign_chart: FVU against L0, and against FVU on foreign text
    grid.py      map_chart, stability_chart: layers by sparsity settings, features that neighbours share
    training.py  curve_chart: the training curves
    features.py  density_chart, layer_density_chart, share_chart: how often features fire
    drawing.py   what they have in common, PNG and SVG
"""

from midiscover.figures.drawing import Chart, javascript, png, save_png, save_svg, svg
from midiscover.figures.features import density_chart, layer_density_chart, share_chart
from midiscover.figures.grid import map_chart, stability_chart
from midiscover.figures.tradeoff import foreign_chart, frontier_chart
from midiscover.figures.training import MEASURES, Measure, curve_chart

__all__ = [
    "MEASURES",
    "Chart",
    "Measure",
    "curve_chart",
    "density_chart",
    "foreign_chart",
    "frontier_chart",
    "javascript",
    "layer_density_chart",
    "map_chart",
    "png",
    "save_png",
    "save_svg",
    "share_chart",
    "stability_chart",
    "svg",
]
