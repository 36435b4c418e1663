"""Delivery: what travels under a rule, from a client to the server and back.

delivery = result.delivery
delivery.sent(client)            the tensors that this client sends
delivery.returned(result)        the tensors that go back
delivery.received(client)        what it receives, ready to run
delivery.bytes_down(client)      what that costs, from shapes: nothing is built for it
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora_kernels.adapters import peft_format
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors
from fedlora_kernels.adapters.kinds import vera
from fedlora_kernels.rules import Rule

HEADS = ("average", "local")


@dataclass(frozen=True)
class Delivery:
    """A round's result on its way to the clients."""

    rule: Rule
    adapter: Adapter
    """the global adapter"""
    residual: Adapter | None = None
    """what the clients merge into the base beside the adapter"""
    heads: str = "average"
    """whether the tensors beside the factors were averaged, or stay with their clients"""

    def __post_init__(self) -> None:
        """Raises ValueError: heads is neither "average" nor "local"."""
        if self.heads not in HEADS:
            raise ValueError(f"heads must be average or local, found {self.heads!r}")

    def sent(self, adapter: Adapter) -> dict[str, Tensor]:
        """The tensors of a client's adapter that travel up, under PEFT's keys."""
        return self._travels(adapter, self.rule.sends)

    def returned(self, adapter: Adapter) -> dict[str, Tensor]:
        """The tensors of the result, or of a client's part of it, that travel down."""
        return self._travels(adapter, self.rule.comes_back())

    def _travels(self, adapter: Adapter, sides: str) -> dict[str, Tensor]:
        factors = adapter.factor_tensors(sides)
        if self.heads == "local":
            return factors
        return {**self._extras(adapter), **factors}

    def _extras(self, adapter: Adapter) -> dict[str, Tensor]:
        """The tensors beside the factors that are averaged."""
        return {k: x for k, x in adapter.extras.items() if k not in vera.PROJECTIONS}

    @property
    def differs(self) -> bool:
        """Whether clients receive different adapters."""
        return self.rule.receives != "global" or self.heads == "local"

    def received(self, client: Adapter, name: str = "the client") -> Adapter:
        """What a client receives, ready to run.

        Where the rule says "leading", the leading r_k components in the client's own scaling; where
        it says "own", the shared A with the client's own B, what goes with B (lora_bias and DoRA's
        magnitudes) and head; else the global adapter.

        Args:
            client: the adapter that the client sent, or last ran.
            name: how messages call the client.

        Raises:
            AdapterError: the client's dtype cannot hold the update at the client's own scaling.
        """
        beside = self.adapter.extras if self.heads == "average" else client.extras
        if self.rule.receives == "global":
            if self.heads == "average":
                return self.adapter
            config = {**self.adapter.config, **peft_format.head(client.config)}
            return Adapter(self.adapter.factors, config, extras=beside)
        if client.vera:
            vectors = vera.received(client.vera, self.adapter.vera)
            beside = {**beside, **vera.projections(client)}
            return Adapter({}, client.config, vera=vectors, extras=beside)
        adapt = _with_own_b if self.rule.personal else _leading
        factors = {
            module: adapt(self.adapter.factors[module], own)
            for module, own in client.factors.items()
        }
        for module, item in factors.items():
            if not bool(item.b.isfinite().all()):
                raise AdapterError(
                    f"{name}, module {module}: the update overflows {item.b.dtype} at scaling "
                    f"{item.scaling:g}"
                )
        return Adapter(factors, client.config, extras=beside)

    def bytes_up(self, client: Adapter) -> int:
        """Bytes that a client sends."""
        return self._bytes(client, client, self.rule.sends)

    def bytes_down(self, client: Adapter) -> int:
        """Bytes that a client receives, a residual included."""
        rest = 0 if self.residual is None else self.residual.bytes
        shaped = self.adapter if self.rule.receives == "global" else client
        return rest + self._bytes(shaped, self.adapter, self.rule.comes_back())

    def _bytes(self, shaped: Adapter, owner: Adapter, sides: str) -> int:
        """Factors of one adapter's shapes, beside the extras of another."""
        heads = self._extras(owner).values() if self.heads == "average" else ()
        factors = shaped.factor_tensors(sides).values()
        return sum(tensor.nbytes for tensor in (*factors, *heads))


def _with_own_b(shared: Factors, own: Factors) -> Factors:
    return replace(own, a=shared.a[: own.rank].to(own.a))


def _leading(shared: Factors, own: Factors) -> Factors:
    """The first r_k components in the client's scaling, zero-padded where there are fewer."""
    rank = min(own.rank, shared.rank)
    b, a = torch.zeros_like(own.b), torch.zeros_like(own.a)
    bias = None if own.bias is None else torch.zeros_like(own.bias)
    if own.scaling != 0:  # a client of scaling 0 cannot carry an update
        b[:, :rank] = shared.b[:, :rank] * (shared.scaling / own.scaling)
        a[:rank] = shared.a[:rank]
        if bias is not None and shared.bias is not None:
            bias = (shared.bias * (shared.scaling / own.scaling)).to(bias)
    magnitude = own.magnitude
    if magnitude is not None and shared.magnitude is not None:
        magnitude = shared.magnitude.to(magnitude)
    return replace(own, b=b, a=a, bias=bias, magnitude=magnitude)
