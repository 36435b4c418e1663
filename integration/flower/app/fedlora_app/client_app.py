"""Flower looks for the ClientApp here."""

from integration.flower.client import app

__all__ = ["app"]
