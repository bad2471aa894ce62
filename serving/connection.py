"""
Close connections that keep a place and do nothing.

    uvicorn.Config(app, http=Connection)
"""

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 15  # to send the next request's head, or to read some of a response
MOST_CONNECTIONS = 512


class Connection(H11Protocol):
    """Speak HTTP with a client, until it is idle for IDLE_SECONDS or twice that."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.state, self.timer = None, self.loop.call_later(IDLE_SECONDS, self.check)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()

    def check(self):
        """Close the connection if nothing has moved since the last check."""
        n_unread = self.transport.get_write_buffer_size()
        is_done = self.cycle is None or self.cycle.response_complete
        last, self.state = self.state, (self.cycle, n_unread)
        if (is_done or n_unread) and last == self.state:
            self.transport.abort()
        else:
            self.timer = self.loop.call_later(IDLE_SECONDS, self.check)

    def connection_lost(self, error):
        self.timer.cancel()
        super().connection_lost(error)
