"""The only client of the Ray Jobs API: a stage's command line, run on a cluster as it would be run here.

    python -m jobs.submit run STAGE ARGUMENTS     submit, follow the log, end with the job's exit code
    python -m jobs.submit list | logs ID [-f] | stop ID

The cluster is `--cluster`, else $MIDISCOVER_CLUSTER: the address of its dashboard, such as http://127.0.0.1:8265 behind
`ray dashboard ray_cluster.yaml`. Its token comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

What is uploaded is a temporary folder with our packages and the resolved YAML, and nothing of what is read here from
the environment: nodes have addresses and secrets of their own. Local models and texts go into the store first, where
they are what they were here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs import NICENESS
from jobs.connection import SILENT_SECONDS, connect
from jobs.progress import PLAIN, Bars, replay
from jobs.runtime import CLIENT, run_main
from midiscover import lineage, tables
from midiscover.config import RunConfig
from midiscover.configio import to_yaml
from midiscover.errors import NotFoundError, StageError
from midiscover.launch import WANDB_PROJECT
from midiscover.models import STORED, push_model
from midiscover.store.storage import store_uri
from midiscover.submission import SubmitArgs, decided_here, parse_submit, submitted_config
from midiscover.texts import is_local, push_text

PACKAGES = ("midiscover", "jobs", "serve")
CONFIG = "run.yaml"
START_SECONDS = 120.0
"""How long the head of a cluster may take until it can start drivers."""
AWAY_SECONDS = 300.0
"""How long a cluster that was followed may stay away before we give up following."""
END_SECONDS = 60
"""How long a driver that is stopped may take for its way out, before Ray kills it; Ray's own default is 3."""
BROKEN = (RuntimeError, TimeoutError, requests.RequestException, aiohttp.ClientError)
"""What Ray's client raises where the cluster refuses, or the connection to it breaks."""
_OURS = re.compile(r"[a-z]+(-.+)?-\d{8}-\d{6}-[0-9a-f]{6}")


def main(argv: list[str]) -> int:
    """Do what is asked; returns the exit code."""
    args = parse_submit(argv)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they set it themselves, each for itself
    client = connect(args.cluster)
    if args.action == "run":
        return run(client, args)
    try:
        match args.action:
            case "list":
                return show_jobs(client, as_json=args.json)
            case "logs":
                return show_log(client, args.job, follow=args.follow)
            case _:
                return stop(client, args.job)
    except BROKEN as error:
        raise StageError(f"The cluster at {args.cluster} no longer answers: {_in_a_line(error)}") from None


def run(client: JobSubmissionClient, args: SubmitArgs) -> int:
    """Upload, submit, follow."""
    config, store = submitted_config(args), store_uri(args.store)
    words = [args.target] if args.target else []
    if config is not None:
        for path in decided_here(args):
            dtype = getattr(config, path.partition(".")[0]).dtype
            print(f"{path}: auto is {dtype}, by this machine; for GPU nodes give bfloat16", file=sys.stderr)
        config, words = portable(config, store), [CONFIG]
    job = submit(client, args.stage, [*words, "--store", store, *args.flags], config, args.target)
    if args.detach:
        print(job)
        return 0
    return follow_job(client, job)


def submit(client: JobSubmissionClient, stage: str, words: list[str], config: RunConfig | None, name: str = "") -> str:
    """Upload our packages, and `config` as the file CONFIG that `words` may name; start the stage. The job's id."""
    with tempfile.TemporaryDirectory(prefix="midiscover-upload-") as folder:
        size = pack(Path(folder), config)
        name = config.name if config is not None else name
        job = f"{stage}{f'-{name}' if name else ''}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        print(f"uploading {size / 1e6:.1f} MB: {', '.join(PACKAGES)}{', ' + CONFIG if config else ''}", file=sys.stderr)
        _submitted(
            client,
            entrypoint=shlex.join(["python", "-m", f"jobs.{stage}", *words]),
            submission_id=job,
            runtime_env={"working_dir": folder, "env_vars": variables()},
            metadata={"stage": stage, "name": name, "owner": lineage.owner()},
        )
    print(f"submitted {job}", file=sys.stderr)
    return job


def _submitted(client: JobSubmissionClient, **job: Any) -> None:
    """Submit. A head that has just come up has no agent yet that could start a driver: it is asked again."""
    ends = time.monotonic() + START_SECONDS
    while True:
        try:
            client.submit_job(**job)
            return
        except (RuntimeError, requests.RequestException) as error:
            if "No available agent" not in str(error) or time.monotonic() > ends:
                raise StageError(f"The cluster did not take the job: {_in_a_line(error)}") from None
            time.sleep(2)


def variables() -> dict[str, str]:
    """What the driver is told of here: whose run it is, what versions it is held against, and where its curves go
    besides. No secret."""
    told = {
        "MIDISCOVER_OWNER": lineage.owner(),
        CLIENT: json.dumps(lineage.versions()),
        "COLUMNS": "120",
        NICENESS: os.environ.get(NICENESS, "15"),
        "RAY_JOB_STOP_WAIT_TIME_S": str(END_SECONDS),  # read by Ray's supervisor, which gets the job's variables too
    }
    maybe = {"MIDISCOVER_COMMIT": lineage.code()["commit"], WANDB_PROJECT: os.environ.get(WANDB_PROJECT)}
    return told | {name: value for name, value in maybe.items() if value}


def portable(config: RunConfig, store: str) -> RunConfig:
    """The config with nothing in it that lies on this machine alone: local texts and models go into the store."""
    corpus, evaluate = config.corpus, config.evaluate
    if is_local(corpus.source):
        corpus = replace(corpus, source=_put_text(corpus.source, store))
    if evaluate.foreign_source is not None and is_local(evaluate.foreign_source):
        evaluate = replace(evaluate, foreign_source=_put_text(evaluate.foreign_source, store))
    config = replace(config, corpus=corpus, evaluate=evaluate)
    if config.model.id == "embedded" or Path(os.path.expanduser(config.model.id)).exists():
        stored, is_new = push_model(config.model, store, beside=True)
        _say_put(stored.name, stored.size, store, is_new=is_new)
        return replace(config, model=replace(config.model, id=f"{STORED}{stored.key}", revision=None))
    return config


def _put_text(source: str, store: str) -> str:
    address, size, is_new = push_text(source, store)
    _say_put(Path(source).name, size, store, is_new=is_new)
    return address


def _say_put(name: str, size: int, store: str, *, is_new: bool) -> None:
    print(f"{name}: {size / 1e6:,.1f} MB {'put' if is_new else 'stand already'} in {store}", file=sys.stderr)


def pack(folder: Path, config: RunConfig | None) -> int:
    """Put what is uploaded into a folder; returns its bytes."""
    for name in PACKAGES:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    if config is not None:
        (folder / CONFIG).write_text(to_yaml(config))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def follow_job(client: JobSubmissionClient, job: str) -> int:
    """Show a job's log until it ends; the exit code is its own. Ctrl-C asks whether it goes on without us."""
    with Bars("job") as bars:
        try:
            info = _followed(client, job, bars)
        except KeyboardInterrupt:
            bars.pause()
            if _wants_stop(job):
                _ask_to_stop(client, job)
            else:
                print(f"{job} goes on; `midiscover jobs logs -f {job}` follows it again.", file=sys.stderr)
            return 130
    return exit_code(job, info)


def exit_code(job: str, info: JobDetails) -> int:
    """That of a job that has ended: its driver's, 143 where it was stopped."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        print(f"{job} was stopped.", file=sys.stderr)
        return 143
    code = info.driver_exit_code
    if code is None or code == 0:
        print(f"{job} failed: {info.message}", file=sys.stderr)
        return 1
    return code if code > 0 else 128 - code


def _followed(client: JobSubmissionClient, job: str, bars: Bars) -> JobDetails:
    """Print a log as it grows until its job has ended; what the cluster says of the job then.

    Where the connection breaks, what is there is read again and what was shown left out. StageError where the cluster
    stays away, or has forgotten the job.
    """
    shown, rest, away, is_whole = 0, "", None, False

    async def lines() -> bool:
        nonlocal shown, rest, away
        seen, log = 0, client.tail_job_logs(job)
        while True:
            try:
                text = await asyncio.wait_for(anext(log), SILENT_SECONDS)
            except StopAsyncIteration:
                return True
            except TimeoutError:  # a job that is quiet, or a connection whose other end has stopped
                return False
            away = None
            seen += len(text)
            new = text[max(0, len(text) - (seen - shown)) :] if seen > shown else ""
            shown = max(shown, seen)
            *whole, rest = (rest + new).split("\n")
            for line in whole:
                replay(line, bars)

    while True:
        try:
            # Asked first: to a log of a job that it does not know the cluster answers without saying so.
            info = client.get_job_info(job)
            if is_whole and info.status.is_terminal():
                if rest:
                    replay(rest, bars)
                return info
            if is_whole:  # the log came to its end before its job did, as where a node is lost
                time.sleep(0.5)
            is_whole = False
            is_whole = asyncio.run(lines())
            if not is_whole and info.status.is_terminal():
                raise TimeoutError("the log of a job that has ended stays silent")
        except BROKEN as error:
            if f"Job {job} does not exist" in str(error):
                raise StageError(
                    f"The cluster does not know {job} any more: its head has been started anew. Submit the same "
                    "command again; it continues."
                ) from None
            away = time.monotonic() if away is None else away
            if time.monotonic() - away > AWAY_SECONDS:
                raise StageError(
                    f"The cluster has not answered for {AWAY_SECONDS / 60:.0f} minutes ({_in_a_line(error)}); the job "
                    f"may go on: `midiscover jobs logs -f {job}`."
                ) from None
            time.sleep(2)


def _ask_to_stop(client: JobSubmissionClient, job: str) -> None:
    try:
        client.stop_job(job)
        print(f"{job} is asked to stop.", file=sys.stderr)
    except BROKEN as error:
        print(f"{job} may go on ({_in_a_line(error)}); `midiscover jobs stop {job}` stops it.", file=sys.stderr)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _wants_stop(job: str) -> bool:
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"\nStop {job} as well? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def show_jobs(client: JobSubmissionClient, *, as_json: bool) -> int:
    """The jobs that were submitted from here or elsewhere, newest first."""
    rows = job_rows(client)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        tables.show(tables.jobs_table(rows, time.time() * 1000))
    return 0


def job_rows(client: JobSubmissionClient) -> list[dict[str, Any]]:
    """Our jobs on a cluster, newest first: `id, stage, name, owner, status, started, ended`; times in milliseconds."""
    rows = [
        {
            "id": job.submission_id,
            **{name: (job.metadata or {}).get(name) for name in ("stage", "name", "owner")},
            "status": str(job.status.value).lower(),
            "started": job.start_time,
            "ended": job.end_time,
        }
        for job in client.list_jobs()
        if job.submission_id and _OURS.fullmatch(job.submission_id)
    ]
    return sorted(rows, key=lambda row: row["started"] or 0, reverse=True)


def progress_of(log: str) -> list[dict[str, Any]]:
    """The lines of progress of a log, each with how far it has come: `stage, name, percent, note`."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for match in filter(None, map(PLAIN.fullmatch, log.splitlines())):
        told = match.groupdict()
        found[told["stage"], told["name"]] = told | {"percent": int(told["percent"]), "note": told["note"].strip()}
    return list(found.values())


def show_log(client: JobSubmissionClient, name: str, *, follow: bool) -> int:
    """A job's log so far, or until it ends."""
    job = find_job(client, name)
    if not follow:
        print(client.get_job_logs(job), end="")
        return 0
    return follow_job(client, job)


def stop(client: JobSubmissionClient, name: str) -> int:
    """Ask a job to stop, and wait until it has."""
    job = find_job(client, name)
    if not client.stop_job(job):
        print(f"{job} had ended already.")
        return 0
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.5)
    print(f"{job}: {str(status.value).lower()}")
    return 0


def find_job(client: JobSubmissionClient, name: str) -> str:
    """The job whose id `name` is or begins. NotFoundError where none or several fit."""
    known = [job.submission_id for job in client.list_jobs() if job.submission_id]
    fits = [job for job in known if job == name] or [job for job in known if job.startswith(name)]
    if len(fits) != 1:
        what = f"'{name}' fits {', '.join(sorted(fits)[:5])}" if fits else f"There is no job '{name}'"
        raise NotFoundError(f"{what} on the cluster; `midiscover jobs list` shows them.")
    return fits[0]


if __name__ == "__main__":
    run_main(main)
