"""Adapter: the LoRA factors of one client, or of the server, with their PEFT config.

    client = Adapter.load("clients/7")          adapter_config.json + adapter_model.safetensors
    client.factors["model.layers.0.self_attn.q_proj"].b
    client.save("copy")

Module names are the model's own, without PEFT's prefix "base_model.model.".
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora_kernels.adapters import (
    folder,
    foreign,
    keys,
    live,
    mlx,
    pairs,
    peft_format,
    refused,
)
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors, fitted
from fedlora_kernels.adapters.finite import finite
from fedlora_kernels.adapters.keys import PREFIX
from fedlora_kernels.adapters.kinds import vera
from fedlora_kernels.adapters.peft_format import (
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    Config,
)
from fedlora_kernels.ops import checks

# What this library writes into an adapter folder; the last three come from aggregate.
WRITTEN = frozenset({CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE, "report.json", "residual", "clients"})


class Adapter:
    """LoRA factors per module (or VeRA vectors), the tensors beside them, and the PEFT config.

    Attributes:
        factors: module name -> :class:`Factors`; for VeRA, the factors that its vectors and saved
            projections amount to (empty when the projections were not saved).
        vera: module name -> (lambda_b [m], lambda_d [r]); empty for LoRA.
        extras: the other tensors of the file (modules_to_save, biases), under PEFT's keys.
        config: adapter_config.json as a dict.
        name: how messages call it: the folder as typed, or None.
        quantized: of a live model's adapter, the first layer whose base weights are in few bits;
            None where none are, or where the base is not known: PEFT's files do not tell.
    """

    quantized: str | None = None

    def __init__(
        self,
        factors: Mapping[str, Factors],
        config: Config,
        *,
        extras: Mapping[str, Tensor] | None = None,
        vera: vera.Vectors | None = None,
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
        return vera.pairs(self.vera, self.extras)

    def scaled(self, factor: float) -> "Adapter":
        """The adapter whose update is ``factor`` times this one's: the same tensors under other
        scalings. The tensors beside the factors stay, and the config keeps its scaling.
        """
        factors = {
            module: replace(item, scaling=item.scaling * factor)
            for module, item in self.factors.items()
        }
        return Adapter(factors, self.config, extras=self.extras, name=self.name)

    @classmethod
    def load(cls, path: str | Path, *, pickled: bool = False, numbers: bool = True) -> "Adapter":
        """Read a PEFT adapter folder, or a folder of mlx-lm, whose conversion is exact.

        Args:
            path: the folder.
            pickled: whether an adapter_model.bin may be read where there are no safetensors, by
                ``torch.load(weights_only=True)``, which runs no code of the file.
            numbers: whether all numbers are looked at. If not, the file is mapped and hardly read;
                a rule finds NaN and Inf in the modules that it works on.

        Raises:
            AdapterError: a file is missing, truncated or not JSON, or belongs to another program; a
                factor is missing, holds NaN or Inf, or contradicts the config; PEFT features that
                no rule can represent. The message starts with the folder as given.
        """
        where, who = Path(path), str(path)
        config = _config(where, who)
        if mlx.is_config(config):
            tensors, config = mlx.converted(who, _tensors(where, who, mlx.WEIGHTS_FILE), config)
        elif pickled and not (where / WEIGHTS_FILE).is_file() and (where / PICKLE_FILE).is_file():
            tensors = _unpickled(where, who)
        else:
            tensors = _tensors(where, who, WEIGHTS_FILE)
        return cls._parse(tensors, config, name=who, source=where.resolve(), numbers=numbers)

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
        cls, model: Any, adapter_name: str | None = None, *, name: str | None = None
    ) -> "Adapter":
        """A copy of an adapter in a live model: the scalings are those that its layers apply.

        Args:
            model: a ``peft.PeftModel`` or a model with injected adapters; also inside
                torch.compile, DistributedDataParallel or FSDP, where all processes must call this.
            adapter_name: PEFT's name of the adapter; None takes "default", or the only one.
            name: how messages call the client.

        Raises:
            AdapterError: there is no such adapter; it is merged, disabled or not in memory; or as
                in :meth:`load`. The message names the client and the module.
        """
        who = name or "adapter"
        with live.opened(model, adapter_name, who) as found:
            adapter = cls.from_state_dict(found.copied(), found.config, name=name)
            adapter.quantized = found.quantized
            return adapter

    def to_model(self, model: Any, adapter_name: str | None = None) -> None:
        """Copy the adapter into a live model whose adapter has the same ranks and scalings.

        Args:
            model: as for :meth:`from_model`.
            adapter_name: as for :meth:`from_model`.

        Raises:
            AdapterError: the model's adapter has other modules, ranks, scalings or tensors; or as
                in :meth:`from_model`. The model is unchanged then.
        """
        who = self.name or "adapter"
        with live.opened(model, adapter_name, who, writing=True) as found:
            # Its shapes only: a model whose training has diverged can be written to.
            shapes = {key: torch.zeros_like(tensor) for key, tensor in found.copied().items()}
            there = Adapter.from_state_dict(shapes, found.config)
            for module in sorted(self.factors.keys() ^ there.factors.keys()):
                owner = "this adapter" if module in self.factors else "the model"
                raise AdapterError(f"{who}, module {module}: only {owner} has factors for it")
            for module, mine in self.factors.items():
                theirs = there.factors[module]
                here = (list(mine.b.shape), list(mine.a.shape), mine.scaling)
                expected = (list(theirs.b.shape), list(theirs.a.shape), theirs.scaling)
                if here != expected:
                    raise AdapterError(
                        f"{who}, module {module}: B, A and scaling are {here}, the model expects "
                        f"{expected} (fit() writes an update in another adapter's ranks)"
                    )
            tensors, theirs_all = self.state_dict(), there.state_dict()
            for key, tensor in tensors.items():
                target = theirs_all.get(key)
                if target is None or target.shape != tensor.shape:
                    what = "no such tensor" if target is None else f"shape {list(target.shape)}"
                    raise AdapterError(
                        f"{who}, tensor {key}: shape {list(tensor.shape)}, the model has {what}"
                    )
            found.write(tensors)

    @classmethod
    def _parse(
        cls,
        tensors: Mapping[str, Tensor],
        config: Config,
        *,
        name: str | None,
        source: Path | None = None,
        numbers: bool = True,
    ) -> "Adapter":
        who = name or "adapter"
        reason = refused.reason(config) or peft_format.malformed(config)
        if reason is not None:
            raise AdapterError(f"{who}: {reason}")
        config = {**config, **_patterns(config)}
        found: dict[str, dict[str, Tensor]] = {}
        vectors: dict[str, dict[str, Tensor]] = {}
        alphas: dict[str, tuple[str, Tensor]] = {}
        extras: dict[str, Tensor] = {}
        for path, tensor in tensors.items():
            _refuse_tensor(who, path, tensor)
            try:
                key = keys.plain(path)
            except ValueError as error:
                raise AdapterError(f"{who}, tensor {path}: {error}") from None
            factor = keys.factor(key)
            if tensor.numel() == 0 and (factor is None or factor.kind == "vera"):
                raise AdapterError(
                    f"{who}, tensor {key}: shape {list(tensor.shape)} holds nothing, expected a "
                    "whole tensor; gather the shards (ZeRO-3, FSDP) before saving"
                )
            if factor is None:
                if module := keys.alpha_of(key):
                    alphas[module] = key, tensor
                elif keys.stray(key):
                    known = foreign.of_keys([key])
                    raise AdapterError(
                        f"{who}, tensor {path}: found a factor under a name that PEFT does not "
                        f"load{f': {known}' if known else ''}"
                    )
                if key in extras:
                    raise AdapterError(f"{who}, tensor {path}: {key} is there twice")
                extras[key] = tensor
                continue
            sides = (vectors if factor.kind == "vera" else found).setdefault(factor.module, {})
            if factor.kind == "embedding":
                sides["embedding"] = tensor
            if factor.side in sides:  # under two prefixes, or as an embedding and as a linear layer
                raise AdapterError(f"{who}, module {factor.module}: {path} is there twice")
            sides[factor.side] = tensor
        if not found and not vectors:
            raise AdapterError(
                f"{who}: holds no LoRA factors and no VeRA vectors under PEFT's names, found "
                f"{peft_format.listed(sorted(tensors)) or 'no tensor'}"
            )
        promised = peft_format.Promised(config)
        for module, (key, alpha) in alphas.items():
            if module in found:
                _refuse_other_alpha(who, module, alpha, promised.alpha(module))
                del extras[key]
        if numbers:
            _refuse_non_finite(who, tensors)
        factors = pairs.read(who, found, config, promised, numbers)
        return cls(
            factors,
            config,
            extras=extras,
            vera=vera.read(who, vectors),
            name=name,
            source=source,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under PEFT's saved keys."""
        return {**self.extras, **self.factor_tensors()}

    def factor_tensors(self, sides: str = "both") -> dict[str, Tensor]:
        """The factors under PEFT's saved keys, or VeRA's vectors.

        Args:
            sides: "both"; "a", A alone (of VeRA lambda_d); or "b", B alone (of VeRA lambda_b).
        """
        return vera.written(self.vera, sides) if self.vera else pairs.written(self.factors, sides)

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
        text = json.dumps(dict(sorted(self.config.items())), indent=2)  # patterns have an order
        (made / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        # safetensors makes files that only their owner may read.
        (made / WEIGHTS_FILE).chmod((made / CONFIG_FILE).stat().st_mode)

    def part(self, modules: Collection[str]) -> "Adapter":
        """The adapter with the factors of these modules alone; nothing is copied."""
        factors = {name: pair for name, pair in self.factors.items() if name in modules}
        return Adapter(factors, self.config, extras=self.extras, name=self.name, source=self.source)

    def delta(self, module: str) -> Tensor:
        """The dense update ``scaling * B @ A`` of one module, [m,n] float64; of DoRA, what it adds
        to the weight before its magnitudes rescale that.

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
        Factors that already agree stay as they are, and so do DoRA's magnitudes.

        Raises:
            AdapterError: the template lacks a module of this adapter, or has another shape; one of
                the two has a lora_bias or DoRA, and the other has not; or one holds VeRA vectors.
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
    def trained(self) -> dict[str, Factors]:
        """Module -> the factors that are trained; none of VeRA, which trains vectors."""
        return {} if self.vera else self.factors

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> r, of VeRA the length of lambda_d."""
        vectors = {module: lambda_d.numel() for module, (_, lambda_d) in self.vera.items()}
        return vectors or {module: item.rank for module, item in self.factors.items()}

    def averaged(self, heads: str = "average") -> dict[str, Tensor]:
        """The tensors of which a result holds the mean as it is, under PEFT's keys: those beside
        the factors, and VeRA's vectors, where zeros stand for the lambda_b that stays.

        Args:
            heads: "local" leaves out what is beside the factors, see :meth:`Round.aggregate`.
        """
        kept = {
            key: tensor
            for key, tensor in self.extras.items()
            if heads == "average" or key in vera.PROJECTIONS
        }
        return {**kept, **vera.written(vera.shared(self.vera), "both")}

    @classmethod
    def of_averaged(
        cls, factors: Mapping[str, Factors], config: Config, averaged: Mapping[str, Tensor]
    ) -> "Adapter":
        """The adapter that has these factors and these tensors of :meth:`averaged`."""
        vectors, extras = vera.parted(averaged)
        return cls(factors, config, extras=extras, vera=vectors)

    def named(self, name: str | None) -> "Adapter":
        """The same adapter under another name, and without a source."""
        same = Adapter(self.trained, self.config, extras=self.extras, vera=self.vera, name=name)
        same.quantized = self.quantized
        return same

    @property
    def direction(self) -> "Adapter":
        """The adapter without DoRA's magnitudes."""
        factors = {name: replace(item, magnitude=None) for name, item in self.factors.items()}
        config = {**self.config, "use_dora": False}
        return Adapter(factors, config, extras=self.extras, name=self.name)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors: what sending the adapter costs."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def __repr__(self) -> str:
        ranks = sorted({factors.rank for factors in self.factors.values()})
        return f"Adapter({self.name or 'unnamed'}: {len(self.factors)} modules, ranks {ranks})"


def _config(where: Path, who: str) -> Config:
    """adapter_config.json of a folder."""
    file = where / CONFIG_FILE
    if not file.is_file():
        raise AdapterError(f"{who} {foreign.folder(where)}")
    if foreign.pointer(file):
        raise AdapterError(f"{who}: {CONFIG_FILE} {foreign.unreadable(file)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # a number too long, nesting too deep
        raise AdapterError(f"{who}: {CONFIG_FILE} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{who}: {CONFIG_FILE} holds no JSON object")
    return config


def _tensors(where: Path, who: str, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    file = where / name
    if not file.is_file():
        raise AdapterError(f"{who} {foreign.folder(where)}")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        why = foreign.unreadable(file) or f"cannot be read: {error}"
        raise AdapterError(f"{who}: {name} {why}") from None
    return tensors


def _unpickled(where: Path, who: str) -> dict[str, Tensor]:
    """The tensors of adapter_model.bin; no code of the file runs."""
    file = where / PICKLE_FILE
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes the reader raise
        why = "holds more than tensors, or is damaged; save the adapter again as safetensors"
        if foreign.pointer(file):
            why = str(foreign.unreadable(file))
        raise AdapterError(f"{who}: {PICKLE_FILE} {why}") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise AdapterError(f"{who}: {PICKLE_FILE} holds no mapping of names to tensors")
    return {str(key): tensor for key, tensor in found.items()}


def _patterns(config: Config) -> Config:
    """rank_pattern and alpha_pattern without what wrappers added to their keys."""
    fields = ("rank_pattern", "alpha_pattern")
    return {
        field: {keys.pattern(key): value for key, value in config[field].items()}
        for field in fields
        if config.get(field)
    }


def _refuse_other_alpha(who: str, module: str, alpha: Tensor, expected: float) -> None:
    """kohya keeps each module's alpha in the file; PEFT keeps it in the config."""
    if alpha.numel() != 1 or abs(float(alpha) - expected) > 1e-6 * abs(expected):
        found = float(alpha) if alpha.numel() == 1 else list(alpha.shape)
        raise AdapterError(
            f"{who}, module {module}: the file has the alpha {found}, {CONFIG_FILE} says "
            f"{expected:g}; write lora_alpha or alpha_pattern to agree with the file"
        )


def _refuse_tensor(who: str, key: str, tensor: Tensor) -> None:
    if not key.isprintable():
        raise AdapterError(f"{who}: the tensor name {key!r} holds unprintable characters")
    if tensor.is_floating_point() and tensor.dtype not in checks.FACTOR_DTYPES:
        raise AdapterError(
            f"{who}, tensor {key}: {tensor.dtype}, expected bfloat16, float16, float32 or float64"
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
