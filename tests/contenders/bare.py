"""FastAPI without a database: what a socket and a stream cost in any case."""

from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse

from tests.contenders.shared import pieces

app = FastAPI()


async def value() -> str:
    return "value-1"


@app.get("/stream")
async def stream(chunks: int, seconds: float) -> StreamingResponse:
    return StreamingResponse(pieces(value, chunks, seconds))


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async for _ in websocket.iter_text():
        await websocket.send_text("ok")
