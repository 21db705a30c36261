"""SAEs on a Hugging Face hub: the SAELens layout of each in a folder of its id, all of a push in one commit.

The token is that of `HF_TOKEN` or of `hf auth login`, the hub that of `HF_ENDPOINT`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from midiscover.errors import UserError

SCHEME = "hf://"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CARD = """---
library_name: saelens
{licence}tags: [saelens, sparse-autoencoder, interpretability]
---

# Sparse autoencoders

Each folder holds one, with a card of its own. In SAELens: `SAE.from_pretrained("{repository}", "<folder>")`.
"""


def repository_of(address: str) -> str:
    """`org/repo` of `hf://org/repo`. UserError for anything else."""
    name = address.removeprefix(SCHEME).strip("/")
    if not address.startswith(SCHEME) or not _REPOSITORY.fullmatch(name):
        raise UserError(f"'{address}' is no repository of a hub; give hf://organisation/repository.")
    return name


def require_token() -> str:
    """The token that a push is made with. UserError where there is none."""
    from huggingface_hub import get_token

    token = get_token()  # HF_TOKEN, else that of a log-in
    if not token:
        raise UserError("A push needs a token of the hub: set HF_TOKEN to one that may write, or run `hf auth login`.")
    return token


def push(files: Mapping[str, bytes], sae_id: str, repository: str, licence: str | None = None) -> str:
    """Put an SAE's files into its folder of a repository, which is made if absent; returns the folder's address.

    A repository without a README.md gets one, with the licence if one is given. UserError where the hub can't be
    reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    token = require_token()
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint, token=token)
    contents = {f"{sae_id}/{name}": data for name, data in files.items()}
    try:
        api.create_repo(repository, exist_ok=True)
        if not api.file_exists(repository, "README.md"):
            head = f"license: {licence}\n" if licence else ""
            contents["README.md"] = _CARD.format(repository=repository, licence=head).encode()
        operations: list[Any] = [CommitOperationAdd(path, data) for path, data in contents.items()]
        api.create_commit(repository, operations, commit_message=f"Add {sae_id}")
    except HfHubHTTPError as error:
        raise UserError(f"The hub at {endpoint} refuses {repository}: {_reason(error)}") from error
    except Exception as error:  # of the HTTP client, which is another one from version to version of the library
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UserError(f"The push to the hub at {endpoint} failed ({reason}); nothing was committed there.") from error
    return f"{endpoint}/{repository}/tree/main/{sae_id}"


def _reason(error: Any) -> str:
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        return f"the token may not write there (HTTP {status})."
    told = " ".join(str(error.server_message or error).split()).rstrip(".")
    return f"{told} (HTTP {status})."
