"""SAEs that leave the house: exports that other tools read.

names.py              what Neuronpedia and TransformerLens call models, hooks and sources
neuronpedia.py        the bulk layout that Neuronpedia imports, from feature records
neuronpedia_rules.py  what the importer asks of it, as checks on a folder
saelens.py            a SAELens folder with a model card, as it goes to a hub
export.py             writes an export with its manifest last
"""
