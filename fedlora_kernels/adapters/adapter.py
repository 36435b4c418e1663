"""Adapter: the LoRA factors of one client, or of the server, with their PEFT config.

    client = Adapter.load("clients/7")          adapter_config.json + adapter_model.safetensors
    client.factors["model.layers.0.self_attn.q_proj"].b
    client.save("copy")

Module names are the model's own, without PEFT's prefix "base_model.model.".
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora_kernels.adapters import folder, peft_format
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors, fitted, of_vera
from fedlora_kernels.adapters.finite import finite
from fedlora_kernels.adapters.peft_format import PREFIX, Config
from fedlora_kernels.ops import checks

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What this library writes into an adapter folder; the last three come from aggregate.
WRITTEN = frozenset(
    {CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin", "report.json", "residual", "clients"}
)


class Adapter:
    """LoRA factors per module (or VeRA vectors), the tensors beside them, and the PEFT config.

    Attributes:
        factors: module name -> :class:`Factors`; for VeRA, the factors that its vectors and saved
            projections amount to (empty when the projections were not saved).
        vera: module name -> (lambda_b [m], lambda_d [r]); empty for LoRA.
        extras: the other tensors of the file (modules_to_save, biases), under PEFT's keys.
        config: adapter_config.json as a dict.
        name: how messages call it: the folder as typed, or None.
    """

    def __init__(
        self,
        factors: Mapping[str, Factors],
        config: Config,
        *,
        extras: Mapping[str, Tensor] | None = None,
        vera: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        name: str | None = None,
        source: Path | None = None,
    ) -> None:
        self.config = config
        self.extras = dict(extras or {})
        self.vera = dict(vera or {})
        if not self.vera:
            self.factors = dict(factors)
        self.name = name
        self.source = source

    @cached_property
    def factors(self) -> dict[str, Factors]:
        """Of VeRA, made when first asked for: averaging its vectors needs none of them."""
        return of_vera(self.vera, self.extras)

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read a PEFT adapter folder.

        Raises:
            AdapterError: a file is missing, truncated or not JSON; a factor is missing, holds NaN
                or Inf, or contradicts the config; PEFT features that no rule can represent. The
                message starts with the folder as given.
        """
        where = Path(path)
        try:
            config = json.loads((where / CONFIG_FILE).read_text(encoding="utf-8"))
            tensors = load_file(where / WEIGHTS_FILE)
        except (FileNotFoundError, NotADirectoryError):
            missing = CONFIG_FILE if not (where / CONFIG_FILE).is_file() else WEIGHTS_FILE
            what = "is no folder" if not where.is_dir() else f"has no {missing}"
            hint = ""
            if (where / "adapter_model.bin").is_file():
                hint = " (found adapter_model.bin: save it again with safe_serialization=True)"
            raise AdapterError(f"{path} {what}{hint}; expected a PEFT adapter folder") from None
        except (ValueError, RecursionError) as error:  # a number too long, nesting too deep
            raise AdapterError(f"{path}: {CONFIG_FILE} is not valid JSON: {error}") from None
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path}: {WEIGHTS_FILE} cannot be read: {error}") from None
        if not isinstance(config, dict):
            raise AdapterError(f"{path}: {CONFIG_FILE} holds no JSON object")
        return cls._parse(tensors, config, name=str(path), source=where.resolve())

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], config: object, *, name: str | None = None
    ) -> "Adapter":
        """An adapter from PEFT's saved keys (``peft.get_peft_model_state_dict``) and its config
        (a PEFT config object, or the mapping of adapter_config.json).

        Raises:
            AdapterError: as in :meth:`load`.
        """
        return cls._parse(state_dict, peft_format.plain(config), name=name)

    @classmethod
    def from_model(
        cls, model: Any, adapter_name: str = "default", *, name: str | None = None
    ) -> "Adapter":
        """A copy of a live ``peft.PeftModel``'s adapter."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        copied = {key: tensor.detach().clone() for key, tensor in state.items()}
        return cls.from_state_dict(copied, model.peft_config[adapter_name], name=name)

    def to_model(self, model: Any, adapter_name: str = "default") -> None:
        """Copy the factors into a live ``peft.PeftModel`` of the same ranks and scalings.

        Raises:
            AdapterError: the model's adapter has other modules, ranks or scalings.
        """
        from peft import set_peft_model_state_dict

        there = Adapter.from_model(model, adapter_name)
        for module in sorted(self.factors.keys() ^ there.factors.keys()):
            owner = "this adapter" if module in self.factors else "the model"
            raise AdapterError(f"module {module}: only {owner} has factors for it")
        for module, mine in self.factors.items():
            theirs = there.factors[module]
            found = (list(mine.b.shape), list(mine.a.shape), mine.scaling)
            expected = (list(theirs.b.shape), list(theirs.a.shape), theirs.scaling)
            if found != expected:
                raise AdapterError(
                    f"module {module}: B, A and scaling are {found}, the model expects {expected} "
                    "(fit() writes an update in another adapter's ranks)"
                )
        set_peft_model_state_dict(model, self.state_dict(), adapter_name=adapter_name)

    @classmethod
    def _parse(
        cls,
        tensors: Mapping[str, Tensor],
        config: Config,
        *,
        name: str | None,
        source: Path | None = None,
    ) -> "Adapter":
        who = name or "adapter"
        reason = peft_format.refusal(config) or peft_format.malformed(config)
        if reason is not None:
            raise AdapterError(f"{who}: {reason}")
        pairs: dict[str, dict[str, Tensor]] = {}
        vectors: dict[str, dict[str, Tensor]] = {}
        embeddings: set[str] = set()
        extras: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            _refuse_tensor(who, key, tensor)
            if found := peft_format.LORA_KEY.match(key):
                sides = pairs.setdefault(found["module"], {})
            elif found := peft_format.EMBEDDING_KEY.match(key):
                sides = pairs.setdefault(found["module"], {})
                embeddings.add(found["module"])
            elif found := peft_format.VERA_KEY.match(key):
                sides = vectors.setdefault(found["module"], {})
            else:
                extras[key] = tensor
                continue
            if found["side"] in sides:  # with PEFT's prefix and without, or embedding and linear
                raise AdapterError(f"{who}, module {found['module']}: {key} is there twice")
            sides[found["side"]] = tensor
        if not pairs and not vectors:
            raise AdapterError(
                f"{who}: {WEIGHTS_FILE} holds no LoRA factors and no VeRA vectors under PEFT's "
                f"names, found {peft_format.listed(sorted(tensors)) or 'no tensor'}"
            )
        _refuse_non_finite(who, tensors)
        factors = {
            module: _factors(who, module, sides, config, module in embeddings)
            for module, sides in sorted(pairs.items())
        }
        vera = {}
        for module, sides in sorted(vectors.items()):
            _require_both(who, module, sides, ("vera_lambda_b", "vera_lambda_d"))
            vera[module] = (sides["b"], sides["d"])
        return cls(factors, config, extras=extras, vera=vera, name=name, source=source)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under PEFT's saved keys."""
        return {**self.extras, **self.factor_tensors()}

    def factor_tensors(self, sides: str = "both") -> dict[str, Tensor]:
        """The factors under PEFT's saved keys, or VeRA's vectors.

        Args:
            sides: "both"; "a", A alone (of VeRA lambda_d); or "b", B alone (of VeRA lambda_b).
        """
        tensors: dict[str, Tensor] = {}
        for module, (lambda_b, lambda_d) in self.vera.items():
            if sides != "a":
                tensors[f"{PREFIX}{module}.vera_lambda_b"] = lambda_b
            if sides != "b":
                tensors[f"{PREFIX}{module}.vera_lambda_d"] = lambda_d
        for module, factors in ({} if self.vera else self.factors).items():
            begin, end = ("embedding_", "") if factors.embedding else ("", ".weight")
            if sides != "b":
                tensors[f"{PREFIX}{module}.lora_{begin}A{end}"] = factors.a
            if sides != "a":
                tensors[f"{PREFIX}{module}.lora_{begin}B{end}"] = factors.b
        return tensors

    def save(self, path: str | Path) -> None:
        """Write a PEFT adapter folder in one step: a crash leaves the old folder or the new one.

        Other files of an existing adapter folder (a model card, a tokenizer) stay.

        Raises:
            FileExistsError: the path is a file, or a non-empty folder that is no adapter.
        """
        with folder.replaced(Path(path), WRITTEN) as made:
            self.write(made)

    def write(self, made: Path) -> None:
        """Write the two files into an existing folder."""
        tensors = {key: tensor.cpu().contiguous() for key, tensor in self.state_dict().items()}
        owned = {}
        seen: set[int] = set()
        for key, tensor in tensors.items():  # safetensors refuses tensors that share memory
            shared = tensor.untyped_storage().data_ptr() in seen
            seen.add(tensor.untyped_storage().data_ptr())
            owned[key] = tensor.clone() if shared else tensor
        save_file(owned, made / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (made / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        # safetensors makes files that only their owner may read.
        (made / WEIGHTS_FILE).chmod((made / CONFIG_FILE).stat().st_mode)

    def delta(self, module: str) -> Tensor:
        """The dense update ``scaling * B @ A`` of one module, [m,n] float64.

        Embeddings and Conv1D layers hold the transpose of this matrix in their weight.

        Raises:
            KeyError: there is no such module.
        """
        found = self.factors[module]
        return found.scaling * (found.b.double() @ found.a.double())

    def fit(self, template: "Adapter") -> "Adapter":
        """This update in the ranks, scalings, dtypes and config of ``template``.

        Where the template's rank is too small the product is truncated by its singular values
        (cutting columns of a stacked adapter would keep the first client only). Where it is larger
        B gets zero columns beside the template's own rows of A, so that the spare rank can learn.
        Factors that already agree stay as they are.

        Raises:
            AdapterError: the template lacks a module of this adapter, or has another shape; or one
                of the two holds VeRA vectors.
        """
        if self.vera or template.vera:
            raise AdapterError("fit() writes LoRA factors, found VeRA vectors")
        for module in self.factors:
            if module not in template.factors:
                raise AdapterError(f"module {module}: the template has no such module")
        factors = {
            module: fitted(module, self.factors.get(module), target)
            for module, target in template.factors.items()
        }
        extras = self.extras or template.extras
        return Adapter(factors, dict(template.config), extras=extras, name=self.name)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors: what sending the adapter costs."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def __repr__(self) -> str:
        ranks = sorted({factors.rank for factors in self.factors.values()})
        return f"Adapter({self.name or 'unnamed'}: {len(self.factors)} modules, ranks {ranks})"


def _refuse_tensor(who: str, key: str, tensor: Tensor) -> None:
    if not key.isprintable():
        raise AdapterError(f"{who}: the tensor name {key!r} holds unprintable characters")
    if tensor.is_floating_point() and tensor.dtype not in checks.FACTOR_DTYPES:
        raise AdapterError(
            f"{who}, tensor {key}: {tensor.dtype}, expected bfloat16, float16, float32 or float64"
        )
    if key.endswith(".lora_magnitude_vector") or ".lora_magnitude_vector." in key:
        raise AdapterError(
            f"{who}: {key}: DoRA magnitudes rescale the whole weight, which no pair of factors "
            "represents"
        )
    if key.endswith(".lora_B.bias"):
        raise AdapterError(
            f"{who}: {key}: lora_bias adds a bias that is no part of B A, which no pair of factors "
            "represents"
        )


def _refuse_non_finite(who: str, tensors: Mapping[str, Tensor]) -> None:
    """A sum is NaN or Inf whenever an entry is; only then (or on overflow) look at each entry."""
    if finite(tensor for tensor in tensors.values() if tensor.is_floating_point()):
        return
    for key, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            module = key.removeprefix(PREFIX)
            raise AdapterError(
                f"{who}, module {module}: {bad} of {tensor.numel()} entries are NaN or Inf"
            )


def _require_both(
    who: str, module: str, sides: Mapping[str, Tensor], names: tuple[str, str]
) -> None:
    if len(sides) != 2:
        have = names[0] if names[0][-1] in sides else names[1]
        other = names[1] if have == names[0] else names[0]
        raise AdapterError(f"{who}, module {module}: found {have} without {other}")


def _factors(
    who: str, module: str, sides: Mapping[str, Tensor], config: Config, embedding: bool
) -> Factors:
    _require_both(who, module, sides, ("lora_A", "lora_B"))
    a, b = sides["A"], sides["B"]
    shapes = f"B {list(b.shape)} and A {list(a.shape)}"
    if a.dim() == 4 or b.dim() == 4:
        raise AdapterError(
            f"{who}, module {module}: convolutions are not supported, found {shapes}"
        )
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*b.shape, *a.shape):
        raise AdapterError(f"{who}, module {module}: found {shapes}, expected [m,r] and [r,n]")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise AdapterError(f"{who}, module {module}: factors are {b.dtype} and {a.dtype}")
    expected = peft_format.configured_rank(config, module)
    if a.shape[0] != expected:
        raise AdapterError(
            f"{who}, module {module}: factors have rank {a.shape[0]}, its {CONFIG_FILE} says "
            f"{expected}"
        )
    made = Factors(b, a, peft_format.scaling(config, module, a.shape[0]), embedding)
    return replace(made, finite_at=made.version)
