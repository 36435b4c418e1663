"""Exchange: who is lost, whatever the framework."""

import pytest
import torch
from federation import draw

import fedlora_kernels as flk
from fedlora_kernels.interop.exchange import Exchange, Reply

FIXED = [name for name, kind in flk.rules.registry.kinds.items() if kind.trains != "both"]
CLIENTS = (11, 12, 13)


def trained(tensors, sides, seed):
    """The tensors after steps on these factors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: x + torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if any(f"lora_{side.upper()}" in key for side in sides)
        else x.clone()
        for key, x in tensors.items()
    }


@pytest.mark.parametrize("rule", FIXED)
@pytest.mark.parametrize("wrong", CLIENTS)
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_client_that_trains_the_fixed_factor_is_lost_alone(rule, wrong, rounds):
    """Also where it is the first: no other client is measured by it."""
    initial = draw(common_a=True).adapters[0]
    exchange = Exchange(rule, adapter_config=initial.config)
    exchange.give(initial.state_dict())
    for number in range(1, rounds + 1):
        exchange.begin()
        replies = {}
        for client in CLIENTS:
            start = exchange.start(client)
            sides = "ab" if number == rounds and client == wrong else start.trains
            replies[client] = trained(start.tensors, sides, seed=10 * number + client)
            exchange.receive(client, Reply(replies[client], weight=client))
        result = exchange.finish()
    assert list(exchange.lost) == [wrong]
    only = start.trains.upper()
    assert f"differs from what it was sent; only {only} is trained" in exchange.lost[wrong]
    rest = [client for client in CLIENTS if client != wrong]
    expected = flk.aggregate(
        [flk.Adapter.from_state_dict(replies[client], initial.config) for client in rest],
        rule=rule,
        weights=rest,
    )
    for name, factors in expected.adapter.factors.items():
        found = result.adapter.factors[name]
        assert torch.equal(found.b, factors.b)
        assert torch.equal(found.a, factors.a)
