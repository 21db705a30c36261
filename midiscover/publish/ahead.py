"""What of a config's section `publish` can be told before there is an SAE, so that no sweep runs for nothing."""

from __future__ import annotations

from midiscover.errors import ConfigError
from midiscover.publish.hub import repository_of, require_token
from midiscover.publish.names import neuronpedia_names, refuse_namesakes
from midiscover.resolve import Resolved
from midiscover.store.storage import open_store

MEASURED = ("frontier", "best")
"""Values of `publish.saes` that only the finished sweep can answer."""


def require_publishable(resolved: Resolved) -> None:
    """UserError where the exports that `publish` lists could not be made of the sweep's SAEs, or could not be pushed.

    A local `publish.out` is made where it is absent, and a bucket is asked.
    """
    publish, model = resolved.config.publish, resolved.model.hub_id or resolved.model.name
    if publish.push:
        repository_of(publish.push)
        require_token()
    if publish.saes in MEASURED:  # any of them may come, so what is told is true of all
        neuronpedia_names(resolved.saes[0].recorded(), model, publish.neuronpedia)
    else:
        chosen = [sae for sae in resolved.saes if publish.saes == "all" or sae.id.startswith(publish.saes)]
        if not chosen:
            raise ConfigError(
                f"publish.saes is '{publish.saes}', which fits none of the sweep's {len(resolved.saes)} SAEs; give "
                "all, frontier, best or the beginning of an id."
            )
        named = [(sae.id, neuronpedia_names(sae.recorded(), model, publish.neuronpedia)) for sae in chosen]
        if "neuronpedia" in publish.formats:
            refuse_namesakes((sae, names.folder) for sae, names in named)
    if publish.out:
        open_store(publish.out)
