"""A client of the HTTP API for programs and the terminal. Imports no server internals."""
