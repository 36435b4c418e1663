"""FedIT (arXiv 2305.05644): factors averaged one by one.

    A = sum_k w_k A_k        B = sum_k w_k B_k

Not exact: the product of means is not the mean of products. Its error is the reason the other
rules exist.
"""

from collections.abc import Sequence

from fedlora_kernels.grams import Grams
from fedlora_kernels.rules.rule import Rule, equal_rank
from fedlora_kernels.rules.solution import Mixture, Solution, common_scaling


def solve(grams: Sequence[Grams]) -> list[Solution]:
    """The averages. A client without a module counts as B = 0, so only B's weights shrink.

    Raises:
        AdapterError: clients' ranks differ; names the client and the module.
    """
    return [Solution(mean(batch, "fedit")) for batch in grams]


def mean(grams: Grams, rule: str) -> Mixture:
    """The weighted mean of both factors, different scalings folded into B."""
    rank = equal_rank(grams, rule)
    scaling, folded = common_scaling(grams)
    total = grams.weights.sum()
    p = grams.weights / total if total > 0 else grams.weights
    return Mixture(
        q=grams.weights * folded, p=p.expand_as(folded).contiguous(), scaling=scaling, rank=rank
    )


RULE = Rule(
    name="fedit",
    title="FedIT",
    paper="2305.05644",
    solve=solve,
    travels="A and B",
    exact="no",
    is_exact=False,
    heterogeneous=False,
)
