"""The one error about what clients sent."""


class AdapterError(ValueError):
    """An adapter, or a set of clients' adapters, that cannot be what it says it is."""
