"""Flower looks for the ServerApp here."""

from integration.flower.server import app

__all__ = ["app"]
