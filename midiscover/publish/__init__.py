"""SAEs that leave the house, those of others that come in, and what is known of both.

names.py              what Neuronpedia and TransformerLens call models, hooks and sources
neuronpedia.py        the bulk layout that Neuronpedia imports, from feature records
neuronpedia_rules.py  what the importer asks of it, as checks on a folder
dashboard.py          the same features as SAEDashboard writes them
saelens.py            a SAELens folder with a model card, as it goes to a hub
bundle.py             one folder that tells all of an SAE, with pictures
hub.py                a SAELens folder pushed to a hub
choice.py             which SAEs of a sweep are worth publishing
ahead.py              what of `publish` in a config can't be, told before the sweep runs
export.py             writes an export with its manifest last
verify.py             named checks of an SAE or an export: checks.py is what they share, checks_*.py a matter each
importers.py          SAEs of other makers, read and folded; sourcehooks.py finds the hook they mean
promote.py            what a deployment serves
"""
