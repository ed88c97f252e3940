"""A page of one's own in the browser: what it shows is in `page.py`, who may ask it for what in `door.py`."""

from unimodal.app.page import require_gradio, serve

__all__ = ["require_gradio", "serve"]
