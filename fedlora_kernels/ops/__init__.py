"""The torch operators ``torch.ops.fedlora.*`` and their Python faces, one file per stage.

    gram -> spectrum + select_rank | surrogate | nothing -> combine | weighted_sum
         -> client_products, which robust weights are made of

Every operator takes a whole batch of L modules of one shape. The faces raise ValueError or
TypeError on bad arguments; the raw operators raise RuntimeError with the same text. Importing this
package registers the operators, with the implementations of the backend in use.

A new operator is its own file, which puts it into the table ``OPERATORS``, and its name below.
"""

from fedlora_kernels import backends
from fedlora_kernels.ops._client_products import client_products
from fedlora_kernels.ops._combine import combine, combine_list
from fedlora_kernels.ops._flora_na import flora_na, flora_na_list
from fedlora_kernels.ops._gram import gram, gram_list
from fedlora_kernels.ops._rank import select_rank
from fedlora_kernels.ops._spectrum import spectrum
from fedlora_kernels.ops._stacked_svd import stacked_svd, stacked_svd_list
from fedlora_kernels.ops._surrogate import surrogate
from fedlora_kernels.ops._weighted_sum import weighted_sum, weighted_sum_list
from fedlora_kernels.ops.operator import OPERATORS

__all__ = [
    "client_products",
    "combine",
    "combine_list",
    "flora_na",
    "flora_na_list",
    "gram",
    "gram_list",
    "select_rank",
    "spectrum",
    "stacked_svd",
    "stacked_svd_list",
    "surrogate",
    "weighted_sum",
    "weighted_sum_list",
]

backends.activate(OPERATORS)
