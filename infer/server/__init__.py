"""The server: live streams over a WebSocket, jobs over HTTP, and the page."""
