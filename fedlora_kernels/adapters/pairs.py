"""Pairs: the factors of a file, of whatever kind of layer, as pairs for the rules; and back."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from fedlora_kernels.adapters import peft_format
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors
from fedlora_kernels.adapters.keys import PREFIX
from fedlora_kernels.adapters.kinds import convolution, dora, experts
from fedlora_kernels.adapters.kinds.embedding import EMBEDDING
from fedlora_kernels.adapters.kinds.kind import LINEAR, Kind
from fedlora_kernels.adapters.peft_format import CONFIG_FILE, Config, Promised

BIAS = "lora_B.bias"
"""of lora_bias: W x + s (B A x + bias)"""


def read(
    who: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    config: Config,
    promised: Promised,
    finite: bool,
) -> dict[str, Factors]:
    """Pair name -> its factors.

    Args:
        who: the client, for messages.
        tensors: module -> its tensors: A, B, and where there are these bias, magnitude, embedding.
        config: of the adapter.
        promised: what the config says.
        finite: whether all numbers were seen to be finite.

    Raises:
        AdapterError: a factor is missing, or contradicts the other or the config; names the module.
    """
    found = _of_parameters(who, tensors, config, promised)
    with_magnitude = bool(config.get("use_dora"))
    made: dict[str, Factors] = {}
    for module, sides in sorted(tensors.items()):
        if ("magnitude" in sides) != with_magnitude:
            stated, have = ("set", "no") if with_magnitude else ("not set", "a")
            raise AdapterError(
                f"{who}: use_dora is {stated}: found {have} {dora.KEY} of module {module} (DoRA)"
            )
        for name, pair in _read(who, module, sides, promised, found.get(module)):
            made[name] = replace(pair, finite_at=pair.version) if finite else pair
    return made


def _read(
    who: str,
    module: str,
    sides: Mapping[str, Tensor],
    promised: Promised,
    found: experts.Found | None,
) -> Iterator[tuple[str, Factors]]:
    where = f"{who}, module {module}"
    if len(sides.keys() & {"A", "B"}) != 2:
        have, other = ("A", "B") if "A" in sides else ("B", "A")
        raise AdapterError(f"{where}: found lora_{have} without lora_{other}")
    a, b, bias = sides["A"], sides["B"], sides.get("bias")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise AdapterError(
            f"{where}: B is {b.dtype} and A {a.dtype}, expected floating-point factors"
        )
    if found is not None:
        try:
            pairs = experts.read(b, a, found)
        except ValueError as error:
            raise AdapterError(f"{where}: {error}") from None
        for expert, own_b, own_a in pairs:
            yield f"{module}.{expert.index}", Factors(own_b, own_a, found.scaling, expert)
        return
    kind: Kind = EMBEDDING if "embedding" in sides else LINEAR
    shapes = f"B {list(b.shape)} and A {list(a.shape)}"
    if kind == LINEAR and 3 <= a.dim() <= 5 and 0 not in (*b.shape, *a.shape):
        try:
            kind, b, a = convolution.read(b, a)
        except ValueError as error:
            raise AdapterError(f"{where}: {error}") from None
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*b.shape, *a.shape):
        raise AdapterError(f"{where}: found {shapes}, expected [m,r] and [r,n]")
    if bias is not None and (bias.shape != b.shape[:1] or not bias.is_floating_point()):
        raise AdapterError(
            f"{where}: {BIAS} is {bias.dtype} {list(bias.shape)}, expected [{b.shape[0]}]"
        )
    magnitude = sides.get("magnitude")
    if magnitude is not None:
        expected = kind.magnitude(b[:, 0]).shape
        if magnitude.shape != expected or not magnitude.is_floating_point():
            raise AdapterError(
                f"{where}: {dora.KEY} is {magnitude.dtype} {list(magnitude.shape)}, expected "
                f"{list(expected)}"
            )
        magnitude = magnitude.flatten()
    rank = promised.rank(module)
    if a.shape[0] != rank:
        raise AdapterError(
            f"{where}: factors have rank {a.shape[0]}, its {CONFIG_FILE} says {rank}"
        )
    yield module, Factors(b, a, promised.scaling(module, rank), kind, bias, magnitude)


def _of_parameters(
    who: str, tensors: Mapping[str, Mapping[str, Tensor]], config: Config, promised: Promised
) -> dict[str, experts.Found]:
    """What is known of the modules that target_parameters names."""
    targets = config.get("target_parameters") or []
    groups: dict[str, list[str]] = {}
    for module in sorted(tensors, key=len):
        if "A" in tensors[module] and not peft_format.targeted(config, module):
            groups.setdefault(experts.wrapped(module), []).append(module)
    found: dict[str, experts.Found] = {}
    for own, modules in groups.items():
        names = experts.parameters(targets, own)
        if len(modules) > max(1, len(names)) or (not names and modules != [own]):
            raise AdapterError(
                f"{who}, module {modules[-1]}: found factors of a parameter, expected it in "
                f"target_parameters of {CONFIG_FILE}, which is {list(targets)}"
            )
        if not names:
            continue
        rows = {module: tensors[module]["A"].shape[0] for module in modules}
        of_group = experts.assigned(rows, names, promised)
        if of_group is None:
            raise AdapterError(
                f"{who}, module {own}: found {list(rows.values())} rows of A, which do not tell "
                f"the ranks of {peft_format.listed(names)} apart\nexpected one rank and one alpha "
                "for all parameters of a module (rank_pattern, alpha_pattern)"
            )
        found.update(of_group)
    return found


def written(factors: Mapping[str, Factors], sides: str) -> dict[str, Tensor]:
    """The factors under PEFT's saved keys.

    Args:
        factors: pair name -> factors.
        sides: "both", "a" or "b"; lora_bias and DoRA's magnitudes go with B.
    """
    modules: dict[str, list[Factors]] = {}
    for name, item in factors.items():
        modules.setdefault(item.kind.module(name), []).append(item)
    tensors: dict[str, Tensor] = {}
    for module, items in modules.items():
        kind = items[0].kind
        items.sort(key=lambda item: item.kind.place)
        b, a = kind.joined([(item.b, item.a) for item in items])
        if sides != "b":
            tensors[f"{PREFIX}{module}.{kind.key_a}"] = a
        if sides != "a":
            tensors[f"{PREFIX}{module}.{kind.key_b}"] = b
            if (bias := items[0].bias) is not None:
                tensors[f"{PREFIX}{module}.{BIAS}"] = bias
            if (magnitude := items[0].magnitude) is not None:
                tensors[f"{PREFIX}{module}.{dora.KEY}"] = kind.magnitude(magnitude)
    return tensors
