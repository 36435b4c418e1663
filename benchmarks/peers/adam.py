"""FLoRA-NA's p and q by gradient descent with Adam, at the best of three learning rates."""

import torch
from torch import Tensor

from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Surrogate

RATES = (1e-3, 1e-2, 1e-1)


def adam(task: Surrogate, rate: float) -> tuple[Tensor, Tensor]:
    """p, q [L,K] after ``task.steps`` of Adam on
    ||dW - (sum q_u s_u B_u)(sum p_v A_v)||^2 / ||dW||^2.

    Starts at p = q = w, in the factors' dtype, one module after the other.
    """
    stacks = task.stacks
    found_p, found_q = [], []
    for module in range(stacks.case.modules):
        blocks_b = torch.stack(stacks.client_b[module]).flatten(1)
        blocks_a = torch.stack(stacks.client_a[module]).flatten(1)
        blocks_b = blocks_b * stacks.scalings[module, :, None].to(blocks_b.dtype)
        shape_b, shape_a = stacks.client_b[module][0].shape, stacks.client_a[module][0].shape
        target = _dense(task, module)
        size = target.square().sum()
        weights = stacks.weights.to(target.dtype)
        p, q = weights.clone().requires_grad_(), weights.clone().requires_grad_()
        optimizer = torch.optim.Adam([p, q], lr=rate)
        for _ in range(task.steps):
            optimizer.zero_grad()
            product = (q @ blocks_b).view(shape_b) @ (p @ blocks_a).view(shape_a)
            loss = (target - product).square().sum() / size
            loss.backward()
            optimizer.step()
        found_p.append(p.detach().double())
        found_q.append(q.detach().double())
    return torch.stack(found_p), torch.stack(found_q)


def _dense(task: Surrogate, module: int) -> Tensor:
    stacks = task.stacks
    factors = (stacks.weights * stacks.scalings[module]).tolist()
    clients = zip(stacks.client_b[module], stacks.client_a[module], factors, strict=True)
    return torch.stack([factor * (b @ a) for b, a, factor in clients]).sum(dim=0)


def _prepare(task: Surrogate) -> Prepared:
    reached = {rate: float(task.shortfall(*adam(task, rate)).mean()) for rate in RATES}
    rate = min(reached, key=lambda key: reached[key])
    named = {f"{rate:g}": objective for rate, objective in reached.items()}
    return Prepared(
        lambda: adam(task, rate),
        note=f"{task.steps} steps, learning rate {rate:g}, best of {', '.join(named)}; "
        "one run timed",
        facts=lambda found: {**task.facts(found), "objectives": named},
    )


PEER = Peer(
    "Adam",
    "FLoRA-NA, arXiv 2509.26399: p and q by gradient descent on the dense objective",
    _prepare,
    Surrogate.checks,
)
