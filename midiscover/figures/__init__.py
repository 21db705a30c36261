"""Every chart of miDiscover, once: Altair charts from plain tables, and their PNG, SVG, PDF, page and CSV.

The same chart is drawn in the report (by Vega in the browser), in frontier.png and in a notebook. Equal tables give
equal JSON, byte for byte. Knows neither torch nor pandas, and draws nothing that needs a network.

    tradeoff.py     frontier_chart, foreign_chart: FVU against L0, and against FVU on foreign text
    grid.py         map_chart, stability_chart: layers by sparsity settings, features that neighbours share
    training.py     curve_chart: the training curves
    features.py     density_chart, layer_density_chart, share_chart: how often features fire
    norms.py        histogram_chart, dead_chart: norms, rates and dead features of one SAE or a few
    activations.py  activation_chart, logit_chart: one feature
    contexts.py     contexts_chart: the texts on which it fires
    cards.py        feature_card, feature_cards: all of that on one card
    concepts.py     concept_chart, concept_map_chart: concepts by features, and by layer and sparsity
    schedule.py     schedule_chart: what workers do over the time of a plan
    drawing.py      what they have in common
    saving.py       png, svg, pdf, html, csv, save
"""

from midiscover.figures.activations import activation_chart, logit_chart
from midiscover.figures.cards import Card, feature_card, feature_cards
from midiscover.figures.concepts import concept_chart, concept_map_chart
from midiscover.figures.contexts import contexts_chart
from midiscover.figures.drawing import Chart
from midiscover.figures.features import density_chart, layer_density_chart, share_chart
from midiscover.figures.grid import map_chart, stability_chart
from midiscover.figures.norms import dead_chart, histogram_chart
from midiscover.figures.saving import (
    FORMATS,
    csv,
    data,
    embedded_javascript,
    html,
    javascript,
    pdf,
    png,
    save,
    save_png,
    save_svg,
    svg,
    undrawable,
)
from midiscover.figures.schedule import schedule_chart
from midiscover.figures.tradeoff import foreign_chart, frontier_chart
from midiscover.figures.training import MEASURES, Measure, curve_chart

__all__ = [
    "FORMATS",
    "MEASURES",
    "Card",
    "Chart",
    "Measure",
    "activation_chart",
    "concept_chart",
    "concept_map_chart",
    "contexts_chart",
    "csv",
    "curve_chart",
    "data",
    "dead_chart",
    "density_chart",
    "embedded_javascript",
    "feature_card",
    "feature_cards",
    "foreign_chart",
    "frontier_chart",
    "histogram_chart",
    "html",
    "javascript",
    "layer_density_chart",
    "logit_chart",
    "map_chart",
    "pdf",
    "png",
    "save",
    "save_png",
    "save_svg",
    "schedule_chart",
    "share_chart",
    "stability_chart",
    "svg",
    "undrawable",
]
