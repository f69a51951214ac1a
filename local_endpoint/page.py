"""The page at `/`, and the permission for pages from elsewhere to call the endpoint."""

import re
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from client.one_file import FILE_TYPES, INDEX, SCHEMA, content_policy, one_file, page_files
from local_endpoint.workers import EndpointError

LOOPBACK_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
ORIGIN = re.compile(r"null|https?://[^/?#\s@]+")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": content_policy("'self'", "'self'", is_header=True),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageRoutes:
    """What a browser gets without a key: the page, and to the page itself the key."""

    def __init__(self, url: Callable[[], str], api_key: str) -> None:
        self._url = url
        self._api_key = api_key
        self._paths: set[str] = set()

    def add_to(self, app: web.Application) -> None:
        self._add(app, "/", lambda _: self._file(INDEX))
        for name in page_files():
            self._add(app, f"/{name}", lambda request: self._file(request.path[1:]))
        self._add(app, "/input.schema.json", self._schema)
        self._add(app, "/sdxl.html", self._one_file)
        self._add(app, "/page-config.json", self._config)

    def serves(self, request: web.Request) -> bool:
        """Whether the request is for the page, and not for the endpoint."""
        return request.path in self._paths

    def _add(
        self, app: web.Application, path: str, answer: Callable[[web.Request], web.Response]
    ) -> None:
        async def handle(request: web.Request) -> web.Response:
            response = answer(request)
            response.headers.update(
                {name: value for name, value in HEADERS.items() if name not in response.headers}
            )
            return response

        app.router.add_get(path, handle)
        self._paths.add(path)

    def _file(self, name: str) -> web.Response:
        path = page_files()[name]
        text = path.read_text(encoding="utf-8")
        return web.Response(text=text, content_type=FILE_TYPES[path.suffix], charset="utf-8")

    def _schema(self, _: web.Request) -> web.Response:
        return web.Response(
            text=SCHEMA.read_text(encoding="utf-8"), content_type="application/json"
        )

    def _one_file(self, _: web.Request) -> web.Response:
        # It brings its own policy. A header beside it would forbid the script that it allows.
        policy = {"Content-Security-Policy": "frame-ancestors 'none'"}
        return web.Response(
            text=one_file(), content_type="text/html", charset="utf-8", headers=policy
        )

    def _config(self, request: web.Request) -> web.Response:
        """The endpoint's address and key, for a page of this server alone."""
        # A name that leads here on behalf of another page (DNS rebinding) is none of ours.
        if not LOOPBACK_HOST.fullmatch(request.headers.get("Host", "")):
            raise web.HTTPForbidden(text="the page's settings are told to this machine only")
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise web.HTTPForbidden(text="the page's settings are told to the page only")
        return web.json_response({"url": self._url(), "api_key": self._api_key})


def allowing(origin: str, within: str) -> Middleware:
    """Let pages of an origin call what is below the path `within` ("null": a page from a file).

    Raises:
        EndpointError: it is no origin.
    """
    if not ORIGIN.fullmatch(origin):
        raise EndpointError(
            f"ORIGIN: must be like https://example.com, or null for a page from a file; "
            f"got {origin!r}"
        )

    @web.middleware
    async def allow(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_from_there = request.headers.get("Origin") == origin and request.path.startswith(within)
        is_preflight = "Access-Control-Request-Method" in request.headers
        if is_from_there and is_preflight and request.method == "OPTIONS":
            response: web.StreamResponse = web.Response(
                status=204,
                headers={
                    "Access-Control-Allow-Methods": "GET, POST",
                    "Access-Control-Allow-Headers": "Authorization, Content-Type",
                    "Access-Control-Max-Age": "600",
                },
            )
        else:
            response = await handler(request)
        if is_from_there:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "Retry-After"
        response.headers.add("Vary", "Origin")
        return response

    return allow
