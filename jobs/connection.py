"""The connection to a cluster's Jobs API: that it answers, takes the token, and runs the same Ray. Submits nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
import requests
from ray.job_submission import JobSubmissionClient

from midiscover.errors import ConfigError

ANSWER_SECONDS = 4.0
"""How long the first answer of all may take, for which somebody waits."""
SILENT_SECONDS = 60.0
"""How long an answer, or a word of a log, is waited for before the cluster is asked anew."""


def connect(cluster: str) -> JobSubmissionClient:
    """A client that has been answered. ConfigError where nothing answers within seconds, or the token is wrong."""
    mode = os.environ["RAY_AUTH_MODE"]  # of `jobs`, where nobody else said it
    if mode.lower() != "token":
        raise ConfigError(f"RAY_AUTH_MODE is {mode!r}, and clusters are asked with a token; leave it out.")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # they would go over what was asked for
    token = _token()
    header = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = requests.get(f"{cluster}/api/version", timeout=ANSWER_SECONDS, headers=header)
    except requests.RequestException as error:
        raise ConfigError(
            f"The cluster at {cluster} does not answer ({type(error).__name__}); give --cluster the address of its "
            "dashboard, for example http://127.0.0.1:8265 behind `ray dashboard ray_cluster.yaml`."
        ) from None
    if answer.status_code in (401, 403):
        raise ConfigError(
            f"The cluster at {cluster} does not take the token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its own."
            if token
            else f"The cluster at {cluster} asks for a token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        )
    try:
        there = answer.json()["ray_version"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"What answers at {cluster} is no Ray dashboard (HTTP {answer.status_code}).") from None
    if there != ray.__version__:
        raise ConfigError(
            f"The cluster at {cluster} runs Ray {there}, and here is {ray.__version__}; use the same one."
        )
    if token is None:
        raise ConfigError(
            f"The cluster at {cluster} asks for no token, so whoever reaches it may run code there; start its nodes "
            "with RAY_AUTH_MODE=token and a token of `ray get-auth-token --generate`."
        )
    return _Client(cluster)


class _Client(JobSubmissionClient):
    """Ray's, which waits without limit for an answer where the other side has stopped."""

    def _do_request(self, method: str, endpoint: str, **given: Any) -> requests.Response:
        given.setdefault("timeout", SILENT_SECONDS)
        return super()._do_request(method, endpoint, **given)


def _token() -> str | None:
    """The token of the cluster, from where Ray looks for it; None: there is none. ConfigError: it can't be read."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path("~/.ray/auth_token").expanduser()
    if not given and not path.is_file():
        return None
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"The cluster's token can't be read from {path} ({type(error).__name__}); set RAY_AUTH_TOKEN_PATH to a "
            "file that holds it, or RAY_AUTH_TOKEN to itself."
        ) from None
