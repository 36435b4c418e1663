"""FedSA-LoRA (arXiv 2410.01463): only A is shared and averaged, every client keeps its own B.

    A = sum_k w_k A_k        client k runs s_k B_k A

FedSA-rsLoRA is the same with s = alpha / sqrt(r). FedSA-VeRA shares lambda_d and keeps lambda_b.
The report compares the clients' mean update, sum_k w_k s_k B_k A, with the ideal one.
"""

from collections.abc import Sequence

from fedlora_kernels.adapter import Adapter
from fedlora_kernels.factors import AdapterError
from fedlora_kernels.grams import Grams
from fedlora_kernels.peft_format import label
from fedlora_kernels.rules.fedit import mean
from fedlora_kernels.rules.rule import Rule
from fedlora_kernels.rules.solution import Solution


def solve(grams: Sequence[Grams]) -> list[Solution]:
    """Shared A, and the mean of the B that stay with the clients (for the report only)."""
    return [Solution(mean(batch, "fedsa")) for batch in grams]


def validate(adapters: Sequence[Adapter]) -> None:
    """VeRA clients share one frozen projection and the shapes of both vectors."""
    first = adapters[0]
    for index, adapter in enumerate(adapters):
        who = label(index, adapter.name)
        for module in sorted(adapter.vera.keys() ^ first.vera.keys()):
            raise AdapterError(f"{who}, module {module}: only some clients have this VeRA module")
        for module, (lambda_b, lambda_d) in adapter.vera.items():
            expected = [list(vector.shape) for vector in first.vera[module]]
            found = [list(lambda_b.shape), list(lambda_d.shape)]
            if found != expected:
                raise AdapterError(
                    f"{who}, module {module}: lambda_b and lambda_d have shapes {found}, expected "
                    f"{expected} as in {label(0, first.name)}"
                )


RULE = Rule(
    name="fedsa",
    title="FedSA-LoRA",
    paper="2410.01463",
    solve=solve,
    travels="A (VeRA: lambda_d)",
    exact="no (personal B)",
    is_exact=False,
    heterogeneous=False,
    sends="a",
    receives="own",
    validate=validate,
)
