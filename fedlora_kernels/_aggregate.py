"""aggregate: the clients' adapters in, the global adapter out; short for a :class:`Round`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedlora_kernels._aggregation import Aggregation
from fedlora_kernels._round import Round
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.robust import Robust
from fedlora_kernels.rules import Rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def aggregate(
    adapters: Sequence[Adapter | str | Path],
    *,
    rule: str | Rule,
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    absent: str = "zero",
    precision: str = "exact",
    carried: Any = None,
    uniform_rank: bool = False,
    dtype: torch.dtype | None = None,
    heads: str | None = None,
    same_base: bool = False,
    magnitudes: str | None = None,
    memory_limit: int | None = None,
    scratch: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    robust: str | Robust | None = None,
    group: "ProcessGroup | None" = None,
    **options: Any,
) -> Aggregation:
    """Combine the clients' adapters into one.

    The arguments are those of :class:`Round` and :meth:`Round.aggregate`, which is the way to
    several rules, or to a rule and an inspection, from one pass over the adapters.

    Args:
        adapters: the K clients of this round, or their PEFT folders.
        rule: a rule of ``flk.rules``, or the name of one.
        weights: the clients' weights (numbers of examples, say), scaled to sum to 1; equal when
            None.
        device: where the work is done; where the adapters are when None.
        absent: what a client without a module counts as: "zero", a zero update, or
            "renormalize", as if it were not there.
        precision: "exact" (float64 accumulation) or "fast" (float32 with promotion).
        carried: ``result.carried`` of the last round, for a rule with memory.
        uniform_rank: one r and one lora_alpha tell the whole update, for servers that ignore
            PEFT's rank_pattern and alpha_pattern: every module is padded with zeros to one rank,
            and different scalings are folded into B.
        dtype: of the result's factors; the clients' own when None.
        heads: what becomes of the tensors beside the factors (modules_to_save, biases): "average",
            or "local" (they stay with their clients); None is the rule's own way.
        same_base: whether the clients have one base model whatever their configs call it.
        magnitudes: "average" admits DoRA, whose magnitudes become their mean, see :class:`Round`;
            None refuses it.
        memory_limit: bytes of memory for the matrices and results of the modules that are worked on
            together, see :class:`Round`; no limit when None.
        scratch: folder of the unnamed files that then hold the result.
        progress: called after every group of modules with how many are done, and how many there
            are; in a group, of this process's modules.
        robust: a robust rule of ``flk.robust``, or the name of one, that weighs the clients first:
            see :meth:`Round.weighed`.
        group: a torch.distributed process group whose processes share the modules out, see
            :class:`Round`. Process 0 has the result.
        **options: of a rule given by name, see ``flk.rules.find(name).options()``.

    Returns:
        The global adapter; its report is computed when asked for. The input adapters are not
        changed.

    Raises:
        AdapterError: what the clients sent cannot be aggregated by this rule, and the message
            names the client and the module; or the result's dtype cannot hold the result.
        ValueError: the rule is unknown, an option is out of range, or the robust rule's weights do
            not reach this rule.
        TypeError: the rule has no such option.
        ConnectionError: a process of the group ended, or did not answer within its timeout.
    """
    round_ = Round(
        adapters,
        weights=weights,
        absent=absent,
        device=device,
        precision=precision,
        same_base=same_base,
        magnitudes=magnitudes,
        memory_limit=memory_limit,
        scratch=scratch,
        group=group,
    )
    return round_.aggregate(
        rule,
        carried=carried,
        uniform_rank=uniform_rank,
        dtype=dtype,
        heads=heads,
        progress=progress,
        robust=robust,
        **options,
    )
