"""Serve a model: continuous batching, an HTTP API in OpenAI's shapes, and a chat page."""
