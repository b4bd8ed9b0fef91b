"""A scope comes in, the right call goes out: HTTP, WebSocket, lifespan."""
