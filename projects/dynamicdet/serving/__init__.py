"""A server: pictures come over HTTP, batches are made of what waits, speed follows the queue."""
