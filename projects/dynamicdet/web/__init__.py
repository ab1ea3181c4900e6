"""Demos in a browser: Gradio's, on this machine, and a static page that needs no server."""
