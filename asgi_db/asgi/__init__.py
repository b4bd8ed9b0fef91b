"""Turns an ASGI scope into a call of the application: HTTP, WebSocket or lifespan."""
