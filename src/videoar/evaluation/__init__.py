"""What a video shows, and what it costs."""
