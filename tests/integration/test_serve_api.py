"""The whole HTTP application over a real store, in this process: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from starlette.routing import Mount

from midiscover.features.records import open_features
from midiscover.store.local import LocalStorage
from serve import jobs as jobs_routes
from serve import neuronpedia_steer as steering
from serve.exchange import Query
from serve.logs import structured
from serve.web import create_routes
from tests.served import Served, api, served, store, store_to_serve

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

SCOPES = ("read", "steer", "admin")
TEXTS = ["The river ran past the old mill.", "Entry 12: stone lamp engine."]
__all__ = ["api", "store", "store_to_serve"]  # fixtures


def routes_of(one: Served) -> list[tuple[Any, str, str]]:
    """Every route that the application answers, with a method and the path; mounts by a file of theirs."""
    found: list[tuple[Any, str, str]] = []
    waiting = list(create_routes(one.context).routes)
    while waiting:
        route: Any = waiting.pop()
        if isinstance(route, Mount):
            found += [(route, "GET", f"{route.path}/app.js"), (route, "GET", f"{route.path}/swagger-ui.css")]
        elif hasattr(route, "original_router"):
            waiting += route.original_router.routes
        else:
            found += [(route, method, route.path) for method in route.methods]
    return found


def test_every_route_needs_a_key(api: Served) -> None:
    known = routes_of(api)
    assert len(known) > 45
    for _, method, path in known:
        concrete = path.replace("{index}", "0").replace("{sae}", "x").replace("{run_id}", "x").replace("{job}", "x")
        answer = api.client.request(method, concrete, json={} if method in ("POST", "PUT") else None)
        is_open = (method, path) in {("GET", "/health"), ("HEAD", "/health"), ("GET", "/login"), ("POST", "/login")}
        # The log-in itself answers 401 to what is no key.
        assert (answer.status_code == 401) is not is_open or path == "/login", (method, path, answer.status_code)


def test_every_route_asks_for_its_scope_however_it_is_written(api: Served) -> None:
    """By the routers: the guard knows paths, and what a path means is decided by Starlette."""
    needs = {id(route): "admin" for route in jobs_routes.router.routes}
    needs |= {id(r): "steer" for part in (steering.inference, steering.application) for r in part.routes}
    refused = set()
    for route, method, path in routes_of(api):
        needed = "steer" if path == "/steer" else needs.get(id(route), "read")
        concrete = re.sub(r"\{.*?\}", "0", path)
        for unprintable in ("%0A", "%0D", "%00", "%0A/", "%E2%80%A8"):
            answer = api.client.request(method, f"{concrete}{unprintable}", headers=api.headers("admin"), json={})
            assert answer.status_code == 404, (method, path, unprintable)
        for scope in SCOPES[: SCOPES.index(needed)]:
            for ending in ("", "/"):
                answer = api.client.request(method, f"{concrete}{ending}", headers=api.headers(scope), json={})
                assert answer.status_code == 403, (method, path, ending, scope)
                refused.add((method, path))
    assert len(refused) == 11


def test_an_error_that_nobody_foresaw_is_a_problem_as_any_other(
    api: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: object, name: str) -> None:
        raise ZeroDivisionError("s3://bucket")

    monkeypatch.setattr(type(api.context.catalog), "find", broken)
    monkeypatch.setattr(logging.getLogger("midiscover.serve"), "propagate", True)
    answer = api.get("/saes/x")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert answer.json()["request_id"] in answer.json()["detail"]
    assert "bucket" not in answer.text
    (line,) = [record for record in caplog.records if record.getMessage() == "failed"]
    assert line.fields == {"request": answer.json()["request_id"], "error": "ZeroDivisionError"}  # type: ignore[attr-defined]


def test_health_is_asked_by_head_as_well_and_a_log_in_of_many_fields_is_none(api: Served) -> None:
    assert api.client.head("/health").status_code == 200
    for form in ("key=a&b&c&d&e=1&f=2", "&".join(["key=a"] * 5), "a;b=%ff", ""):
        answer = api.client.post("/login", content=form, headers={"Content-Type": "application/x-www-form-urlencoded"})
        assert (answer.status_code, "not valid here" in answer.text) == (401, True), form


@pytest.mark.parametrize("origin", ["http://testserver", "https://testserver", "null", None])
def test_a_cookie_is_secure_where_the_browser_came_by_tls(api: Served, origin: str | None) -> None:
    headers = {"Origin": origin} if origin else {}
    answer = api.client.post("/login", data={"key": api.keys["read"]}, headers=headers, follow_redirects=False)
    assert answer.status_code == 303
    assert ("; Secure" in answer.headers["set-cookie"]) is (origin == "https://testserver")
    api.client.cookies.clear()


def test_a_model_that_no_interpreter_runs_is_named_and_asked_of_by_nobody_who_names_no_sae(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(store) as one:
        catalog, running = one.context.catalog, one.interpreter.lm.identity
        best = catalog.default()
        model = {**best.record["lineage"]["model"], "digest": "f" * 12, "name": "org/away"}
        record = {**best.record, "lineage": {**best.record["lineage"], "model": model}}
        monkeypatch.setitem(catalog._hosted, best.id, replace(best, record=record))
        health = one.client.get("/health").json()
        assert health["reasons"] == ["no interpreter runs org/away; its SAEs can't be asked"]
        told = one.get("/v1/capabilities")
        assert told.status_code == 200
        assert [found["model"] for found in told.json()["models"]] == [running.name]
        assert best.source not in [found["source"] for found in told.json()["sources"]]
        assert len(told.json()["sources"]) == 3
        answer = one.post("/interpret", {"text": "The river"})
        assert answer.status_code == 200
        assert best.id not in answer.json()["texts"][0]["saes"]
        assert one.post("/interpret", {"text": "The river", "sae": best.id}).status_code == 503


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({}, 422, "give one of text, texts and concept"),
        ({"text": "a", "texts": ["b"]}, 422, "give one of"),
        ({"text": ""}, 422, "at least 1 character"),
        ({"text": "a" * 20_000}, 422, "at most 16384 characters"),
        ({"text": "river " * 2000}, 422, "reads at most"),
        ({"texts": ["a"] * 65}, 422, "65 texts are given; give 1 to 64"),
        ({"texts": []}, 422, "0 texts"),
        ({"text": "a", "top_k": 101}, 422, "at most 100"),
        ({"text": "a", "top_k": 0}, 422, "top_k"),
        ({"text": "a", "top_k": "5"}, 422, "top_k: Input should be a valid integer"),
        ({"text": "a", "sea": "x"}, 422, "sea: Extra inputs are not permitted"),
        ({"text": "a", "sae": "nothing"}, 404, "There is no SAE 'nothing' here; hosted are l0."),
        ({"text": "a", "sae": "l1"}, 404, "'l1' fits 2 SAEs"),
        ({"text": "a", "sae": "../l1"}, 404, "There is no SAE '../l1'"),
        ({"text": "a", "sae": "s3://bucket/sae"}, 404, "There is no SAE"),
        ({"text": "a", "sae": "x", "saes": ["y"]}, 422, "give sae or saes"),
        ({"concept": "no-such"}, 422, "'no-such' is no concept module"),
    ],
)
def test_wrong_requests_are_told_what_would_be_right(api: Served, body: Any, status: int, told: str) -> None:
    answer = api.post("/interpret", body)
    assert answer.status_code == status
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert told in problem["detail"]
    assert problem["error"] == problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]


def test_bodies_that_are_no_json_or_too_deep(api: Served) -> None:
    headers = {**api.headers(), "Content-Type": "application/json"}
    for body in ("{", "", "[" * 100_000, '{"text": ' * 10_000, "\x00", '{"text": "\\ud800"}', "NaN"):
        answer = api.client.post("/interpret", content=body, headers=headers)
        assert answer.status_code in (200, 400, 422), (body[:10], answer.status_code)
        assert answer.status_code == 200 or answer.headers["content-type"] == "application/problem+json"
    text = api.client.post("/interpret", content='{"text": "a"}', headers={**headers, "Content-Type": "text/plain"})
    assert text.status_code == 422


def test_features_are_paged_sorted_and_filtered(api: Served, store: Path) -> None:
    name = api.saes[0]
    table = open_features(LocalStorage(store), name).table(["index", "firing_rate", "max"]).to_pylist()
    seen: list[int] = []
    for page in (1, 2, 3):
        answer = api.get(f"/features/{name}", params={"size": 40, "page": page, "sort": "max", "order": "asc"}).json()
        assert answer["total"] == len(table) == 96
        seen += [row["index"] for row in answer["features"]]
    assert seen == [row["index"] for row in sorted(table, key=lambda row: (row["max"], -row["index"]))]
    rare = api.get(f"/features/{name}", params={"max_rate": 0.05, "size": 200}).json()
    assert {row["index"] for row in rare["features"]} == {r["index"] for r in table if r["firing_rate"] <= 0.05}
    words = api.get(f"/features/{name}", params={"text": "promotes", "size": 1}).json()
    assert "promotes" in words["features"][0]["label"]
    assert api.get(f"/features/{name}", params={"sort": "index; DROP TABLE saes"}).status_code == 422
    assert api.get(f"/features/{name}", params={"page": 0}).status_code == 422


def test_a_sweep_needs_its_sae_named(api: Served) -> None:
    (run,) = api.get("/runs").json()["runs"]
    several = api.get(f"/features/{run['id']}")
    assert several.status_code == 422
    assert f"means 4 SAEs; give ?sae= with one: {api.saes[0]}" in several.json()["detail"]
    assert api.get(f"/features/{run['id']}", params={"sae": api.saes[1]}).json()["sae"] == api.saes[1]
    shown = api.get(f"/runs/{run['id']}").json()
    assert {row["sae_id"] for row in shown["compared"]} == set(api.saes)
    assert api.get(f"/runs/{api.saes[0]}").status_code == 404
    assert api.get("/runs/nothing").status_code == 404


def test_a_feature_is_shown_with_all_that_is_known(api: Served, store: Path) -> None:
    name = api.saes[3]
    shown = api.get(f"/saes/{name}/features/5").json()
    records = open_features(LocalStorage(store), name)
    assert shown["neighbour_index"] == records.feature(5)["neighbour_index"]
    assert [one["tokens"] for one in shown["contexts"]] == [one.tokens for one in records.contexts(5)]
    missing = api.get(f"/saes/{name}/features/96")
    assert missing.status_code == 404
    assert "has no feature 96; its features are 0 to 95" in missing.json()["detail"]


def test_search_by_token_by_label_and_by_text(api: Served) -> None:
    name = api.saes[2]
    rows = api.context.catalog.rows(name)
    token = next(row["top_tokens"][0] for row in rows if row["count"] and row["top_tokens"][0].strip())
    hits = api.get("/search", params={"token": token, "sae": name, "limit": 200}).json()["features"]
    wanted = token.strip().casefold()
    expected = [r["index"] for r in rows if r["count"] and wanted in [t.strip().casefold() for t in r["top_tokens"]]]
    assert sorted(hit["feature"] for hit in hits) == expected
    assert api.get("/search", params={"label": "never fired"}).json()["features"] == []
    assert api.get("/search").status_code == 422
    assert "is blank" in api.get("/search", params={"label": "  "}).json()["detail"]
    for blank in (" ", "\n"):  # which are tokens
        hits = api.get("/search", params={"token": blank, "sae": name, "limit": 200}).json()["features"]
        expected = [row["index"] for row in rows if row["count"] and blank in row["top_tokens"]]
        assert sorted(hit["feature"] for hit in hits) == expected
    here, there = "The river ran.", "The engine stood."
    found = api.post("/search", {"text": here, "without": there, "sae": name, "top_k": 4}).json()
    query = Query(sae=name, kind="values", features=tuple(range(96)))
    answers: Any = asyncio.run(api.interpreter.read([here, there], [query], "corpus"))
    highest = [torch.tensor(answer.found[0].values).amax(1) for answer in answers]
    difference = (highest[0] - highest[1]).where(highest[0] > 0, -1)
    best = difference.topk(4)
    assert [one["feature"] for one in found["features"]] == best.indices.tolist()
    assert [one["max"] - one["max_without"] for one in found["features"]] == pytest.approx(
        best.values.tolist(), abs=1e-5
    )


def test_pieces_of_a_character_are_named_by_it_but_for_neuronpedia(api: Served) -> None:
    text = "a \u4e2d\U0001f600"
    tokens = api.post("/interpret", {"text": text}).json()["texts"][0]["tokens"]
    assert tokens == ["a", " ", *["\u4e2d"] * 3, *["\U0001f600"] * 4]
    model = api.context.catalog.default().neuronpedia_model
    theirs = api.post("/v1/tokenize", {"model": model, "text": text, "prependBos": False}).json()["tokenStrings"]
    assert theirs == ["a", " ", *["\ufffd"] * 7]


def test_steering_is_streamed_and_whole(api: Served) -> None:
    body = {"prompt": "The river", "features": [{"feature": 3, "value": 6.0}], "max_new_tokens": 6, "seed": 5}
    before = api.interpreter.done["generated_tokens"]
    whole = api.post("/steer", body | {"temperature": 0.0}, "steer").json()
    # Nothing that is generated is an end of the text here, so that both sides have all their tokens.
    assert api.interpreter.done["generated_tokens"] - before == 2 * body["max_new_tokens"]
    with api.client.stream("POST", "/steer", json={**body, "stream": True}, headers=api.headers("steer")) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        frames = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line]
    assert [frame["done"] for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert {**frames[-1]} == whole
    assert api.post("/steer", {**body, "features": [{"feature": 96}]}, "steer").status_code == 422
    assert api.post("/steer", {**body, "max_new_tokens": 257}, "steer").status_code == 422
    assert api.post("/steer", {**body, "features": []}, "steer").status_code == 422
    assert api.post("/steer", body).status_code == 403


class Jobs:
    """Stands in for the Jobs API; what is asked of the real one is in test_serve.py."""

    def __init__(self) -> None:
        self.submitted: list[dict[str, Any]] = []

    def submit_job(self, **job: Any) -> str:
        folder = Path(job["runtime_env"]["working_dir"])
        self.submitted.append({**job, "config": yaml.safe_load((folder / "run.yaml").read_text())})
        return job["submission_id"]


def test_training_takes_a_config_and_numbers_and_nothing_else(store: Path) -> None:
    jobs = Jobs()
    with served(store, jobs) as one:
        body = {"config": "quick", "overrides": {"train.lr": 0.002, "grid.sae.l1_coefficient": [1, 4]}}
        started = one.post("/train", body, "admin")
        assert started.status_code == 202
        (job,) = jobs.submitted
        assert started.json()["id"] == job["submission_id"]
        assert job["config"]["train"]["lr"] == 0.002
        assert job["config"]["grid"] == [{"sae.l1_coefficient": [1, 4]}] or "sae.l1_coefficient" in str(
            job["config"]["grid"]
        )
        assert job["entrypoint"].startswith("python -m jobs.sweep run.yaml --store /")
        assert not [key for scope, key in one.keys.items() if key in str(job)]
        for wrong, told in (
            ({"config": "../../etc/passwd"}, "There is no config '../../etc/passwd' here; there is demo"),
            ({"config": "quick", "overrides": {"model.id": "evil"}}, "overrides"),
            ({"config": "quick", "overrides": {"train.lrr": 1}}, "did you mean 'lr'"),
            ({"config": "quick", "overrides": {"train.lr": "1e-3"}}, "overrides"),
            ({"config": "quick", "overrides": {"lr": 1}}, "'lr' is no path of a setting"),
            ({"config": "quick", "stage": "rm"}, "stage"),
            ({"config": "quick", "store": "s3://other"}, "store: Extra inputs"),
        ):
            answer = one.post("/train", wrong, "admin")
            assert answer.status_code == 422, wrong
            assert told in answer.json()["detail"]
        assert one.post("/train", body, "steer").status_code == 403
        assert len(jobs.submitted) == 1


def readme_curls() -> list[list[str]]:
    lines = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ curl")]


@pytest.mark.parametrize("words", readme_curls(), ids=lambda words: words[-1][:20])
def test_the_curls_of_the_readme(store: Path, words: list[str]) -> None:
    """As they stand there, but for the names of the demo's SAEs and sweep."""
    jobs = Jobs()
    with served(store, jobs) as one:
        (place,) = [word for word in words if word.startswith("localhost:8000/")]
        body = words[words.index("-d") + 1] if "-d" in words else None
        sae = "l15.mlp-down_proj.standard-4608.l1-4"
        path = place.removeprefix("localhost:8000").replace("/demo?", "/tiny?").replace(sae, one.saes[0])
        body = body.replace(sae, one.saes[0]) if body else None
        headers = {**one.headers("admin"), "Content-Type": "application/json"}
        answer = one.client.request("POST" if body else "GET", path, content=body, headers=headers)
        assert answer.status_code == (202 if path == "/train" else 200), answer.text
        if "sae" in (body or ""):
            assert answer.json()["texts"][0]["saes"].keys() == {one.saes[0]}


def test_the_log_has_neither_texts_nor_keys(api: Served, capfd: pytest.CaptureFixture[str]) -> None:
    structured()
    secret = "a text that is nobody's business"
    api.post("/interpret", {"text": secret})
    api.post("/interpret", {"text": secret, "sae": "nothing"})
    api.client.get("/saes", headers={"Authorization": "Bearer mdc_00000000_" + "f" * 48})
    said = capfd.readouterr().err
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert {line["status"] for line in lines if line["event"] == "request"} >= {200, 404, 401}
    assert secret not in said
    assert not [key for key in (*api.keys.values(), "f" * 48) if key in said]


def test_the_description_is_complete_and_needs_no_other_host(api: Served) -> None:
    document = api.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            assert "401" in operation["responses"], path
            assert ("security" in operation) is (path != "/health")
    page = api.get("/docs").text
    assert "//" not in page.replace("http://www.w3.org", "").replace("//unpkg", "!") or "cdn" not in page
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert f"/static-offline-docs/{asset}" in page
        assert api.get(f"/static-offline-docs/{asset}").status_code == 200
