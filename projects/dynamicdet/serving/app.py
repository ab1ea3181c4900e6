"""The server's pages: /detect, /healthz, /readyz, /metrics and the OpenAPI description."""

import asyncio
import base64
import binascii
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.formparsers import MultiPartException, MultiPartParser

from ..version import __version__
from .batcher import Batcher, Busy, Stopping

#: As Pillow calls them: what may be sent. Each kind more is a decoder more that strangers reach.
_FORMATS = ('JPEG', 'PNG')
_RAW = ('image/jpeg', 'image/png', 'application/octet-stream')


@dataclass(frozen=True)
class RequestLimits:
    """What a request may cost.

    Attributes:
        most_bytes (int): Of a request's body.
        most_pixels (int): Width times height of a picture.
        timeout (float): Seconds until a body has come, and until its answer is there.
        decoders (int): Threads that decode.
    """

    most_bytes: int = 20_000_000
    most_pixels: int = 50_000_000
    timeout: float = 30.0
    decoders: int = 2


class Detections(BaseModel):
    """What was found in a picture, the best first."""

    boxes: list[list[float]] = Field(description='Left, top, right, bottom, in pixels')
    labels: list[int] = Field(description='Class of each box')
    names: list[str] = Field(description='The same by name')
    scores: list[float] = Field(description='In [0, 1]')
    difficulty: float = Field(description='Of the picture, in [0, 1]')
    exit: int = Field(description='Where it left the detector, from 0 on')


class Problem(BaseModel):
    """Why there is no answer, in one line."""

    detail: str


_PROBLEMS = {
    400: 'The picture cannot be read, or the request is none',
    408: 'The request did not come in time',
    413: 'The request has too many bytes, or the picture too many pixels',
    415: 'The content type is none of those that are taken',
    422: 'A parameter is out of range',
    429: 'The picture could not be answered in time: send fewer, or later',
    500: 'The detector failed',
    503: 'The server is stopping',
    504: 'The answer did not come in time',
}
_PICTURE = dict(type='string', format='binary', description='A JPEG or PNG file')
_BODY = dict(
    required=True,
    content={
        **{kind: dict(schema=_PICTURE) for kind in _RAW},
        'multipart/form-data': dict(
            schema=dict(
                type='object',
                required=['image'],
                properties=dict(image=_PICTURE),
                additionalProperties=False,
            )
        ),
        'application/json': dict(
            schema=dict(
                type='object',
                required=['image'],
                properties=dict(
                    image=dict(
                        type='string', format='byte', description='A JPEG or PNG file in base64'
                    )
                ),
                additionalProperties=False,
            )
        ),
    },
)


def build_app(
    batcher: Batcher,
    limits: RequestLimits | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application of a server; when it ends, all that was accepted is answered first.

    Args:
        batcher (Batcher): The detector at work; stopped with the application.
        limits (RequestLimits, optional): What a request may cost.
        on_start (Callable): Called once the server is about to listen.
    """
    limits = limits or RequestLimits()
    decoders = ThreadPoolExecutor(limits.decoders, thread_name_prefix='decode')
    names = list((batcher.detector.model.dataset_meta or {}).get('classes', ()))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        on_start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, batcher.stop)
        decoders.shutdown()

    app = FastAPI(
        title='DynamicDet',
        version=__version__,
        description='Detect objects in pictures.',
        lifespan=lifespan,
    )

    @app.post(
        '/detect',
        summary='Detect objects in a picture',
        response_model=Detections,
        responses={
            status: dict(model=Problem, description=text) for status, text in _PROBLEMS.items()
        },
        openapi_extra=dict(requestBody=_BODY),
    )
    async def detect(
        request: Request,
        min_score: Annotated[float, Query(ge=0, le=1, description='Lowest score to return')] = 0.0,
    ) -> Response:
        arrived = time.monotonic()
        status = 500
        try:
            found = await _detect(request, arrived)
            kept = [row for row, score in enumerate(found['scores']) if score >= min_score]
            for key in ('boxes', 'labels', 'scores'):
                found[key] = [found[key][row] for row in kept]
            found['names'] = [
                names[label] if label < len(names) else str(label) for label in found['labels']
            ]
            status = 200
            # As it is: to check each box again would take longer than to find it.
            return Response(json.dumps(found), media_type='application/json')
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            batcher.metrics.requested(status)

    async def _detect(request: Request, arrived: float) -> dict:
        try:
            async with asyncio.timeout(limits.timeout):
                data = await _picture_in(request, limits.most_bytes)
        except TimeoutError:
            raise HTTPException(
                408, f'the request did not come within {limits.timeout:g} s'
            ) from None
        try:
            with batcher.accepted():
                async with asyncio.timeout(limits.timeout):
                    prepared, fault = await asyncio.get_running_loop().run_in_executor(
                        decoders, batcher.detector.prepare, data, limits.most_pixels, _FORMATS
                    )
                    if fault is not None:
                        raise HTTPException(
                            413 if 'pixels' in fault else 400, f'the picture {fault}'
                        )
                    return await asyncio.wrap_future(batcher.detect(prepared, arrived))
        except Busy:
            raise HTTPException(
                429,
                'more pictures wait than can be answered in time: send fewer, or later',
                {'Retry-After': '1'},
            ) from None
        except Stopping:
            raise HTTPException(503, 'the server is stopping') from None
        except TimeoutError:
            raise HTTPException(504, f'no answer within {limits.timeout:g} s') from None

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        text = json.dumps(dict(detail='the detector failed: see the log of the server'))
        return Response(text, 500, media_type='application/json')

    @app.exception_handler(RequestValidationError)
    async def out_of_range(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        detail = f'{first["loc"][-1]}: {first["msg"]}'
        return Response(json.dumps(dict(detail=detail)), 422, media_type='application/json')

    @app.get('/healthz', summary='Whether the server lives', responses={503: dict(model=Problem)})
    async def healthz() -> dict[str, str]:
        if not batcher.alive:
            raise HTTPException(503, 'the detector has ended')
        return dict(status='ok')

    @app.get(
        '/readyz',
        summary='Whether a picture would be accepted now',
        responses={503: dict(model=Problem)},
    )
    async def readyz() -> dict[str, str]:
        if not batcher.ready:
            raise HTTPException(503, 'busy or stopping')
        return dict(status='ok')

    @app.get(
        '/metrics',
        summary='For Prometheus',
        response_class=Response,
        responses={200: dict(content={'text/plain': dict(schema=dict(type='string'))})},
    )
    async def metrics() -> Response:
        text, kind = batcher.metrics.text()
        return Response(text, media_type=kind)

    return app


async def _picture_in(request: Request, most_bytes: int) -> bytes:
    """The bytes of the picture that a request brings, in any of three forms."""
    kind = request.headers.get('content-type', _RAW[-1]).partition(';')[0].strip().lower()
    if kind not in (*_RAW, 'multipart/form-data', 'application/json'):
        raise HTTPException(
            415, f"content type '{kind[:60]}' is not taken: send {', '.join(_BODY['content'])}"
        )
    body = await _body_of(request, most_bytes)
    if kind == 'multipart/form-data':
        return await _part_of(request, body)
    if kind == 'application/json':
        return _decoded(body)
    if not body:
        raise HTTPException(400, 'the request has no picture: its body is empty')
    return body


async def _body_of(request: Request, most_bytes: int) -> bytes:
    """All of a request's body, read no further than the limit, whatever its headers say."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > most_bytes:
            raise HTTPException(413, f'the request has more than {most_bytes:,} bytes')
    return b''.join(parts)


async def _part_of(request: Request, body: bytes) -> bytes:
    """The file called ``image`` in a form."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        form = await MultiPartParser(
            request.headers, stream(), max_files=1, max_fields=0, max_part_size=len(body) + 1
        ).parse()
    except (MultiPartException, KeyError, ValueError, AttributeError) as error:
        why = getattr(error, 'message', None) or 'it has no boundary'
        raise HTTPException(400, f'the form cannot be read: {why}') from None
    try:
        image = form.get('image')
        if image is None or isinstance(image, str):
            raise HTTPException(400, "the form has no file called 'image'")
        return await image.read()
    finally:
        await form.close()


def _decoded(body: bytes) -> bytes:
    """``{"image": "..."}``, the file in base64: nothing is fetched for anybody."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, 'the request is no JSON') from None
    text = content.get('image') if isinstance(content, dict) else None
    if not isinstance(text, str) or len(content) != 1:
        raise HTTPException(400, 'the request must be {"image": "..."}, the file in base64')
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise HTTPException(400, "'image' is no base64; URLs are not taken") from None
