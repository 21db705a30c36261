"""The client of a cluster without one: its command line, what it uploads, how it follows and ends."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs import NICENESS, submit
from jobs.progress import Bars, replay
from jobs.runtime import CLIENT, check_client
from midiscover import cli, configio, lineage, models
from midiscover.config import CorpusConfig, EvaluateConfig, ModelConfig, RunConfig
from midiscover.configio import load_config
from midiscover.errors import ConfigError, NotFoundError, StageError
from midiscover.launch import WANDB_PROJECT
from midiscover.submission import parse_submit, split_cluster, submitted_config
from tests.tiny import make_tiny_model

URL = "http://127.0.0.1:8265"


def test_a_stages_line_names_a_cluster_or_the_variable_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIDISCOVER_CLUSTER", raising=False)
    assert split_cluster(["demo", "--train.lr", "1"]) == (None, ["demo", "--train.lr", "1"])
    assert split_cluster(["demo", "--cluster", URL, "--force"]) == (URL, ["demo", "--force"])
    monkeypatch.setenv("MIDISCOVER_CLUSTER", URL)
    assert split_cluster(["demo"]) == (URL, ["demo"])
    assert split_cluster(["demo", "--cluster", "none"]) == (None, ["demo"])


def test_flags_of_a_config_go_into_it_and_those_of_an_id_along() -> None:
    args = parse_submit(["run", "sweep", "demo", "--cluster", URL + "/", "--tag", "a", "--train.lr", "1e-3", "--force"])
    assert (args.cluster, args.is_config, args.overrides) == (URL, True, {"train.lr": 1e-3})
    assert args.flags == ("--force", "--tag", "a")
    args = parse_submit(["run", "features", "demo.0123", "--cluster", URL, "--features.max_tokens", "5000"])
    assert (args.is_config, args.overrides, args.flags) == (False, {}, ("--features.max_tokens", "5000"))
    for line in (["doctor", "demo", "--json"], ["doctor", "--json", "demo"]):
        args = parse_submit(["run", *line, "--cluster", URL])
        assert (args.target, args.flags) == ("demo", ("--json",))
    args = parse_submit(["run", "pipeline", "--force", "--tag", "a", "demo", "--cluster", URL])
    assert (args.target, args.flags) == ("demo", ("--force", "--tag", "a"))


def test_help_is_the_verbs_own_wherever_it_would_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for cluster in ("none", URL):
        monkeypatch.setenv("MIDISCOVER_CLUSTER", cluster)
        with pytest.raises(SystemExit):
            cli.main(["sweep", "--help"])
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert told[0].startswith("usage: midiscover sweep ")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["list"], "No cluster is named: give --cluster URL or set MIDISCOVER_CLUSTER"),
        (["run", "serve", "demo", "--cluster", URL], "invalid choice: 'serve'"),
        (["run", "sweep", "demo", "--cluster", URL, "--lr", "1"], "did you mean --train.lr?"),
        (["run", "sweep", "demo", "--cluster", URL, "--json"], "'--json' is not a flag"),
        (["logs", "--cluster", URL], "required: ID"),
        (["list", "--cluster", URL, "more"], "'more' is not expected here"),
    ],
)
def test_wrong_lines(argv: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIDISCOVER_CLUSTER", raising=False)
    with pytest.raises(ConfigError) as told:
        parse_submit(argv)
    assert sentence in str(told.value)


def test_what_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret-s3cret")
    monkeypatch.setenv("MIDISCOVER_DATABASE_URL", "postgresql://u:s3cret-s3cret@h/d")
    monkeypatch.delenv(WANDB_PROJECT, raising=False)
    config = RunConfig(name="mine", model=ModelConfig(id="a/b"))
    size = submit.pack(tmp_path, config)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in tmp_path.iterdir()} == {"midiscover", "jobs", "serve", "run.yaml"}
    assert size == sum(path.stat().st_size for path in files) < 2e6
    assert {path.suffix for path in files} <= {
        ".py",
        ".yaml",
        ".txt",
        ".html",
        ".css",
        ".js",
        ".mako",
        ".j2",
        ".typed",
        ".ini",
    }
    assert load_config(tmp_path / "run.yaml") == config
    told = submit.variables()
    always = {"MIDISCOVER_OWNER", CLIENT, NICENESS, "RAY_JOB_STOP_WAIT_TIME_S"}
    assert always <= told.keys() <= always | {"MIDISCOVER_COMMIT", "COLUMNS"}
    assert not [path for path in files if b"s3cret-s3cret" in path.read_bytes()]
    assert "s3cret" not in json.dumps(told)
    monkeypatch.setenv(NICENESS, "3")
    assert submit.variables()[NICENESS] == "3"
    monkeypatch.delenv(NICENESS)
    assert submit.variables()[NICENESS] == "15"
    assert WANDB_PROJECT not in told
    monkeypatch.setenv(WANDB_PROJECT, "curves")
    assert submit.variables()[WANDB_PROJECT] == "curves"


def test_nothing_of_this_machine_is_left_in_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model("llama", tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("words " * 100)
    config = RunConfig(model=ModelConfig(id=str(tmp_path / "tiny")))
    moved = submit.portable(config, str(tmp_path / "store"))
    assert moved.model.id == "store:tiny"
    assert (tmp_path / "store" / "models" / "tiny" / "manifest.json").is_file()
    assert submit.portable(RunConfig(model=ModelConfig(id="a/b")), "unused").model.id == "a/b"
    monkeypatch.setattr(models, "ensure_embedded_model", lambda: tmp_path / "tiny")
    embedded = RunConfig(model=ModelConfig(id="embedded"))
    assert submit.portable(embedded, str(tmp_path / "store")).model.id == "store:tiny"
    # Somebody else's, by the same name: it keeps its own, and is found again.
    other = make_tiny_model("llama", tmp_path / "others" / "tiny", seed=1)
    identity = models.resolve_model(ModelConfig(id=str(other)))
    for _ in range(2):
        moved = submit.portable(RunConfig(model=ModelConfig(id=str(other))), str(tmp_path / "store"))
        assert moved.model.id == f"store:tiny-{identity.digest[:10]}"
    stored = models.resolve_model(moved.model, str(tmp_path / "store"))
    assert (stored.name, stored.digest) == ("tiny", identity.digest)
    # The same where the other's push is not finished.
    (tmp_path / "store" / "models" / "tiny" / "manifest.json").unlink()
    moved = submit.portable(RunConfig(model=ModelConfig(id=str(other))), str(tmp_path / "store"))
    assert moved.model.id == f"store:tiny-{identity.digest[:10]}"
    text, store = str(tmp_path / "text.txt"), str(tmp_path / "store")
    config = RunConfig(corpus=CorpusConfig(source=text), evaluate=EvaluateConfig(foreign_source=text))
    moved = submit.portable(config, store)
    assert moved.corpus.source == moved.evaluate.foreign_source
    assert moved.corpus.source.startswith(f"{store}/texts/")
    assert Path(moved.corpus.source).read_bytes() == Path(text).read_bytes()


@pytest.mark.parametrize("stage", ["publish", "pipeline"])
@pytest.mark.parametrize("out", ["./exports", "/mnt/exports"])
def test_exports_that_a_node_would_keep_to_itself_are_refused(stage: str, out: str) -> None:
    line = ["run", stage, "demo", "--store", "s3://b/p", "--cluster", URL]
    with pytest.raises(ConfigError, match=f"publish.out is {out}, a folder of whichever node writes it"):
        submitted_config(parse_submit([*line, "--publish.out", out]))
    config = submitted_config(parse_submit([*line, "--publish.out", "s3://b/exports"]))
    assert config is not None
    assert config.publish.out == "s3://b/exports"
    line[:3] = ["run", "publish", "demo.0123"]
    with pytest.raises(ConfigError, match=f"publish.out is {out}"):
        submitted_config(parse_submit([*line, f"--publish.out={out}"]))
    assert submitted_config(parse_submit([*line, "--publish.out", "s3://b/exports"])) is None


@pytest.mark.parametrize("native", [False, True])
def test_what_auto_came_to_is_said(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(configio, "native_bfloat16", lambda: native)
    sent: list[RunConfig] = []
    monkeypatch.setattr(submit, "submit", lambda _client, _stage, _words, config, _name: sent.append(config) or "job")
    monkeypatch.setattr(submit, "portable", lambda config, _store: config)
    path = tmp_path / "x.yaml"
    path.write_text("model: {dtype: auto}\ntrain: {dtype: float32}\nharvest: {hooks: a.0.b}")
    line = ["run", "sweep", str(path), "--store", "s3://b/p", "--cluster", URL, "--detach"]
    dtype = "bfloat16" if native else "float32"
    assert submit.run(FakeClient([]), parse_submit(line)) == 0  # type: ignore[arg-type]
    assert sent[0].model.dtype == dtype
    assert capsys.readouterr().err == f"model.dtype: auto is {dtype}, by this machine; for GPU nodes give bfloat16\n"
    assert submit.run(FakeClient([]), parse_submit([*line, "--model.dtype", "bfloat16"])) == 0  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


class FakeClient:
    """Jobs as a cluster would tell them; its log breaks off as often as it is told."""

    def __init__(self, chunks: list[list[str]], status: JobStatus = JobStatus.SUCCEEDED, code: int | None = 0) -> None:
        self.chunks, self.status, self.code, self.asked = chunks, status, code, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        parts, self.asked = self.chunks[min(self.asked, len(self.chunks) - 1)], self.asked + 1
        for part in parts:
            if part == "BREAK":
                raise RuntimeError("closed")
            yield part

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=self.status, driver_exit_code=self.code, message="it fell over")

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(submission_id=name) for name in ("sweep-a-1", "sweep-a-2", "sweep-b-1")]


def test_a_log_that_breaks_off_is_read_again_without_showing_a_line_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    lines = "one\ntwo\nthree\nfour\n"
    client: Any = FakeClient([["one\ntw", "BREAK"], ["one\ntwo\nth", "ree\n", "BREAK"], [lines[:9], lines[9:]]])
    assert submit.follow_job(client, "job") == 0
    assert capsys.readouterr().out == lines
    assert client.asked == 3


class BehindTunnel(FakeClient):
    """Its log is read by Ray's client, from a port that answers the first time as it is told."""

    def __init__(self, answer: bytes) -> None:
        super().__init__([["one\n"]])
        self.listening = socket.create_server(("127.0.0.1", 0))
        self._address = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self._cookies, self._headers, self._ssl_context, self._server_ray_version = None, {}, False, "2.60"
        self.thread = threading.Thread(target=self._answer, args=(answer,))
        self.thread.start()

    def _answer(self, answer: bytes) -> None:
        with self.listening, self.listening.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(answer)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        lines = super().tail_job_logs(job)
        if self.asked == 0:
            self.asked = 1
            lines = JobSubmissionClient.tail_job_logs(self, job)  # type: ignore[arg-type]  # what it needs of itself
        async for text in lines:
            yield text


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"])
def test_a_tunnel_that_closes_or_has_nothing_behind_it_is_tried_again(
    answer: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    client: Any = BehindTunnel(answer)
    assert submit.follow_job(client, "job") == 0
    client.thread.join(10)
    assert not client.thread.is_alive(), "it was asked"
    assert client.asked == 2
    assert capsys.readouterr().out == "one\n"


def test_a_job_is_followed_to_its_end_though_its_log_and_the_cluster_break_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log ends while the job runs, as where a node is lost; then nothing answers for a while."""
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    running = SimpleNamespace(status=JobStatus.RUNNING)
    told = [running, running, requests.ConnectionError("the tunnel is gone"), running]
    client: Any = FakeClient([["one\n"], ["one\ntwo\n"]], JobStatus.FAILED, 3)
    ended = client.get_job_info

    def get_job_info(job: str) -> Any:
        answer = told.pop(0) if told else ended(job)
        if isinstance(answer, Exception):
            raise answer
        return answer

    client.get_job_info = get_job_info
    assert submit.follow_job(client, "job") == 3
    assert told == []
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_job_that_the_cluster_has_forgotten_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: pytest.fail("it was waited for"))
    client: Any = FakeClient([[]])

    def get_job_info(job: str) -> Any:
        raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")

    client.get_job_info = get_job_info
    with pytest.raises(StageError, match="The cluster does not know job any more"):
        submit.follow_job(client, "job")


def test_a_cluster_that_breaks_off_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = FakeClient([[]])

    def broken(*_: Any) -> Any:
        raise requests.ConnectionError("the tunnel is gone")

    client.stop_job = client.list_jobs = broken
    monkeypatch.setattr(submit, "connect", lambda _: client)
    for line in (["list"], ["stop", "a"], ["logs", "a"]):
        with pytest.raises(StageError, match=f"The cluster at {URL} no longer answers: the tunnel is gone"):
            submit.main([*line, "--cluster", URL])


def test_ctrl_c_without_a_cluster_leaves_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client: Any = FakeClient([[]])

    def interrupted(_job: str) -> Any:
        raise KeyboardInterrupt

    def gone(_job: str) -> Any:
        raise requests.ConnectionError("the tunnel is gone")

    client.get_job_info, client.stop_job = interrupted, gone
    monkeypatch.setattr(submit, "_wants_stop", lambda _: True)
    assert submit.follow_job(client, "job") == 130
    assert "job may go on (the tunnel is gone); `midiscover jobs stop job` stops it." in capsys.readouterr().err


def test_a_cluster_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(submit, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    client: Any = FakeClient([["BREAK"]])
    with pytest.raises(StageError, match="has not answered for 5 minutes"):
        submit.follow_job(client, "job")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 143),
    ],
)
def test_exit_codes(status: JobStatus, code: int | None, expected: int) -> None:
    client: Any = FakeClient([[]], status, code)
    assert submit.follow_job(client, "job") == expected


def test_jobs_are_found_by_the_beginning_of_their_ids() -> None:
    client: Any = FakeClient([[]])
    assert submit.find_job(client, "sweep-b") == "sweep-b-1"
    with pytest.raises(NotFoundError, match="'sweep-a' fits sweep-a-1, sweep-a-2 on the cluster"):
        submit.find_job(client, "sweep-a")
    with pytest.raises(NotFoundError, match="There is no job 'x' on the cluster"):
        submit.find_job(client, "x")


def test_progress_goes_where_it_would_here(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars("job") as bars:
        for line in (
            "sweep: harvest:  10 %  12,288 tokens, 295/s  366 s left",
            "sweep: corpus made",
            "versions: the cluster has x",
            "2026-11-28 01:44:06,530\tINFO job_manager.py:581 -- Runtime env is setting up.",
            "Running entrypoint for job doctor-1: python -m jobs.doctor --json",
            "hook  l1  L0",
        ):
            replay(line, bars)
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        "sweep: harvest:  10 %  12,288 tokens, 295/s  366 s left",
        "sweep: corpus made",
        "versions: the cluster has x",
        "2026-11-28 01:44:06,530\tINFO job_manager.py:581 -- Runtime env is setting up.",
        "Running entrypoint for job doctor-1: python -m jobs.doctor --json",
    ]
    assert told.out == "hook  l1  L0\n"


def test_versions_of_client_and_driver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ours = lineage.versions()
    monkeypatch.setenv(CLIENT, json.dumps(ours))
    check_client()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(CLIENT, json.dumps(ours | {"torch": "1.0"}))
    check_client()
    assert capsys.readouterr().err == f"versions: the cluster has torch {ours['torch']}, and the client 1.0\n"
    monkeypatch.setenv(CLIENT, json.dumps(ours | {"ray": "1.0"}))
    with pytest.raises(ConfigError, match="and the job was submitted from 1.0; use the same"):
        check_client()
