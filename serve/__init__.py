"""The Ray Serve application: SAEs of a store behind HTTP. `python -m serve.app` here, serve/config.yaml on a cluster.

    app.py          starts it: here, or as Serve's `build` on a cluster
    replicas.py     the two deployments: ingress (speaks HTTP, no model) and interpreter (language model and SAEs)
    together.py     both in one process, for one machine: no hop between the request and the model
    interpreter.py  texts in, the features that fire out · shelf.py SAEs in memory · batching.py what is run together
    guard.py        keys, scopes, limits, before anything else reads a request · access.py who has which key
    catalog.py      which SAEs are hosted, and what is known of them
    web.py          the routes put together · api.py interpret, steer · browse.py SAEs, features · jobs.py train
    neuronpedia.py  what the routes of Neuronpedia's inference server (_v1), web application (_web) and both's steering
                    (_steer) share
    pages.py        the first page and the log-in · assets/

Only app.py, replicas.py and together.py know Ray. Ray reads these variables when it is imported.
"""

import os

for _name, _value in {
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # user code on the replica's own loop: a hop costs 2 ms less
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # which the line before turns on: an HTTP port a replica, for all to see
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # ten looks a second took a tenth of a core from the model
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # a dead proxy is missed after three checks: 30 s by default
}.items():
    os.environ.setdefault(_name, _value)
