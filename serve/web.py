"""The whole HTTP application: routes, errors, description, behind the guard. No Ray."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

import midiscover
from midiscover.errors import MiDiscoverError
from serve import api, browse, jobs, neuronpedia_steer, neuronpedia_v1, neuronpedia_web, pages
from serve.context import Context
from serve.guard import Guard, Meter
from serve.problems import NOTHING_HERE, RESPONSES, ProblemError, failed, of_error, problem_bytes, problem_headers

DESCRIPTION = """\
Which features of sparse autoencoders fire on texts, what is known of each feature, and what a model writes while
features are changed. Every route but `/health` needs a key: `Authorization: Bearer mdc_…`.

Routes under `/v1` answer as Neuronpedia's inference server does, those under `/api` as its web application.
"""


def create_app(context: Context, meter: Meter) -> Guard:
    """An ASGI application: all routes behind the guard."""
    app, login = create_routes(context), pages.login_page().encode()
    return Guard(_with_docs_policy(app), context.config, context.access, meter, login, pages.LOGIN_POLICY)


def create_routes(context: Context) -> FastAPI:
    """What stands behind the guard; to be served through `create_app` alone."""
    app = FastAPIOffline(
        redoc_url=None,
        title="miDiscover",
        version=midiscover.__version__,
        description=DESCRIPTION,
        responses=RESPONSES,
        generate_unique_id_function=_operation_id,
    )
    app.state.context = context
    ours = (browse.router, api.router, jobs.router, pages.router)
    neuronpedias = (
        neuronpedia_v1.router,
        neuronpedia_steer.inference,
        neuronpedia_web.router,
        neuronpedia_steer.application,
    )
    for router in (*ours, *neuronpedias):
        app.include_router(router)
    app.mount("/assets", StaticFiles(directory=pages.ASSETS), name="assets")
    _handle_errors(app)
    _describe_keys(app)
    return app


def _operation_id(route: APIRoute) -> str:
    return f"{route.name}_{'_'.join(sorted(route.methods or ()))}_{route.path_format}".lower().translate(
        str.maketrans(dict.fromkeys("/{}-", "_"))
    )


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ProblemError)
    async def _problem(request: Request, error: ProblemError) -> Response:
        return _answer(request, error.status, error.detail, error.headers)

    @app.exception_handler(MiDiscoverError)
    async def _ours(request: Request, error: MiDiscoverError) -> Response:
        return await _problem(request, of_error(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        told = {404: NOTHING_HERE, 405: "Not by this method."}
        return _answer(request, error.status_code, told.get(error.status_code, str(error.detail)), error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or "the request"
        if first["type"] == "json_invalid":
            return _answer(request, 422, "The body is no JSON.")
        more = len(error.errors()) - 1
        others = f" ({more} more problem{'s' if more > 1 else ''})" if more else ""
        return _answer(request, 422, f"{place}: {str(first['msg']).removeprefix('Value error, ')}{others}.")

    @app.exception_handler(Exception)
    async def _failed(request: Request, _: Exception) -> Response:
        # Starlette raises it again after this answer, and the guard writes it down.
        return _answer(request, 500, failed(_id(request)))


def _id(request: Request) -> str | None:
    return request.scope.get("midiscover", {}).get("request_id")


def _answer(request: Request, status: int, detail: str, headers: Any = None) -> Response:
    return Response(problem_bytes(status, detail, _id(request)), status, problem_headers(status, headers))


def _describe_keys(app: FastAPI) -> None:
    """Say in the description that a key is needed, where one is."""
    describe = app.openapi

    def with_keys() -> dict[str, Any]:
        document = describe()
        document["components"].setdefault("securitySchemes", {})["key"] = {"type": "http", "scheme": "bearer"}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if path != "/health":
                    operation["security"] = [{"key": []}]
        return document

    app.openapi = with_keys  # type: ignore[method-assign]


def _with_docs_policy(app: FastAPI) -> Any:
    """/docs runs a script of its own; every other page runs files of ours alone."""

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", pages.DOCS_POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        is_docs = scope["type"] == "http" and scope["path"] == "/docs"
        await app(scope, receive, answer if is_docs else send)

    return inner
