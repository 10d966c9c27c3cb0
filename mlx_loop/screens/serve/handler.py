"""HTTP: mlx-lm's handler, behind checks of who asks and for what."""

from __future__ import annotations

import hmac
import io
import json
import logging
import math
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from email.message import Message
from http import HTTPStatus
from importlib.resources import files
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit

from mlx_lm.server import (
    APIHandler,
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ... import several
from ...errors import UserError
from ...generation.sampling import not_finite
from ...models.looped import Looped
from ...upstream_server import Batch
from . import checks
from .comparing import MOST_COMPARISONS, Comparisons, asked
from .desk import Busy, Desk

if TYPE_CHECKING:
    from .server import Server

log = logging.getLogger("mlx_loop.serve")

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
# The page loads nothing from elsewhere, and nobody frames it.
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
ANSWERS = ("/v1/chat/completions", "/chat/completions", "/v1/completions")
# What containers call the machine that they run on.
DOCKERS = "host.docker.internal"
GONE = (BrokenPipeError, ConnectionError, TimeoutError)


@dataclass
class _Request(CompletionRequest):
    """mlx-lm's, with the grammar of its answer (`grammar.Grammars`)."""

    schema: str | None = None


class Handler(APIHandler):
    """mlx-lm's handler: `response_generator` is the `Desk`, and in an answer a setting's batch."""

    # Of the socket, in seconds: who sends or reads nothing for so long is gone.
    timeout = 60
    server: Server

    def __init__(self, desk: Desk, comparisons: Comparisons, *args: Any, **kwargs: Any):
        self.desk, self.comparisons = desk, comparisons
        self._view: Looped
        self._schema: str | None = None
        self._status: int | None = None
        # Of the answer, what no `generate_response` has been made of.
        self.said: list[Response] = []
        # mlx-lm's handler asks it for options and health only.
        super().__init__(desk, *args, **kwargs)  # type: ignore[arg-type]

    # --- Requests ---

    def setup(self) -> None:
        super().setup()
        self.server.waiting.add(self.connection)

    def parse_request(self) -> bool:
        self.server.waiting.discard(self.connection)
        return super().parse_request()

    def finish(self) -> None:
        self.server.waiting.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        path = _split(self.path).path
        if not self._is_welcome():
            return
        if path in PAGE:
            name, kind = PAGE[path]
            self._send(200, (files(__package__) / "page" / name).read_bytes(), kind)
        elif path == "/health":
            self.handle_health_check()
        elif path.startswith("/v1/models"):
            if self._has_key():
                self._models(unquote(path.removeprefix("/v1/models").strip("/")))
        else:
            self._refuse(404, f"there is nothing at {path}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = _split(self.path).path
        if not self._is_welcome() or not self._has_key():
            return
        if path not in (*ANSWERS, "/compare"):
            self._refuse(404, f"there is nothing at {path}")
            return
        try:
            body = self._read()
            if body is None:
                return
            if path == "/compare":
                self._compare(body)
            else:
                self._prepare(path, body)
                super().do_POST()
        except UserError as error:
            self._refuse(400, str(error))
        except Busy as error:
            self._refuse(429, str(error))
        except GONE:
            log.info("the client has gone")

    def _read(self) -> dict[str, Any] | None:
        """The body; None: it was refused."""
        most = self.desk.cli_args.max_request_bytes
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if length < 0:
            self._refuse(411, "Content-Length is needed, the number of bytes of the body")
            return None
        if length > most:
            self._refuse(413, f"the body has {length} bytes, and {most} is the most here")
            return None
        raw = self.rfile.read(length)
        if len(raw) < length:
            self._refuse(400, f"the body has {len(raw)} bytes, and Content-Length says {length}")
            return None
        return checks.read(raw)

    def _prepare(self, path: str, body: dict[str, Any]) -> None:
        """Check a request, and hand it on to mlx-lm's handler."""
        checks.check(body, self.desk.vocabulary, self.desk.reserved)
        (checks.check_prompt if path == "/v1/completions" else checks.check_messages)(body)
        self._view = self.desk.names.view(body.get("model", "default_model"), body.get("loop"))
        self._schema = self.desk.grammars.read(body.get("response_format"))
        # Equal settings have to have equal names, since a batch compares them.
        body["model"] = self.desk.names.canonical(self._view)
        raw = json.dumps(body).encode()
        self.path = path
        self.headers.replace_header("Content-Length", str(len(raw)))
        self.rfile = io.BytesIO(raw)

    def handle_chat_completions(self) -> CompletionRequest:
        return self._with_schema(super().handle_chat_completions())

    def handle_text_completions(self) -> CompletionRequest:
        return self._with_schema(super().handle_text_completions())

    def _with_schema(self, request: CompletionRequest) -> CompletionRequest:
        return _Request(**vars(request), schema=self._schema)

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        try:
            alone = self.seed is not None
            with (
                self.desk.batch(self._view, alone) as batch,
                closing(_Answer(self, batch)) as answer,
            ):
                self.response_generator = answer  # type: ignore[assignment]
                super().handle_completion(request, stop_words)
        except (Busy, *GONE):
            raise
        except Exception as error:
            lost = several.is_lost(error)
            if not lost:
                log.exception("an answer has failed")
            self._fail(several.GONE if lost else str(error))

    def generate_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """mlx-lm's, with probabilities of the tokens that were chosen, in streams as well."""
        response = super().generate_response(*args, **kwargs)
        if self.logprobs:
            rows, self.said = self.said, []
            likely = _chat_logprobs if self.object_type.startswith("chat") else _text_logprobs
            response["choices"][0]["logprobs"] = likely(rows, self.desk.tokenizer)
        return response

    def _fail(self, message: str) -> None:
        """Say that an answer that has begun ends here."""
        if self.stream:
            self.wfile.write(f"data: {json.dumps({'error': message})}\n\n".encode())
        else:
            # What was written of a good answer has not been sent yet.
            self._headers_buffer: list[bytes] = []
            self._refuse(500, message)

    def refuses(self, status: int) -> None:
        """mlx-lm's handler answers 404 whatever was wrong with a request; this is what to say."""
        self._status = status

    def is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    # --- Answers ---

    def _models(self, name: str) -> None:
        names = self.desk.names
        listed = self.desk.cli_args.loop_names
        if name:
            try:
                names.view(name)
            except UserError as error:
                self._refuse(404, str(error))
                return
            self._json(self._model(name))
        else:
            shown = [names.name, *(f"{names.name}:{settings}" for settings in listed)]
            self._json({"object": "list", "data": [self._model(name) for name in shown]})

    def _model(self, name: str) -> dict[str, Any]:
        view = self.desk.names.view(name)
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "mlx_loop",
            "loop": None if view.is_unlooped or view.loop is None else view.loop.to_dict(),
        }

    def _compare(self, body: dict[str, Any]) -> None:
        job = asked(self.desk, body)
        if len(self.comparisons.running) >= MOST_COMPARISONS:
            raise Busy(f"{MOST_COMPARISONS} comparisons are under way, the most: ask again later")
        self._set_stream_headers(200)
        self.end_headers()
        for event in self.comparisons.run(job, self.is_gone):
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _refuse(self, status: int, message: str) -> None:
        log.info("%s %s: %s", status, self.path, message)
        self._status = None
        with suppress(*GONE):
            self._json({"error": message}, status)

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if kind.startswith("text/"):
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            self.send_header("Retry-After", "1")
        self._set_cors_headers()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _set_completion_headers(self, status_code: int = 200) -> None:
        super()._set_completion_headers(self._status or status_code)

    def _set_cors_headers(self) -> None:
        if self.desk.cli_args.allowed_origins:
            super()._set_cors_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself, as JSON."""
        self.command = getattr(self, "command", None) or ""
        self.headers = getattr(self, "headers", None) or Message()
        self.path = getattr(self, "path", "")
        self._refuse(code, explain or message or HTTPStatus(code).phrase)

    def log_message(self, form: str, *args: Any) -> None:
        log.info("%s %s", self.address_string(), form % args)

    # --- Who asks ---

    def _is_welcome(self) -> bool:
        """Whether no other site's page asks, through the browser of who runs this; else refuse."""
        args = self.desk.cli_args
        host = self.headers.get("Host", "")
        name = _split(f"//{host}").hostname or host
        if _is_loopback(args.host) and name and not (_is_loopback(name) or name == DOCKERS):
            # A name that was made to point here: its pages would count as our own.
            self._refuse(403, f"this server answers to localhost, not to {name}")
            return False
        origin = self.headers.get("Origin")
        own = origin is None or _split(origin).netloc == host
        if own or "*" in args.allowed_origins or origin in args.allowed_origins:
            return True
        self._refuse(403, f"pages of {origin} may not ask: start the server with --allowed-origins")
        return False

    def _has_key(self) -> bool:
        key = self.desk.cli_args.api_key
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if key is None or hmac.compare_digest(given.encode(), key.encode()):
            return True
        self._refuse(401, "an API key is needed: send the header Authorization: Bearer KEY")
        return False


def _split(url: str) -> SplitResult:
    """Its parts; none of one that is no address."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


class _Answer:
    """A batch, as mlx-lm's handler asks it, for a client that may go away."""

    def __init__(self, handler: Handler, batch: Batch):
        self._handler, self._batch, self._loop = handler, batch, handler._view.loop
        self._context: GenerationContext | None = None
        self._args: GenerationArguments | None = None
        self.cli_args = batch.cli_args

    def generate(
        self,
        request: CompletionRequest,
        args: GenerationArguments,
        progress_callback: Callable[[int, int], None],
    ) -> tuple[GenerationContext, Iterator[Response]]:
        self._args = args

        def progress(done: int, total: int) -> None:
            self._check()
            progress_callback(done, total)

        try:
            self._context, responses = self._batch.generate(request, args, progress)
        except Exception as error:
            self._handler.refuses(429 if isinstance(error, Busy) else 400)
            raise
        return self._context, self._watched(responses, args.stop_words)

    def _watched(self, responses: Iterator[Response], stops: list[str]) -> Iterator[Response]:
        """Up to a stop text, which mlx-lm takes out but ends at only where its tokens stand."""
        known, seen = max(map(len, stops), default=1) - 1, ""
        for response in responses:
            self._check()
            if not math.isfinite(response.logprob):
                raise not_finite(self._loop)
            self._handler.said.append(response)
            seen = seen[max(len(seen) - known, 0) :] + response.text
            ends = [seen.find(stop) + len(stop) for stop in stops if stop in seen]
            if ends:
                text = response.text[: len(response.text) - (len(seen) - min(ends))]
                yield replace(response, text=text, finish_reason=None)
                return
            yield response

    def _check(self) -> None:
        if self._handler.is_gone():
            raise ConnectionAbortedError

    def close(self) -> None:
        """Free what the answer holds, if it has begun."""
        if self._context is not None:
            self._context.stop()
        if self._args is not None:
            self._handler.desk.finished(self._args)


def _chat_logprobs(said: list[Response], tokenizer: TokenizerWrapper) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"id": token, "token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            entry(r.token, r.logprob) | {"top_logprobs": [entry(*top) for top in _top(r)]}
            for r in said
        ]
    }


def _text_logprobs(said: list[Response], tokenizer: TokenizerWrapper) -> dict[str, Any]:
    return {
        "tokens": [tokenizer.decode([r.token]) for r in said],
        "token_logprobs": [r.logprob for r in said],
        "top_logprobs": [{tokenizer.decode([t]): p for t, p in _top(r)} for r in said],
    }


def _top(response: Response) -> list[tuple[int, float]]:
    """The likeliest tokens and their log-probabilities, from the top."""
    top = [(int(row["id"]), float(row["logprob"])) for row in response.top_tokens]
    return sorted(top, key=lambda row: -row[1])


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
