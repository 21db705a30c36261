"""What each feature of an SAE is: statistics, contexts, logit lens, neighbours; and which concepts it stands for.

plan.py        which blocks are read, in which chunks, and which rows are drawn at random beforehand
histogram.py   counts and an exact histogram of each feature's activations
examples.py    the contexts kept of each feature: highest, drawn from each interval, drawn at random
collect.py     one chunk of stored activations through SAEs; parts of features that merge
directions.py  logit lens, nearest decoder directions, neurons: from weights alone
sample.py      rows drawn beforehand, with codes and inputs
relations.py   features and inputs that correlate, on that sample
finish.py      a merged part to features.parquet and contexts.parquet
records.py     those files, read
"""
