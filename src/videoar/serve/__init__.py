"""One page, one stream: sessions over a WebSocket."""
