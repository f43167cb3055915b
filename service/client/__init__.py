"""A client of the HTTP API, for programs and for the terminal. It imports no server internals."""

from ditserve.service.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
