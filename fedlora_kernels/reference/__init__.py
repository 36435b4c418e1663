"""The specification: every stage and every rule in plain float64 torch.

Tests and benchmarks compare the operators with these functions.  They have the operators' names and
signatures and share no algorithm with them: where an operator works on Gram matrices, the function
here works on the dense update or on factors recovered from the Gram matrices by an SVD.  They check
no arguments (the operators' Python faces do) and loop over modules in Python where that is clearer.
"""

from fedlora_kernels.reference import robust, rules
from fedlora_kernels.reference._client_products import client_products
from fedlora_kernels.reference._combine import combine
from fedlora_kernels.reference._flora_na import flora_na
from fedlora_kernels.reference._gram import gram
from fedlora_kernels.reference._rank import select_rank
from fedlora_kernels.reference._spectrum import spectrum
from fedlora_kernels.reference._stacked_svd import stacked_svd
from fedlora_kernels.reference._surrogate import surrogate
from fedlora_kernels.reference._weighted_sum import weighted_sum

__all__ = [
    "client_products",
    "combine",
    "flora_na",
    "gram",
    "robust",
    "rules",
    "select_rank",
    "spectrum",
    "stacked_svd",
    "surrogate",
    "weighted_sum",
]
